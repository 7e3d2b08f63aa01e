"""ppo_loss and value_loss: loss, statistics and gradients out of one pass over the tokens, behind torch.ops.fastrlhf.

Tokens are taken flat, TILE at a time; program p takes the tiles p, p + programs, ... and every lane keeps its own sums.
Programs leave their sums in `partials`, and the last one to finish adds those up, in the order of the programs. Which
one is last (see masked.py) does not show in the result: equal inputs give equal bits.

Launches. A gradient needs the number of tokens (or sequences) that count before it is written. So:
- one launch if `denominator` is given, if no gradient is wanted, or if there are at most COUNT_ITSELF tokens, for then
  every program counts the whole mask, which lies in L2;
- two otherwise, the first reading the mask alone. It also goes first where sequences matter (a sequence-level ratio, a
  mean over each sequence's tokens): it leaves the length of each, its log-ratio, and the slope of its surrogate. That
  slope needs no third pass: -r times the sums of w A over the tokens with A > 0 and with A < 0, of which the ratio of
  the sequence, clipped or not, lets through the one, the other or both.

Moments are kept by Welford's update in every lane and put together as in Chan et al. 1983, never as a difference of
squares; equal numbers deviate by exactly 0.

Vector width and compilation as in log_probs.py: 16 bytes a thread where all tensors start at 16-byte boundaries, loads
of one element otherwise, the same bits either way; one binary for each set of options, whatever the sizes and numbers.
"""

import torch

import triton
import triton.language as tl

from ._math import _hold, exp_with_residual, kl_estimate
from ._rows import on_device_of
from .masked import _arrived_last, arrivals

NUM_WARPS = 4
TILE = 512  # tokens: 16 bytes of fp32 a thread
MASK_TILE = 4096  # tokens: 32 bytes of the mask a thread
PROGRAMS = 1024
PARTIALS = 1024  # room for a sum of every program
WORDS = 2048  # of 4 bytes; at least PROGRAMS
COUNT_ITSELF = 65_536
REGISTERS = 168  # a thread at most, so that three programs fit on a multiprocessor
VECTOR = 4  # elements of fp32 in 16 bytes
PPO_SUMS, PPO_STATS = 11, 10
VALUE_SUMS, VALUE_STATS = 8, 5
TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN = 0, 1, 2

# Constants read inside kernels have to be constexpr.
_TOKEN_MEAN = tl.constexpr(TOKEN_MEAN)
_SEQ_MEAN_TOKEN_MEAN = tl.constexpr(SEQ_MEAN_TOKEN_MEAN)
_PARTIALS = tl.constexpr(PARTIALS)
_INF = tl.constexpr(float("inf"))


# ------------------------------------------------------------------------------------------ formulas of one token


@triton.jit
def _surrogate(log_ratio, advantage, low, high, dual_clip, log_ratio_clamp):
    """The clipped surrogate: ratio, loss, d loss / d log r, r - 1 - log r, where it is clipped and dual-clipped."""
    ratio, approx_kl = exp_with_residual(_hold(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    cost = -advantage
    plain = cost * ratio
    at_clip = cost * _hold(ratio, low, high)
    clipped = plain < at_clip
    loss = tl.where(clipped, at_clip, plain)
    bound = cost * dual_clip
    dual_clipped = (advantage < 0.0) & (bound < loss)
    loss = tl.where(dual_clipped, bound, loss)
    held = clipped | dual_clipped | (tl.abs(log_ratio) > log_ratio_clamp)
    return ratio, loss, tl.where(held, 0.0, plain), approx_kl, clipped, dual_clipped


@triton.jit
def _value_error(value, target, low, high):
    """Half the squared error, at the value or at the value held in [low, high], its slope, and whether the latter."""
    held = tl.where(low == low, _hold(value, low, high), low)  # an old value of nan shows
    error = value - target
    loss = 0.5 * error * error
    held_error = held - target
    held_loss = 0.5 * held_error * held_error
    clipped = loss < held_loss
    slope = tl.where(clipped, 0.0, tl.where(held == held, error, held))
    return tl.where(clipped | (held != held), held_loss, loss), slope, clipped


# ------------------------------------------------------------------------------------------ what the kernels share


@triton.jit
def _tile(tile, n, lane, TILE: tl.constexpr, GRANULE: tl.constexpr):
    """First token of a tile, how many of it are there, and the lanes that may load: whole granules.

    A granule that straddles the end lies inside one aligned 16-byte unit, so it cannot fault; gradients have room.
    """
    base = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(n - base, TILE).to(tl.int32)
    return base, left, lane // GRANULE * GRANULE < left


@triton.jit
def _start(ptr, base, GRANULE: tl.constexpr):
    return tl.multiple_of(ptr + base, 16) if GRANULE > 1 else ptr + base


@triton.jit
def _mask_start(ptr, base, GRANULE: tl.constexpr):
    return tl.multiple_of(ptr.to(tl.pointer_type(tl.int8)) + base, GRANULE)


@triton.jit
def _kept(start, lane, inside, keep):
    """Where it counts; 0 elsewhere, whatever stands there."""
    return tl.where(keep, tl.load(start + lane, mask=inside, other=0.0), 0.0)


@triton.jit
def _ratio_or_zero(total, count):
    return tl.where(count == 0.0, 0.0, tl.div_rn(total, tl.where(count == 0.0, 1.0, count)))


@triton.jit
def _sum4(a, b, c, d):
    """Four sums with one meeting of the threads."""
    x, y = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))
    a, b = tl.split(x)
    c, d = tl.split(y)
    return a, b, c, d


