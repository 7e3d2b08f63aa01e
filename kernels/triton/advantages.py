"""Advantages and returns, from the last token to the first: Triton kernels behind torch.ops.fastrlhf.

One program a row (a sequence, where they are packed), in tiles of TILE tokens from the end; what is later than a tile
comes down to two numbers, V_{t+1} and A_{t+1}. Inside a tile everything is two scans over maps that can be put together
in any grouping. The first finds the value of the next token that moves the recursion, by selection alone, so that it is
exact however many masked tokens lie between; it gives delta_t = r_t + gamma V_next - V_t. The second is the recursion
A_t = a_t A_{t+1} + b_t, with (gamma lambda, delta_t) at tokens that move it and (1, 0) at those that do not, which pass
on what they get to the last bit. (One scan, over gamma V + gamma lambda A, would do. But it adds up values instead of
their differences: where values are large and neighbours close, digits would be lost that the plain recursion keeps.)

Tiles start at the first token of a row, so its bits do not depend on the other rows, on the padding behind it under
"carry", or on where it lies in memory: packed and padded give the same.

rollout_advantages makes the rewards on the way (the score goes to the last token that counts, the first that is met)
and leaves each row's moments of the advantages behind; the last program puts them together, in the same launch. How
that is ordered without float atomics, and how rows are loaded 16 bytes a thread, is told in masked.py.

Compilation. One binary for all sizes, strides, alignments, modes, estimators and coefficients; only whether there are a
mask, bootstrap_values and token_rewards chooses between binaries.
"""

import torch

import triton
import triton.language as tl

from ._math import kl_estimate
from ._rows import on_device_of
from .masked import (
    _arrived_last,
    _moments_joined,
    _moments_of,
    _moments_of_parts,
    _moments_stored,
    _read,
    _reciprocal_deviation,
    _unaligned,
    _write,
    arrivals,
    check,
    rows_of,
)

NUM_WARPS = 4
TILE = 1024  # tokens: 8 a thread
LANES = 512  # rows whose moments are put together at a time
VARIANCE_EPS = 1e-8  # as in fastrlhf.reference

CARRY, ZERO, NONE = range(3)  # of the mask modes
_CARRY, _NONE = tl.constexpr(CARRY), tl.constexpr(NONE)
_VARIANCE_EPS = tl.constexpr(VARIANCE_EPS)


@triton.jit
def _following(n, first, second, n2, first2, second2):
    """Of later tokens, then earlier ones before them: how many move the recursion, and the values of the first two."""
    return (
        n + n2,
        tl.where(n2 > 0, first2, first),
        tl.where(n2 > 1, second2, tl.where(n2 == 1, first, second)),
    )


@triton.jit
def _discounted(a, b, a2, b2):
    """The maps A -> a A + b of later tokens, then A -> a2 A + b2 of earlier ones."""
    return a * a2, tl.fma(a2, b, b2)


@triton.jit
def _gae_tile(r, v, moves, next_value, next_advantage, gamma, gamma_lam):
    """Advantages of one tile, given V and A of the token after it; and for the tile before: is it to take V of this
    one, and V and A of its first token that moves."""
    n, first, second = tl.associative_scan((moves.to(tl.int32), v, v), 0, _following, reverse=True)
    delta = tl.fma(gamma, tl.where(n > 1, second, next_value), r) - v
    a, b = tl.associative_scan(
        (tl.where(moves, gamma_lam, 1.0), tl.where(moves, delta, 0.0)), 0, _discounted, reverse=True
    )
    return tl.fma(a, next_advantage, b), n, first


@triton.jit
def _state_before(advantage, n, first, next_value, LENGTH: tl.constexpr):
    """What the tile before has to know of one: V and A of its first token that moves the recursion."""
    head = tl.arange(0, LENGTH) == 0
    moved = tl.sum(tl.where(head, n, 0), 0) > 0
    value = tl.sum(tl.where(head, first, 0.0), 0)
    return tl.where(moved, value, next_value), tl.sum(tl.where(head, advantage, 0.0), 0)


