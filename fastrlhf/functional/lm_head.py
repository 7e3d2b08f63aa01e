"""From hidden states to log-probs and to losses, with no more of the logits in memory than a few rows.

Every op takes the LM head as `weight` (and `bias`) and does the head's matrix product itself, some rows or tiles at a
time. With x = hidden, z = softcap tanh((x W^T + bias) / softcap), or x W^T + bias without a cap, and
p = softmax(z / T):

    dz = (1/T) [ g (delta - p) - h p (log p + H) ],    dx = dz (1 - (z / softcap)^2) W,    dW = (...)^T x,

g and h being the gradients of log-prob and entropy. `linear_token_log_probs` computes the logits again for that (four
products of N V H in all); the losses know g and h in the forward pass and have their gradients before they return
(three). A head whose weight needs no gradient pays for none. A head that multiplies its logits by s is one with
temperature T / s and softcap / s.

Arguments that all of them share:

hidden: [..., H], fp32, bf16 or fp16. Under autocast it is cast to autocast's dtype, as nn.Linear would.
weight: [V, H], of the same dtype. Its gradient is summed in fp32 over all tokens and rounded once. Where the parameter
    has an attribute `main_grad` (fp32, [V, H], as Megatron's), the gradient is added there, and weight.grad stays
    untouched; not under torch.compile, and not where autocast casts the weight.
tokens: [...], int64 in [0, V), or -100 for positions to ignore: result 0, gradient 0, hidden state not read.
bias: [V], of the same dtype, or None.
temperature: a positive normal fp32 number. softcap: the same, or None.
chunk_bytes: what logits and packed hidden states may take; None is 28 MiB on CPU, 1 GiB elsewhere. A loss works on
    max(128, chunk_bytes / (4 (V + 3 H))) tokens at a time on CPU, at most 1024, and on max(64, chunk_bytes / (b V))
    elsewhere, b being the bytes of an element. Log-probs on CPU keep no logits for longer than a tile, and their
    backward pass a stretch of 1536 rows of the vocabulary. On CPU it changes no bit of the result. A weight of 16 bits
    needs an fp32 [V, H] beside its gradient as soon as there are two chunks, to sum them up in.
group: a process group of torch.distributed over which the vocabulary is spread, in the order of its ranks: weight and
    bias are this rank's rows, V may differ from rank to rank, and tokens are in [0, sum of V). All ranks call with the
    same hidden states and tokens, get the same bits and must go on to the same loss. The gradient of hidden is summed
    over the ranks, in fp32, so all of them or none must want it; those of weight and bias stay with their rows. Two
    small all-gathers forward (of V, and of four numbers a token), one all-reduce of [N, H] backward. The losses are
    then composed of `linear_token_log_probs_and_entropy` and a loss of its results, four products: no rank alone knows
    g and h in time. torch.compile makes one graph of it.

Log-probs come from logits in fp32 on CPU. Reverse mode only, once: forward-mode AD and double backward raise
NotImplementedError. Raises ValueError on shapes, dtypes and devices that don't match, IndexError (CPU) on tokens
outside [0, V).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable, is_traced, scaled
from fastrlhf.functional._vocab_parallel import over_group, shard, summed
from fastrlhf.functional.losses import PPOStats, check_ppo_inputs, ppo_loss, ppo_options
from fastrlhf.functional.preferences import DPOStats, dpo_loss
from fastrlhf.reference import check_ends

ops = torch.ops.fastrlhf

CHUNK_BYTES = {"cpu": 28 << 20}  # what of the logits stays in memory; with it, a few MiB of packed hidden states
CHUNK_BYTES_ELSEWHERE = 1 << 30  # fewer tokens would read and write the weight's gradient too often


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`token_log_probs` of the logits hidden weight^T + bias, which never exist.

    Arguments and errors: see the module. Returns [...], fp32, in nats. Gradient to hidden, weight and bias, each in its
    dtype, and none computed that nobody asked for.
    """
    head = _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes)
    return _log_probs_and_entropy(head, tokens, group)[0]


