"""What a row of RequestRecord or WorkerInterval says of a job or a worker of the engine. Columns: ``traces.records``."""

from __future__ import annotations

from typing import Any

from engine.allocation import Pool
from engine.serving.job import Job, Outcome, StageSeconds
from traces.records import WorkerState


def request_row(job: Job, outcome: Outcome, origin_s: float = 0.0) -> dict[str, Any]:
    """One row of RequestRecord, JSON values; times count from ``origin_s`` of the engine's clock.

    Stages of a done request fill start to end, as in a simulated log: what the worker did not count (messages between the
    processes, a retry is before the start) is part of ``decode_s`` and also stands in ``overhead_s``. ``denoise_alone_s`` is null
    where another request used one of the same ControlNet workers meanwhile: how long this one would have taken alone was not
    measured then. Further columns: ``variant``, ``n_attempts``, ``lora_patch_step``, ``code``.
    """
    is_done = outcome.status == "done"
    start_s = None if outcome.start_s is None else outcome.start_s - origin_s
    arrival_s, end_s = outcome.arrival_s - origin_s, outcome.end_s - origin_s
    result = outcome.result
    stages = result.stages if is_done and result is not None else StageSeconds()
    service_s = 0.0 if start_s is None or not is_done else end_s - start_s
    stages, overhead_s = _filled(stages, service_s)
    return {
        "request_id": job.request_id,
        "arrival_s": arrival_s,
        "status": outcome.status,
        "reason": outcome.reason,
        "topology": outcome.topology,
        "worker_id": outcome.worker_id,
        "base_model_id": job.base_model_id,
        "tenant_id": job.tenant_id,
        "n_images": job.n_images,
        "n_steps": job.n_steps,
        "n_controlnets": len(job.controls),
        "n_loras": len(job.loras),
        "start_s": start_s,
        "end_s": end_s,
        "queue_wait_s": None if start_s is None else start_s - arrival_s,
        "switch_s": stages.switch_s,
        "controlnet_load_s": stages.controlnet_load_s,
        "lora_wait_s": stages.lora_wait_s,
        "text_s": stages.text_s,
        "denoise_s": stages.denoise_s,
        "denoise_alone_s": None if outcome.had_company else stages.denoise_s,
        "decode_s": stages.decode_s,
        "n_lora_misses": outcome.n_lora_misses,
        "n_controlnet_misses": result.n_controlnet_misses if result is not None else 0,
        "is_switch": int(result.is_switch) if result is not None else 0,
        "latency_s": end_s - arrival_s if is_done else None,
        "variant": job.variant,
        "n_attempts": outcome.n_attempts,
        "lora_patch_step": result.lora_patch_step if result is not None else None,
        "code": outcome.code,
        "overhead_s": overhead_s,
    }


def interval_row(
    worker_id: str, pool: Pool, state: WorkerState, start_s: float, end_s: float, busy_s: float = 0.0
) -> dict[str, Any]:
    """One row of WorkerInterval, JSON values."""
    return {
        "worker_id": worker_id,
        "pool": pool.name,
        "role": pool.role,
        "n_gpus": pool.n_gpus_per_replica,
        "gpu_kind": pool.gpu_kind,
        "state": state,
        "start_s": start_s,
        "end_s": end_s,
        "busy_s": busy_s,
    }


def _filled(stages: StageSeconds, service_s: float) -> tuple[StageSeconds, float]:
    """Stages that sum to ``service_s``, and what was added.

    Two clocks measured: should the worker's sum be the longer one (by microseconds), all stages shrink in proportion.
    """
    total_s = (
        stages.switch_s
        + stages.controlnet_load_s
        + stages.lora_wait_s
        + stages.text_s
        + stages.denoise_s
        + stages.decode_s
    )
    if total_s > service_s:
        ratio = service_s / total_s
        return (
            StageSeconds(
                switch_s=stages.switch_s * ratio,
                controlnet_load_s=stages.controlnet_load_s * ratio,
                lora_wait_s=stages.lora_wait_s * ratio,
                text_s=stages.text_s * ratio,
                denoise_s=stages.denoise_s * ratio,
                decode_s=stages.decode_s * ratio,
            ),
            service_s - total_s,
        )
    return (
        StageSeconds(
            switch_s=stages.switch_s,
            controlnet_load_s=stages.controlnet_load_s,
            lora_wait_s=stages.lora_wait_s,
            text_s=stages.text_s,
            denoise_s=stages.denoise_s,
            decode_s=stages.decode_s + (service_s - total_s),
        ),
        service_s - total_s,
    )
