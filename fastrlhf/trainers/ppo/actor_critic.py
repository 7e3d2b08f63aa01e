"""The policy and its value function as one module, so that one forward gives log-probs and values."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrlhf.rewards.reward_model import score_in_fp32
from fastrlhf.trainers.token_scorer import Loss, TokenScorer

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"


class ActorCritic(TokenScorer):
    """A policy with a value head on its own trunk, or with a separate value model.

    policy: a causal language model of transformers, with or without LoRA adapters.
    value_model: a sequence classification model with one label on the same vocabulary; its score at every position
        is the value. None puts a linear head, zero at the start, on the policy's last hidden state.
    lm_head: as for TokenScorer.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None, lm_head: str = "fused") -> None:
        super().__init__(policy, lm_head)
        self.value_model = value_model
        if value_model is None:
            # fp32 whatever the trunk's dtype: its output is regressed on, not a softmax input.
            self.value_head = nn.Linear(self.config.get_text_config().hidden_size, 1, device=self.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        else:
            score_in_fp32(value_model)
            _score_head(value_model)

    def activation_checkpointing_enable(self, **options) -> None:
        super().activation_checkpointing_enable(**options)
        if self.value_model is not None:
            self.value_model.activation_checkpointing_enable(**options)

    def forward(
        self, input_ids: Tensor, positions: Tensor, tokens: Tensor, temperature: float = 1.0, loss: Loss | None = None
    ) -> tuple[Any, Any, Tensor]:
        """Log-probs, entropies and values [n], fp32, of `tokens` [n]; the value is of the state before the token. With
        `loss`, the pair that it returns, and the values."""
        scores, hidden = self.score(input_ids, positions, tokens, temperature, loss)
        return *scores, self.values_of(hidden) if self.value_model is None else self.values(input_ids, positions)

    def values_of(self, hidden: Tensor) -> Tensor:
        """The value head's, of the policy's last hidden states [n, H]."""
        return self.value_head(hidden.float()).squeeze(-1)

    def values(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The value model's, at the positions."""
        states = self.value_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        states = states.flatten(0, 1).index_select(0, positions)
        return _score_head(self.value_model)(states).squeeze(-1).float()

    def save_pretrained(self, output_dir: str) -> None:
        """The policy as transformers or peft save it, and the value function beside it."""
        super().save_pretrained(output_dir)
        if self.value_model is None:
            save_file(self.value_head.state_dict(), os.path.join(output_dir, VALUE_HEAD_FILE))
        else:
            self.value_model.save_pretrained(os.path.join(output_dir, VALUE_MODEL_FOLDER))

    def load_value_function(self, folder: str) -> None:
        """Load what `save_pretrained` wrote of the value function."""
        if self.value_model is None:
            self.value_head.load_state_dict(load_file(os.path.join(folder, VALUE_HEAD_FILE)))
            return
        saved = type(self.value_model).from_pretrained(os.path.join(folder, VALUE_MODEL_FOLDER))
        with torch.no_grad():
            for mine, theirs in zip(self.value_model.parameters(), saved.parameters(), strict=True):
                mine.copy_(theirs)


def _score_head(model: nn.Module) -> nn.Module:
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
    raise ValueError(
        f"value_model: {type(model).__name__} has no linear head with one output (`score` or `classifier`); give an "
        "AutoModelForSequenceClassification with num_labels=1"
    )