def linear_token_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs_and_entropy` of the logits hidden weight^T + bias, which never exist.

    As `linear_token_log_probs`. Returns (log_probs, entropy), both [...], fp32, in nats; both carry gradient.
    """
    head = _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes)
    return _log_probs_and_entropy(head, tokens, group)


def _log_probs_and_entropy(head: tuple, tokens: Tensor, group) -> tuple[Tensor, Tensor]:
    """In the shape of tokens, from what `_head` returns."""
    if group is None:
        results = _linear_token_log_probs(*head)
    else:
        results = _linear_token_log_probs_over_group(shard(group, head[3], head[1].shape[0]), *head)
    return tuple(x.view(tokens.shape) for x in results[:2])


class CrossEntropyStats(NamedTuple):
    """Scalars on the loss's device, without gradient; 0 if nothing counts."""

    entropy: Tensor  # mean over the tokens that count, in nats
    tokens: Tensor  # how many counted


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    denominator: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, CrossEntropyStats]:
    """Mean of -log p over the tokens that count, with its gradients computed in the forward pass: three products.

    Arguments and errors: see the module (with a group, four products). tokens are the labels, already shifted to the
    positions that predict them.
    denominator: replaces the count of the tokens by the global one, so that gradient accumulation and data parallelism
        give the gradient of one big batch.
    Returns (loss, CrossEntropyStats), the loss an fp32 scalar; 0 if nothing counts.
    """
    head = _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes)
    denominator = check.denominator(denominator, tokens)
    if group is not None:
        log_probs, entropy = _log_probs_and_entropy(head, tokens, group)
        count = (tokens != -100).sum().float()
        total = count if denominator is None else denominator
        return _mean(-log_probs.sum(), total), CrossEntropyStats(_mean(entropy.detach().sum(), count), count)
    loss, stats, *_ = _linear_cross_entropy(*head, denominator, *_wanted(*head[:3]))
    return loss, CrossEntropyStats(*stats.unbind())


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing counts."""
    return total / torch.where(count == 0, math.inf, count)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ratio_level: str = "token",
    weights: Tensor | None = None,
    advantage_stats: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, PPOStats]:
    """`ppo_loss` of the log-probs and entropies of the logits hidden weight^T + bias, which never exist.

    hidden, weight, tokens, bias, temperature, softcap, chunk_bytes, group: see the module.
    old_log_probs, advantages, mask and all other options: as for `ppo_loss`, in the shape of tokens. Where the mask is
        0, tokens and hidden states are not read either. The entropy is that of softmax(logits / temperature).
    Returns (loss, PPOStats), with the gradients of hidden, weight and bias computed in the forward pass: three products
    of N V H, two where the weight is frozen. A "sequence" ratio needs the sum over its sequence before any gradient is
    known: it is composed of `linear_token_log_probs_and_entropy` and `ppo_loss`, four products, as with a group.
    """
    tokens = _only_where(mask, tokens, old_log_probs)
    head = _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes)
    options = (clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef)
    names = (kl_estimator, ratio_level, aggregation)
    numbers, (estimator, sequence_ratio, aggregation_index) = ppo_options(*options, *names)
    by_sequence = f"aggregation={aggregation!r}" if aggregation_index else None
    counts = check_ppo_inputs(
        ("tokens", tokens),
        {"old_log_probs": old_log_probs, "advantages": advantages},
        {"weights": weights, "ref_log_probs": ref_log_probs},
        mask,
        advantage_stats,
        kl_coef=kl_coef,
        by_sequence="ratio_level='sequence'" if sequence_ratio else by_sequence,
    )
    if sequence_ratio or group is not None:
        log_probs, entropy = _log_probs_and_entropy(head, tokens, group)
        return ppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            counts,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
            ratio_level=ratio_level,
            weights=weights,
            advantage_stats=advantage_stats,
            entropy=entropy,
            entropy_coef=entropy_coef,
            ref_log_probs=ref_log_probs,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            aggregation=aggregation,
            denominator=denominator,
        )
    hidden, weight, bias, _, *rest = head
    loss, stats, *_ = _linear_ppo_loss(
        hidden,
        weight,
        bias,
        tokens,
        *rest,
        check.fp32(old_log_probs),
        check.fp32(advantages),
        counts,
        check.fp32(weights),
        check.fp32(advantage_stats),
        check.fp32(ref_log_probs),
        check.denominator(denominator, tokens),
        numbers,
        estimator,
        aggregation_index,
        *_wanted(hidden, weight, bias),
    )
    return loss, PPOStats(*stats.unbind())


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, DPOStats]:
    """`dpo_loss` of the log-probs of whole responses, from the hidden states of their tokens.

    hidden [N, H], weight, tokens [N], bias, temperature, softcap, chunk_bytes, group: see the module.
    cu_seqlens: [2 B + 1], int32 or int64: response b is cu_seqlens[b] .. cu_seqlens[b + 1], the B chosen ones first.
        For responses padded to [2 B, T], torch.arange(0, 2 * B * T + 1, T), with tokens of -100 for the padding.
    ref_chosen, ref_rejected: [B], log-probs summed over a response, under the reference.
    beta, variant, label_smoothing: as for `dpo_loss`; for "ipo", divide by the lengths and call `dpo_loss` yourself.
    Returns (loss, DPOStats). A pair's gradient needs the sums over its responses first: four products of N V H. Raises
    IndexError (CPU) where cu_seqlens is not an ascent from 0 to N.
    """
    if variant == "ipo":
        raise ValueError("variant: got 'ipo', wanted a variant of summed log-probs; see dpo_loss for 'ipo'")
    check.tensor("tokens", tokens, dims=1, dtypes=(torch.int64,))
    check.tensor("cu_seqlens", cu_seqlens, dims=1, dtypes=(torch.int32, torch.int64))
    check.same_device("cu_seqlens", cu_seqlens, "tokens", tokens)
    check.tensor("ref_chosen", ref_chosen, dims=1)
    check.same_device("ref_chosen", ref_chosen, "tokens", tokens)
    check.like("ref_rejected", ref_rejected, "ref_chosen", ref_chosen)
    if cu_seqlens.shape[0] != 2 * ref_chosen.shape[0] + 1:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, wanted ({2 * ref_chosen.shape[0] + 1},): the ends of "
            f"twice as many responses as ref_chosen {tuple(ref_chosen.shape)} has"
        )
    if tokens.is_cpu and not is_traced():
        check_ends(cu_seqlens.tolist(), tokens.shape[0])
    head = _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes)
    log_probs, _ = _log_probs_and_entropy(head, tokens, group)
    # On CPU it adds one by one: over thousands of tokens fp32 would lose digits. Elsewhere it adds as a tree.
    terms = log_probs.double() if log_probs.is_cpu else log_probs
    sums = torch.segment_reduce(terms, "sum", offsets=cu_seqlens, axis=0, initial=0.0)
    chosen, rejected = sums.float().chunk(2)
    return dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, variant=variant, label_smoothing=label_smoothing
    )


def _only_where(mask: Tensor, tokens: Tensor, model: Tensor) -> Tensor:
    """Tokens, and -100 where the mask is 0."""
    check.tensor("tokens", tokens, dtypes=(torch.int64,))
    check.like("old_log_probs", model, "tokens", tokens)
    return torch.where(check.mask("mask", mask, "tokens", tokens), tokens, -100)


def _head(hidden, weight, tokens, bias, temperature, softcap, chunk_bytes) -> tuple:
    """Checked, and as the raw ops take them: hidden [N, H], weight, bias, tokens [N], numbers, chunk_bytes."""
    check.tensor("hidden", hidden)
    check.tensor("weight", weight, dims=2)
    check.tensor("tokens", tokens, dtypes=(torch.int64,))
    if hidden.dim() == 0 or hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens: got shape {tuple(tokens.shape)}, wanted {tuple(hidden.shape[:-1])}, the shape of hidden "
            f"{tuple(hidden.shape)} without its last dimension"
        )
    if weight.numel() == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, wanted [V, {max(hidden.shape[-1], 1)}], V >= 1, for hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None:
        check.tensor("bias", bias, dims=1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},), one for each token")
    for name, x in (("weight", weight), ("tokens", tokens), *((("bias", bias),) if bias is not None else ())):
        check.same_device(name, x, "hidden", hidden)
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (x if x is None or x.dtype == dtype else x.to(dtype) for x in (hidden, weight, bias))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{name}: got dtype {x.dtype}, wanted {hidden.dtype}, the dtype of hidden")
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE)
    elif not isinstance(chunk_bytes, int) or isinstance(chunk_bytes, bool) or chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: got {chunk_bytes!r}, wanted a positive number of bytes")
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat, weight, bias, tokens.reshape(-1), head_numbers(temperature, softcap), chunk_bytes


@checked_once
def head_numbers(temperature, softcap) -> Tensor:
    """As the raw ops take them."""
    least = check.FP32.tiny  # below it, the kernels would see a 0
    softcap = math.inf if softcap is None else check.number("softcap", softcap, least=least)
    return check.scalars(check.temperature(temperature), softcap)


def _wanted(*inputs: Tensor | None) -> tuple[bool, bool, bool, bool]:
    """Of hidden, weight and bias: which gradients the forward pass is to compute, and whether the weight's in fp32."""
    enabled = torch.is_grad_enabled()
    needs = (enabled and x is not None and x.requires_grad for x in inputs)
    return *needs, _main_grad(inputs[1]) is not None


# Autograd.


def _main_grad(weight: Tensor) -> Tensor | None:
    return None if torch.compiler.is_compiling() else getattr(weight, "main_grad", None)


def _added(weight: Tensor) -> None:
    """Megatron asks for a sign that main_grad has it."""
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, tokens, ctx.numbers, ctx.chunk_bytes = inputs
    ctx.save_for_backward(hidden, weight, bias, tokens, *output[1:])
    ctx.weight = weight if _main_grad(weight) is not None else None
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_log_probs, grad_entropy, _grad_normaliser):
    needs = ctx.needs_input_grad[:3]
    if not any(needs) or (grad_log_probs is None and grad_entropy is None):
        return (None,) * 6
    hidden, weight, bias, tokens, entropy, normaliser = ctx.saved_tensors
    if grad_log_probs is None:
        grad_log_probs = torch.zeros_like(grad_entropy)
    main_grad = None if ctx.weight is None else ctx.weight.main_grad
    into = main_grad is not None and needs[1]
    grads = ops.linear_token_log_probs_backward(
        *(grad_log_probs, grad_entropy, hidden, weight, bias, tokens, normaliser, entropy, ctx.numbers),
        *(ctx.chunk_bytes, *needs, into),
    )
    grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    if into:
        main_grad.add_(grads[1])
        _added(ctx.weight)
        grads[1] = None
    return *grads, None, None, None


def _backward_over_group(ctx, *grads):
    hidden, *rest = _backward(ctx, *grads)
    return None if hidden is None else summed(hidden, ctx.group), *rest


def _known(arguments: int) -> tuple:
    """For `differentiable`: a loss that returns (loss, stats, grad_hidden, grad_weight, grad_bias)."""

    def setup(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output[2:])
        ctx.weight = inputs[1] if _main_grad(inputs[1]) is not None else None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        grads = [None] * arguments
        if grad is None:
            return tuple(grads)
        for i, known in enumerate(ctx.saved_tensors):
            if not ctx.needs_input_grad[i]:
                continue
            if i == 1 and ctx.weight is not None:
                ctx.weight.main_grad.addcmul_(known, grad)
                _added(ctx.weight)
            else:
                grads[i] = scaled(known, grad, getattr(ctx, "outputs_are_ours", False))
        return tuple(grads)

    return setup, backward, (0, 1, 2)


_linear_token_log_probs = differentiable("linear_token_log_probs", _setup, _backward, (0, 1, 2))
_linear_token_log_probs_over_group = over_group("linear_token_log_probs", _setup, _backward_over_group, tokens=3)
_linear_cross_entropy = differentiable("linear_cross_entropy", *_known(arguments=11))
_linear_ppo_loss = differentiable("linear_ppo_loss", *_known(arguments=20))


# Shapes.


@torch.library.register_fake("fastrlhf::linear_token_log_probs")
def _(hidden, weight, bias, tokens, numbers, chunk_bytes):
    shape = tokens.shape
    return tuple(hidden.new_empty((*shape, *more), dtype=torch.float32) for more in ((), (), (2,)))


@torch.library.register_fake("fastrlhf::linear_token_log_probs_backward")
def _(grad_log_probs, grad_entropy, hidden, weight, bias, tokens, normaliser, entropy, numbers, chunk_bytes, *needs):
    return _grads(hidden, weight, bias, *needs)


@torch.library.register_fake("fastrlhf::linear_cross_entropy")
def _(hidden, weight, bias, tokens, numbers, chunk_bytes, denominator, *needs):
    return *_scalars(hidden, CrossEntropyStats), *_grads(hidden, weight, bias, *needs)


@torch.library.register_fake("fastrlhf::linear_ppo_loss")
def _(hidden, weight, bias, tokens, *rest):
    return *_scalars(hidden, PPOStats), *_grads(hidden, weight, bias, *rest[-4:])


def _scalars(model: Tensor, stats: type) -> tuple[Tensor, Tensor]:
    return tuple(model.new_empty(shape, dtype=torch.float32) for shape in ((), (len(stats._fields),)))


def _grads(hidden, weight, bias, needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32) -> tuple[Tensor, ...]:
    dtype = torch.float32 if weight_grad_in_fp32 else weight.dtype
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=dtype),
        hidden.new_empty(bias.shape if needs_bias else 0),
    )
