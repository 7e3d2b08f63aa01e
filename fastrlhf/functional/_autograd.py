"""From a raw op to one with a gradient, cheaply when nothing is being traced."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "fastrlhf"


def is_traced() -> bool:
    """Whether someone watches the calls: torch.compile, a dispatch mode, a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def checked_once(validate: Callable) -> Callable:
    """Remembers what `validate` made of a call's Python options; the same options come with every call."""

    @functools.lru_cache(maxsize=1024, typed=True)
    def remember(*options):
        with torch.inference_mode(False):  # its tensors outlive the call
            return validate(*options)

    @functools.wraps(validate)
    def wrapper(*options):
        if is_traced():
            return validate(*options)
        try:
            return remember(*options)
        except TypeError:  # not hashable, hence not a number or a name either
            return validate(*options)

    return wrapper


def differentiable(
    name: str, setup: Callable, backward: Callable, inputs: tuple[int, ...] = (0,), *, times: int = 1
) -> Callable:
    """The op `name` with a gradient for `inputs`: `setup(ctx, inputs, output)`, then `backward(ctx, *grads)`.

    times: how often it can be differentiated, 1 or more; after once, an error says so.

    The op gets its autograd from torch.library, which is what torch.compile and functorch see. That costs 90 us a call,
    more than a small kernel; in plain eager mode the same two functions hang on an autograd.Function instead.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    backward = once_differentiable(backward) if times == 1 else backward
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup(ctx, args, output)
            ctx.outputs_are_ours = True  # the public functions hand out no gradient
            return output

    Recorded.backward = staticmethod(backward)
    # The apply of torch._C: Function's own looks for functorch's tensors among the arguments first, for 4 us.
    record = super(torch.autograd.Function, Recorded).apply
    Recorded.__name__ = Recorded.__qualname__ = name  # what grad_fn and the profiler show

    @functools.wraps(op)
    def call(*args):
        if is_traced():
            return op(*args)
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in inputs):
            return record(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def known_gradients(of: dict[int, int], arguments: int) -> tuple[Callable, Callable, tuple[int, ...]]:
    """For `differentiable`: an op that returns (loss, stats, *gradients); argument i has the gradient output[of[i]]."""

    def setup(ctx, inputs, output) -> None:
        ctx.save_for_backward(*(output[i] for i in of.values()))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        grads = [None] * arguments
        if grad is not None:
            for i, known in zip(of, ctx.saved_tensors, strict=True):
                if ctx.needs_input_grad[i]:
                    grads[i] = scaled(known, grad, getattr(ctx, "outputs_are_ours", False))
        return tuple(grads)

    return setup, backward, tuple(of)


def scaled(known: Tensor, grad: Tensor, ours: bool) -> Tensor:
    """known * grad, without a new tensor where nobody can miss the old one."""
    if not ours or is_traced() or torch._C._autograd._get_current_graph_task_keep_graph():
        return known * grad
    if grad.is_cpu and grad.item() == 1.0:  # reading it stalls nothing there, and it is almost always 1
        return known
    return known.mul_(grad)


def without_gradient(name: str) -> Callable:
    """The op `name`, whose results are targets and constants."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    @functools.wraps(op)
    def call(*args):
        if is_traced():
            return op(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("double backward is not implemented for the ops of fastrlhf")


def once_differentiable(backward):
    """For backward functions that autograd must not differentiate: whoever tries gets an error.

    torch's decorator of that name hands out plain numbers where the incoming gradient needs no gradient, which it
    never does under a loss: the second derivative would silently be 0.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        return tuple(None if x is None else _Refusal.apply(x.detach().requires_grad_()) for x in results)

    return wrapper