@triton.jit
def _write_targets(advantages, returns, start, length, wide, advantage, v, counts, TILE: tl.constexpr):
    a = tl.where(counts, advantage, 0.0)
    r = tl.where(counts, advantage + v, 0.0)
    if wide:
        _write(advantages, start, length, a, True, 16, TILE)
        _write(returns, start, length, r, True, 16, TILE)
    else:
        _write(advantages, start, length, a, False, 16, TILE)
        _write(returns, start, length, r, False, 16, TILE)


@triton.jit
def _gae_inputs(rewards, values, mask, start, length, WIDE: tl.constexpr, TILE: tl.constexpr):
    """All that is read of one tile. Without a mask everything counts."""
    kept = tl.full([TILE], 1, tl.int8)
    if mask is not None:
        kept = _read(mask, start, length, 0, WIDE, 4, TILE)
    return kept, _read(rewards, start, length, 0.0, WIDE, 16, TILE), _read(values, start, length, 0.0, WIDE, 16, TILE)


@triton.jit
def _gae_row(
    rewards,
    values,
    mask,
    advantages,
    returns,
    length,
    next_value,
    gamma,
    gamma_lam,
    mode,
    TILE: tl.constexpr,
):
    behind = _unaligned(rewards, 16) + _unaligned(values, 16) + _unaligned(advantages, 16) + _unaligned(returns, 16)
    if mask is not None:
        behind += _unaligned(mask, 4)
    wide = (behind + length % 4) == 0
    next_advantage = 0.0
    tiles = tl.cdiv(length, TILE)
    for i in range(0, tiles):
        start = (tiles - 1 - i) * TILE
        inside = start + tl.arange(0, TILE) < length
        # One branch for all loads, so that none waits for another.
        if wide:
            kept, r, v = _gae_inputs(rewards, values, mask, start, length, True, TILE)
        else:
            kept, r, v = _gae_inputs(rewards, values, mask, start, length, False, TILE)
        kept = inside & (kept != 0)
        r = tl.where(kept, r, 0.0)
        v = tl.where(kept, v, 0.0)
        moves = kept | (inside & (mode != _CARRY))
        advantage, n, first = _gae_tile(r, v, moves, next_value, next_advantage, gamma, gamma_lam)
        _write_targets(advantages, returns, start, length, wide, advantage, v, kept, TILE)
        if start > 0:
            next_value, next_advantage = _state_before(advantage, n, first, next_value, TILE)


@triton.jit(
    do_not_specialize=["T", "stride_r", "stride_v", "stride_m", "mode"],
    do_not_specialize_on_alignment=[
        "rewards_ptr",
        "values_ptr",
        "mask_ptr",
        "bootstrap_ptr",
        "advantages_ptr",
        "returns_ptr",
    ],
)
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    T: tl.int32,
    stride_r: tl.int64,
    stride_v: tl.int64,
    stride_m: tl.int64,
    gamma: tl.float32,
    gamma_lam: tl.float32,
    mode: tl.int32,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + b * stride_m
    last_value = 0.0
    if bootstrap_ptr is not None:
        last_value = tl.load(bootstrap_ptr + b)
    _gae_row(
        rewards_ptr + b * stride_r,
        values_ptr + b * stride_v,
        mask,
        advantages_ptr + b * T,
        returns_ptr + b * T,
        T,
        last_value,
        gamma,
        gamma_lam,
        mode,
        TILE,
    )


