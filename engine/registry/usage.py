"""What each add-on cost where it was used, from what an engine recorded: a replay's folder, or a request log of ``engine serve``.

Seconds of GPU time that one use adds, by two parts that are told apart:

* waiting: ``lora_wait_s`` and ``controlnet_load_s`` of the request, shared evenly by its LoRAs and its ControlNets;
* steps: ``denoise_s`` minus the median ``denoise_s`` of at least ``PEERS_MIN`` requests without add-ons that asked for the same
  (checkpoint, images, steps, pixels, guidance on or off) and ran in the same topology, shared evenly by the request's ControlNets, or by its LoRAs
  where it has no ControlNet. Without such peers it is not known, and is not guessed.

Not modelled: time on ControlNet workers and loaders (records do not say whose), the share of a batch, queueing that a use causes others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Final

from engine.catalogue import NAME
from traces.problems import one_problem

PEERS_MIN: Final = 3
LINE_BYTES_MAX: Final = 2**20
LOG_BYTES_MAX: Final = 4 * 2**30
ADD_ONS_PER_REQUEST_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """What is needed of one request that was done."""

    controlnet_ids: tuple[str, ...]
    lora_ids: tuple[str, ...]
    like: tuple[object, ...]
    """Requests with the same value differ in their add-ons only."""
    controlnet_load_s: float
    lora_wait_s: float
    denoise_s: float
    n_gpus: int = 1
    """Of the base worker that ran it."""


@dataclass(frozen=True, slots=True)
class UseCost:
    """Measured cost of one add-on, as means over its uses."""

    n_uses: int
    wait_s: float
    steps_s: float | None
    """None: no use had peers to compare with."""
    n_compared: int
    """Uses that had peers."""
    gpu_s: float | None
    """GPU seconds a use adds: both parts, times the GPUs of the base worker, over the uses that had peers."""
    gpu_s_standard_error: float | None
    """Of ``gpu_s``, from the scatter of its uses; that of the peers' median is not in it. None for fewer than two."""

    def cost_usd(self, price_usd_per_gpu_hour: float) -> float | None:
        """Dollars a use adds; None where its GPU seconds are not known."""
        return None if self.gpu_s is None else self.gpu_s * price_usd_per_gpu_hour / 3600.0


def read_served(place: Path) -> list[ServedRequest]:
    """Requests that were done, of a replay's folder (``trace.parquet``, ``requests.parquet``, ``workers.parquet``) or a request log.

    Raises:
        InputError: neither, too large, damaged, or a value is out of range.
    """
    if place.is_dir():
        return list(_of_replay(place))
    return list(_of_request_log(place))


def cost_per_use(served: Iterable[ServedRequest]) -> dict[str, UseCost]:
    """Cost of one use by add-on id."""
    served = list(served)
    plain: dict[tuple[object, ...], list[float]] = {}
    for request in served:
        if not request.controlnet_ids and not request.lora_ids:
            plain.setdefault(request.like, []).append(request.denoise_s)
    alone_s = {like: median(values) for like, values in plain.items() if len(values) >= PEERS_MIN}
    shares: dict[str, list[_Share]] = {}
    for request in served:
        for add_on_id, share in _shares(request, alone_s.get(request.like)):
            shares.setdefault(add_on_id, []).append(share)
    return {add_on_id: _mean(shares[add_on_id]) for add_on_id in sorted(shares)}


@dataclass(frozen=True, slots=True)
class _Share:
    wait_s: float
    steps_s: float | None
    n_gpus: int


def _shares(request: ServedRequest, alone_s: float | None) -> Iterator[tuple[str, _Share]]:
    added_s = None if alone_s is None else request.denoise_s - alone_s
    nets, loras = request.controlnet_ids, request.lora_ids
    for add_on_id in nets:
        steps_s = None if added_s is None else added_s / len(nets)
        yield add_on_id, _Share(request.controlnet_load_s / len(nets), steps_s, request.n_gpus)
    for add_on_id in loras:
        # beside ControlNets a LoRA's part of the steps cannot be told from theirs
        steps_s = None if added_s is None else 0.0 if nets else added_s / len(loras)
        yield add_on_id, _Share(request.lora_wait_s / len(loras), steps_s, request.n_gpus)


def _mean(shares: list[_Share]) -> UseCost:
    compared = [(share, share.steps_s) for share in shares if share.steps_s is not None]
    gpu_s = [(share.wait_s + steps_s) * share.n_gpus for share, steps_s in compared]
    return UseCost(
        n_uses=len(shares),
        wait_s=fmean(share.wait_s for share in shares),
        steps_s=fmean(steps_s for _, steps_s in compared) if compared else None,
        n_compared=len(compared),
        gpu_s=fmean(gpu_s) if gpu_s else None,
        gpu_s_standard_error=stdev(gpu_s) / math.sqrt(len(gpu_s)) if len(gpu_s) > 1 else None,
    )


