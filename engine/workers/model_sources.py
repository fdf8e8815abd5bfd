"""Where the weights of a catalogue id come from: a folder or file of the store, or random numbers drawn from the id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import ControlNetModel

from engine.catalogue import SHA256
from engine.models import (
    ModelSpec,
    SdxlModels,
    build_controlnet,
    build_models,
    copy_tensors,
    copy_weights,
    load_local,
    redraw_controlnet,
    redraw_models,
)
from engine.registry.checked_stream import Piece
from engine.registry.checkpoint_check import check_checkpoint
from engine.registry.controlnet_check import check_controlnet
from engine.registry.random_lora import seed_of
from engine.registry.safetensors_header import DTYPE_BYTES, SafetensorsHeader
from engine.registry.shapes import architecture
from engine.registry.store import FolderStore, StoreError
from engine.workers.painter import JobError
from traces.problems import InputError

SEED_PREFIX: Final = "seed:"
DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEFAULT_MODEL_ID: Final = "default"
"""What jobs name that name no checkpoint."""


class ControlNetWeights:
    """A ControlNet on the host: a seed, or the checked values of its file."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._tensors: dict[str, torch.Tensor] = {}

    def keep(self, header: SafetensorsHeader) -> Callable[[Piece, memoryview], None]:
        """Makes room for a file's tensors; the bytes that are checked are the bytes that are kept."""
        self._tensors = {span.name: torch.empty(span.shape, dtype=DTYPES[span.dtype]) for span in header.spans}
        rooms = {name: tensor.view(-1).view(torch.uint8).numpy() for name, tensor in self._tensors.items()}

        def take(piece: Piece, raw: memoryview) -> None:
            at = piece.first * DTYPE_BYTES[piece.span.dtype]
            rooms[piece.span.name][at : at + piece.n_bytes] = np.frombuffer(raw, dtype=np.uint8)

        return take

    def copy_into(self, net: ControlNetModel) -> None:
        """Writes the values of the file, if there is one, over the network's own, in its type and memory order."""
        if self._tensors:
            copy_tensors(self._tensors, net)


class ModelSources:
    """The catalogue as a worker knows it. An id that is not in it has random weights drawn from the id."""

    def __init__(
        self,
        spec: ModelSpec,
        sources: Mapping[str, Mapping[str, Any]],
        store: str,
        weights: str = "",
        progress: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """``weights``: local folder of the checkpoint :data:`DEFAULT_MODEL_ID`, where the catalogue does not say another."""
        self.spec = spec
        self._progress = progress
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
        place = self._checked_checkpoint(model_id)
        if isinstance(place, int):
            return build_models(self.spec, device, dtype, place)
        return _loaded(model_id, lambda: load_local(place, device, dtype, self.spec))

    def checkpoint_into(self, model_id: str, target: SdxlModels) -> None:
        """Loads a checkpoint into the memory of another one, whose graphs stay valid. Raises :class:`JobError`."""
        place = self._checked_checkpoint(model_id)
        if isinstance(place, int):
            redraw_models(target, place)
            return
        loaded = _loaded(model_id, lambda: load_local(place, "cpu", target.unet.dtype, self.spec))
        for module, into in zip(loaded.modules, target.modules, strict=True):
            copy_weights(module, into)

    def read_controlnet(self, model_id: str) -> ControlNetWeights:
        """Brings a ControlNet's weights into host memory, checked as they come. May run beside the work path.

        Raises:
            JobError: they are not what was admitted: settings, names, shapes, finite values and, if that is its id, sha256.
        """
        place = self.place_of(model_id)
        if isinstance(place, int):
            return ControlNetWeights(seed=place)
        if self._store is None:
            raise JobError(f"{model_id!r} has a file, and this worker was given no store")
        store, key = FolderStore(self._store), str(self._sources[model_id]["file"])
        sha256 = model_id if SHA256.fullmatch(model_id) else None
        weights = ControlNetWeights()
        _loaded(
            model_id,
            lambda: check_controlnet(
                store,
                key,
                architecture(self.spec.name),
                expected_sha256=sha256,
                progress=lambda: self._progress("load"),
                keep=weights.keep,
            ),
        )
        return weights

    def controlnet(
        self, model_id: str, device: str, dtype: torch.dtype, weights: ControlNetWeights | None = None
    ) -> ControlNetModel:
        """Builds a ControlNet; ``weights`` from :meth:`read_controlnet`, read now if None. Raises :class:`JobError`."""
        weights = weights or self.read_controlnet(model_id)
        net = build_controlnet(self.spec, device, dtype, weights.seed or 0)
        weights.copy_into(net)
        return net

    def controlnet_into(self, model_id: str, target: ControlNetModel, weights: ControlNetWeights | None = None) -> None:
        """Puts a ControlNet into the memory of another one. Raises :class:`JobError` before anything is written."""
        weights = weights or self.read_controlnet(model_id)
        if weights.seed is not None:
            redraw_controlnet(target, weights.seed)
        weights.copy_into(target)

    def _checked_checkpoint(self, model_id: str) -> Path | int:
        """:meth:`place_of`, after its files passed the same check as an add-on's: settings, shapes, finite values, sha256."""
        place = self.place_of(model_id)
        if isinstance(place, Path):
            file = str(self._sources.get(model_id, {}).get("file") or "")
            if file and self._store is not None:
                store, key = FolderStore(self._store), file
            else:
                folder = place.resolve()
                store, key = FolderStore(folder.parent, follows_links=True), folder.name
            sha256 = model_id if SHA256.fullmatch(model_id) else None
            shapes = architecture(self.spec.name)
            _loaded(
                model_id,
                lambda: check_checkpoint(
                    store, key, shapes, expected_sha256=sha256, progress=lambda: self._progress("load")
                ),
            )
        return place


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
