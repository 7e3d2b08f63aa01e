"""pairwise_reward_loss and dpo_loss: loss, statistics and gradients of pairs, in one launch of one program.

A pair is two or four numbers, and a batch has thousands of pairs at most: one program walks over them, TILE at a time,
every lane with its own sums. That takes about a microsecond a tile, and nothing has to be put together afterwards.

Compilation. One binary for each op, for each variant, with and without gradient; sizes and coefficients at run time.
"""

import triton
import triton.language as tl

from ._math import exp_with_residual
from ._rows import on_device_of
from .losses import _gradient, _like, _no_tokens, _ratio_or_zero, _sum4

NUM_WARPS = 4
TILE = 512
STATS = 4

# Constants read inside kernels have to be constexpr. The variants are numbered as in fastrlhf/fallback.py.
_SIGMOID, _, _HINGE, _IPO = (tl.constexpr(i) for i in range(4))


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1], as 2 artanh(t / (2 + t)) by its series: full relative accuracy for small t too."""
    s = tl.div_rn(t, 2.0 + t)
    q = s * s
    series = tl.fma(q, 1.0 / 17.0, 1.0 / 15.0)
    series = tl.fma(q, series, 1.0 / 13.0)
    series = tl.fma(q, series, 1.0 / 11.0)
    series = tl.fma(q, series, 1.0 / 9.0)
    series = tl.fma(q, series, 1.0 / 7.0)
    series = tl.fma(q, series, 1.0 / 5.0)
    series = tl.fma(q, series, 1.0 / 3.0)
    return 2.0 * tl.fma(s * q, series, s)


@triton.jit
def _log_sigmoids(x):
    """-log sigmoid(x), -log sigmoid(-x), and their slopes up to the sign, sigmoid(-x) and sigmoid(x)."""
    tail, _ = exp_with_residual(-tl.abs(x))  # exp never overflows this way round
    common = _log1p(tail)
    large = tl.div_rn(1.0, 1.0 + tail)
    small = tl.div_rn(tail, 1.0 + tail)
    positive = x > 0.0
    right = common + tl.where(positive, 0.0, -x)
    wrong = common + tl.where(positive, x, 0.0)
    return right, wrong, tl.where(positive, small, large), tl.where(positive, large, small)


@triton.jit
def _won(difference):
    """1 for the right order, 1/2 for a tie."""
    return tl.where(difference > 0.0, 1.0, tl.where(difference == 0.0, 0.5, 0.0))


@triton.jit
def _store_results(loss_ptr, stats_ptr, count, loss, first, second, third, fourth):
    """Means over the pairs."""
    first, second, third, fourth = _sum4(first, second, third, fourth)
    tl.store(loss_ptr, _ratio_or_zero(tl.sum(loss, 0), count))
    tl.store(stats_ptr, _ratio_or_zero(first, count))
    tl.store(stats_ptr + 1, _ratio_or_zero(second, count))
    tl.store(stats_ptr + 2, _ratio_or_zero(third, count))
    tl.store(stats_ptr + 3, _ratio_or_zero(fourth, count))


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[
        "chosen_ptr",
        "rejected_ptr",
        "margin_ptr",
        "loss_ptr",
        "stats_ptr",
        "grad_chosen_ptr",
        "grad_rejected_ptr",
    ],
)
def _pairwise_kernel(
    chosen_ptr,
    rejected_ptr,
    margin_ptr,
    loss_ptr,
    stats_ptr,
    grad_chosen_ptr,
    grad_rejected_ptr,
    n: tl.int64,
    center_coef: tl.float32,
    TILE: tl.constexpr,
):
    count = n.to(tl.float32)
    zeros = tl.zeros([TILE], tl.float32)
    loss, won, differences, sum_chosen, sum_rejected = zeros, zeros, zeros, zeros, zeros
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE).to(tl.int64)
        inside = i < n
        chosen = tl.load(chosen_ptr + i, mask=inside, other=0.0)
        rejected = tl.load(rejected_ptr + i, mask=inside, other=0.0)
        difference = chosen - rejected
        both = chosen + rejected
        x = difference
        if margin_ptr is not None:
            x = difference - tl.load(margin_ptr + i, mask=inside, other=0.0)
        right, _, slope, _ = _log_sigmoids(x)
        loss += tl.where(inside, right + center_coef * both * both, 0.0)
        won += tl.where(inside, _won(difference), 0.0)
        differences += difference
        sum_chosen += chosen
        sum_rejected += rejected
        if grad_chosen_ptr is not None:
            center = 2.0 * center_coef * both
            tl.store(grad_chosen_ptr + i, tl.div_rn(center - slope, count), mask=inside)
            tl.store(grad_rejected_ptr + i, tl.div_rn(center + slope, count), mask=inside)
    _store_results(loss_ptr, stats_ptr, count, loss, won, differences, sum_chosen, sum_rejected)


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[
        "policy_chosen_ptr",
        "policy_rejected_ptr",
        "ref_chosen_ptr",
        "ref_rejected_ptr",
        "loss_ptr",
        "stats_ptr",
        "grad_chosen_ptr",
        "grad_rejected_ptr",
    ],
)
def _dpo_kernel(
    policy_chosen_ptr,
    policy_rejected_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    loss_ptr,
    stats_ptr,
    grad_chosen_ptr,
    grad_rejected_ptr,
    n: tl.int64,
    beta: tl.float32,
    smoothing: tl.float32,
    VARIANT: tl.constexpr,
    TILE: tl.constexpr,
):
    count = n.to(tl.float32)
    zeros = tl.zeros([TILE], tl.float32)
    loss, won, margins, rewards_chosen, rewards_rejected = zeros, zeros, zeros, zeros, zeros
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE).to(tl.int64)
        inside = i < n
        chosen = tl.load(policy_chosen_ptr + i, mask=inside, other=0.0)
        chosen -= tl.load(ref_chosen_ptr + i, mask=inside, other=0.0)
        rejected = tl.load(policy_rejected_ptr + i, mask=inside, other=0.0)
        rejected -= tl.load(ref_rejected_ptr + i, mask=inside, other=0.0)
        h = chosen - rejected
        x = beta * h
        if VARIANT == _HINGE:
            each = tl.where(x > 1.0, 0.0, 1.0 - x)  # a nan shows
            slope = tl.where(x < 1.0, -beta, tl.where(x == x, 0.0, x))
        elif VARIANT == _IPO:
            distance = h - tl.div_rn(0.5, beta)
            each = distance * distance
            slope = 2.0 * distance
        else:
            right, wrong, up, down = _log_sigmoids(x)
            if VARIANT == _SIGMOID:
                each = (1.0 - smoothing) * right + smoothing * wrong
                slope = beta * (smoothing * down - (1.0 - smoothing) * up)
            else:
                unbiased = 1.0 - 2.0 * smoothing
                each = tl.div_rn((1.0 - smoothing) * right - smoothing * wrong, unbiased)
                slope = tl.div_rn(-beta * ((1.0 - smoothing) * up + smoothing * down), unbiased)
        loss += tl.where(inside, each, 0.0)
        won += tl.where(inside, _won(h), 0.0)
        margins += x
        rewards_chosen += beta * chosen
        rewards_rejected += beta * rejected
        if grad_chosen_ptr is not None:
            slope = tl.div_rn(slope, count)
            tl.store(grad_chosen_ptr + i, slope, mask=inside)
            tl.store(grad_rejected_ptr + i, -slope, mask=inside)
    _store_results(loss_ptr, stats_ptr, count, loss, won, margins, rewards_chosen, rewards_rejected)


def _launch(kernel, inputs, numbers, needs_grad, **constants):
    """Loss, statistics and the gradients of chosen and rejected, from a kernel that takes them in this order."""
    model = inputs[0]
    grads = [_gradient(model) if needs_grad else model.new_empty(0) for _ in range(2)]
    n = model.numel()
    if n == 0:
        return *_no_tokens(model, STATS), *grads
    loss, stats = model.new_empty(()), model.new_empty(STATS)
    with on_device_of(model):
        kernel[(1,)](
            *inputs,
            loss,
            stats,
            *(grads if needs_grad else (None, None)),
            n,
            *numbers,
            TILE=TILE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
            **constants,
        )
    return loss, stats, *grads


def pairwise_reward_loss(chosen, rejected, margin, center_coef, needs_grad):
    """The Bradley-Terry loss of a reward model, its four statistics, and its gradients.

    chosen, rejected, margin (or None): [B], fp32. center_coef: one fp32 number in CPU memory.
    Returns (loss, stats [4] in the order of fastrlhf.functional.PairwiseRewardStats, grad_chosen, grad_rejected), the
    gradients empty without needs_grad.
    """
    inputs = {"chosen": chosen, "rejected": rejected, "margin": margin}
    inputs = [_like(name, x, chosen) for name, x in inputs.items()]
    return _launch(_pairwise_kernel, inputs, [center_coef.item()], needs_grad)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, options, variant, needs_grad):
    """Direct preference optimisation: loss, four statistics, and the gradients of the first two.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected: [B], fp32, log-probabilities of responses. options: fp32
    in CPU memory, beta and label_smoothing. variant: position in fastrlhf.fallback.DPO_VARIANTS.
    Returns (loss, stats [4] in the order of fastrlhf.functional.DPOStats, grad_chosen, grad_rejected), the gradients
    empty without needs_grad.
    """
    inputs = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }
    inputs = [_like(name, x, policy_chosen) for name, x in inputs.items()]
    return _launch(_dpo_kernel, inputs, options.tolist(), needs_grad, VARIANT=variant)
