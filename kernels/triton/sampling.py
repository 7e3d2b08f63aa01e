"""A token from each row of logits, with its log-prob: Triton kernels behind torch.ops.fastrlhf.

One random number a row, and the distribution function inverted in three steps. The first launch reads the logits: every
chunk of a row has a program, which leaves its maximum and its mass, as in token_log_probs and with its bits. The last
launch has a program a row: it finds the chunk that the number falls into, then the tile of that chunk, then the token.
Sums over more than a tile are in fp64. Nothing as wide as the vocabulary is written.

What the filters keep is described by one number, the least logit that stays. top_k and top_p find theirs digit by digit
from the top of the logits' order as unsigned integers: a launch in between, a program a row, which reads its row, out
of L2 by then, once for every two bits. It also leaves the chunks' masses of what stays.

Nobody can be told of a row without a distribution without waiting for the device: its log-prob is nan, its token some
index of the vocabulary.
"""

import math

import torch

import triton
import triton.language as tl

from . import _rows
from ._rows import (
    LOG2_E,
    STEPS,
    UNROLL,
    _aligned_down,
    _clamp,
    _load_end,
    _merge_parts,
    _row_statistics,
    _store_part,
    _which_chunks,
)

LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}  # of a key that tell no two logits apart
TILES = UNROLL * STEPS  # of a chunk
DRAW_WARPS = 8  # a chunk lies in their registers
PARTS = 32  # chunks of a row that are looked at together

_TILES = tl.constexpr(TILES)
_PARTS = tl.constexpr(PARTS)
_PART = _rows._PART

_RUN_TIME = ["V", "splits", "stride", "top_k", "greedy", "filtered"]
_POINTERS = [
    *("logits_ptr", "parts_ptr", "least_ptr", "seed_ptr", "sequence_ptr", "position_ptr"),
    *("tokens_ptr", "log_probs_ptr"),
]


