"""How an engine is started in a pod, and where in the pod its files are: the one place that knows the engine's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.export.cluster import Store
from planner.export.host_memory import HostTiers

PORT: Final = 8080
ALLOCATION_FILE: Final = "/etc/diffplan/allocation/allocation.json"
CATALOGUE_FILE: Final = "/etc/diffplan/catalogue/catalogue.json"
CATALOGUE_PARTS: Final = "/etc/diffplan/catalogue-parts"
TOKEN_SECRET_FOLDER: Final = "/etc/diffplan/token-secret"  # noqa: S105 - a path
TOKEN_FOLDER: Final = "/run/diffplan"  # noqa: S105 - a path
TOKEN_KEY: Final = "tokens.json"  # noqa: S105 - a key of a Secret
STORE_TOKEN_FOLDER: Final = "/etc/diffplan/store-token"  # noqa: S105 - a path
STORE_TOKEN_KEY: Final = "token"  # noqa: S105 - a key of a Secret
STORE_FOLDER: Final = "/var/lib/diffplan/store"
HOST_TIER_FOLDER: Final = "/dev/shm"  # noqa: S108 - of the pod alone; the engine makes a private folder in it
RUN_FOLDER: Final = "/var/lib/diffplan/run"
READY_PATH: Final = "/health/ready"
CHECKPOINTS_ON_DEVICE: Final = 2
"""The engine's own limit (``--option n_checkpoints_max``), whatever the device could hold."""
LIVE_PATH: Final = "/health/live"
METRICS_PATH: Final = "/metrics"


def engine_command() -> list[str]:
    """The program."""
    return ["diffplan", "engine", "serve"]


def engine_arguments(store: Store, n_gpus: int, drain_s: int, tiers: HostTiers, warm: Sequence[str] = ()) -> list[str]:
    """Its arguments for a pod with ``n_gpus`` GPUs; SIGTERM waits ``drain_s`` for admitted requests.

    Args:
        tiers: host memory of each worker process for checked models.
        warm: shapes that workers capture before the pod is ready.
    """
    options = ["--warm", ",".join(warm)] if warm else []
    options += ["--option", f"host_checkpoint_gib={tiers.checkpoint_gib:.10g}"]
    options += ["--option", f"host_controlnet_gib={tiers.controlnet_gib:.10g}"]
    if store.token_secret is not None:
        options += ["--option", f"loader_token_file={STORE_TOKEN_FOLDER}/{STORE_TOKEN_KEY}"]
        options += ["--option", "loader_token_over_http=true"] if store.is_token_sent_plainly else []
    return [
        "--allocation",
        ALLOCATION_FILE,
        "--catalogue",
        CATALOGUE_FILE,
        "--store",
        store.url if store.url is not None else STORE_FOLDER,
        "--model",
        "sdxl",
        "--devices",
        ",".join(f"cuda:{index}" for index in range(n_gpus)),
        "--listen",
        f"0.0.0.0:{PORT}",
        "--tenants",
        f"{TOKEN_FOLDER}/{TOKEN_KEY}",
        "--run-dir",
        RUN_FOLDER,
        "--drain-seconds",
        str(drain_s),
        *options,
    ]