@triton.jit(
    do_not_specialize=["N", "mode"],
    do_not_specialize_on_alignment=[
        "rewards_ptr",
        "values_ptr",
        "ends_ptr",
        "mask_ptr",
        "bootstrap_ptr",
        "advantages_ptr",
        "returns_ptr",
    ],
)
def _gae_packed_kernel(
    rewards_ptr,
    values_ptr,
    ends_ptr,
    mask_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    N: tl.int64,
    gamma: tl.float32,
    gamma_lam: tl.float32,
    mode: tl.int32,
    TILE: tl.constexpr,
):
    b = tl.program_id(0)
    # Checking the ends would take a host sync. Wrong ones give wrong results, but lead nowhere outside [0, N).
    zero = tl.zeros([], tl.int64)
    start = tl.minimum(tl.maximum(tl.load(ends_ptr + b).to(tl.int64), zero), N)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + b + 1).to(tl.int64), start), N)
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + start
    last_value = 0.0
    if bootstrap_ptr is not None:
        last_value = tl.load(bootstrap_ptr + b)
    _gae_row(
        rewards_ptr + start,
        values_ptr + start,
        mask,
        advantages_ptr + start,
        returns_ptr + start,
        (end - start).to(tl.int32),
        last_value,
        gamma,
        gamma_lam,
        mode,
        TILE,
    )


@triton.jit
def _rollout_tile(
    log_probs, ref_log_probs, values, mask, token_rewards, start, T, WIDE: tl.constexpr, TILE: tl.constexpr
):
    """All that is read of one tile. token_rewards may be None, and is 0 then."""
    kept = _read(mask, start, T, 0, WIDE, 4, TILE)
    log_p = _read(log_probs, start, T, 0.0, WIDE, 16, TILE)
    log_q = _read(ref_log_probs, start, T, 0.0, WIDE, 16, TILE)
    v = _read(values, start, T, 0.0, WIDE, 16, TILE)
    r = tl.zeros([TILE], tl.float32)
    if token_rewards is not None:
        r = _read(token_rewards, start, T, 0.0, WIDE, 16, TILE)
    return kept, log_p, log_q, v, r


