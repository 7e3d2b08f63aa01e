"""The engines by name."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.rollout.native_engine import NativeEngine
from fastrlhf.rollout.transformers_engine import TransformersEngine
from fastrlhf.rollout.types import RolloutEngine
from fastrlhf.rollout.vllm_engine import VLLMEngine

ENGINES = ("native", "transformers", "vllm")


def create_engine(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    server: str | None = None,
) -> RolloutEngine:
    """The engine `name` over a causal language model.

    name: "native", "transformers" or "vllm". dtype: of the weights in decoding, for the native engine; the model's when
    None. server: URL of a vLLM server; without one, vLLM runs in this process. Raises ValueError for another name, and
    NotDrivenError, a ValueError, where the native engine has no decoder for the model.
    """
    if name == "native":
        return NativeEngine(model, tokenizer, dtype=dtype)
    if name == "transformers":
        return TransformersEngine(model, tokenizer)
    if name == "vllm":
        return VLLMEngine(model, tokenizer, mode=server or "colocated")
    raise ValueError(f"engine: got {name!r}, wanted one of {', '.join(map(repr, ENGINES))}")
