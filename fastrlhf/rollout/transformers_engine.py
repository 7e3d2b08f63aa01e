"""Rollouts by `model.generate` of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastrlhf.rollout.types import Rollout, SamplingParams


class TransformersEngine:
    """Samples responses with `model.generate`, for any causal language model of transformers.

    tokenizer: its eos_token ends a response, its pad_token fills prompts on the left. Only lengths tell padding from
    text, so the two may be the same token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: SamplingParams) -> Rollout:
        """One response a prompt. Prompts of similar length are decoded together, to pad little."""
        if not prompts or any(not prompt for prompt in prompts):
            raise ValueError("prompts: every prompt must have at least one token, and there must be at least one")
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        responses: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            for index, tokens in zip(batch, self._decode([prompts[i] for i in batch], sampling), strict=True):
                responses[index] = tokens
        eos = self.tokenizer.eos_token_id
        return Rollout(prompts, responses, [response[-1] == eos for response in responses])

    def _decode(self, prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=eos,
            use_cache=True,
        )
        training, own = self.model.training, self.model.generation_config
        self.model.eval()
        # generate fills what `config` leaves open from the model's own configuration: a repetition penalty there would
        # sample from another distribution than the one that log-probs are taken of.
        self.model.generation_config = GenerationConfig()
        try:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=(torch.arange(width, device=device) >= width - lengths).long(),
                generation_config=config,
            )
        finally:
            self.model.generation_config = own
            self.model.train(training)
        return [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in output[:, width:].tolist()]