@triton.jit(
    do_not_specialize=["B", "T", "stride_l", "stride_f", "stride_v", "stride_m", "stride_t", "estimator", "mode"],
    do_not_specialize_on_alignment=[
        "scores_ptr",
        "log_probs_ptr",
        "ref_log_probs_ptr",
        "values_ptr",
        "mask_ptr",
        "token_rewards_ptr",
        "bootstrap_ptr",
        "advantages_ptr",
        "returns_ptr",
        "kl_ptr",
        "stats_ptr",
        "parts_ptr",
        "arrivals_ptr",
    ],
)
def _rollout_kernel(
    scores_ptr,
    log_probs_ptr,
    ref_log_probs_ptr,
    values_ptr,
    mask_ptr,
    token_rewards_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    kl_ptr,
    stats_ptr,  # mean and 1 / std of the advantages that count
    parts_ptr,
    arrivals_ptr,
    B: tl.int32,
    T: tl.int32,
    stride_l: tl.int64,
    stride_f: tl.int64,
    stride_v: tl.int64,
    stride_m: tl.int64,
    stride_t: tl.int64,
    kl_coef: tl.float32,
    score_clip: tl.float32,
    gamma: tl.float32,
    gamma_lam: tl.float32,
    estimator: tl.int32,
    mode: tl.int32,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    b = row.to(tl.int64)
    log_probs = log_probs_ptr + b * stride_l
    ref_log_probs = ref_log_probs_ptr + b * stride_f
    values = values_ptr + b * stride_v
    mask = mask_ptr + b * stride_m
    advantages = advantages_ptr + b * T
    returns = returns_ptr + b * T
    token_rewards = token_rewards_ptr
    behind = _unaligned(log_probs, 16) + _unaligned(ref_log_probs, 16) + _unaligned(values, 16) + _unaligned(mask, 4)
    behind += _unaligned(advantages, 16) + _unaligned(returns, 16)
    if token_rewards_ptr is not None:
        token_rewards = token_rewards_ptr + b * stride_t
        behind += _unaligned(token_rewards, 16)
    wide = (behind + T % 4) == 0

    score = tl.load(scores_ptr + row)
    clipped = tl.minimum(tl.maximum(score, -score_clip), score_clip)
    score = tl.where(score == score, clipped, score)
    next_value = 0.0
    if bootstrap_ptr is not None:
        next_value = tl.load(bootstrap_ptr + row)
    next_advantage = 0.0
    scored = False
    kl_lanes = tl.zeros([TILE], tl.float32)
    count, pivot, offset, squares = 0.0, 0.0, 0.0, 0.0
    tiles = tl.cdiv(T, TILE)
    for i in range(0, tiles):
        start = (tiles - 1 - i) * TILE
        at = start + tl.arange(0, TILE)
        inside = at < T
        # One branch for all loads, so that none waits for another.
        if wide:
            kept, log_p, log_q, v, r = _rollout_tile(
                log_probs, ref_log_probs, values, mask, token_rewards, start, T, True, TILE
            )
        else:
            kept, log_p, log_q, v, r = _rollout_tile(
                log_probs, ref_log_probs, values, mask, token_rewards, start, T, False, TILE
            )
        kept = kept != 0
        counts = kept | (inside & (mode == _NONE))
        moves = kept | (inside & (mode != _CARRY))
        v = tl.where(counts, v, 0.0)
        kl, _ = kl_estimate(tl.where(kept, log_p - log_q, 0.0), estimator)
        kl_lanes += kl
        r += tl.where(kl_coef != 0.0, -kl_coef * kl, 0.0)  # monitored alone, an infinite KL is no reward
        last = tl.max(tl.where(kept, at, -1), 0)
        r = tl.where((at == last) & (not scored), r + score, r)
        scored = scored | (last >= 0)
        r = tl.where(kept, r, 0.0)
        advantage, n, first = _gae_tile(r, v, moves, next_value, next_advantage, gamma, gamma_lam)
        _write_targets(advantages, returns, start, T, wide, advantage, v, counts, TILE)
        n2, p2, m2, s2 = _moments_of(advantage, kept)
        count, pivot, offset, squares = _moments_joined(count, pivot, offset, squares, n2, p2, m2, s2)
        if start > 0:
            next_value, next_advantage = _state_before(advantage, n, first, next_value, TILE)

    tl.store(kl_ptr + row, tl.sum(kl_lanes, 0))
    _moments_stored(parts_ptr, row, B, (count, pivot, offset, squares))
    if _arrived_last(arrivals_ptr, B):
        count, pivot, offset, squares = _moments_of_parts(parts_ptr, B, LANES)
        tl.store(stats_ptr, pivot + offset)
        tl.store(stats_ptr + 1, _reciprocal_deviation(count, squares, 1.0, _VARIANCE_EPS))


_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def gae(rewards, values, mask, bootstrap_values, options, mask_mode):
    """Generalised advantage estimation: advantages and returns [B, T], fp32, 0 where masked.

    rewards, values: [B, T], fp32. mask: [B, T], bool, or None. bootstrap_values: [B], fp32, or None.
    options: [2], gamma and lambda, in CPU memory. mask_mode: 0 carry, 1 zero, 2 none.
    """
    B, T = rewards.shape
    for name, x in (("rewards", rewards), ("values", values)):
        check(name, x, rewards.shape)
    check("mask", mask, rewards.shape, torch.bool)
    check("bootstrap_values", bootstrap_values, (B,))
    gamma, lam = options.tolist()
    advantages, returns = rewards.new_empty(B, T), rewards.new_empty(B, T)
    if B == 0 or T == 0:
        return advantages, returns
    mask = None if mask_mode == NONE else mask
    (rewards, stride_r), (values, stride_v) = rows_of(rewards), rows_of(values)
    mask, stride_m = (None, 0) if mask is None else rows_of(mask)
    with on_device_of(rewards):
        _gae_kernel[(B,)](
            rewards,
            values,
            mask,
            bootstrap_values if bootstrap_values is None else bootstrap_values.contiguous(),
            advantages,
            returns,
            T,
            stride_r,
            stride_v,
            stride_m,
            gamma,
            gamma * lam,
            mask_mode,
            TILE=TILE,
            **_OPTIONS,
        )
    return advantages, returns


def gae_packed(rewards, values, cu_seqlens, mask, bootstrap_values, options, mask_mode):
    """`gae` of sequences that lie one after the other: advantages and returns [N], fp32.

    rewards, values: [N], fp32. mask: [N], bool, or None. cu_seqlens: [B + 1], int32 or int64; wrong ones are not
    noticed, and what belongs to no sequence is left undefined, but nothing outside [0, N) is touched. The rest as gae.
    """
    N, B = rewards.shape[0], cu_seqlens.shape[0] - 1
    for name, x in (("rewards", rewards), ("values", values)):
        check(name, x, (N,))
    check("mask", mask, (N,), torch.bool)
    check("bootstrap_values", bootstrap_values, (B,))
    gamma, lam = options.tolist()
    advantages, returns = rewards.new_empty(N), rewards.new_empty(N)
    if B == 0 or N == 0:
        return advantages, returns
    mask = None if mask_mode == NONE else mask
    tensors = (rewards, values, cu_seqlens, mask, bootstrap_values)
    with on_device_of(rewards):
        _gae_packed_kernel[(B,)](
            *(x if x is None else x.contiguous() for x in tensors),
            advantages,
            returns,
            N,
            gamma,
            gamma * lam,
            mask_mode,
            TILE=TILE,
            **_OPTIONS,
        )
    return advantages, returns


def rollout_advantages(
    scores,
    log_probs,
    ref_log_probs,
    values,
    mask,
    token_rewards,
    bootstrap_values,
    options,
    kl_estimator,
    mask_mode,
):
    """KL penalty, score, GAE, returns and the statistics for whitening, in one launch.

    scores: [B]. log_probs, ref_log_probs, values: [B, T]. token_rewards: [B, T] or None. bootstrap_values: [B] or None.
    All fp32. mask: [B, T], bool. options: [4], kl_coef, score_clip (infinity for none), gamma and lambda, in CPU
    memory. kl_estimator: 0 k1, 1 k2, 2 k3, 3 abs. mask_mode: 0 carry, 1 zero, 2 none.
    Returns advantages, returns [B, T], kl [B], and stats [2], the mean and 1 / std of the advantages that count; fp32.
    """
    B, T = log_probs.shape
    tokenwise = {
        "log_probs": log_probs,
        "ref_log_probs": ref_log_probs,
        "values": values,
        "token_rewards": token_rewards,
    }
    for name, x in tokenwise.items():
        check(name, x, log_probs.shape)
    check("mask", mask, log_probs.shape, torch.bool)
    for name, x in (("scores", scores), ("bootstrap_values", bootstrap_values)):
        check(name, x, (B,))
    kl_coef, score_clip, gamma, lam = options.tolist()
    advantages, returns = log_probs.new_empty(B, T), log_probs.new_empty(B, T)
    if B == 0 or T == 0:
        stats = log_probs.new_zeros(2)
        stats[1] = VARIANCE_EPS**-0.5
        return advantages, returns, log_probs.new_zeros(B), stats
    kl, stats, parts = log_probs.new_empty(B), log_probs.new_empty(2), log_probs.new_empty(4 * B)
    rows = [rows_of(x) for x in (log_probs, ref_log_probs, values, mask)]
    rows.append((None, 0) if token_rewards is None else rows_of(token_rewards))
    with on_device_of(log_probs):
        _rollout_kernel[(B,)](
            scores.contiguous(),
            *(x for x, _ in rows),
            bootstrap_values if bootstrap_values is None else bootstrap_values.contiguous(),
            advantages,
            returns,
            kl,
            stats,
            parts,
            arrivals(log_probs),
            B,
            T,
            *(stride for _, stride in rows),
            kl_coef,
            score_clip,
            gamma,
            gamma * lam,
            kl_estimator,
            mask_mode,
            TILE=TILE,
            LANES=LANES,
            **_OPTIONS,
        )
    return advantages, returns, kl, stats