def _of_replay(folder: Path) -> Iterator[ServedRequest]:
    from traces.reader import read_table, read_trace
    from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS

    asked = read_trace(folder / "trace.parquet").requests.set_index("request_id")
    records = read_table(folder / "requests.parquet", REQUEST_RECORD_COLUMNS)
    workers = read_table(folder / "workers.parquet", WORKER_INTERVAL_COLUMNS)
    n_gpus = dict(zip(workers["worker_id"], workers["n_gpus"].astype(int), strict=True))
    done = records[records["status"] == "done"]
    unknown = sorted(set(done["request_id"]) - set(asked.index))
    if unknown:
        raise one_problem(
            str(folder / "requests.parquet"), f"has {len(unknown)} requests that trace.parquet lacks, such as {unknown[0]!r}",
            "both of one replay", "Name the folder that `diffplan engine replay --out` wrote.",
        )  # fmt: skip
    names = ("controlnet_ids", "lora_ids", "width_px", "height_px", "guidance_scale")
    columns = asked.loc[done["request_id"], list(names)]
    for record, (nets, loras, width, height, guidance) in zip(
        done.to_dict("records"), columns.itertuples(index=False, name=None), strict=True
    ):
        yield ServedRequest(
            controlnet_ids=tuple(nets), lora_ids=tuple(loras),
            like=(
                record["base_model_id"], record["topology"], int(record["n_images"]), int(record["n_steps"]), int(width),
                int(height), float(guidance) > 1,
            ),
            controlnet_load_s=float(record["controlnet_load_s"]), lora_wait_s=float(record["lora_wait_s"]),
            denoise_s=float(record["denoise_s"]), n_gpus=n_gpus.get(record["worker_id"], 1),
        )  # fmt: skip


def _of_request_log(path: Path) -> Iterator[ServedRequest]:
    try:
        if path.stat().st_size > LOG_BYTES_MAX:
            raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {LOG_BYTES_MAX}", "Split it.")
        file = path.open("rb")
    except OSError as error:
        raise one_problem(
            str(path), f"cannot be read: {error.strerror}", "a replay's folder or a request log", "Check the path."
        ) from None
    with file:
        number = 0
        while data := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if not data.endswith(b"\n") and len(data) <= LINE_BYTES_MAX:
                return  # the server writes the last line now, or was killed in it
            request = _of_line(data, f"{path} line {number}")
            if request is not None:
                yield request


def _of_line(data: bytes, where: str) -> ServedRequest | None:
    """None for a request that was not done."""
    try:
        row = json.loads(data) if len(data) <= LINE_BYTES_MAX else None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or "http_status" not in row:
        raise one_problem(
            where, "is no line of a request log", "what `diffplan engine serve --log` writes", "Check it."
        )
    if row["http_status"] != 200 or not isinstance(row.get("stages"), dict):
        return None
    job, stages = row.get("job"), row["stages"]
    if not isinstance(job, dict):
        raise one_problem(where, "has stages but no job", "what `diffplan engine serve --log` writes", "Check it.")
    engine = row.get("engine", "")  # topologies do not change within an engine's pool; the log does not name them
    return ServedRequest(
        controlnet_ids=_ids(job, "controlnet_ids", where), lora_ids=_ids(job, "lora_ids", where),
        like=(
            str(job.get("base_model_id")), str(engine), *(
                _number(job, name, where) for name in ("n_images", "n_steps", "width_px", "height_px")
            ), _number(job, "guidance_scale", where) > 1,
        ),
        controlnet_load_s=_number(stages, "controlnet_load_s", where), lora_wait_s=_number(stages, "lora_wait_s", where),
        denoise_s=_number(stages, "denoise_s", where),
    )  # fmt: skip


def _number(table: Mapping[str, Any], name: str, where: str) -> float:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < 1e9) or math.isnan(value):
        raise one_problem(where, f"has {name} {str(value)[:40]}", "a number from 0 to 10^9", "Check the log.")
    return float(value)


def _ids(table: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    ids = table.get(name)
    is_right = isinstance(ids, list) and len(ids) <= ADD_ONS_PER_REQUEST_MAX
    if not is_right or not all(isinstance(item, str) and NAME.fullmatch(item) for item in ids or []):
        raise one_problem(where, f"has {name} {ascii(ids)[:80]}", "a list of ids of the catalogue", "Check the log.")
    return tuple(ids or ())
