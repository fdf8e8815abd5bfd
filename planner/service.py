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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from calibrate.profile import RESIDUAL_LEVELS, Grade, LatencyProfile, Predictor
from engine.allocation import GIB, Catalogue, Link, LinkKind, Topology
from planner.workload import Bools, Floats, Ints, Workload
from traces.problems import one_problem

STACK_OF: Final[Mapping[Topology, str]] = {
    "diffusers": "diffusers",
    "diffusers_tuned": "diffusers_tuned",
    "colocated": "engine",
    "decoupled": "engine",
    "decoupled_cfg2": "engine",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of models and add-ons: the catalogue's where it lists them, else the default of their kind."""

    lora_bytes: int
    controlnet_bytes: int
    checkpoint_bytes: int
    catalogue: Catalogue = field(default_factory=Catalogue)

    @classmethod
    def from_profile(cls, profile: LatencyProfile, *, lora_bytes: int, catalogue: Catalogue | None = None) -> Sizes:
        """Checkpoint and ControlNet defaults from the profile's facts; raises :class:`InputError` if it lacks them."""
        fact = profile.predictor().fact
        return cls(
            lora_bytes=lora_bytes,
            controlnet_bytes=round(fact("controlnet_gib") * GIB),
            checkpoint_bytes=round(fact("checkpoint_gib") * GIB),
            catalogue=catalogue if catalogue is not None else Catalogue(),
        )

    def of_loras(self, names: Sequence[str]) -> Ints:
        """Bytes of each LoRA."""
        return self._of(names, self.lora_bytes)

    def of_controlnets(self, names: Sequence[str]) -> Ints:
        """Bytes of each ControlNet."""
        return self._of(names, self.controlnet_bytes)

    def of_checkpoints(self, names: Sequence[str]) -> Ints:
        """Bytes of each checkpoint."""
        return self._of(names, self.checkpoint_bytes)

    def _of(self, names: Sequence[str], default_bytes: int) -> Ints:
        return np.array([self.catalogue.bytes_of(name, default_bytes) for name in names], dtype=np.int64)


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
    is_lora_store_local: bool = False,
) -> ServiceTable:
    """Predicts the service table of a workload on one topology.

    Args:
        draw: which joint bootstrap draw of the profile's parameters; None for the fitted ones.
        noise_seed: seeds the per-request noise, which is keyed by request id: the same request draws the same noise in
            every topology, allocation and subset of the workload.
        forward_batch_max: also predict forwards of up to so many samples, for requests that run together.
        links: also predict the transfers of these, for allocations whose links differ.
        is_lora_store_local: LoRA files lie on the host's own disk: a miss takes the engine's check and pin only.

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
    steps = _predict_steps(workload, topology, predictor, link_kind)
    noise_ratio = _noise_ratio(workload, profile.noise_ratio_quantiles.get(stack, ()), noise_seed)
    megapixels = workload.megapixels
    decode_s = _by_shape(predictor, f"{stack}.vae_decode", n_images=workload.n_images, megapixels=megapixels)
    overhead_s = float(predictor.seconds(f"{stack}.request_overhead"))
    text_s = _text_s(workload, stack, predictor) + _control_input_s(workload, stack, predictor)
    lora_bytes = sizes.of_loras(workload.lora_names)
    checkpoint_bytes = sizes.of_checkpoints(workload.checkpoint_names)
    controlnet_bytes = sizes.of_controlnets(workload.controlnet_names)
    patch_by_step = lora_patch_by_step if topology == "decoupled" else 0
    batch = None
    if forward_batch_max is not None:
        batch = _batch_times(workload, topology, predictor, forward_batch_max, steps, overhead_s)
    residual_bytes, transfers = _transfers(workload, predictor, links if topology == "decoupled" else ())
    return ServiceTable(
        topology=topology,
        text_s=text_s * noise_ratio,
        denoise_alone_s=steps.denoise_s * noise_ratio,
        decode_s=(decode_s + overhead_s) * noise_ratio,
        lora_attach_s=_patch_s(workload, predictor, f"{stack}.lora_attach", lora_bytes),
        lora_detach_s=_patch_s(workload, predictor, f"{stack}.lora_detach", lora_bytes),
        lora_hidden_s=np.minimum(patch_by_step / workload.n_steps, 1.0) * steps.denoise_s * noise_ratio,
        noise_ratio=noise_ratio,
        plain_step_s=steps.plain_s,
        encoder_s=steps.encoder_s,
        decoder_s=steps.decoder_s,
        controlnet_forward_s=steps.controlnet_s,
        transfer_s=steps.transfer_s,
        is_remote=steps.is_remote,
        checkpoint_load_s=_by_bytes(predictor, f"{stack}.checkpoint_load", checkpoint_bytes),
        checkpoint_fetch_s=_by_bytes(predictor, "model_fetch.remote", checkpoint_bytes),
        controlnet_load_s=_by_bytes(predictor, f"{stack}.controlnet_load", controlnet_bytes),
        controlnet_fetch_s=_by_bytes(predictor, "model_fetch.remote", controlnet_bytes),
        lora_fetch_s=_lora_fetch_s(predictor, topology, lora_bytes, is_store_local=is_lora_store_local),
        grades=dict(sorted(predictor.used.items())),
        _controlnet_work_s=np.where(steps.is_remote, steps.controlnet_s * steps.n_forwards, 0.0) * noise_ratio,
        batch=batch,
        transfers=transfers,
        residual_bytes=residual_bytes,
    )


def _batch_times(
    workload: Workload, topology: Topology, predictor: Predictor, samples_max: int, steps: _Steps, overhead_s: float
) -> BatchTimes:
    stack = STACK_OF[topology]
    is_unfused = (workload.n_loras > 0) & (topology == "diffusers")
    shapes, shape = np.unique(np.stack([workload.megapixels, is_unfused], axis=1), axis=0, return_inverse=True)
    shape = shape.reshape(-1).astype(np.int64)
    largest = max(samples_max, int(workload.forward_batch.max(initial=1)))
    plain_s = np.full((len(shapes), largest + 1), np.nan)
    controlnet_s = np.zeros((len(shapes), largest + 1))
    n_images_max = max(largest, int(workload.n_images.max(initial=1)))
    vae_s = np.full((len(shapes), n_images_max + 1), np.nan)
    for row, (megapixels, unfused) in enumerate(shapes.tolist()):
        mine = shape == row
        sizes = np.arange(int(workload.forward_batch[mine].min()), largest + 1)
        same = np.full(len(sizes), megapixels)
        law = "diffusers.unet_lora_step" if unfused else f"{stack}.unet_step"
        plain_s[row, sizes] = _by_shape(predictor, law, forward_batch=sizes, megapixels=same)
        if (steps.n_forwards[mine] > 0).any() and topology != "decoupled":
            controlnet_s[row, sizes] = _by_shape(
                predictor, f"{stack}.controlnet_step", forward_batch=sizes, megapixels=same
            )
        guided = bool((workload.forward_batch[mine] > workload.n_images[mine]).all())
        images = np.arange(1, max(largest // 2 if guided else largest, int(workload.n_images[mine].max())) + 1)
        decode_s = _by_shape(
            predictor, f"{stack}.vae_decode", n_images=images, megapixels=np.full(len(images), megapixels)
        )
        vae_s[row, images] = decode_s + overhead_s
    n_forwards = np.where(steps.is_remote, 0.0, steps.n_forwards)
    return BatchTimes(shape, plain_s, controlnet_s, vae_s, n_forwards)


def _transfers(
    workload: Workload, predictor: Predictor, links: Sequence[Link]
) -> tuple[Floats | None, dict[tuple[LinkKind, float], Floats]]:
    has_controlnets = workload.n_controlnets > 0
    if not links or not has_controlnets.any():
        return None, {}
    n_bytes = predictor.fact("residual_bytes_per_sample") * workload.forward_batch.astype(np.float64)
    found: dict[tuple[LinkKind, float], Floats] = {}
    for link in links:
        seconds = np.zeros(len(workload))
        sent = n_bytes[has_controlnets] / link.compression_ratio
        seconds[has_controlnets] = _by_shape(predictor, f"engine.residual_transfer.{link.kind}", n_bytes=sent)
        found[link.kind, link.compression_ratio] = seconds
    return n_bytes, found


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Seconds of one step's parts per request, and of all its steps when nobody shares its ControlNet workers."""

    plain_s: Floats
    encoder_s: Floats
    decoder_s: Floats
    controlnet_s: Floats
    transfer_s: Floats
    is_remote: Bools
    n_forwards: Floats
    """ControlNet forwards of the whole request."""
    denoise_s: Floats


