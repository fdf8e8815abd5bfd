"""Service times of a whole workload, predicted at once from a profile: what each request takes apart from waiting and state.

Which laws make up a request, by topology (stack ``diffusers``, ``diffusers_tuned``, else ``engine``):

- step in process = unet_step + Σ controlnet_step. Stock Diffusers runs a ControlNet at every step, with weight 0 outside its
  window; our engine runs it inside its window only. Stock Diffusers with a LoRA takes unet_lora_step (PEFT does not fuse).
- step with remote ControlNets = max(encoder, max over workers(Σ controlnet_step there) + workers · residual_transfer) + decoder
  + remote_join: workers that push into one GPU at once share its ingress.
- LoRAs: fetched into the host tier if missing (lora_fetch.remote; our engine adds lora_fetch.local: check and pin), attached and detached (one by one, by our engine together), for every request anew:
  a LoRA is not kept attached for the next request, even if that asks for the same. ``decoupled`` starts denoising at once, so
  that a fetch shorter than ``lora_patch_by_step`` steps is hidden; the other topologies wait for it.
- before: text_encode (text_encode_unguided for one prompt), starting noise (latent_input) and control images (control_input); once
  for all LoRAs of a request lora_wait; each where the profile has it. After: vae_decode + request_overhead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.profile import LatencyProfile
from engine.allocation import Link, LinkKind, Topology
from planner.service_noise import service_noise_ratio
from planner.service_prediction import by_bytes, by_shape
from planner.service_sizes import Sizes
from planner.service_stages import control_input_s, lora_patch_s, text_encode_s
from planner.service_steps import STACK_OF, batch_times, predict_steps
from planner.service_table import BatchTimes, ServiceTable
from planner.service_transfers import lora_fetch_s, model_fetch_s, residual_transfers
from planner.workload import Workload
from traces.problems import one_problem

__all__ = ["STACK_OF", "BatchTimes", "ServiceTable", "Sizes", "build_service"]


def build_service(
    workload: Workload,
    topology: Topology,
    profile: LatencyProfile,
    sizes: Sizes,
    *,
    link_kind: LinkKind = "nvlink",
    lora_patch_by_step: int = 10,
    draw: int | None = None,
    extrapolate: bool = False,
    noise_seed: int = 0,
    forward_batch_max: int | None = None,
    links: Sequence[Link] = (),
    is_store_local: bool = False,
) -> ServiceTable:
    """Predicts the service table of a workload on one topology.

    Args:
        draw: which joint bootstrap draw of the profile's parameters; None for the fitted ones.
        noise_seed: seeds the per-request noise, which is keyed by request id: the same request draws the same noise in
            every topology, allocation and subset of the workload.
        forward_batch_max: also predict forwards of up to so many samples, for requests that run together.
        links: also predict the transfers of these, for allocations whose links differ.
        is_store_local: the store is a folder on the host's own disk: a miss takes the engine's reading, check and pin only.

    Raises:
        InputError: the profile lacks a law that these requests need, or the topology or link cannot be modelled yet.
        calibrate.profile.OutOfDomainError: a request lies outside the measured box and ``extrapolate`` is False.
    """
    if topology == "decoupled_cfg2":
        raise one_problem(
            "topology", "got 'decoupled_cfg2'", "one of diffusers, diffusers_tuned, colocated, decoupled",
            "Leave it out: no law for CFG halves on two GPUs is measured yet.",
        )  # fmt: skip
    if topology == "decoupled" and link_kind == "local":
        raise one_problem(
            "link kind", "got 'local' for decoupled", "nvlink, pcie or network",
            "ControlNets on the base's own GPU are the topology colocated.",
        )  # fmt: skip
    predictor = profile.predictor(draw, extrapolate=extrapolate)
    stack = STACK_OF[topology]
    steps = predict_steps(workload, topology, predictor, link_kind)
    noise_ratio = service_noise_ratio(workload, profile.noise_ratio_quantiles.get(stack, ()), noise_seed)
    megapixels = workload.megapixels
    decode_s = by_shape(predictor, f"{stack}.vae_decode", n_images=workload.n_images, megapixels=megapixels)
    overhead_s = float(predictor.seconds(f"{stack}.request_overhead"))
    text_s = text_encode_s(workload, stack, predictor) + control_input_s(workload, stack, predictor)
    lora_bytes = sizes.of_loras(workload.lora_names)
    checkpoint_bytes = sizes.of_checkpoints(workload.checkpoint_names)
    controlnet_bytes = sizes.of_controlnets(workload.controlnet_names)
    patch_by_step = lora_patch_by_step if topology == "decoupled" else 0
    batch = None
    if forward_batch_max is not None:
        batch = batch_times(workload, topology, predictor, forward_batch_max, steps, overhead_s)
    residual_bytes, transfers = residual_transfers(workload, predictor, links if topology == "decoupled" else ())
    return ServiceTable(
        topology=topology,
        text_s=text_s * noise_ratio,
        denoise_alone_s=steps.denoise_s * noise_ratio,
        decode_s=(decode_s + overhead_s) * noise_ratio,
        lora_attach_s=lora_patch_s(workload, predictor, f"{stack}.lora_attach", lora_bytes),
        lora_detach_s=lora_patch_s(workload, predictor, f"{stack}.lora_detach", lora_bytes),
        lora_hidden_s=np.minimum(patch_by_step / workload.n_steps, 1.0) * steps.denoise_s * noise_ratio,
        noise_ratio=noise_ratio,
        plain_step_s=steps.plain_s,
        encoder_s=steps.encoder_s,
        decoder_s=steps.decoder_s,
        controlnet_forward_s=steps.controlnet_s,
        transfer_s=steps.transfer_s,
        is_remote=steps.is_remote,
        checkpoint_load_s=by_bytes(predictor, f"{stack}.checkpoint_load", checkpoint_bytes),
        checkpoint_fetch_s=model_fetch_s(
            predictor, stack, "checkpoint", checkpoint_bytes, is_store_local=is_store_local
        ),
        controlnet_load_s=by_bytes(predictor, f"{stack}.controlnet_load", controlnet_bytes),
        controlnet_fetch_s=model_fetch_s(
            predictor, stack, "controlnet", controlnet_bytes, is_store_local=is_store_local
        ),
        lora_fetch_s=lora_fetch_s(predictor, topology, lora_bytes, is_store_local=is_store_local),
        grades=dict(sorted(predictor.used.items())),
        _controlnet_work_s=np.where(steps.is_remote, steps.controlnet_s * steps.n_forwards, 0.0) * noise_ratio,
        batch=batch,
        transfers=transfers,
        residual_bytes=residual_bytes,
    )
