"""The lower part of a policy that is not trained, which policy and reference then share."""

from __future__ import annotations

import copy

from torch import nn

from fastrlhf.trainers.token_scorer import causal_lm


def freeze_lower_layers(policy: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the input embeddings and the first `count` layers of a causal language model; returns these modules.

    No gradient goes below them, so their backward pass and their activations are saved, too. A head that is tied to the
    embeddings is frozen with them. Raises ValueError where the layers cannot be found, or for all of them or more.
    """
    trunk = causal_lm(policy).base_model
    layers = next((x for name in ("layers", "h") if isinstance(x := getattr(trunk, name, None), nn.ModuleList)), None)
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
