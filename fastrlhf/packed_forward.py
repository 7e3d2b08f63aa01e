"""The forward pass of a model of transformers on packed sequences, and whether it keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.packed_attention import packed
from fastrlhf.packing import Packing


def run(model: nn.Module, input_ids: Tensor, packing: Packing | None, **options: Any) -> Any:
    """The output of a model of transformers for rows padded on the right, or for one row of packed sequences."""
    # Causal attention alone keeps the padding from the tokens: no mask is needed.
    if packing is None:
        return model(input_ids=input_ids, use_cache=False, **options)
    with packed(model, packing):
        return model(input_ids=input_ids, position_ids=packing.position_ids, use_cache=False, **options)


class DisturbedError(ValueError):
    """Packed sequences are not to a model what each of them is alone."""


@torch.no_grad()
def why_not_packed(model: nn.Module, states: Callable[[Tensor, Packing | None], Tensor]) -> Exception | None:
    """Why packed sequences are not to the model what each is alone; None where they are.

    states: called as states(input_ids [1, N], packing or None), gives what the model makes of every token [N, H].
    Nothing is known of a model on the meta device.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return None
    lengths = [5, 1, 3]
    tokens = torch.arange(1, sum(lengths) + 1, device=device) * 7919 % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        alone = torch.cat([states(sequence[None], None) for sequence in tokens.split(lengths)])
        together = states(tokens[None], Packing.of(lengths).to(device))
    except Exception as error:  # whatever a model makes of arguments or masks that it does not know
        return error
    finally:
        model.train(training)
    if same_up_to_rounding(together, alone):
        return None
    return DisturbedError(
        "in it, packed sequences disturb each other, or their positions are not those that it is told"
    )


def check_packing(argument: str, model: nn.Module, states: Callable[[Tensor, Packing | None], Tensor]) -> None:
    """Raises ValueError, naming `argument`, where `why_not_packed` has a reason."""
    error = why_not_packed(model, states)
    if error is None:
        return
    why = error if isinstance(error, DisturbedError) else f"it cannot take them ({type(error).__name__}: {error})"
    raise ValueError(
        f"{argument}: {type(model).__name__} does not work on packed sequences: {why}. Set padding_free=False to pad "
        "them instead."
    ) from error


def same_up_to_rounding(ours: Tensor, wanted: Tensor) -> bool:
    """Up to the roundings of the dtype that they come from, or of TF32."""
    if ours.shape != wanted.shape:
        return False
    tolerance = max(1e-3, 4 * torch.finfo(ours.dtype).eps) * wanted.nan_to_num().abs().max().item()
    return torch.allclose(ours.float(), wanted.float(), rtol=0, atol=tolerance, equal_nan=True)
