"""The forward pass of a model of transformers on packed sequences, and whether it keeps them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.packed_attention import packed
from fastrlhf.packing import Packing, share_prefixes


def run(model: nn.Module, input_ids: Tensor, packing: Packing | None, **options: Any) -> Any:
    """The output of a model of transformers for rows padded on the right, or for one row of packed sequences."""
    # Causal attention alone keeps the padding from the tokens: no mask is needed.
    if packing is None:
        return model(input_ids=input_ids, use_cache=False, **options)
    with packed(model, packing):
        return model(input_ids=input_ids, position_ids=packing.position_ids, use_cache=False, **options)


class NotPackedError(ValueError):
    """Packed sequences are not to a model what each of them is alone."""


@torch.no_grad()
def why_not_packed(model: nn.Module, states: Callable[[Tensor, Packing | None], Tensor]) -> NotPackedError | None:
    """Why packed sequences, some with a common beginning, are not to the model what each is alone; None where they are.

    states: called as states(input_ids [1, N], packing or None), gives what the model makes of every token [N, H].
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return NotPackedError("nothing is known of it on the meta device")
    numbers = (torch.arange(1, 16) * 7919 % model.config.get_text_config().vocab_size).tolist()
    first, second, third = numbers[:5], numbers[5:6], numbers[6:9]
    # What branches off the first one stands behind the second.
    shared = [first, second, first[:2] + numbers[9:12], third]
    with evaluated(model):
        try:
            for sequences in ([first, second, third], shared):
                row, packing, _ = share_prefixes(sequences)
                packing = packing.to(device)
                together = packing.by_sequence(states(torch.tensor([row], device=device), packing))
                alone = [states(torch.tensor([sequence], device=device), None) for sequence in sequences]
                if not same_states(together, torch.cat(alone)):
                    return NotPackedError(
                        "in it, packed sequences disturb each other, or their positions are not those that it is told"
                    )
        except Exception as error:  # whatever a model makes of arguments or masks that it does not know
            return NotPackedError(f"it cannot take them ({type(error).__name__}: {error})").with_traceback(
                error.__traceback__
            )
    return None


def check_packing(argument: str, model: nn.Module, states: Callable[[Tensor, Packing | None], Tensor]) -> None:
    """Raises ValueError, naming `argument`, where `why_not_packed` has a reason. A model on the meta device passes."""
    error = None if next(model.parameters()).device.type == "meta" else why_not_packed(model, states)
    if error is not None:
        raise ValueError(
            f"{argument}: {type(model).__name__} does not work on packed sequences: {error}. Set padding_free=False to "
            "pad them instead."
        ) from error


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Inside it, all modules are in evaluation mode; then each is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def same_states(ours: Tensor, wanted: Tensor) -> bool:
    """Whether states [N, H] of tokens are the same up to the roundings of the dtype that they come from, or of TF32.

    By the root mean square of the differences, beside that of the states about the mean of the tokens: what all of
    these have in common hides nothing.
    """
    if ours.shape != wanted.shape:
        return False
    tolerance = max(2e-3, 16 * torch.finfo(ours.dtype).eps)
    ours, wanted = ours.double(), wanted.double()
    if not torch.equal(ours.isfinite(), wanted.isfinite()):
        return False
    difference, varied = (
        x.nan_to_num(0, 0, 0).square().mean().sqrt() for x in (ours - wanted, wanted - wanted.mean(0))
    )
    return bool(difference <= tolerance * varied)