# ------------------------------------------------------------------------------------------------------ random numbers


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of Salmon et al. 2011, section 3.3: four uint32 from as many and a key of two."""
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high_a, high_b = tl.umulhi(a, c0), tl.umulhi(b, c2)
        low_a, low_b = a * c0, b * c2
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _uniform(seed, sequence, position):
    """A number in [0, 1), fp64, with 53 random bits, from three int64."""
    a, b, _, _ = philox(
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        sequence.to(tl.uint32),
        (sequence >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    bits = ((a >> 5).to(tl.int64) << 26) + (b >> 6).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 9007199254740992.0)  # 2^53


# ----------------------------------------------------------------------------------------------------------- the parts


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _statistics_kernel(
    logits_ptr,
    parts_ptr,
    V: tl.int32,
    splits: tl.int32,
    stride: tl.int64,
    scale: tl.float32,  # log2(e) / T
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n, first, stop = _which_chunks(V, splits, LANES, ROLL)
    m, s, u = _row_statistics(
        logits_ptr + n.to(tl.int64) * stride, first, stop, V, scale, GRANULE, LANES, ROLL, ENTROPY=False
    )
    _store_part(parts_ptr, m, s, u)


# ------------------------------------------------------------------------------------------------------------- filters


@triton.jit
def _logit_of(key):
    """The float at a place in the order of the floats, -inf at the lowest."""
    key = tl.maximum(key, tl.full([], 0x007FFFFF, tl.uint32))  # below are only nans
    high = tl.full([], 0x80000000, tl.uint32)
    return tl.where(key >= high, key ^ high, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _masses(x, m, least, scale):
    """2^d of those that stay, 0 of the others."""
    return tl.where(x >= least, tl.exp2((x - m) * scale), 0.0)


@triton.jit
def _chunk(row, chunk, V, GRANULE: tl.constexpr, LANES: tl.constexpr, ROLL: tl.constexpr):
    """The logits of a chunk, a tuple of ROLL [LANES]."""
    tile = ()
    for i in tl.static_range(ROLL):
        tile += (_load_end(row, (chunk * ROLL + i) * LANES + tl.arange(0, LANES), V, GRANULE),)
    return tile


@triton.jit
def _weights_from(
    row,
    splits,
    V,
    m,
    least,
    scale,
    by_mass,
    a,
    b,
    c,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    """What the logits from `least` on weigh together, fp64, and those of them from a, from b and from c on.

    By mass, or, if not, one by one. The sums of fewer are never greater, since rounding keeps the order.
    """
    total = tl.zeros([LANES], tl.float32)
    from_a = tl.zeros([LANES], tl.float32)
    from_b = tl.zeros([LANES], tl.float32)
    from_c = tl.zeros([LANES], tl.float32)
    for chunk in range(0, splits):
        tile = _chunk(row, chunk, V, GRANULE, LANES, ROLL)
        for i in tl.static_range(ROLL):
            x = tile[i]
            weight = tl.where(x >= least, tl.where(by_mass, tl.exp2((x - m) * scale), 1.0), 0.0)
            total += weight
            from_a += tl.where(x >= a, weight, 0.0)
            from_b += tl.where(x >= b, weight, 0.0)
            from_c += tl.where(x >= c, weight, 0.0)
    return (
        tl.sum(total.to(tl.float64), 0),
        tl.sum(from_a.to(tl.float64), 0),
        tl.sum(from_b.to(tl.float64), 0),
        tl.sum(from_c.to(tl.float64), 0),
    )


@triton.jit
def _store_masses(
    parts, row, splits, V, m, least, scale, GRANULE: tl.constexpr, LANES: tl.constexpr, ROLL: tl.constexpr
):
    for chunk in range(0, splits):
        tile = _chunk(row, chunk, V, GRANULE, LANES, ROLL)
        mass = tl.zeros([LANES], tl.float32)
        for i in tl.static_range(ROLL):
            mass += _masses(tile[i], m, least, scale)
        tl.store(parts + chunk * _PART + 3, tl.sum(mass, 0))


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _filter_kernel(
    logits_ptr,
    parts_ptr,
    least_ptr,
    V: tl.int32,
    splits: tl.int32,
    stride: tl.int64,
    scale: tl.float32,  # log2(e) / T
    top_k: tl.int32,  # V or more: all
    top_p: tl.float64,  # 1 or more: all
    distance: tl.float64,  # at most that far below the largest, -T log(min_p)
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """The least logit that stays, and the mass of what stays in each chunk, which is a turn of the loops here."""
    n = tl.program_id(0)
    parts = parts_ptr + n.to(tl.int64) * splits * _PART
    m = _merge_parts(parts_ptr, n, splits, scale, ENTROPY=False)[0]
    row = logits_ptr + n.to(tl.int64) * stride
    aligned, skip = _aligned_down(row, GRANULE)
    least = tl.full([], float("-inf"), tl.float32)
    for by_mass in range(0, 2):
        if tl.where(by_mass == 0, top_k < V, top_p < 1.0):
            key = tl.full([], 0, tl.uint32)
            digit = tl.full([], 1 << 30, tl.uint32)  # two bits at a time: three thresholds hide behind the read
            for _read in range(0, (32 - LOW_BITS) // 2):
                a, b, c = _logit_of(key + digit), _logit_of(key + 2 * digit), _logit_of(key + 3 * digit)
                if skip == 0:
                    total, from_a, from_b, from_c = _weights_from(
                        aligned, splits, V, m, least, scale, by_mass == 1, a, b, c, GRANULE, LANES, ROLL
                    )
                else:
                    total, from_a, from_b, from_c = _weights_from(
                        row, splits, V, m, least, scale, by_mass == 1, a, b, c, 1, LANES, ROLL
                    )
                wanted = tl.where(by_mass == 1, top_p * total, top_k)
                enough = (from_a >= wanted).to(tl.uint32) + (from_b >= wanted) + (from_c >= wanted)
                key += digit * enough
                digit = digit >> 2
            least = tl.maximum(least, _logit_of(key))
    bound = m.to(tl.float64) - distance
    rounded = bound.to(tl.float32)
    # In fp32 the same tokens are at least the bound as at least the next number above it.
    bits = rounded.to(tl.int32, bitcast=True)
    above = tl.where(rounded == 0.0, 1, tl.where(bits < 0, bits - 1, bits + 1)).to(tl.float32, bitcast=True)
    least = tl.maximum(least, tl.where(rounded.to(tl.float64) < bound, above, rounded))
    if skip == 0:
        _store_masses(parts, aligned, splits, V, m, least, scale, GRANULE, LANES, ROLL)
    else:
        _store_masses(parts, row, splits, V, m, least, scale, 1, LANES, ROLL)
    tl.store(least_ptr + n, least)


# ---------------------------------------------------------------------------------------------------------------- draw


@triton.jit
def _passed(masses, before, wanted):
    """Which of the masses, added to `before` one after the other, makes the sum exceed `wanted`, and the sum before it.

    Or, if none does, the last that is not 0; or 0 if all are. Third, whether one does.
    """
    at = tl.arange(0, masses.shape[0])
    sums = before + tl.cumsum(masses, 0)
    first = tl.min(tl.where((masses > 0.0) & (sums > wanted), at, masses.shape[0]), 0)
    last = tl.max(tl.where(masses > 0.0, at, 0), 0)
    chosen = tl.where(first < masses.shape[0], first, last)
    return chosen, tl.sum(tl.where(at == chosen, sums - masses, 0.0), 0), first < masses.shape[0]


@triton.jit
def _part_masses(parts, first, splits, m, scale, greedy, filtered):
    """Masses of _PARTS chunks, fp64."""
    at = first + tl.arange(0, _PARTS)
    there = at < splits
    peak = tl.load(parts + at * _PART, mask=there, other=0.0)
    s = tl.load(parts + at * _PART + 1, mask=there, other=0.0).to(tl.float64)
    mass = s * tl.exp2(_clamp((peak - m) * scale)).to(tl.float64)
    mass = tl.where(greedy & (peak != m), 0.0, mass)
    if filtered:
        mass = tl.load(parts + at * _PART + 3, mask=there, other=0.0).to(tl.float64)
    return mass


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _draw_kernel(
    logits_ptr,
    seed_ptr,
    sequence_ptr,
    position_ptr,
    parts_ptr,
    least_ptr,
    tokens_ptr,
    log_probs_ptr,
    V: tl.int32,
    splits: tl.int32,
    stride: tl.int64,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    greedy: tl.int32,
    filtered: tl.int32,
    LANES: tl.constexpr,
):
    n = tl.program_id(0)
    row = logits_ptr + n.to(tl.int64) * stride
    parts = parts_ptr + n.to(tl.int64) * splits * _PART
    m, s, _ = _merge_parts(parts_ptr, n, splits, scale, ENTROPY=False)
    u = _uniform(tl.load(seed_ptr + n), tl.load(sequence_ptr + n), tl.load(position_ptr + n))
    least = tl.full([], float("-inf"), tl.float32)
    if filtered:
        least = tl.load(least_ptr + n)
    if greedy:  # the number 0 among the largest: the first of them
        least = m
        u = u * 0.0
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, splits, _PARTS):
        total += tl.sum(_part_masses(parts, first, splits, m, scale, greedy != 0, filtered), 0)
    wanted = u * total

    before = tl.full([], 0.0, tl.float64)
    start = before
    chunk = 0
    passed = 0
    for first in range(0, splits, _PARTS):
        if passed == 0:
            masses = _part_masses(parts, first, splits, m, scale, greedy != 0, filtered)
            within, sum_before, here = _passed(masses, before, wanted)
            if tl.sum(masses, 0) > 0.0:  # so that after the last chunks, all 0, those before them count
                chunk = first + within
                start = sum_before
            passed = here.to(tl.int32)
            before += tl.sum(masses, 0)

    lane = tl.arange(0, LANES)
    columns = (chunk * _TILES + tl.arange(0, _TILES))[:, None] * LANES + lane[None, :]
    x = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    tile, start, _ = _passed(tl.sum(_masses(x, m, least, scale), 1).to(tl.float64), start, wanted)
    columns = (chunk * _TILES + tile) * LANES + lane
    x = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    column, _, _ = _passed(_masses(x, m, least, scale).to(tl.float64), start, wanted)
    token = tl.minimum((chunk * _TILES + tile) * LANES + column, V - 1)
    z = tl.load(row + token).to(tl.float32)
    tl.store(tokens_ptr + n, token.to(tl.int64))
    tl.store(log_probs_ptr + n, (z - m) * inv_t - tl.log(s))


# ---------------------------------------------------------------------------------------------------------- the host


def _check(logits, keys, temperature, top_p, min_p, top_k):
    """What the kernels trust, for raw calls: the public function has looked at more."""
    if logits.dim() != 2 or logits.dtype not in LOW_BITS or logits.shape[1] == 0:
        raise ValueError(f"logits: got {tuple(logits.shape)}, {logits.dtype}, wanted [B, V > 0], fp32, bf16 or fp16")
    _rows.check_layout("logits", logits)
    for name, x in keys.items():
        if x.shape != logits.shape[:1] or x.dtype != torch.int64:
            raise ValueError(f"{name}: got {tuple(x.shape)}, {x.dtype}, wanted {tuple(logits.shape[:1])}, torch.int64")
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p <= 1 and top_k >= 0):
        raise ValueError(
            f"numbers: got temperature {temperature}, top_p {top_p}, min_p {min_p}, top_k {top_k}, "
            "wanted temperature >= 0, top_p in (0, 1], min_p in [0, 1], top_k >= 0"
        )


def sample_tokens(logits, seed, sequence, position, numbers, top_k):
    """A token from each row of logits, and its log-prob under softmax(logits / temperature), unfiltered.

    logits: [B, V], fp32, bf16 or fp16; any row stride. seed, sequence, position: [B], int64, on the same device.
    numbers: [3], in CPU memory: temperature (0: the most likely token, whose log-prob is given at 1), top_p, min_p.
    Returns tokens [B], int64, and log_probs [B], fp32, with the bits of token_log_probs; for a row without a
    distribution some token, and nan.
    """
    temperature, top_p, min_p = numbers.tolist()
    _check(logits, {"seed": seed, "sequence": sequence, "position": position}, temperature, top_p, min_p, top_k)
    rows, V = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return tokens, log_probs
    keys = [x.contiguous() for x in (seed, sequence, position)]
    greedy = temperature == 0
    filtered = not greedy and (0 < top_k < V or top_p < 1 or min_p > 0)
    temperature = temperature or 1.0
    tile, scale = _rows.constants(logits), LOG2_E / temperature
    splits = triton.cdiv(V, tile["LANES"] * TILES)
    granule = _rows.granule(logits)
    place = (V, splits, logits.stride(0))
    with _rows.on_device_of(logits):
        parts = _rows.new_parts(rows, splits, log_probs)
        least = torch.empty_like(log_probs) if filtered else log_probs
        _statistics_kernel[(rows * splits,)](logits, parts, *place, scale, GRANULE=granule, **tile)
        if filtered:
            _filter_kernel[(rows,)](
                logits,
                parts,
                least,
                *place,
                scale,
                top_k if 0 < top_k < V else V,
                top_p,
                -temperature * math.log(min_p) if min_p else math.inf,
                GRANULE=granule,
                LOW_BITS=LOW_BITS[logits.dtype],
                **tile | {"LANES": tile["LANES"] * STEPS, "num_warps": _rows.NUM_WARPS * STEPS},
            )
        _draw_kernel[(rows,)](
            logits,
            *keys,
            parts,
            least,
            tokens,
            log_probs,
            *place,
            scale,
            1.0 / temperature,
            int(greedy),
            int(filtered),
            LANES=tile["LANES"],
            num_warps=DRAW_WARPS,
            enable_fp_fusion=False,
        )
    return tokens, log_probs