def _predict_steps(workload: Workload, topology: Topology, predictor: Predictor, link_kind: LinkKind) -> _Steps:
    stack = STACK_OF[topology]
    n = len(workload)
    shape: dict[str, Ints | Floats] = {"forward_batch": workload.forward_batch, "megapixels": workload.megapixels}
    has_controlnets = workload.n_controlnets > 0
    plain_s = np.zeros(n)
    # PEFT leaves LoRA matrices unfused, which costs stock Diffusers at every step
    is_unfused = (workload.n_loras > 0) & (topology == "diffusers")
    for law, rows in ((f"{stack}.unet_step", ~is_unfused), ("diffusers.unet_lora_step", is_unfused)):
        if rows.any():
            plain_s[rows] = _by_shape(predictor, law, **{name: values[rows] for name, values in shape.items()})

    def where_controlled(law: str, **features: Ints | Floats) -> Floats:
        seconds = np.zeros(n)
        if has_controlnets.any():
            chosen = {name: values[has_controlnets] for name, values in features.items()}
            seconds[has_controlnets] = _by_shape(predictor, law, **chosen)
        return seconds

    controlnet_s = where_controlled(f"{stack}.controlnet_step", **shape)
    n_forwards = workload.active_steps.astype(np.float64)
    none = np.zeros(n)
    if topology != "decoupled":
        if stack != "engine":
            n_forwards = (workload.n_controlnets * workload.n_steps).astype(np.float64)
        denoise_s = workload.n_steps * plain_s + n_forwards * controlnet_s
        return _Steps(plain_s, none, none, controlnet_s, none, np.zeros(n, dtype=np.bool_), n_forwards, denoise_s)
    encoder_s = where_controlled("engine.encoder_step", **shape)
    decoder_s = where_controlled("engine.decoder_step", **shape)
    transfer_s = none
    if has_controlnets.any():
        decoder_s = decoder_s + np.where(has_controlnets, float(predictor.seconds("engine.remote_join")), 0.0)
        n_bytes = predictor.fact("residual_bytes_per_sample") * workload.forward_batch.astype(np.float64)
        transfer_s = where_controlled(f"engine.residual_transfer.{link_kind}", n_bytes=n_bytes)
    # each ControlNet on a worker of its own: a step is remote while any of them is active, however many
    n_joined = workload.joined_steps
    joined_s = np.maximum(encoder_s, controlnet_s + transfer_s * np.maximum(1, workload.n_controlnets)) + decoder_s
    denoise_s = (workload.n_steps - n_joined) * plain_s + n_joined * joined_s
    return _Steps(plain_s, encoder_s, decoder_s, controlnet_s, transfer_s, has_controlnets, n_forwards, denoise_s)


