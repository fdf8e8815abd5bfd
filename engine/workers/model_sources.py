"""Where the weights of a catalogue id come from: the host tier, a folder or file of the store, or random numbers drawn from the id.

A file is read once: the bytes that are hashed and checked are the bytes that reach the device.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import ControlNetModel
from torch import nn

from engine.catalogue import SHA256
from engine.empty_models import empty_controlnet, empty_models
from engine.models import (
    ModelSpec,
    SdxlModels,
    build_controlnet,
    build_models,
    bytes_of,
    redraw_controlnet,
    redraw_models,
)
from engine.registry.checkpoint_check import PARTS, SCHEDULER_NAME, check_checkpoint
from engine.registry.controlnet_check import WEIGHTS_NAME, check_controlnet
from engine.registry.network_check import CONFIG_NAME
from engine.registry.random_lora import seed_of
from engine.registry.shapes import architecture
from engine.registry.store import FolderStore, StoreError
from engine.workers.host_weights import HostLayout, HostWeights
from engine.workers.model_tier import ModelTier
from engine.workers.painter import JobError
from traces.problems import InputError

SEED_PREFIX: Final = "seed:"
DEFAULT_MODEL_ID: Final = "default"
"""What jobs name that name no checkpoint."""
CONTROLNET: Final = "controlnet"
"""The only part of a ControlNet."""
Origin = Literal["host", "store", "seed"]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A model that can be put onto the device: checked values on the host, or a seed to draw them from."""

    model_id: str
    sign: object
    """What its source looked like before it was read."""
    origin: Origin
    """Which tier it came from; ``seed``: it is drawn on the device."""
    seed: int = 0
    host: HostWeights | None = None


