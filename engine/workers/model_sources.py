"""Where the weights of a catalogue id come from: a folder or file of the store, or random numbers drawn from the id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import ControlNetModel

from engine.catalogue import SHA256
from engine.models import (
    ModelSpec,
    SdxlModels,
    build_controlnet,
    build_models,
    copy_weights,
    load_local,
    load_local_controlnet,
    redraw_controlnet,
    redraw_models,
)
from engine.registry.controlnet_check import check_controlnet
from engine.registry.random_lora import seed_of
from engine.registry.shapes import architecture
from engine.registry.store import FolderStore, StoreError
from engine.workers.painter import JobError
from traces.problems import InputError

SEED_PREFIX: Final = "seed:"
DEFAULT_MODEL_ID: Final = "default"
"""What jobs name that name no checkpoint."""


class ModelSources:
    """The catalogue as a worker knows it. An id that is not in it has random weights drawn from the id."""

    def __init__(
        self, spec: ModelSpec, sources: Mapping[str, Mapping[str, Any]], store: str, weights: str = ""
    ) -> None:
        """``weights``: local folder of the checkpoint :data:`DEFAULT_MODEL_ID`, where the catalogue does not say another."""
        self.spec = spec
        self._weights = Path(weights) if weights else None
        self._sources = {name: dict(source) for name, source in sources.items()}
        self._store = Path(store) if store else None

    def admit(self, model_id: str, source: Mapping[str, Any]) -> None:
        """Makes one more known, after checking that its weights can be found.

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

    def checkpoint(self, model_id: str, device: str, dtype: torch.dtype) -> SdxlModels:
        """Loads a checkpoint. Raises :class:`JobError` if it cannot be."""
        place = self.place_of(model_id)
        if isinstance(place, int):
            return build_models(self.spec, device, dtype, place)
        return _loaded(model_id, lambda: load_local(place, device, dtype))

    def checkpoint_into(self, model_id: str, target: SdxlModels) -> None:
        """Loads a checkpoint into the memory of another one, whose graphs stay valid. Raises :class:`JobError`."""
        place = self.place_of(model_id)
        if isinstance(place, int):
            redraw_models(target, place)
            return
        loaded = _loaded(model_id, lambda: load_local(place, "cpu", target.unet.dtype))
        for module, into in zip(loaded.modules, target.modules, strict=True):
            copy_weights(module, into)

    def controlnet(self, model_id: str, device: str, dtype: torch.dtype) -> ControlNetModel:
        """Loads a ControlNet. Raises :class:`JobError` if it cannot be."""
        place = self._checked_controlnet(model_id)
        if isinstance(place, int):
            return build_controlnet(self.spec, device, dtype, place)
        if place.is_dir():
            return _loaded(model_id, lambda: load_local_controlnet(place, device, dtype))
        net = build_controlnet(self.spec, device, dtype, 0)
        _loaded(model_id, lambda: _load_file(place, net))
        return net

    def controlnet_into(self, model_id: str, target: ControlNetModel) -> None:
        """Loads a ControlNet into the memory of another one. Raises :class:`JobError` if it cannot be."""
        place = self._checked_controlnet(model_id)
        if isinstance(place, int):
            redraw_controlnet(target, place)
        elif place.is_dir():
            copy_weights(_loaded(model_id, lambda: load_local_controlnet(place, "cpu", target.dtype)), target)
        else:
            _loaded(model_id, lambda: _load_file(place, target))

    def _checked_controlnet(self, model_id: str) -> Path | int:
        """:meth:`place_of`, after its file passed the add-on check: settings, shapes, finite values and, if that is its id, sha256."""
        place = self.place_of(model_id)
        if isinstance(place, Path) and self._store is not None:
            store, key = FolderStore(self._store), str(self._sources[model_id]["file"])
            sha256 = model_id if SHA256.fullmatch(model_id) else None
            shapes = architecture(self.spec.name)
            _loaded(model_id, lambda: check_controlnet(store, key, shapes, expected_sha256=sha256))
        return place


def _load_file(path: Path, target: ControlNetModel) -> None:
    from safetensors.torch import load_file

    target.load_state_dict(load_file(path), strict=True)


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
