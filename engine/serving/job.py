"""A job as it travels from the front door to a worker, and how it ends. Plain values and bytes: nothing is pickled, no path is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from traces.problems import one_problem
from traces.records import RequestStatus

ID_CHARACTERS_MAX: Final = 200

OutcomeCode = Literal[
    "", "queue_full", "tenant_limit", "deadline_unreachable", "not_admitting", "unservable", "lora_refused",
    "deadline", "cancelled", "worker_lost", "job_error",
]  # fmt: skip
"""Why a job was not done, for machines: what a status code or a metric's label is chosen by. Empty if it was done."""


@dataclass(frozen=True, slots=True)
class ControlUse:
    """One use of a ControlNet."""

    controlnet_id: str
    scale: float = 1.0
    start: float = 0.0
    """Share of the steps before which it is not used."""
    end: float = 1.0
    """Share of the steps after which it is not used."""
    image: int | None = None
    """Index of its encoded image in :attr:`Job.blobs`. None: an image drawn from the seed (replays of traces have none)."""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One use of a LoRA."""

    lora_id: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """One image request, checked by the front door: ids are ids of the catalogue (sha256 or name), resolved to one version."""

    request_id: str
    base_model_id: str = "default"
    prompt: str = ""
    negative_prompt: str | None = None
    n_images: int = 1
    n_steps: int = 30
    width_px: int = 1024
    height_px: int = 1024
    guidance_scale: float = 5.0
    controls: tuple[ControlUse, ...] = ()
    loras: tuple[LoraUse, ...] = ()
    seed: int = 0
    tenant_id: str = ""
    priority: int = 0
    """Larger is more urgent."""
    deadline_s: float | None = None
    """Seconds after arrival at which the result is worthless. None: the engine's own limit for a request."""
    variant: str = ""
    """Name of the side of a traffic split that it belongs to."""
    wants_images: bool = True
    """False: the worker does not encode PNGs (replays)."""
    blobs: tuple[bytes, ...] = ()
    """Encoded control images (PNG, JPEG or WebP), checked for size before they came here; decoded in the worker."""

    @property
    def uses_cfg(self) -> bool:
        """Whether classifier-free guidance doubles the forward batch."""
        return self.guidance_scale > 1.0

    @property
    def forward_batch(self) -> int:
        """Samples of one forward of the UNet."""
        return self.n_images * (2 if self.uses_cfg else 1)

    def to_plain(self) -> dict[str, Any]:
        """JSON values, without the blobs: they travel beside the message."""
        plain = dataclasses.asdict(dataclasses.replace(self, blobs=()))
        del plain["blobs"]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], blobs: tuple[bytes, ...] = ()) -> Job:
        """The inverse of :meth:`to_plain`, for messages that this code wrote.

        Raises:
            InputError: a field is unknown or missing.
        """
        try:
            values = dict(plain)
            values["controls"] = tuple(ControlUse(**use) for use in values.get("controls", ()))
            values["loras"] = tuple(LoraUse(**use) for use in values.get("loras", ()))
            return cls(**values, blobs=blobs)
        except TypeError as error:
            raise one_problem("job", f"got {error}", "the fields of Job", "Use one version on both sides.") from None


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Where a job's time went; the stage columns of RequestRecord. Seconds on the worker's clock, so only lengths."""

    switch_s: float = 0.0
    controlnet_load_s: float = 0.0
    lora_wait_s: float = 0.0
    """What LoRA fetches and patches added: waiting for a fetch, attaching, restoring."""
    text_s: float = 0.0
    denoise_s: float = 0.0
    """All denoising steps, without what is counted under ``lora_wait_s``."""
    decode_s: float = 0.0
    """VAE decode and everything after it: encoding PNGs, sending."""


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """What a base worker reports of a job that it finished."""

    stages: StageSeconds
    lora_patch_step: int | None = None
    """Before which step the LoRAs were patched in; None without LoRAs, 0 for synchronous loading."""
    is_switch: bool = False
    n_controlnet_misses: int = 0
    images: tuple[bytes, ...] = ()
    """PNG files, one an image; () if the job did not want them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended; every accepted job has exactly one."""

    request_id: str
    status: RequestStatus
    reason: str = ""
    """Why it was not done: a sentence, empty if it was."""
    retry_after_s: float | None = None
    """With ``rejected``: when it is worth trying again; None if it never is."""
    worker_id: str = ""
    n_attempts: int = 0
    arrival_s: float = 0.0
    """Engine clock: seconds since the engine's start."""
    start_s: float | None = None
    """When the base worker that ended it took it up."""
    end_s: float = 0.0
    n_lora_misses: int = 0
    result: WorkerResult | None = None
    """Only with ``done``."""
    code: OutcomeCode = ""
    topology: str = ""
    """Of the base worker named in ``worker_id``."""
    had_company: bool = False
    """Another batch used one of its ControlNet workers while it ran, so that it may have waited for them."""
