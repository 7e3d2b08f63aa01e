"""Contenders from inputs: forward, forward and backward, in place, and many small calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.bench.measure import Contender
from fastrlhf.bench.peers import Run, contenders

Inputs = tuple[Any, ...]
OURS = "ours"


def forward(op: str, inputs: Inputs, calls: int = 1) -> dict[str, Contender | str]:
    """Every peer's `op` without autograd."""
    return _everyone(op, lambda run, work: timed_forward(run, work, inputs, calls))


def timed_forward(run: Run, work: Callable, inputs: Inputs, calls: int = 1) -> Contender:
    converted = run.convert(*inputs)

    def timed(arguments):
        with torch.no_grad():
            for _ in range(calls - 1):
                work(*arguments)
            return work(*arguments)

    return Contender(timed, lambda: converted, run.note)


def forward_backward(
    op: str, inputs: Inputs, leaves: Sequence[int], grads: Sequence[Tensor] = (), calls: int = 1
) -> dict[str, Contender | str]:
    """Every peer's `op` and the gradient of its first result, or of as many results as there are `grads`.

    leaves: which inputs get a gradient.
    """
    return _everyone(op, lambda run, work: timed_forward_backward(run, work, inputs, leaves, grads, calls))


def timed_forward_backward(
    run: Run, work: Callable, inputs: Inputs, leaves: Sequence[int], grads: Sequence[Tensor] = (), calls: int = 1
) -> Contender:
    def prepare():
        # Clones, because some peers write the gradient over what they were given.
        with_leaves = [x.detach().clone().requires_grad_() if i in leaves else x for i, x in enumerate(inputs)]
        return run.convert(*with_leaves), [with_leaves[i] for i in leaves]

    def timed(prepared):
        arguments, wanted = prepared
        for _ in range(calls - 1):
            backward(work(*arguments), wanted, grads)
        return backward(work(*arguments), wanted, grads)

    return Contender(timed, prepare, run.note)


def logits_in_place(
    op: str, logits: Tensor, tokens: Tensor, grads: Sequence[Tensor], only_backward: bool = False
) -> dict[str, Contender | str]:
    """The gradient of the logits; ours writes it over them, the peers as they do.

    The logits are the result of an operation, as they are in a model, in memory that is filled anew, untimed, before
    every call.
    """
    scratch = torch.empty_like(logits)

    def refilled() -> Tensor:
        anchor = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
        return scratch.detach().copy_(logits).add_(anchor)

    def contest(run: Run, work: Callable) -> Contender:
        def prepare():
            filled = refilled()
            return (work(filled, tokens) if only_backward else None), filled

        def timed(prepared):
            results, filled = prepared
            return backward(work(filled, tokens) if results is None else results, [filled], grads)

        return Contender(timed, prepare, run.note)

    return _everyone(op, contest, ours=f"{op} in place")


def backward(results: Any, wanted: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(results[: max(1, len(grads))], wanted, grads or None)


def _everyone(op: str, contest: Callable, ours: str | None = None) -> dict[str, Contender | str]:
    everyone = contenders(op)
    if ours is not None:
        everyone[OURS] = contenders(ours)[OURS]
    return {name: x if isinstance(x, str) else contest(x, x.ready()) for name, x in everyone.items()}
