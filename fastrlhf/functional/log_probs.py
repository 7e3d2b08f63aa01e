"""Log-probabilities and entropies from logits, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable, once_differentiable
from fastrlhf.functional._vocab_parallel import Shard, merge, over_group, shard

ops = torch.ops.fastrlhf


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), in one pass over the logits.

    logits: [..., V], fp32, bf16 or fp16; rows may be strided, the last dimension contiguous.
    tokens: [...], int64 in [0, V), or -100 for positions to ignore (row not read, result 0, gradient 0).
    temperature: a positive normal fp32 number.
    inplace_backward: write the gradient over the logits (they are garbage afterwards; saves V values a row). Their rows
        must not overlap, and they must not be a leaf that requires grad. Under torch.compile the compiler plans the
        memory and this is ignored; the numbers are the same.
    group: a process group of torch.distributed over which the vocabulary is spread, in the order of its ranks: logits
        are this rank's columns, V may differ from rank to rank, and tokens are in [0, sum of V). All ranks call with
        the same tokens, get the same bits and must go on to the same loss. Two small all-gathers: of V, and of three
        or four numbers a token. The gradient needs none. torch.compile makes one graph of it.
    Returns [...], fp32, in nats. Gradient to logits, in their dtype. Raises ValueError on shapes, dtypes and devices
    that don't match, IndexError (CPU) on tokens outside [0, V); elsewhere such a token gives nan. Reverse mode only,
    once: forward-mode AD and double backward raise NotImplementedError.

    log p(y) = z_y/T - logsumexp(z/T);  d log p / dz_j = (1[j = y] - p_j) / T.
    """
    temperature = _check(logits, tokens, temperature)
    if inplace_backward and not torch.compiler.is_compiling():
        check.writable_rows("logits", logits, "inplace_backward=True writes the gradient over them")
        both = (ops.token_log_probs.default, ops.token_log_probs_backward_.default)
        return _InPlace.apply(*both, logits, tokens, temperature, _shard(group, logits, tokens))[0]
    if group is not None:
        return _token_log_probs_over_group(_shard(group, logits, tokens), logits, tokens, temperature)[0]
    return _token_log_probs(logits, tokens, temperature)[0]


def token_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs`, and the entropy of the same distribution softmax(logits / temperature), in the same pass.

    Arguments and errors as for `token_log_probs`. Returns (log_probs, entropy), both [...], fp32, in nats; both carry
    gradient. A logit of -inf has probability 0 and adds nothing to the entropy.

    H = -sum_j p_j log p_j;  dH / dz_j = -p_j (log p_j + H) / T.
    """
    temperature = _check(logits, tokens, temperature)
    if inplace_backward and not torch.compiler.is_compiling():
        check.writable_rows("logits", logits, "inplace_backward=True writes the gradient over them")
        both = (ops.token_log_probs_and_entropy.default, ops.token_log_probs_and_entropy_backward_.default)
        return _InPlace.apply(*both, logits, tokens, temperature, _shard(group, logits, tokens))
    if group is not None:
        return _token_log_probs_and_entropy_over_group(_shard(group, logits, tokens), logits, tokens, temperature)[:2]
    return _token_log_probs_and_entropy(logits, tokens, temperature)[:2]


def _check(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    check.tensor("logits", logits)
    check.tensor("tokens", tokens, dtypes=(torch.int64,))
    check.same_device("tokens", tokens, "logits", logits)
    if logits.dim() == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens: got shape {tuple(tokens.shape)}, wanted {tuple(logits.shape[:-1])}, the shape of logits "
            f"{tuple(logits.shape)} without the vocabulary"
        )
    check.vocabulary("logits", logits)
    return temperature_number(temperature)


def _shard(group, logits: Tensor, tokens: Tensor) -> Shard | None:
    return None if group is None else shard(group, tokens, logits.shape[-1])


@checked_once
def temperature_number(temperature: float) -> Tensor:
    """As the raw ops take it."""
    return check.scalars(check.temperature(temperature))


# Autograd. The backward passes rebuild p from the logits and their normaliser; nothing of size [N, V] is kept.


def _setup(ctx, inputs, output) -> None:
    logits, tokens, ctx.temperature = inputs
    ctx.save_for_backward(logits, tokens, *output[1:])
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_log_probs, _grad_normaliser):
    if grad_log_probs is None or not ctx.needs_input_grad[0]:
        return None, None, None
    return ops.token_log_probs_backward(grad_log_probs, *ctx.saved_tensors, ctx.temperature), None, None


def _backward_with_entropy(ctx, grad_log_probs, grad_entropy, _grad_normaliser):
    if not ctx.needs_input_grad[0] or (grad_log_probs is None and grad_entropy is None):
        return None, None, None
    logits, tokens, entropy, normaliser = ctx.saved_tensors
    if grad_entropy is None:
        return ops.token_log_probs_backward(grad_log_probs, logits, tokens, normaliser, ctx.temperature), None, None
    if grad_log_probs is None:
        grad_log_probs = torch.zeros_like(grad_entropy)
    grad = ops.token_log_probs_and_entropy_backward(
        grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, ctx.temperature
    )
    return grad, None, None


_token_log_probs = differentiable("token_log_probs", _setup, _backward)
_token_log_probs_and_entropy = differentiable("token_log_probs_and_entropy", _setup, _backward_with_entropy)
_token_log_probs_over_group = over_group("token_log_probs", _setup, _backward, tokens=1)
_token_log_probs_and_entropy_over_group = over_group(
    "token_log_probs_and_entropy", _setup, _backward_with_entropy, tokens=1
)


class _InPlace(torch.autograd.Function):
    """Either op with the gradient written over the logits."""

    @staticmethod
    def forward(ctx, op, backward, logits, tokens, temperature, part):
        if part is None:
            *results, normaliser = op(logits, tokens, temperature)
        else:
            tokens = part.tokens
            *results, normaliser = merge(op(logits, tokens, temperature), part, temperature)
        ctx.save_for_backward(logits, tokens, normaliser, *results[1:])
        ctx.op, ctx.temperature = backward, temperature
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        logits, *saved = ctx.saved_tensors
        logits = logits.detach()
        ctx.op(*grads, logits, *saved, ctx.temperature)
        # Whoever else saved these logits for a backward pass, or runs this one twice, gets torch's error, not garbage.
        torch.autograd.graph.increment_version(logits)
        return None, None, logits, None, None, None


# Shapes.


@torch.library.register_fake("fastrlhf::token_log_probs")
def _(logits, tokens, temperature):
    return _fp32(tokens), _fp32(tokens, 2)


@torch.library.register_fake("fastrlhf::token_log_probs_and_entropy")
def _(logits, tokens, temperature):
    return _fp32(tokens), _fp32(tokens), _fp32(tokens, 2)


@torch.library.register_fake("fastrlhf::token_log_probs_backward")
def _(grad_log_probs, logits, tokens, normaliser, temperature):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fastrlhf::token_log_probs_and_entropy_backward")
def _(grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fastrlhf::token_log_probs_backward_")
def _(grad_log_probs, logits, tokens, normaliser, temperature):
    return None


@torch.library.register_fake("fastrlhf::token_log_probs_and_entropy_backward_")
def _(grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature):
    return None


def _fp32(x: Tensor, *more: int) -> Tensor:
    return x.new_empty((*x.shape, *more), dtype=torch.float32)
