"""Text encoding as SDXL's pipeline does it: both encoders' last but one hidden state side by side, pooled from the second."""

from __future__ import annotations

import torch

from engine.models import N_TEXT_POSITIONS, ModelSpec, SdxlModels, seed_for
from engine.options import PromptEmbeddings, TokenIds


def encode_prompt(models: SdxlModels, prompt: TokenIds | PromptEmbeddings) -> PromptEmbeddings:
    """Runs both text encoders; embeddings pass through, moved to the models' device and type."""
    device, dtype = models.device, models.dtype
    if isinstance(prompt, PromptEmbeddings):
        return PromptEmbeddings(prompt.context.to(device, dtype), prompt.pooled.to(device, dtype))
    first = models.text_encoder(prompt.ids.to(device), output_hidden_states=True)
    second = models.text_encoder_2(prompt.ids_2.to(device), output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return PromptEmbeddings(context.to(dtype), second[0].to(dtype))


def batch_for_guidance(
    prompt: PromptEmbeddings, negative: PromptEmbeddings | None, n_images: int, *, uses_cfg: bool
) -> PromptEmbeddings:
    """One row per forward sample, unconditional rows first: context ``[batch, 77, width]``, pooled ``[batch, width]``."""
    context, pooled = _rows(prompt.context, n_images), _rows(prompt.pooled, n_images)
    if not uses_cfg:
        return PromptEmbeddings(context, pooled)
    if negative is None:
        negative = PromptEmbeddings(torch.zeros_like(context), torch.zeros_like(pooled))
    return PromptEmbeddings(
        torch.cat([_rows(negative.context, n_images), context]), torch.cat([_rows(negative.pooled, n_images), pooled])
    )


def random_prompt(spec: ModelSpec, seed: int) -> TokenIds:
    """Token ids for benchmarks without a tokenizer: start, random tokens, end."""
    generator = torch.Generator().manual_seed(seed_for(seed, "prompt"))

    def ids() -> torch.Tensor:
        row = torch.randint(0, spec.n_tokens - 2, (1, N_TEXT_POSITIONS), generator=generator)
        row[:, 0], row[:, -1] = spec.n_tokens - 2, spec.n_tokens - 1
        return row

    return TokenIds(ids(), ids())


def _rows(rows: torch.Tensor, n_images: int) -> torch.Tensor:
    return rows if rows.shape[0] == n_images else rows.repeat(n_images, *([1] * (rows.ndim - 1)))
