"""Prompt texts to token ids: with the tokenizers of a local folder, else hashed, so that random-weight models need no files."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.models import N_TEXT_POSITIONS, ModelSpec
from engine.options import TokenIds
from engine.workers.model_sources import ModelSources
from engine.workers.painter import JobError
from traces.problems import InputError, one_problem


class Prompts:
    """Turns texts into ids of both text encoders."""

    def __init__(self, spec: ModelSpec, tokenizers: Path | None) -> None:
        """``tokenizers``: a folder with ``tokenizer/`` and ``tokenizer_2/``.

        Raises:
            InputError: the folder does not hold them.
        """
        self._spec = spec
        self._tokenizers: list[Any] = []
        if tokenizers is not None:
            from transformers import CLIPTokenizer

            for name in ("tokenizer", "tokenizer_2"):
                folder = tokenizers / name
                if not folder.is_dir():
                    raise one_problem(str(folder), "does not exist", "a folder of tokenizer files", "Check the path.")
                self._tokenizers.append(CLIPTokenizer.from_pretrained(folder, local_files_only=True))

    def ids(self, text: str) -> TokenIds:
        """``[1, 77]`` for each encoder; longer prompts are cut, as SDXL's pipeline does."""
        if not self._tokenizers:
            return TokenIds(*(hashed_ids(text, self._spec.n_tokens, encoder) for encoder in (1, 2)))
        first, second = (
            tokenizer(
                text, padding="max_length", max_length=N_TEXT_POSITIONS, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer in self._tokenizers
        )
        return TokenIds(first, second)


class ModelPrompts:
    """The prompts of a worker's active checkpoint: with the tokenizers in its folder, else with those of the worker's own folder."""

    def __init__(self, spec: ModelSpec, sources: ModelSources, tokenizers: Path | None) -> None:
        """``tokenizers``: see :class:`Prompts`; None: random weights take hashed ids, and others need tokenizers of their own."""
        self._spec = spec
        self._sources = sources
        self._default = Prompts(spec, tokenizers)
        self._is_default_real = tokenizers is not None
        self._by_folder: dict[Path, Prompts] = {}
        self._now = self._default

    def use(self, model_id: str) -> None:
        """Takes the tokenizers of this checkpoint from now on.

        Raises:
            JobError: its weights are real and nobody has tokenizers for them: hashed ids would give pictures of nothing.
        """
        place = self._sources.place_of(model_id)
        if isinstance(place, int):
            self._now = self._default
        elif (place / "tokenizer").is_dir():
            if place not in self._by_folder:
                try:
                    self._by_folder[place] = Prompts(self._spec, place)
                except (InputError, OSError, ValueError) as error:
                    raise JobError(f"the tokenizers of {model_id!r} cannot be loaded: {str(error)[:300]}") from error
            self._now = self._by_folder[place]
        elif self._is_default_real:
            self._now = self._default
        else:
            raise JobError(f"{model_id!r} has weights and no tokenizer/; add its folders tokenizer/ and tokenizer_2/")

    def ids(self, text: str) -> TokenIds:
        """See :meth:`Prompts.ids`."""
        return self._now.ids(text)


@lru_cache(maxsize=256)
def hashed_ids(text: str, n_tokens: int, encoder: int) -> torch.Tensor:
    """Start, one id a word drawn from the word, end; ``[1, 77]``. The same text gives the same ids everywhere."""
    words = text.split()[: N_TEXT_POSITIONS - 2]
    start, end = n_tokens - 2, n_tokens - 1
    drawn = [
        int.from_bytes(hashlib.sha256(f"{encoder} {word}".encode()).digest()[:8], "big") % (n_tokens - 2)
        for word in words
    ]
    row = np.full((1, N_TEXT_POSITIONS), end, dtype=np.int64)
    row[0, 0] = start
    row[0, 1 : 1 + len(drawn)] = drawn
    return torch.from_numpy(row)