class ModelSources:
    """The catalogue as a worker knows it. An id that is not in it has random weights drawn from the id."""

    def __init__(
        self,
        spec: ModelSpec,
        sources: Mapping[str, Mapping[str, Any]],
        store: str,
        weights: str = "",
        progress: Callable[[str], None] = lambda phase: None,
        *,
        layout: HostLayout | None = None,
        checkpoints: ModelTier | None = None,
        controlnets: ModelTier | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            spec: the architecture of this worker.
            sources: entry of the catalogue by id.
            store: folder of the files; empty: none.
            weights: local folder of the checkpoint :data:`DEFAULT_MODEL_ID`, where the catalogue does not say another.
            progress: called while a file is read.
            layout: type and memory order of this worker's networks; None: float32 in plain order.
            checkpoints: what keeps checkpoints in host memory; None: nothing does.
            controlnets: what keeps ControlNets there.
        """
        self.spec = spec
        self._progress = progress
        self._weights = Path(weights) if weights else None
        self._sources = {name: dict(source) for name, source in sources.items()}
        self._store = Path(store) if store else None
        self._layout = layout or HostLayout()
        self._checkpoints = checkpoints or ModelTier("checkpoint", 0.0)
        self._controlnets = controlnets or ModelTier("controlnet", 0.0)

    def admit(self, model_id: str, source: Mapping[str, Any]) -> None:
        """Makes one more known, after checking that its weights can be found. What the host holds of its former source is dropped.

        Raises:
            JobError: they cannot.
        """
        before = self._sources.get(model_id)
        self._sources[model_id] = dict(source)
        try:
            self.place_of(model_id)
        except JobError:
            if before is None:
                del self._sources[model_id]
            else:
                self._sources[model_id] = before
            raise
        if before != self._sources[model_id]:
            self._checkpoints.drop(model_id)
            self._controlnets.drop(model_id)

    def place_of(self, model_id: str) -> Path | int:
        """A file or folder that exists, or a seed.

        Raises:
            JobError: the catalogue names a file that is not in the store, or the architecture is another one.
        """
        source = self._sources.get(model_id, {})
        architecture = str(source.get("architecture") or self.spec.name)
        if architecture not in {self.spec.name, "sdxl"}:
            raise JobError(f"{model_id!r} is made for {architecture}, this worker runs {self.spec.name}")
        file = str(source.get("file") or "")
        if not file:
            is_local = model_id == DEFAULT_MODEL_ID and self._weights is not None
            return self._weights if is_local and self._weights is not None else seed_of(model_id)
        if file.startswith(SEED_PREFIX):
            return int(file.removeprefix(SEED_PREFIX))
        if self._store is None:
            raise JobError(f"{model_id!r} has the file {file!r}, and this worker was given no store")
        path = (self._store / file).resolve()
        if not path.is_relative_to(self._store.resolve()) or not path.exists():
            raise JobError(f"the file {file!r} of {model_id!r} is not in the store")
        return path

    def read_checkpoint(self, model_id: str) -> ModelWeights:
        """Finds a checkpoint's weights on the host, or brings them there, checked as they come.

        Raises:
            JobError: they are not what was admitted: settings, names, shapes, finite values and, if that is its id, sha256.
        """
        place = self.place_of(model_id)
        files = [f"{part}/{name}" for part in PARTS for name in (CONFIG_NAME, PARTS[part].weights)]
        sign = place if isinstance(place, int) else _sign(place, [*files, SCHEDULER_NAME])
        found = self._checkpoints.get(model_id, sign)
        if found is not None:
            return ModelWeights(model_id, sign, "host", host=found)
        if isinstance(place, int):
            return ModelWeights(model_id, sign, "seed", seed=place)
        weights = self._room(self._checkpoints)
        store, key = self._store_of(model_id, place)
        _loaded(
            model_id,
            lambda: check_checkpoint(
                store,
                key,
                architecture(self.spec.name),
                expected_sha256=model_id if SHA256.fullmatch(model_id) else None,
                progress=lambda: self._progress("load"),
                keep=weights.keep,
            ),
        )
        self._checkpoints.put(model_id, sign, weights)
        return ModelWeights(model_id, sign, "store", host=weights)

    def checkpoint(
        self, model_id: str, device: str, dtype: torch.dtype, weights: ModelWeights | None = None
    ) -> SdxlModels:
        """Loads a checkpoint; ``weights`` from :meth:`read_checkpoint`, read now if None. Raises :class:`JobError`."""
        weights = weights or self.read_checkpoint(model_id)
        if weights.host is None:
            models = build_models(self.spec, device, dtype, weights.seed)
            self._keep_drawn(self._checkpoints, weights, dict(zip(PARTS, models.modules, strict=True)))
        else:
            models = empty_models(self.spec, device, dtype)
            _copy(weights.host, dict(zip(PARTS, models.modules, strict=True)))
        return models

    def checkpoint_into(self, model_id: str, target: SdxlModels, weights: ModelWeights | None = None) -> None:
        """Loads a checkpoint into the memory of another one, whose graphs stay valid.

        Raises:
            JobError: it cannot be read; nothing has been written then.
        """
        weights = weights or self.read_checkpoint(model_id)
        modules = dict(zip(PARTS, target.modules, strict=True))
        if weights.host is None:
            redraw_models(target, weights.seed)
            self._keep_drawn(self._checkpoints, weights, modules)
        else:
            _copy(weights.host, modules)

    def read_controlnet(self, model_id: str) -> ModelWeights:
        """:meth:`read_checkpoint` of a ControlNet. May run beside the work path."""
        place = self.place_of(model_id)
        sign = place if isinstance(place, int) else _sign(place, [CONFIG_NAME, WEIGHTS_NAME])
        found = self._controlnets.get(model_id, sign)
        if found is not None:
            return ModelWeights(model_id, sign, "host", host=found)
        if isinstance(place, int):
            return ModelWeights(model_id, sign, "seed", seed=place)
        weights = self._room(self._controlnets)
        store, key = self._store_of(model_id, place)
        _loaded(
            model_id,
            lambda: check_controlnet(
                store,
                key,
                architecture(self.spec.name),
                expected_sha256=model_id if SHA256.fullmatch(model_id) else None,
                progress=lambda: self._progress("load"),
                keep=lambda header: weights.keep(CONTROLNET, header),
            ),
        )
        self._controlnets.put(model_id, sign, weights)
        return ModelWeights(model_id, sign, "store", host=weights)

    def controlnet(
        self, model_id: str, device: str, dtype: torch.dtype, weights: ModelWeights | None = None
    ) -> ControlNetModel:
        """Builds a ControlNet; ``weights`` from :meth:`read_controlnet`, read now if None. Raises :class:`JobError`."""
        weights = weights or self.read_controlnet(model_id)
        if weights.host is None:
            net = build_controlnet(self.spec, device, dtype, weights.seed)
            self._keep_drawn(self._controlnets, weights, {CONTROLNET: net})
        else:
            net = empty_controlnet(self.spec, device, dtype)
            _copy(weights.host, {CONTROLNET: net})
        return net

    def controlnet_into(self, model_id: str, target: ControlNetModel, weights: ModelWeights | None = None) -> None:
        """Puts a ControlNet into the memory of another one. Raises :class:`JobError` before anything is written."""
        weights = weights or self.read_controlnet(model_id)
        if weights.host is None:
            redraw_controlnet(target, weights.seed)
            self._keep_drawn(self._controlnets, weights, {CONTROLNET: target})
        else:
            _copy(weights.host, {CONTROLNET: target})

    def _room(self, tier: ModelTier) -> HostWeights:
        """Where a file is read to; what is copied once and let go is not worth page-locking."""
        return HostWeights(self._layout if tier.capacity_bytes else dataclasses.replace(self._layout, locker=None))

    def _keep_drawn(self, tier: ModelTier, weights: ModelWeights, modules: Mapping[str, nn.Module]) -> None:
        """Keeps weights that have just been drawn on the device, before any LoRA is patched into them."""
        n_bytes = sum(bytes_of(module) for module in modules.values())
        if not tier.may_keep(n_bytes):
            return
        host = HostWeights(self._layout)
        try:
            for part, module in modules.items():
                host.copy_from(part, module)
        except OSError as error:  # memory that the system will not give
            sys.stderr.write(f"host tier: {weights.model_id!r} is not kept: {error}\n")
            return
        finally:
            _settle(modules)
        tier.put(weights.model_id, weights.sign, host)

    def _store_of(self, model_id: str, place: Path) -> tuple[FolderStore, str]:
        """The store and the key of a file or folder: the catalogue's store, or the operator's own folder, whose links are followed."""
        file = str(self._sources.get(model_id, {}).get("file") or "")
        if file and self._store is not None:
            return FolderStore(self._store), file
        folder = place.resolve()
        return FolderStore(folder.parent, follows_links=True), folder.name


def _sign(place: Path, files: list[str]) -> tuple[tuple[int, ...] | None, ...]:
    """What a source looks like from outside: a file that is replaced or written to looks different."""
    paths = [place / name for name in files] if place.is_dir() else [place]
    return tuple(_look(path) for path in paths)


def _look(path: Path) -> tuple[int, ...] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _copy(host: HostWeights, modules: Mapping[str, nn.Module]) -> None:
    """Host to device; when it returns the device has them."""
    for part, module in modules.items():
        host.copy_into(part, module)
    _settle(modules)


def _settle(modules: Mapping[str, nn.Module]) -> None:
    device = next(next(iter(modules.values())).parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loaded(model_id: str, load: Any) -> Any:
    """Runs a loader; whatever is wrong with the files is the model's fault and not the worker's."""
    try:
        return load()
    except (InputError, StoreError) as error:
        raise JobError(f"{model_id!r} cannot be loaded: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise JobError(f"{model_id!r} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error
