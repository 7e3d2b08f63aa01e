"""How the tests of fastrlhf.compat compare: values and gradients of two functions on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Outcome = tuple[list[Any], list[Tensor | None]]


def outcome(function: Callable, inputs: Sequence[Any], leaves: Sequence[int], seed: int = 0) -> Outcome:
    """(results, gradients of the leaves) under random gradients of the results, the same for the same seed."""
    inputs = [x.detach().clone().requires_grad_() if i in leaves else x for i, x in enumerate(inputs)]
    results = function(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator) if isinstance(x, Tensor) else None for x in results]
    pairs = [(x, g) for x, g in zip(results, grads, strict=True) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [inputs[i] for i in leaves]
    if not pairs or not wanted:
        return results, [None] * len(wanted)
    total = sum((x.float() * g).sum() for x, g in pairs)
    return results, list(torch.autograd.grad(total, wanted, allow_unused=True))


def assert_same(ours: Outcome, theirs: Outcome, atol: float, grad_atol: float, *, dtypes: bool = True) -> None:
    """Results and gradients agree within these errors, nan with nan and inf with inf; dtypes too, if told so."""
    for a, b, limit in (
        *((a, b, atol) for a, b in zip(ours[0], theirs[0], strict=True)),
        *((a, b, grad_atol) for a, b in zip(ours[1], theirs[1], strict=True)),
    ):
        if not isinstance(b, Tensor) or not isinstance(a, Tensor):
            assert a is b is None
            continue
        assert a.shape == b.shape
        if dtypes:
            assert a.dtype == b.dtype
        if b.dtype == torch.bool:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a.double(), b.double(), atol=limit, rtol=0.0, equal_nan=True)
