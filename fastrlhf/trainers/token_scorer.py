"""A causal language model that gives the log-probs of given tokens, or a loss of them, and nothing else of the
vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastrlhf.fused_layers import fuse_layers
from fastrlhf.packed_attention import packed_attention
from fastrlhf.packed_forward import check_packing, run, why_not_packed
from fastrlhf.packing import Packing
from fastrlhf.trainers.lm_heads import lm_head, registered_lm_head, unsupported
from fastrlhf.trainers.scored_tokens import FromHidden, FromLogits, ScoredTokens

logger = logging.getLogger(__name__)

Loss = Callable[[ScoredTokens], Any]


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a `peft` wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inside(module: nn.Module | None, function: Callable, *args: Any) -> Any:
    """function(*args) as if it were the forward of `module`: one that fully_shard has sharded gathers its weights
    before, and its gradients are reduced over the ranks."""
    if not isinstance(module, FSDPModule):
        return function(*args)
    module.forward = function
    try:
        return module(*args)
    finally:
        del module.forward


class TokenScorer(nn.Module):
    """Log-probs of chosen tokens, and losses of them, from the last hidden states of the positions that predict them.

    model: a causal language model of transformers, with or without LoRA adapters of peft.
    lm_head: "fused" never calls the model's LM head: the ops take its weight and keep no logits (`lm_heads`). "logits"
        has the model compute all its logits, and takes those at the positions.
    padding_free: whether packed sequences are taken, too; None: if they do not disturb each other in this model.
    Raises ValueError for a model whose logits are not what "fused" would compute, and with `padding_free` for one in
    which packed sequences disturb each other.
    """

    def __init__(self, model: nn.Module, lm_head: str = "fused", padding_free: bool | None = False) -> None:
        super().__init__()
        self.model = fuse_layers(model)
        self.fused = lm_head == "fused"
        self.padding_free = padding_free is not False
        if self.fused:
            self._check_head()
        if padding_free is None:
            reason = why_not_packed(causal_lm(model), self._states)
            self.padding_free = reason is None
            if reason is not None:
                logger.info("%s: sequences are padded: %s", type(causal_lm(model)).__name__, reason)
        elif padding_free:
            check_packing("model", causal_lm(model), self._states)

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def packed_attention(self) -> str:
        """Which attention packed sequences get; see the function of this name."""
        return packed_attention(self.model)

    @property
    def _keys_to_ignore_on_save(self):
        return causal_lm(self.model)._keys_to_ignore_on_save

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the blocks that FSDP shards one by one."""
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        return sorted({name for model in models for name in model._no_split_modules or ()})

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def tie_weights(self) -> None:
        causal_lm(self.model).tie_weights()

    def activation_checkpointing_enable(self, **options) -> None:
        self.model.activation_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        tokens: Tensor,
        temperature: float = 1.0,
        loss: Loss | None = None,
        packing: Packing | None = None,
    ) -> Any:
        """Log-probs and entropies [n] of `tokens` [n], or the `loss` of them.

        input_ids: [b, L], padded on the right, or with `packing` the packed sequences [1, N]. positions: [n], indices
            into the flattened input_ids: where each token is predicted.
        loss: called here, where sharded weights are whole, with the ScoredTokens; its result is returned. What else it
            needs it brings along, out of reach of wrappers that cast a forward's arguments.
        """
        return self.score(input_ids, positions, tokens, temperature, loss, packing)[0]

    def score(
        self,
        input_ids: Tensor,
        positions: Tensor,
        tokens: Tensor,
        temperature: float,
        loss: Loss | None,
        packing: Packing | None = None,
    ) -> tuple[Any, Tensor]:
        """What `forward` returns, and the last hidden states [n, H] at the positions."""
        if packing is not None and not self.padding_free:
            raise ValueError(
                "packing: this scorer was made with padding_free=False and has not checked that its model "
                "keeps packed sequences apart"
            )
        model = causal_lm(self.model)
        loss = loss or (lambda scored: scored.log_probs_and_entropy())

        def at_positions(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, positions)

        if not self.fused:
            output = run(model, input_ids, packing, output_hidden_states=True)
            logits, hidden = (at_positions(x) for x in (output.logits, output.hidden_states[-1]))
            return loss(FromLogits(logits, tokens, temperature)), hidden

        def from_hidden() -> tuple[Any, Tensor]:
            hidden = at_positions(run(model.base_model, input_ids, packing).last_hidden_state)
            return inside(model.get_output_embeddings(), at_head, hidden), hidden

        def at_head(hidden: Tensor) -> Any:
            return loss(FromHidden(lm_head(model, hidden), tokens, temperature))

        if self.model is model:
            return inside(model, from_hidden)
        return inside(self.model, inside, model, from_hidden)

    def save_pretrained(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """The model as transformers or peft save it. state_dict: of this module, whole, if its weights are sharded."""
        state_dict = part_of(state_dict, "model")
        if state_dict is not None:  # tied weights have become two there
            first: dict[nn.Parameter, str] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                state_dict[name] = state_dict[first.setdefault(parameter, name)]
        self.model.save_pretrained(output_dir, state_dict=state_dict)

    def _states(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        """Last hidden states [N, H] of all tokens."""
        positions = torch.arange(input_ids.numel(), device=self.device)
        return self.score(input_ids, positions, input_ids.flatten(), 1.0, lambda scored: None, packing)[1]

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head's logits must be the model's own, and so must what becomes of large ones, in which a cap shows."""
        model = causal_lm(self.model)
        if self.device.type == "meta":
            return
        if model.base_model is model:
            raise unsupported(model, "its last hidden state cannot be had without its head")
        training = model.training
        model.eval()
        tokens = torch.arange(2, device=self.device) % model.config.get_text_config().vocab_size
        inputs = {"input_ids": tokens[None], "use_cache": False}

        def logits(scored: FromHidden) -> tuple[Tensor, Tensor]:
            ours = scored.head.logits()
            return ours, scored.head.from_product(ramp_like(ours))

        (ours, of_large), _ = self.score(tokens[None], torch.arange(2, device=self.device), tokens, 1.0, logits)
        same = same_logits(ours, model(**inputs).logits[0])
        if same and registered_lm_head(model) is None:  # one of these may give another product and no scale
            hook = model.get_output_embeddings().register_forward_hook(lambda module, args, output: ramp_like(output))
            same = same_logits(of_large, model(**inputs).logits[0])
            hook.remove()
        model.train(training)
        if not same:
            raise unsupported(model, "it gives others than its head, scaled and capped as its configuration says")


def part_of(state_dict: dict[str, Tensor] | None, name: str) -> dict[str, Tensor] | None:
    """What belongs to the submodule of that name, by the names it has there."""
    if state_dict is None:
        return None
    return {key.removeprefix(f"{name}."): x for key, x in state_dict.items() if key.startswith(f"{name}.")}


def ramp_like(logits: Tensor) -> Tensor:
    """In every row, numbers from far below to far above any softcap."""
    return torch.linspace(-1000, 1000, logits.shape[-1], device=logits.device).to(logits.dtype).expand_as(logits)


def same_logits(ours: Tensor, wanted: Tensor) -> bool:
    """Up to the roundings of the dtype that they come from, or of TF32."""
    if ours.shape != wanted.shape:
        return False
    tolerance = max(1e-3, 4 * torch.finfo(ours.dtype).eps) * wanted.nan_to_num().abs().max().item()
    return torch.allclose(ours.float(), wanted.float(), rtol=0, atol=tolerance, equal_nan=True)
