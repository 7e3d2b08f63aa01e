"""Decoding with transformers: `model.generate`, and what it samples with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def generate(model: nn.Module, prompts: list[list[int]], new_tokens: int) -> Tensor:
    """Samples so many tokens after each of the prompts, which are of one length, at temperature 1 and without EOS.

    Returns them with the prompts before them [B, T].
    """
    # What this one leaves open is taken from the model's own: a repetition penalty, say.
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    input_ids = torch.tensor(prompts, device=next(model.parameters()).device)
    with torch.no_grad():
        return model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)


def sampler(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Logits [B, V] -> tokens [B], as `generate` draws them with these options and temperature 1."""
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []

    def sample(logits: Tensor) -> Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    return sample
