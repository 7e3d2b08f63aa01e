"""The lower part of a policy that is not trained, which policy and reference then share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.batching import ScoredBatch
from fastrlhf.trainers.token_scorer import causal_lm


def freeze_lower_layers(policy: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the input embeddings and the first `count` layers of a causal language model; returns these modules.

    No gradient goes below them, so their backward pass and their activations are saved, too. A head that is tied to the
    embeddings is frozen with them. Raises ValueError where the layers cannot be found, or for all of them or more.
    """
    trunk, layers = causal_lm(policy).base_model, _layers(policy)
    if layers is None:
        raise ValueError(f"num_frozen_layers={count}: {type(trunk).__name__} has no list of layers (`layers` or `h`)")
    if count >= len(layers):
        raise ValueError(f"num_frozen_layers={count} must be less than the model's {len(layers)} layers")
    frozen = [policy.get_input_embeddings(), *layers[:count]]
    positions = getattr(trunk, "wpe", None)  # GPT-2's
    frozen += [] if positions is None else [positions]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def copy_sharing(policy: nn.Module, shared: list[nn.Module]) -> nn.Module:
    """A deep copy of the policy that has the `shared` modules, and whatever is tied to their weights, in common with
    it."""
    common = [*shared, *(p for module in shared for p in module.parameters())]
    return copy.deepcopy(policy, {id(x): x for x in common})


class LowerStates:
    """What the frozen lower layers make of a rollout: computed once, and given to every other forward of policy and
    reference, in which only the layers above them run.

    policy: with its first `count` layers frozen, which the reference has in common with it. With count=0, nothing is
        kept and every forward is whole.
    Costs [tokens of the rollout, H] in the dtype of the layers' output.
    """

    def __init__(self, policy: nn.Module, count: int) -> None:
        self.layers = list(_layers(policy)[:count]) if count else []
        self.states: dict[int, Tensor] = {}  # [L, H] of a row of the rollout
        self.extras = 0  # what these layers return beside the states, in the models where they do

    def forget(self) -> None:
        """The rollout is over."""
        self.states.clear()

    @contextmanager
    def __call__(self, batch: ScoredBatch) -> Iterator[None]:
        """Around a forward of policy or reference over `batch`: the first that meets its sequences runs the layers,
        and the others leave them out."""
        if not self.layers:
            yield
        elif all(row in self.states for row in batch.sequence_rows):
            with self._left_out(self._together(batch)):
                yield
        else:
            with self._kept(batch):
                yield

    @contextmanager
    def _kept(self, batch: ScoredBatch) -> Iterator[None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states, *extras = (output,) if isinstance(output, Tensor) else output
            self.extras = len(extras)
            packing = batch.packing
            sequences = states if packing is None else packing.by_sequence(states[0]).split(packing.lengths)
            self.states.update(zip(batch.sequence_rows, (x.detach() for x in sequences), strict=True))

        hook = self.layers[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _left_out(self, states: Tensor) -> Iterator[None]:
        # What the lower ones return is read by the next alone, and the last one gives what counts.
        output = (states, *[None] * self.extras) if self.extras else states
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _together(self, batch: ScoredBatch) -> Tensor:
        """[b, L, H], or [1, N, H] of packed sequences."""
        each = [self.states[row] for row in batch.sequence_rows]
        if batch.packing is not None:
            return batch.packing.from_sequences(torch.cat(each))[None]
        # Each was kept at the length of its batch then; nothing reads what stands in the padding.
        together = each[0].new_zeros(len(each), batch.input_ids.shape[1], each[0].shape[-1])
        for row, states in zip(together, each, strict=True):
            row[: len(states)] = states[: len(row)]
        return together


def _layers(policy: nn.Module) -> nn.ModuleList | None:
    """The list of layers of a causal language model, where it has one under a name that is known."""
    trunk = causal_lm(policy).base_model
    return next((x for name in ("layers", "h") if isinstance(x := getattr(trunk, name, None), nn.ModuleList)), None)
