"""The policy and its value function as one module, so that one forward gives log-probs and values."""

from __future__ import annotations

import os
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrlhf.fused_layers import fuse_layers
from fastrlhf.packed_forward import check_packing, run
from fastrlhf.packing import Packing
from fastrlhf.rewards.text_scores import score_in_fp32
from fastrlhf.trainers.sharding import copy_whole
from fastrlhf.trainers.token_scorer import Loss, TokenScorer, inside, part_of

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"


class ValueHead(nn.Linear):
    """A class of its own, by which FSDP is told to shard it apart from the trunk."""


class ActorCritic(TokenScorer):
    """A policy with a value head on its own trunk, with a separate value model, or without a value function.

    policy: a causal language model of transformers, with or without LoRA adapters.
    value_model: a sequence classification model with one label on the same vocabulary; its score at every position
        is the value.
    lm_head, padding_free: as for TokenScorer; the value model must take packed sequences, too.
    value_head: without a value model, whether there is a linear head, zero at the start, on the policy's last hidden
        state. False leaves the policy without a value function.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_model: nn.Module | None = None,
        lm_head: str = "fused",
        padding_free: bool = False,
        value_head: bool = True,
    ) -> None:
        super().__init__(policy, lm_head, padding_free)
        self.value_model = value_model
        self.value_head = None
        if value_model is None and value_head:
            # fp32 whatever the trunk's dtype: its output is regressed on, not a softmax input.
            self.value_head = ValueHead(self.config.get_text_config().hidden_size, 1, device=self.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if value_model is not None:
            fuse_layers(score_in_fp32(value_model))
            _score_head(value_model)
            if padding_free:
                check_packing("value_model", value_model, self._value_states)

    @property
    def _no_split_modules(self) -> list[str]:
        # FSDP has one dtype for what it shards together.
        return [*super()._no_split_modules, *([] if self.value_head is None else [ValueHead.__name__])]

    def activation_checkpointing_enable(self, **options) -> None:
        super().activation_checkpointing_enable(**options)
        if self.value_model is not None:
            self.value_model.activation_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        tokens: Tensor,
        temperature: float = 1.0,
        loss: Loss | None = None,
        packing: Packing | None = None,
        train_policy: bool = True,
        model_values: bool = False,
    ) -> tuple[Any, Any, Tensor | None]:
        """Log-probs, entropies and values [n], fp32, of `tokens` [n]; with `loss`, what it returns, and the values.

        The value is the value head's, of the state before the token. It is None where there is no value head, except
        with `model_values`: a value model has a forward of its own, `values`, whose activations need not be in memory
        together with the policy's. train_policy: whether the values' gradient goes on into the policy's trunk.
        """
        scores, hidden = self.score(input_ids, positions, tokens, temperature, loss, packing)
        if self.value_model is not None and model_values:
            return *scores, self._model_values(input_ids, positions, packing)
        if self.value_head is None:
            return *scores, None
        return *scores, self.values_of(hidden if train_policy else hidden.detach())

    def drop_policy_gradients(self) -> None:
        """Leave gradients to the value function alone."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def values_of(self, hidden: Tensor) -> Tensor:
        """The value head's, of the policy's last hidden states [n, H]."""
        return self.value_head(hidden.float()).squeeze(-1)

    def values(self, input_ids: Tensor, positions: Tensor, packing: Packing | None = None) -> Tensor:
        """The value model's, at the positions; as if it were this module's forward."""
        return inside(self, self._model_values, input_ids, positions, packing)

    def _model_values(self, input_ids: Tensor, positions: Tensor, packing: Packing | None) -> Tensor:
        def values() -> Tensor:
            states = self._value_states(input_ids, packing).index_select(0, positions)
            return _score_head(self.value_model)(states).squeeze(-1).float()

        return inside(self.value_model, values)

    def _value_states(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        """The value model's last hidden states [N, H] of all tokens."""
        return run(self.value_model.base_model, input_ids, packing).last_hidden_state.flatten(0, 1)

    def save_pretrained(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy as transformers or peft save it, and the value function, if there is one, beside it."""
        super().save_pretrained(output_dir, state_dict)
        if self.value_head is not None:
            head = self.value_head.state_dict() if state_dict is None else part_of(state_dict, "value_head")
            save_file(head, os.path.join(output_dir, VALUE_HEAD_FILE))
        if self.value_model is not None:
            folder = os.path.join(output_dir, VALUE_MODEL_FOLDER)
            self.value_model.save_pretrained(folder, state_dict=part_of(state_dict, "value_model"))

    def load_value_function(self, folder: str) -> None:
        """Load what `save_pretrained` wrote of the value function."""
        if self.value_head is not None:
            saved = load_file(os.path.join(folder, VALUE_HEAD_FILE))
            for name, mine in self.value_head.named_parameters():
                copy_whole(mine, saved[name])
        if self.value_model is None:
            return
        model = type(self.value_model).from_pretrained(os.path.join(folder, VALUE_MODEL_FOLDER))
        for mine, theirs in zip(self.value_model.parameters(), model.parameters(), strict=True):
            copy_whole(mine, theirs)


def _score_head(model: nn.Module) -> nn.Module:
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
    raise ValueError(
        f"value_model: {type(model).__name__} has no linear head with one output (`score` or `classifier`); give an "
        "AutoModelForSequenceClassification with num_labels=1"
    )