def _by_shape(predictor: Predictor, law: str, **features: Ints | Floats) -> Floats:
    """Predicts the few distinct feature vectors of a trace once each: a profile draw then costs microseconds per law."""
    code = np.zeros(len(next(iter(features.values()))), dtype=np.int64)
    tables = {}
    for name, values in features.items():
        tables[name], inverse = np.unique(values, return_inverse=True)
        code = code * len(tables[name]) + inverse
    distinct, rows, inverse = np.unique(code, return_index=True, return_inverse=True)
    chosen = {name: np.asarray(values[rows], dtype=np.float64) for name, values in features.items()}
    return np.broadcast_to(predictor.seconds(law, **chosen), distinct.shape)[inverse]


def _lora_fetch_s(predictor: Predictor, topology: Topology, lora_bytes: Ints, *, is_store_local: bool) -> Floats:
    """From the store into the host tier. Our engine also checks and pins the file then; stock reads it at each attach."""
    fetch_s = np.zeros(len(lora_bytes)) if is_store_local else _by_bytes(predictor, "lora_fetch.remote", lora_bytes)
    if STACK_OF[topology] == "engine":
        fetch_s = fetch_s + _by_bytes(predictor, "lora_fetch.local", lora_bytes)
    return fetch_s


def _patch_s(workload: Workload, predictor: Predictor, law: str, lora_bytes: Ints) -> Floats:
    """All LoRAs of each request onto the weights, or off them.

    Our engine writes the weights once for all of them: the law at the sum of their bytes, as far as that was measured; beyond it, and in
    the other stacks, one after the other.
    """
    alone_s = workload.lora_sum(_by_bytes(predictor, law, lora_bytes))
    if law == "engine.lora_attach" and predictor.has("engine.lora_wait") and (workload.n_loras > 0).any():
        once_s = np.where(workload.n_loras > 0, float(predictor.seconds("engine.lora_wait")), 0.0)
    else:
        once_s = np.zeros(len(workload))
    several = workload.n_loras > 1
    if not law.startswith("engine.") or not several.any():
        return alone_s + once_s
    n_bytes = workload.lora_sum(lora_bytes.astype(np.float64))
    _, most = predictor.profile.laws[law].domain.get("n_bytes", (0.0, math.inf))
    together = several & (n_bytes <= most)
    if together.any():
        alone_s[together] = _by_shape(predictor, law, n_bytes=n_bytes[together])
    return alone_s + once_s


