"""A trained reward model as a reward function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import group_by_length, pad_right
from fastrlhf.data.encode import Encoder
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
    batch_size: most texts scored at a time. options: for `from_pretrained`, when model is a string.
    Prompt and completion become the very tokens that RewardTrainer would make of them (fastrlhf.data.encode), EOS
    included, whether or not the response came to one.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        if processing_class is None and isinstance(model, str):
            processing_class = load_tokenizer(model, "reward_funcs")
        self.model = score_in_fp32(load_reward_model(model, "reward_funcs", **options)).eval().requires_grad_(False)
        self.tokenizer = tokenizer_with_pad(processing_class, self.model, unlike_eos=True)
        self.encoder = Encoder(self.tokenizer)
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.batch_size = batch_size
        self.__name__ = "reward_model"

    def to(self, device: torch.device) -> RewardModel:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rendered = [self.encoder.render(p, c, row) for row, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        sequences = [tokens for tokens, _ in self.encoder.texts(rendered)]
        longest = max(map(len, sequences))
        if longest > self.max_length:
            raise ValueError(
                f"the reward model takes {self.max_length} tokens (max_position_embeddings), a text has {longest}; "
                "shorten prompts or response_length"
            )
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = sequence_scores(self.model, [sequences[i] for i in batch], self.tokenizer.pad_token_id)
            for index, value in zip(batch, values.tolist(), strict=True):
                scores[index] = value
        return scores
