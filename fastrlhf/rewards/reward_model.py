"""A trained reward model as a reward function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import group_by_length, pad_right
from fastrlhf.loading import load_reward_model, load_tokenizer, tokenizer_with_pad


def score_in_fp32(model: nn.Module) -> nn.Module:
    """Let a half-precision sequence classifier compute its score in fp32; in bf16 scores near 3 are 0.016 apart."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and head.weight.dtype != torch.float32:
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return model


def sequence_scores(model: nn.Module, sequences: list[list[int]], pad_token_id: int) -> Tensor:
    """Scores [len(sequences)], fp32, by forwards over groups of similar length (little padding)."""
    device = next(model.parameters()).device
    groups = group_by_length([len(sequence) for sequence in sequences])
    scores = []
    for group in groups:
        input_ids, attention_mask = pad_right([sequences[i] for i in group], pad_token_id)
        output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        scores.append(output.logits.squeeze(-1).float())
    order = torch.tensor([i for group in groups for i in group], device=device)
    return torch.cat(scores)[order.argsort()]


class RewardModel:
    """`f(prompts, completions, **columns) -> list[float]` by a sequence classification model with one label.

    model: the model, or its hub id or folder. processing_class: its tokenizer; the one beside the model when None.
    The text of prompt and completion is tokenised by the reward model's own tokenizer and ends with its EOS, as in
    RewardTrainer; conversations go through its chat template.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_length: int = 4096,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        if processing_class is None and isinstance(model, str):
            processing_class = load_tokenizer(model, "reward_funcs")
        self.model = score_in_fp32(load_reward_model(model, "reward_funcs", **options)).eval().requires_grad_(False)
        self.tokenizer = tokenizer_with_pad(processing_class, self.model, unlike_eos=True)
        self.max_length = max_length
        self.batch_size = batch_size
        self.__name__ = "reward_model"

    def to(self, device: torch.device) -> RewardModel:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        sequences = [self._tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = sequence_scores(self.model, [sequences[i] for i in batch], self.tokenizer.pad_token_id)
            for index, value in zip(batch, values.tolist(), strict=True):
                scores[index] = value
        return scores

    def _tokens(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer(prompt + completion)["input_ids"]
            if not tokens or tokens[-1] != self.tokenizer.eos_token_id:
                tokens = [*tokens, self.tokenizer.eos_token_id]
        else:
            tokens = self.tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
        if len(tokens) > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} of the reward model is less than a text of {len(tokens)} tokens; raise "
                "it, or shorten prompts or response_length"
            )
        return tokens