def _text_s(workload: Workload, stack: str, predictor: Predictor) -> Floats:
    """Prompts and starting noise; a profile that does not tell them apart has both in ``text_encode``."""
    seconds = np.full(len(workload), float(predictor.seconds(f"{stack}.text_encode")))
    unguided = workload.forward_batch == workload.n_images
    if unguided.any() and predictor.has(f"{stack}.text_encode_unguided"):
        seconds[unguided] = float(predictor.seconds(f"{stack}.text_encode_unguided"))
    if predictor.has(f"{stack}.latent_input"):
        return seconds + _by_shape(
            predictor, f"{stack}.latent_input", n_images=workload.n_images, megapixels=workload.megapixels
        )
    return seconds


def _control_input_s(workload: Workload, stack: str, predictor: Predictor) -> Floats:
    """Control images onto the device, one a ControlNet; 0 by a profile without that law, which older ones are."""
    seconds = np.zeros(len(workload))
    has_controlnets = workload.n_controlnets > 0
    if has_controlnets.any() and predictor.has(f"{stack}.control_input"):
        one_s = _by_shape(predictor, f"{stack}.control_input", megapixels=workload.megapixels[has_controlnets])
        seconds[has_controlnets] = workload.n_controlnets[has_controlnets] * one_s
    return seconds


def _by_bytes(predictor: Predictor, law: str, n_bytes: Ints) -> Floats:
    return _by_shape(predictor, law, n_bytes=n_bytes) if len(n_bytes) else np.zeros(0)


def _noise_ratio(workload: Workload, quantiles: Sequence[float], noise_seed: int) -> Floats:
    """Inverse transform of one uniform per request between the quantiles' levels, held at the outermost ones."""
    if not quantiles:
        return np.ones(len(workload))
    stream = int.from_bytes(b"service_noise", "little")  # the stream's name, so that no other stream shares its bits
    salt = np.random.SeedSequence([noise_seed, stream]).generate_state(1, np.uint64)
    uniform = (_mix(workload.request_key ^ salt[0]) >> np.uint64(11)) * 2.0**-53
    return np.asarray(np.interp(uniform, RESIDUAL_LEVELS, quantiles), dtype=np.float64)


def _mix(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit flips every output bit with probability near 1/2."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