@triton.jit
def _max4(a, b, c, d):
    """Four maxima with one meeting of the threads."""
    x, y = tl.split(tl.max(tl.join(tl.join(a, b), tl.join(c, d)), 0))
    a, b = tl.split(x)
    c, d = tl.split(y)
    return a, b, c, d


@triton.jit
def _count(mask_ptr, found_ptr, n, n_found, aligned, WORDS: tl.constexpr):
    """How many of the first n bytes of the mask are not 0, plus the numbers that the first launch found."""
    lane = tl.arange(0, WORDS)
    counts = tl.zeros([WORDS], tl.int32)
    if n_found > 0:
        counts = tl.load(found_ptr + lane, mask=lane < n_found, other=0)
    bytes_ptr = mask_ptr.to(tl.pointer_type(tl.int8))
    words_ptr = tl.multiple_of(mask_ptr.to(tl.pointer_type(tl.int32)), 16)
    words = tl.where(aligned != 0, n // 16 * 4, 0)
    packed = tl.zeros([WORDS], tl.int32)  # a count in every byte: at most COUNT_ITSELF / (4 WORDS) = 8 each
    for start in range(0, words, WORDS):
        word = tl.load(words_ptr + (start + lane), mask=start + lane // 4 * 4 < words, other=0)
        packed += (((word & 0x7F7F7F7F) + 0x7F7F7F7F | word) >> 7) & 0x01010101
    for start in range(words * 4, n, WORDS):
        counts += (tl.load(bytes_ptr + (start + lane), mask=start + lane < n, other=0) != 0).to(tl.int32)
    counts += (packed & 0xFF) + (packed >> 8 & 0xFF) + (packed >> 16 & 0xFF) + (packed >> 24 & 0xFF)
    return tl.sum(counts, 0).to(tl.float32)


@triton.jit
def _partial(partials_ptr, index: tl.constexpr, other):
    """One of the sums, of every program, past L1, which other programs do not write to."""
    program = tl.arange(0, _PARTIALS)
    sums = tl.load(_start(partials_ptr, index * _PARTIALS, 4) + program, cache_modifier=".cg")
    return tl.where(program < tl.num_programs(0), sums, other)


# -------------------------------------------------------------------------------------------------- the first launch


@triton.jit
def _row_lanes(
    log_probs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    weights_ptr,
    base,
    size,
    mean,
    rstd,
    TILE: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Lane-wise, of one row: tokens, summed log-ratio, summed w A where A > 0 (or nan) and where A < 0."""
    lane = tl.arange(0, TILE)
    tokens = tl.zeros([TILE], tl.int32)
    log_ratio = tl.zeros([TILE], tl.float32)
    above = tl.zeros([TILE], tl.float32)
    below = tl.zeros([TILE], tl.float32)
    for first in range(0, size, TILE):
        left = size - first
        inside = lane // GRANULE * GRANULE < left
        at = tl.multiple_of(base, GRANULE) + first
        keep = (tl.load(_mask_start(mask_ptr, at, GRANULE) + lane, mask=inside, other=0) != 0) & (lane < left)
        tokens += keep.to(tl.int32)
        if log_probs_ptr is not None:
            log_prob = _kept(_start(log_probs_ptr, at, GRANULE), lane, inside, keep)
            log_ratio += log_prob - _kept(_start(old_ptr, at, GRANULE), lane, inside, keep)
        if advantages_ptr is not None:
            advantage = _kept(_start(advantages_ptr, at, GRANULE), lane, inside, keep)
            pull = tl.where(keep, (advantage - mean) * rstd, 0.0)
            negative = pull < 0.0
            if weights_ptr is not None:
                pull = pull * _kept(_start(weights_ptr, at, GRANULE), lane, inside, keep)
            above += tl.where(negative, 0.0, pull)
            below += tl.where(negative, pull, 0.0)
    return tokens, log_ratio, above, below


@triton.jit(
    do_not_specialize=["n", "length", "rows", "aligned"],
    do_not_specialize_on_alignment=[
        "log_probs_ptr",
        "old_ptr",
        "advantages_ptr",
        "mask_ptr",
        "weights_ptr",
        "advantage_stats_ptr",
        "lengths_ptr",
        "log_ratios_ptr",
        "slopes_ptr",
        "found_ptr",
    ],
)
def _rows_kernel(
    log_probs_ptr,  # None without a sequence-level ratio
    old_ptr,
    advantages_ptr,  # None without its gradient
    mask_ptr,
    weights_ptr,
    advantage_stats_ptr,
    lengths_ptr,  # None where nobody asks how long a row is
    log_ratios_ptr,
    slopes_ptr,
    found_ptr,
    n: tl.int64,
    length: tl.int32,
    rows: tl.int32,
    aligned: tl.int32,  # every row starts at a 16-byte boundary in every tensor
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,
    log_ratio_clamp: tl.float32,
    FIND_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Goes through the rows before the gradient can be written: their lengths, and how many count."""
    mean = 0.0
    rstd = 1.0
    if advantage_stats_ptr is not None:
        mean = tl.load(advantage_stats_ptr)
        rstd = tl.load(advantage_stats_ptr + 1)
    found = tl.full([], 0, tl.int32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        base = tl.cast(row, tl.int64) * length
        size = tl.minimum(n - base, length).to(tl.int32)
        inputs = (log_probs_ptr, old_ptr, advantages_ptr, mask_ptr, weights_ptr)
        if aligned != 0:
            tokens, log_ratio, above, below = _row_lanes(*inputs, base, size, mean, rstd, TILE, 16)
        else:
            tokens, log_ratio, above, below = _row_lanes(*inputs, base, size, mean, rstd, TILE, 1)
        counted = tl.sum(tokens, 0)
        found += counted if FIND_TOKENS else (counted > 0).to(tl.int32)
        if lengths_ptr is not None:
            tl.store(lengths_ptr + row, counted)
        if log_probs_ptr is not None:
            log_ratio = _ratio_or_zero(tl.sum(log_ratio, 0), counted.to(tl.float32))
            tl.store(log_ratios_ptr + row, log_ratio)
            if advantages_ptr is not None:
                ratio, _ = exp_with_residual(_hold(log_ratio, -log_ratio_clamp, log_ratio_clamp))
                above = tl.where(ratio > high, tl.where(above == above, 0.0, above), above)
                below = tl.where((ratio < low) | (ratio > dual_clip), 0.0, below)
                slope = -ratio * tl.sum(above + below, 0)  # lane by lane first: they may cancel
                slope = tl.where(tl.abs(log_ratio) > log_ratio_clamp, 0.0, slope)
                tl.store(slopes_ptr + row, _ratio_or_zero(slope, counted.to(tl.float32)))
    tl.store(found_ptr + tl.program_id(0), found)


# -------------------------------------------------------------------------------------------------------------- PPO


@triton.jit
def _row_of(lane, base, length):
    """The row of each lane's token. One division of 64 bits a tile, of 32 bits a token."""
    first = base // length
    column = (base - first * length).to(tl.uint32)
    return first, ((column + lane.to(tl.uint32)) // length.to(tl.uint32)).to(tl.int32)


@triton.jit
def _ppo_lanes(
    log_probs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    weights_ptr,
    entropy_ptr,
    ref_ptr,
    grad_ptr,
    grad_entropy_ptr,
    lengths_ptr,
    log_ratios_ptr,
    slopes_ptr,
    n,
    length,
    tiles,
    mean,
    rstd,
    scale,
    low,
    high,
    dual_clip,
    log_ratio_clamp,
    entropy_coef,
    kl_coef,
    ESTIMATOR: tl.constexpr,
    AGGREGATION: tl.constexpr,
    TILE: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Writes the gradients of a program's tiles; returns its sums, lane by lane."""
    lane = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], tl.float32)
    loss, policy, approx_kl, clipped, dual_clipped, ratios = zeros, zeros, zeros, zeros, zeros, zeros
    entropies, kls, tokens = zeros, zeros, zeros
    smallest, largest = zeros + _INF, zeros - _INF
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        base, left, inside = _tile(tile, n, lane, TILE, GRANULE)
        keep = (tl.load(_mask_start(mask_ptr, base, GRANULE) + lane, mask=inside, other=0) != 0) & (lane < left)
        log_prob = _kept(_start(log_probs_ptr, base, GRANULE), lane, inside, keep)
        advantage = _kept(_start(advantages_ptr, base, GRANULE), lane, inside, keep)
        advantage = tl.where(keep, (advantage - mean) * rstd, 0.0)
        if lengths_ptr is not None or log_ratios_ptr is not None:
            first, row = _row_of(lane, base, length)
        if log_ratios_ptr is not None:
            log_ratio = tl.load(log_ratios_ptr + first + row, mask=keep, other=0.0)
        else:
            log_ratio = log_prob - _kept(_start(old_ptr, base, GRANULE), lane, inside, keep)
        share = scale
        ratio, surrogate, slope, excess, is_clipped, is_dual_clipped = _surrogate(
            log_ratio, advantage, low, high, dual_clip, log_ratio_clamp
        )
        if weights_ptr is not None:
            weight = _kept(_start(weights_ptr, base, GRANULE), lane, inside, keep)
            surrogate = surrogate * weight
            slope = slope * weight
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + first + row, mask=keep, other=0.0)
        total = surrogate
        # Coefficients of 0 ask for the statistics alone, and 0 * inf would be a nan.
        if ref_ptr is not None:
            distance = log_prob - _kept(_start(ref_ptr, base, GRANULE), lane, inside, keep)
            kl, kl_slope = kl_estimate(distance, ESTIMATOR)
            kls += kl
            total += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            slope += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
        if entropy_ptr is not None:
            entropy = _kept(_start(entropy_ptr, base, GRANULE), lane, inside, keep)
            entropies += entropy
            total -= tl.where(entropy_coef != 0.0, entropy_coef * entropy, 0.0)
        if AGGREGATION == _SEQ_MEAN_TOKEN_MEAN:
            part = tl.div_rn(1.0, tl.load(lengths_ptr + first + row, mask=keep, other=1).to(tl.float32))
            surrogate = surrogate * part
            total = total * part
            share = part * scale
        loss += total
        policy += surrogate
        approx_kl += excess
        clipped += is_clipped.to(tl.float32)
        dual_clipped += is_dual_clipped.to(tl.float32)
        kept_ratio = tl.where(keep, ratio, 0.0)
        ratios += kept_ratio
        smallest = tl.minimum(smallest, tl.where(keep, ratio, _INF))
        largest = tl.maximum(largest, tl.where(keep, ratio, -_INF))
        tokens += keep.to(tl.float32)
        if grad_ptr is not None:
            tl.store(_start(grad_ptr, base, GRANULE) + lane, tl.where(keep, slope * share, 0.0), mask=inside)
        if grad_entropy_ptr is not None:
            tl.store(
                _start(grad_entropy_ptr, base, GRANULE) + lane, tl.where(keep, -entropy_coef * share, 0.0), mask=inside
            )
    return loss, policy, approx_kl, clipped, dual_clipped, ratios, entropies, kls, tokens, smallest, largest


@triton.jit
def _ppo_finish(partials_ptr, loss_ptr, stats_ptr, denominator, DIVIDE_BY_TOKENS: tl.constexpr):
    """The programs' sums put together."""
    loss, policy, approx_kl, ratios = _sum4(
        _partial(partials_ptr, 0, 0.0),
        _partial(partials_ptr, 1, 0.0),
        _partial(partials_ptr, 2, 0.0),
        _partial(partials_ptr, 3, 0.0),
    )
    clipped, dual_clipped, entropies, kls = _sum4(
        _partial(partials_ptr, 4, 0.0),
        _partial(partials_ptr, 5, 0.0),
        _partial(partials_ptr, 6, 0.0),
        _partial(partials_ptr, 7, 0.0),
    )
    count = tl.sum(_partial(partials_ptr, 8, 0.0).to(tl.int64), 0).to(tl.float32)
    smallest = tl.min(_partial(partials_ptr, 9, _INF), 0)
    largest = tl.max(_partial(partials_ptr, 10, -_INF), 0)
    # Minima lose a nan. The sum of the ratios does not, and nothing else makes it one: ratios are not negative.
    smallest = tl.where(ratios == ratios, smallest, ratios)
    largest = tl.where(ratios == ratios, largest, ratios)
    if DIVIDE_BY_TOKENS:
        denominator = count
    tl.store(loss_ptr, _ratio_or_zero(loss, denominator))
    tl.store(stats_ptr, _ratio_or_zero(policy, denominator))
    tl.store(stats_ptr + 1, _ratio_or_zero(approx_kl, count))
    tl.store(stats_ptr + 2, _ratio_or_zero(clipped, count))
    tl.store(stats_ptr + 3, _ratio_or_zero(dual_clipped, count))
    tl.store(stats_ptr + 4, _ratio_or_zero(ratios, count))
    tl.store(stats_ptr + 5, tl.where(count == 0.0, 0.0, smallest))
    tl.store(stats_ptr + 6, tl.where(count == 0.0, 0.0, largest))
    tl.store(stats_ptr + 7, _ratio_or_zero(entropies, count))
    tl.store(stats_ptr + 8, _ratio_or_zero(kls, count))
    tl.store(stats_ptr + 9, count)


@triton.jit(
    do_not_specialize=["n", "length", "tiles", "n_count", "n_found", "aligned"],
    do_not_specialize_on_alignment=[
        "log_probs_ptr",
        "old_ptr",
        "advantages_ptr",
        "mask_ptr",
        "weights_ptr",
        "advantage_stats_ptr",
        "entropy_ptr",
        "ref_ptr",
        "denominator_ptr",
        "grad_ptr",
        "grad_entropy_ptr",
        "loss_ptr",
        "stats_ptr",
        "lengths_ptr",
        "log_ratios_ptr",
        "slopes_ptr",
        "found_ptr",
        "partials_ptr",
        "arrivals_ptr",
    ],
)
def _ppo_kernel(
    log_probs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    weights_ptr,
    advantage_stats_ptr,
    entropy_ptr,
    ref_ptr,
    denominator_ptr,
    grad_ptr,
    grad_entropy_ptr,
    loss_ptr,
    stats_ptr,
    lengths_ptr,
    log_ratios_ptr,
    slopes_ptr,
    found_ptr,
    partials_ptr,
    arrivals_ptr,
    n: tl.int64,
    length: tl.int32,
    tiles: tl.int32,
    n_count: tl.int32,
    n_found: tl.int32,
    aligned: tl.int32,
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,
    log_ratio_clamp: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    ESTIMATOR: tl.constexpr,
    AGGREGATION: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    denominator = 0.0
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr)
    elif AGGREGATION != _TOKEN_MEAN or grad_ptr is not None:
        denominator = _count(mask_ptr, found_ptr, n_count, n_found, aligned, WORDS)
    scale = _ratio_or_zero(1.0, denominator)
    mean = 0.0
    rstd = 1.0
    if advantage_stats_ptr is not None:
        mean = tl.load(advantage_stats_ptr)
        rstd = tl.load(advantage_stats_ptr + 1)
    inputs = (log_probs_ptr, old_ptr, advantages_ptr, mask_ptr, weights_ptr, entropy_ptr, ref_ptr)
    others = (grad_ptr, grad_entropy_ptr, lengths_ptr, log_ratios_ptr, slopes_ptr)
    numbers = (n, length, tiles, mean, rstd, scale, low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef)
    if aligned != 0:
        lanes = _ppo_lanes(*inputs, *others, *numbers, ESTIMATOR, AGGREGATION, TILE, 4)
    else:
        lanes = _ppo_lanes(*inputs, *others, *numbers, ESTIMATOR, AGGREGATION, TILE, 1)
    loss, policy, approx_kl, clipped, dual_clipped, ratios, entropies, kls, tokens, smallest, largest = lanes
    loss, policy, approx_kl, ratios = _sum4(loss, policy, approx_kl, ratios)
    clipped, dual_clipped, entropies, kls = _sum4(clipped, dual_clipped, entropies, kls)
    mine = partials_ptr + tl.program_id(0)
    tl.store(mine, loss)
    tl.store(mine + 1 * _PARTIALS, policy)
    tl.store(mine + 2 * _PARTIALS, approx_kl)
    tl.store(mine + 3 * _PARTIALS, ratios)
    tl.store(mine + 4 * _PARTIALS, clipped)
    tl.store(mine + 5 * _PARTIALS, dual_clipped)
    tl.store(mine + 6 * _PARTIALS, entropies)
    tl.store(mine + 7 * _PARTIALS, kls)
    tl.store(mine + 8 * _PARTIALS, tl.sum(tokens, 0))
    tl.store(mine + 9 * _PARTIALS, tl.min(smallest, 0))
    tl.store(mine + 10 * _PARTIALS, tl.max(largest, 0))

    if _arrived_last(arrivals_ptr, tl.num_programs(0)):
        by_tokens: tl.constexpr = denominator_ptr is None and AGGREGATION == _TOKEN_MEAN
        _ppo_finish(partials_ptr, loss_ptr, stats_ptr, denominator, by_tokens)


# ------------------------------------------------------------------------------------------------------------ value


@triton.jit
def _meet(tokens, value, target, target_squares, error, error_squares):
    """Means and squared deviations of lanes (or programs) put together.

    Deviations are those from the mean as it rounds, held among the numbers, and are set right by their own mean: where
    all numbers are equal, nothing deviates.
    """
    some = tokens > 0.0
    count, value, target_mean, error_mean = _sum4(tokens, tokens * value, tokens * target, tokens * error)
    target_most, target_least, error_most, error_least = _max4(
        tl.where(some, target, -_INF),
        tl.where(some, -target, -_INF),
        tl.where(some, error, -_INF),
        tl.where(some, -error, -_INF),
    )
    target_mean = _hold(_ratio_or_zero(target_mean, count), -target_least, target_most)
    error_mean = _hold(_ratio_or_zero(error_mean, count), -error_least, error_most)
    target = tl.where(some, target - target_mean, 0.0)
    error = tl.where(some, error - error_mean, 0.0)
    target_step, error_step, target_squares, error_squares = _sum4(
        tokens * target,
        tokens * error,
        tl.where(some, target_squares + tokens * target * target, 0.0),
        tl.where(some, error_squares + tokens * error * error, 0.0),
    )
    target_off = _ratio_or_zero(target_step, count)
    error_off = _ratio_or_zero(error_step, count)
    target_mean = tl.where(count == 0.0, 0.0, target_mean + target_off)
    error_mean = tl.where(count == 0.0, 0.0, error_mean + error_off)
    target_squares -= target_step * target_off
    error_squares -= error_step * error_off
    return count, _ratio_or_zero(value, count), target_mean, target_squares, error_mean, error_squares


@triton.jit
def _value_lanes(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    grad_ptr,
    lengths_ptr,
    n,
    length,
    tiles,
    scale,
    clip,
    TILE: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Writes the gradient of a program's tiles; returns its sums and moments, lane by lane."""
    lane = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], tl.float32)
    loss, clipped, tokens, value_mean = zeros, zeros, zeros, zeros
    target_mean, target_squares, error_mean, error_squares = zeros, zeros, zeros, zeros
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        base, left, inside = _tile(tile, n, lane, TILE, GRANULE)
        keep = (tl.load(_mask_start(mask_ptr, base, GRANULE) + lane, mask=inside, other=0) != 0) & (lane < left)
        value = _kept(_start(values_ptr, base, GRANULE), lane, inside, keep)
        target = _kept(_start(returns_ptr, base, GRANULE), lane, inside, keep)
        low, high = -_INF, _INF
        if old_ptr is not None:
            old = _kept(_start(old_ptr, base, GRANULE), lane, inside, keep)
            low, high = old - clip, old + clip
        squared, slope, is_clipped = _value_error(value, target, low, high)
        share = scale
        if lengths_ptr is not None:
            first, row = _row_of(lane, base, length)
            part = tl.div_rn(1.0, tl.load(lengths_ptr + first + row, mask=keep, other=1).to(tl.float32))
            squared = squared * part
            share = part * scale
        loss += squared
        clipped += (is_clipped & keep).to(tl.float32)
        if grad_ptr is not None:
            tl.store(_start(grad_ptr, base, GRANULE) + lane, tl.where(keep, slope * share, 0.0), mask=inside)
        tokens += keep.to(tl.float32)
        weight = tl.div_rn(1.0, tl.maximum(tokens, 1.0))
        value_mean += tl.where(keep, value - value_mean, 0.0) * weight
        step = tl.where(keep, target - target_mean, 0.0)
        target_mean += step * weight
        target_squares += step * (target - target_mean)
        error = target - value
        step = tl.where(keep, error - error_mean, 0.0)
        error_mean += step * weight
        error_squares += step * (error - error_mean)
    return loss, clipped, tokens, value_mean, target_mean, target_squares, error_mean, error_squares


@triton.jit
def _value_finish(partials_ptr, loss_ptr, stats_ptr, denominator, DIVIDE_BY_TOKENS: tl.constexpr):
    """The programs' sums put together."""
    loss = tl.sum(_partial(partials_ptr, 0, 0.0), 0)
    clipped = tl.sum(_partial(partials_ptr, 1, 0.0), 0)
    count, value, target, target_squares, _, error_squares = _meet(
        _partial(partials_ptr, 2, 0.0),
        _partial(partials_ptr, 3, 0.0),
        _partial(partials_ptr, 4, 0.0),
        _partial(partials_ptr, 5, 0.0),
        _partial(partials_ptr, 6, 0.0),
        _partial(partials_ptr, 7, 0.0),
    )
    if DIVIDE_BY_TOKENS:
        denominator = count
    explained = 1.0 - tl.div_rn(error_squares, tl.where(target_squares > 0.0, target_squares, 1.0))
    tl.store(loss_ptr, _ratio_or_zero(loss, denominator))
    tl.store(stats_ptr, _ratio_or_zero(clipped, count))
    tl.store(stats_ptr + 1, value)
    tl.store(stats_ptr + 2, target)
    tl.store(stats_ptr + 3, tl.where(target_squares > 0.0, explained, 0.0))
    tl.store(stats_ptr + 4, count)


@triton.jit(
    do_not_specialize=["n", "length", "tiles", "n_count", "n_found", "aligned"],
    do_not_specialize_on_alignment=[
        "values_ptr",
        "old_ptr",
        "returns_ptr",
        "mask_ptr",
        "denominator_ptr",
        "grad_ptr",
        "loss_ptr",
        "stats_ptr",
        "lengths_ptr",
        "found_ptr",
        "partials_ptr",
        "arrivals_ptr",
    ],
)
def _value_kernel(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    denominator_ptr,
    grad_ptr,
    loss_ptr,
    stats_ptr,
    lengths_ptr,
    found_ptr,
    partials_ptr,
    arrivals_ptr,
    n: tl.int64,
    length: tl.int32,
    tiles: tl.int32,
    n_count: tl.int32,
    n_found: tl.int32,
    aligned: tl.int32,
    clip: tl.float32,
    AGGREGATION: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    denominator = 0.0
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr)
    elif AGGREGATION != _TOKEN_MEAN or grad_ptr is not None:
        denominator = _count(mask_ptr, found_ptr, n_count, n_found, aligned, WORDS)
    scale = _ratio_or_zero(1.0, denominator)
    pointers = (values_ptr, old_ptr, returns_ptr, mask_ptr, grad_ptr, lengths_ptr)
    if aligned != 0:
        lanes = _value_lanes(*pointers, n, length, tiles, scale, clip, TILE, 4)
    else:
        lanes = _value_lanes(*pointers, n, length, tiles, scale, clip, TILE, 1)
    loss, clipped, tokens, value, target, target_squares, error, error_squares = lanes
    count, value, target, target_squares, error, error_squares = _meet(
        tokens, value, target, target_squares, error, error_squares
    )
    mine = partials_ptr + tl.program_id(0)
    tl.store(mine, tl.sum(loss, 0))
    tl.store(mine + 1 * _PARTIALS, tl.sum(clipped, 0))
    tl.store(mine + 2 * _PARTIALS, count)
    tl.store(mine + 3 * _PARTIALS, value)
    tl.store(mine + 4 * _PARTIALS, target)
    tl.store(mine + 5 * _PARTIALS, target_squares)
    tl.store(mine + 6 * _PARTIALS, error)
    tl.store(mine + 7 * _PARTIALS, error_squares)

    if _arrived_last(arrivals_ptr, tl.num_programs(0)):
        by_tokens: tl.constexpr = denominator_ptr is None and AGGREGATION == _TOKEN_MEAN
        _value_finish(partials_ptr, loss_ptr, stats_ptr, denominator, by_tokens)


# ------------------------------------------------------------------------------------------------------- the launches


def _like(name, x, model, dtype=torch.float32):
    """x, contiguous. The kernels trust shapes, so that what comes past the public functions is looked at here."""
    if x is None:
        return None
    if x.shape != model.shape or x.dtype != dtype or x.device != model.device:
        got, wanted = ((tuple(y.shape), t, y.device) for y, t in ((x, x.dtype), (model, dtype)))
        raise ValueError(f"{name}: got {got}, wanted {wanted}")
    return x.contiguous()


def _gradient(model):
    """Room for a gradient of model's shape, and for the rest of its last 16 bytes."""
    n = model.numel()
    return torch.empty(-(-n // VECTOR) * VECTOR, dtype=torch.float32, device=model.device)[:n].view(model.shape)


def _are_aligned(tensors):
    return int(all(x is None or x.data_ptr() % 16 == 0 for x in tensors))


class _Plan:
    """How a batch is gone through: what the first launch, if there is one, finds out for the second."""

    def __init__(self, model, mask, denominator, aggregation, sequence_ratio, needs_grad):
        self.n, self.device = model.numel(), model.device
        self.tiles = triton.cdiv(self.n, TILE)
        self.programs = min(self.tiles, PROGRAMS)
        by_sequence = sequence_ratio or aggregation != TOKEN_MEAN
        if by_sequence and model.dim() != 2:
            raise ValueError(f"the first argument: got shape {tuple(model.shape)}, wanted [B, T]: sequences aggregate")
        self.find_tokens = aggregation == TOKEN_MEAN
        self.need_lengths = aggregation == SEQ_MEAN_TOKEN_MEAN
        wanted = denominator is None and (needs_grad or not self.find_tokens)
        self.n_count = self.n if wanted and self.find_tokens and self.n <= COUNT_ITSELF and not sequence_ratio else 0
        self.first_launch = sequence_ratio or self.need_lengths or (wanted and self.n_count == 0)
        if by_sequence:
            self.rows, self.length = model.shape
        else:
            self.length = triton.cdiv(triton.cdiv(self.n, PROGRAMS), MASK_TILE) * MASK_TILE
            self.rows = triton.cdiv(self.n, self.length)
        self.n_found = min(self.rows, PROGRAMS) if self.first_launch and wanted else 0
        self.mask, self.sequence_ratio, self.needs_grad = mask, sequence_ratio, needs_grad
        self.lengths = self.log_ratios = self.slopes = self.found = None

    def _row_values(self, dtype=torch.float32):
        return torch.empty(self.rows, dtype=dtype, device=self.device)

    def find_out(self, inputs=(None,) * 5, limits=(0.0,) * 4):
        """The first launch."""
        if not self.first_launch:
            return
        self.found = torch.empty(min(self.rows, PROGRAMS), dtype=torch.int32, device=self.device)
        if self.need_lengths:
            self.lengths = self._row_values(torch.int32)
        log_probs, old, advantages, weights, advantage_stats = inputs
        inputs = (None, None, None, self.mask, None, None)
        if self.sequence_ratio:
            self.log_ratios = self._row_values()
            inputs = (log_probs, old, None, self.mask, None, None)
            if self.needs_grad:
                self.slopes = self._row_values()
                inputs = (log_probs, old, advantages, self.mask, weights, advantage_stats)
        _rows_kernel[(self.found.numel(),)](
            *inputs,
            self.lengths,
            self.log_ratios,
            self.slopes,
            self.found,
            self.n,
            self.length,
            self.rows,
            _are_aligned(inputs[:5]) * (self.length % 16 == 0),
            *limits,
            FIND_TOKENS=self.find_tokens,
            TILE=2 * TILE if self.sequence_ratio else MASK_TILE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )

    def constants(self, aggregation):
        # Contracting a * b + c at will could make the two copies of a loop differ in the last bit; fma is written out.
        return {
            "AGGREGATION": aggregation,
            "TILE": TILE,
            "WORDS": WORDS,
            "num_warps": NUM_WARPS,
            "maxnreg": REGISTERS,
            "enable_fp_fusion": False,
        }


def _no_tokens(model, stats):
    return torch.zeros((), device=model.device), torch.zeros(stats, device=model.device)


def ppo_loss(
    log_probs,
    old_log_probs,
    advantages,
    mask,
    weights,
    advantage_stats,
    entropy,
    ref_log_probs,
    denominator,
    options,
    kl_estimator,
    sequence_ratio,
    aggregation,
    needs_grad,
):
    """The clipped PPO loss with entropy bonus and KL penalty, its ten statistics, and its gradients.

    All of log_probs' shape: [...], or [B, T] where sequences matter. fp32, the mask bool. weights, advantage_stats [2],
    entropy, ref_log_probs and denominator (one fp32 number on the device) may be None. options: fp32 in CPU memory,
    clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef. needs_grad: else the gradients are empty.
    Returns (loss, stats [10] in the order of fastrlhf.functional.PPOStats, grad_log_probs, grad_entropy).
    """
    model = log_probs
    tensors = {
        "log_probs": log_probs,
        "old_log_probs": old_log_probs,
        "advantages": advantages,
        "weights": weights,
        "entropy": entropy,
        "ref_log_probs": ref_log_probs,
    }
    log_probs, old, advantages, weights, entropy, ref = (_like(name, x, model) for name, x in tensors.items())
    mask = _like("mask", mask, model, torch.bool)
    if advantage_stats is not None:
        advantage_stats = _like("advantage_stats", advantage_stats, model.new_empty(2))
    clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef = options.tolist()
    grad = _gradient(model) if needs_grad else model.new_empty(0)
    grad_entropy = _gradient(model) if needs_grad and entropy is not None else model.new_empty(0)
    if model.numel() == 0:
        return *_no_tokens(model, PPO_STATS), grad, grad_entropy
    plan = _Plan(model, mask, denominator, aggregation, sequence_ratio, needs_grad)
    loss, stats = model.new_empty(()), model.new_empty(PPO_STATS)
    limits = (1.0 - clip_low, 1.0 + clip_high, dual_clip, log_ratio_clamp)
    with on_device_of(model):
        plan.find_out((log_probs, old, advantages, weights, advantage_stats), limits)
        counter = arrivals(model)
        grads = [x if needs_grad else None for x in (grad, None if entropy is None else grad_entropy)]
        _ppo_kernel[(plan.programs,)](
            log_probs,
            old,
            advantages,
            mask,
            weights,
            advantage_stats,
            entropy,
            ref,
            denominator,
            *grads,
            loss,
            stats,
            plan.lengths,
            plan.log_ratios,
            plan.slopes,
            counter if plan.found is None else plan.found,  # where there are none, none are read
            model.new_empty(PPO_SUMS * PARTIALS),
            counter,
            plan.n,
            plan.length,
            plan.tiles,
            plan.n_count,
            plan.n_found,
            _are_aligned((log_probs, old, advantages, mask, weights, entropy, ref)),
            *limits,
            entropy_coef,
            kl_coef,
            ESTIMATOR=0 if ref is None else kl_estimator,
            **plan.constants(aggregation),
        )
    return loss, stats, grad, grad_entropy


def value_loss(values, old_values, returns, mask, denominator, clip, aggregation, needs_grad):
    """The value function's squared error, clipped around old_values, its five statistics, and its gradient.

    values, returns, old_values (or None): [...], or [B, T] where sequences are aggregated, fp32; mask: the same, bool.
    denominator: one fp32 number on the device, or None. clip: one fp32 number in CPU memory.
    Returns (loss, stats [5] in the order of fastrlhf.functional.ValueStats, grad_values), the last empty without
    needs_grad.
    """
    model = values
    tensors = {"values": values, "old_values": old_values, "returns": returns}
    values, old, returns = (_like(name, x, model) for name, x in tensors.items())
    mask = _like("mask", mask, model, torch.bool)
    grad = _gradient(model) if needs_grad else model.new_empty(0)
    if model.numel() == 0:
        return *_no_tokens(model, VALUE_STATS), grad
    plan = _Plan(model, mask, denominator, aggregation, False, needs_grad)
    loss, stats = model.new_empty(()), model.new_empty(VALUE_STATS)
    with on_device_of(model):
        plan.find_out()
        counter = arrivals(model)
        _value_kernel[(plan.programs,)](
            values,
            old,
            returns,
            mask,
            denominator,
            grad if needs_grad else None,
            loss,
            stats,
            plan.lengths,
            counter if plan.found is None else plan.found,  # where there are none, none are read
            model.new_empty(VALUE_SUMS * PARTIALS),
            counter,
            plan.n,
            plan.length,
            plan.tiles,
            plan.n_count,
            plan.n_found,
            _are_aligned((values, old, returns, mask)),
            clip.item(),
            **plan.constants(aggregation),
        )
    return loss, stats, grad
