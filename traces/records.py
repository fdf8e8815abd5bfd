"""The recorded data types: what was asked (Request) and what happened (RequestRecord, WorkerInterval).

The engine and the simulator write the same RequestRecord and WorkerInterval columns, so comparing them is a join on
``request_id``; every statistic of the project derives from these tables. Each column is declared once, here, with its
unit, default and allowed range; readers, writers, documentation and checks all read this declaration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

Kind = Literal["str", "int", "float", "list[str]", "list[float]"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a recorded table."""

    name: str
    kind: Kind
    unit: str
    description: str
    default: Any = None
    """Value where an import has none; stated and counted there. Only used if ``is_required`` is False."""
    is_required: bool = False
    is_nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None


REQUEST_COLUMNS: Final[tuple[Column, ...]] = (
    Column("request_id", "str", "", "Unique name of the request.", is_required=True),
    Column("arrival_s", "float", "s", "Arrival, in seconds after the trace's start.", is_required=True, minimum=0.0),
    Column("base_model_id", "str", "", "Checkpoint that draws the image.", default="default"),
    Column("n_steps", "int", "steps", "Denoising steps.", default=50, minimum=1, maximum=1000),
    Column("width_px", "int", "px", "Image width.", default=1024, minimum=64, maximum=8192),
    Column("height_px", "int", "px", "Image height.", default=1024, minimum=64, maximum=8192),
    Column("n_images", "int", "images", "Images drawn together.", default=1, minimum=1, maximum=64),
    Column("guidance_scale", "float", "", "Classifier-free guidance; 1 or less switches it off.", default=7.5, minimum=0.0,
           maximum=100.0),
    Column("controlnet_ids", "list[str]", "", "ControlNets that steer the image, in order.", default=()),
    Column("controlnet_scales", "list[float]", "", "Weight of each ControlNet; 1 where not given.", default=()),
    Column("control_start", "list[float]", "ratio", "Share of the steps after which each ControlNet starts.", default=(),
           minimum=0.0, maximum=1.0),
    Column("control_end", "list[float]", "ratio", "Share of the steps after which each ControlNet ends.", default=(),
           minimum=0.0, maximum=1.0),
    Column("lora_ids", "list[str]", "", "LoRAs that change the style, in order.", default=()),
    Column("lora_scales", "list[float]", "", "Weight of each LoRA; 1 where not given.", default=()),
    Column("tenant_id", "str", "", "Who asked.", default=""),
    Column("priority", "int", "", "Larger is more urgent.", default=0, minimum=-100, maximum=100),
    Column("deadline_s", "float", "s", "Seconds after arrival at which the result is worthless; null for none.",
           is_nullable=True, minimum=0.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """One image job. Columns, units and ranges: ``REQUEST_COLUMNS``."""

    request_id: str
    arrival_s: float
    base_model_id: str = "default"
    n_steps: int = 50
    width_px: int = 1024
    height_px: int = 1024
    n_images: int = 1
    guidance_scale: float = 7.5
    controlnet_ids: tuple[str, ...] = ()
    controlnet_scales: tuple[float, ...] = ()
    control_start: tuple[float, ...] = ()
    control_end: tuple[float, ...] = ()
    lora_ids: tuple[str, ...] = ()
    lora_scales: tuple[float, ...] = ()
    tenant_id: str = ""
    priority: int = 0
    deadline_s: float | None = None


RequestStatus = Literal["done", "rejected", "expired", "failed"]
REQUEST_STATUSES: Final[tuple[RequestStatus, ...]] = ("done", "rejected", "expired", "failed")

REQUEST_RECORD_COLUMNS: Final[tuple[Column, ...]] = (
    Column("request_id", "str", "", "The request.", is_required=True),
    Column("arrival_s", "float", "s", "Arrival.", is_required=True, minimum=0.0),
    Column("status", "str", "", "done, rejected, expired or failed: an accepted request ends exactly once.", is_required=True),
    Column("reason", "str", "", "Why it was not done; empty if it was.", default=""),
    Column("topology", "str", "", "Topology that served it.", default=""),
    Column("worker_id", "str", "", "Base worker that served it; empty if none did.", default=""),
    Column("base_model_id", "str", "", "Checkpoint.", default="default"),
    Column("tenant_id", "str", "", "Who asked.", default=""),
    Column("n_images", "int", "images", "Images drawn together.", default=1),
    Column("n_steps", "int", "steps", "Denoising steps.", default=50),
    Column("n_controlnets", "int", "", "ControlNets of the request.", default=0),
    Column("n_loras", "int", "", "LoRAs of the request.", default=0),
    Column("start_s", "float", "s", "A base worker took it up.", is_nullable=True),
    Column("end_s", "float", "s", "It ended, whichever way.", is_required=True),
    Column("queue_wait_s", "float", "s", "Arrival to take-up.", is_nullable=True),
    Column("switch_s", "float", "s", "Making its checkpoint the active one.", default=0.0),
    Column("controlnet_load_s", "float", "s", "Loading ControlNets that were not resident.", default=0.0),
    Column("lora_wait_s", "float", "s", "Time LoRA fetches and patches added.", default=0.0),
    Column("text_s", "float", "s", "Text encoding.", default=0.0),
    Column("denoise_s", "float", "s", "All denoising steps.", default=0.0),
    Column("denoise_alone_s", "float", "s", "The same steps had nobody else shared its ControlNet workers; null if not known, as in "
           "an engine's log of a request that had company there.", is_nullable=True),
    Column("decode_s", "float", "s", "VAE decode and everything after it.", default=0.0),
    Column("n_lora_misses", "int", "", "LoRAs that had to be fetched into the host tier.", default=0),
    Column("n_controlnet_misses", "int", "", "ControlNets that had to be loaded.", default=0),
    Column("is_switch", "int", "", "1 if the checkpoint had to be loaded or made active from another tier.", default=0),
    Column("latency_s", "float", "s", "Arrival to image; null if there is none.", is_nullable=True),
)  # fmt: skip

WorkerRole = Literal["base", "controlnet", "loader"]
WorkerState = Literal["busy", "loading", "idle", "down"]

WORKER_INTERVAL_COLUMNS: Final[tuple[Column, ...]] = (
    Column("worker_id", "str", "", "The worker.", is_required=True),
    Column("pool", "str", "", "Pool it belongs to.", is_required=True),
    Column("role", "str", "", "base, controlnet or loader.", is_required=True),
    Column("n_gpus", "int", "GPUs", "GPUs it occupies.", default=1),
    Column("gpu_kind", "str", "", "Kind of those GPUs.", default=""),
    Column("state", "str", "", "busy, loading, idle or down.", is_required=True),
    Column("start_s", "float", "s", "Begin of the span.", is_required=True),
    Column("end_s", "float", "s", "End of the span.", is_required=True),
    Column("busy_s", "float", "s", "Work done in the span: for a shared ControlNet worker the sum of its forwards.",
           default=0.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorkerInterval:
    """One span in which a worker's state did not change."""

    worker_id: str
    pool: str
    role: WorkerRole
    n_gpus: int
    gpu_kind: str
    state: WorkerState
    start_s: float
    end_s: float
    busy_s: float = 0.0


def column_names(columns: tuple[Column, ...]) -> list[str]:
    """Names of the columns, in their recorded order."""
    return [column.name for column in columns]
