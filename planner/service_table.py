"""The tables of service times that the simulator reads: of requests, and of forwards that several requests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from calibrate.profile import Grade
from engine.allocation import LinkKind, Topology
from planner.workload import Bools, Floats, Ints, Workload


@dataclass(frozen=True, slots=True, eq=False)
class BatchTimes:
    """What a forward takes for more samples than one request has: requests that run together share every forward."""

    shape: Ints
    """Of each request: which row of the tables below (its resolution, and whether its step runs unfused)."""
    plain_step_s: Floats
    """[shapes, samples]: one UNet forward of that many samples; NaN below the smallest request's."""
    controlnet_forward_s: Floats
    """[shapes, samples]: likewise one ControlNet in process; 0 where nobody uses one."""
    vae_s: Floats
    """[shapes, images]: decoding that many images, and the overhead of one request."""
    n_forwards: Floats
    """Of each request: ControlNet forwards in process."""

    @property
    def samples_max(self) -> int:
        """Largest forward batch in the tables."""
        return int(self.plain_step_s.shape[1]) - 1


@dataclass(frozen=True, slots=True, eq=False)
class ServiceTable:
    """Seconds of every stage for n requests on one topology. Per-request columns have length n.

    What depends on the state of a replica is given per model: the simulator adds it where it occurs.
    """

    topology: Topology
    text_s: Floats
    denoise_alone_s: Floats
    """All steps with nobody else on its ControlNet workers and each of its ControlNets on a worker of its own."""
    decode_s: Floats
    lora_attach_s: Floats
    """Attaching all LoRAs of the request."""
    lora_detach_s: Floats
    lora_hidden_s: Floats
    """How much of its LoRA fetches denoising hides."""
    noise_ratio: Floats
    """This request's computing over the median's; already in the text, denoise and decode columns."""
    # one forward of a step, without noise; used for requests with remote ControlNets
    plain_step_s: Floats
    encoder_s: Floats
    decoder_s: Floats
    """Decoder and the cost of joining."""
    controlnet_forward_s: Floats
    transfer_s: Floats
    is_remote: Bools
    """Whether the request denoises with ControlNet workers."""
    # per model code of the workload's name tables
    checkpoint_load_s: Floats
    checkpoint_fetch_s: Floats
    controlnet_load_s: Floats
    controlnet_fetch_s: Floats
    lora_fetch_s: Floats
    grades: Mapping[str, Grade]
    """Law to the worst grade of any prediction made with it."""

    def __len__(self) -> int:
        return len(self.text_s)

    @property
    def alone_s(self) -> Floats:
        """Take-up to image of each request on an idle system with everything resident: the latency floor."""
        lora_s = self.lora_attach_s + self.lora_detach_s
        return self.text_s + self.denoise_alone_s + self.decode_s + lora_s

    @property
    def controlnet_work_s(self) -> Floats:
        """Seconds of ControlNet workers that each request takes, 0 where it uses none: for screens before simulation."""
        return self._controlnet_work_s

    _controlnet_work_s: Floats = field(kw_only=True, repr=False)
    batch: BatchTimes | None = field(default=None, kw_only=True, repr=False)
    """Only where the allocation batches."""
    transfers: Mapping[tuple[LinkKind, float], Floats] = field(default_factory=dict, kw_only=True, repr=False)
    """Link kind and compression ratio to the seconds of one step's residuals of each request; only where links differ."""
    residual_bytes: Floats | None = field(default=None, kw_only=True, repr=False)
    """Of one step and one worker, before compression; likewise."""

    def slowed(self, ratio: float) -> ServiceTable:
        """The table of a worker that computes ``1 / ratio`` as fast; loads, fetches and transfers stay as they are."""
        batch = self.batch
        if batch is not None:
            batch = replace(
                batch, plain_step_s=batch.plain_step_s * ratio, vae_s=batch.vae_s * ratio,
                controlnet_forward_s=batch.controlnet_forward_s * ratio,
            )  # fmt: skip
        return replace(
            self, batch=batch,
            **{
                name: getattr(self, name) * ratio
                for name in (
                    "text_s", "denoise_alone_s", "decode_s", "lora_attach_s", "lora_detach_s", "lora_hidden_s", "plain_step_s",
                    "encoder_s", "decoder_s", "controlnet_forward_s", "_controlnet_work_s",
                )
            },
        )  # fmt: skip

    @classmethod
    def from_service_s(cls, workload: Workload, service_s: Floats, *, topology: Topology = "colocated") -> ServiceTable:
        """A table in which request i takes ``service_s[i]`` and nothing else costs anything (theory tests, M/G/c)."""
        n = len(workload)
        zero = np.zeros(n)

        def nothing(names: Sequence[str]) -> Floats:
            return np.zeros(len(names))

        return cls(
            topology=topology,
            text_s=zero,
            denoise_alone_s=np.broadcast_to(np.asarray(service_s, dtype=np.float64), (n,)),
            decode_s=zero,
            lora_attach_s=zero,
            lora_detach_s=zero,
            lora_hidden_s=zero,
            noise_ratio=np.ones(n),
            plain_step_s=zero,
            encoder_s=zero,
            decoder_s=zero,
            controlnet_forward_s=zero,
            transfer_s=zero,
            is_remote=np.zeros(n, dtype=np.bool_),
            checkpoint_load_s=nothing(workload.checkpoint_names),
            checkpoint_fetch_s=nothing(workload.checkpoint_names),
            controlnet_load_s=nothing(workload.controlnet_names),
            controlnet_fetch_s=nothing(workload.controlnet_names),
            lora_fetch_s=nothing(workload.lora_names),
            grades={},
            _controlnet_work_s=zero,
        )
