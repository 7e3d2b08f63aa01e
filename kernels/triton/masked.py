"""Statistics over the positions that count: Triton kernels behind torch.ops.fastrlhf.

A row is cut into chunks of CHUNK numbers, one program each. What a program found goes to scratch memory, and the last
program of a row to arrive puts the parts together, always in the same order: one launch, and the same bits every time.

Moments are four numbers: count, pivot, offset and squares. The pivot is one of the numbers, the mean is pivot + offset,
and squares is the sum of the squared distances to the mean. A mean in two parts loses nothing where the numbers are
large and lie close together, and equal numbers deviate from it by exactly 0. Parts are put together by the formula of
Chan, Golub and LeVeque 1983, which does not cancel.

Arriving (_arrived_last). A program stores its parts and adds 1 to an integer in memory; who finds programs - 1 there is
the last, and sees the parts of all others. The addition is atomic, acquires and releases at the scope of the device:
the stores before it in any thread of the program (the barrier orders them before the one thread that adds) are seen by
whoever reads after a later addition. Parts are read past L1, which is not coherent. The order of arrival decides who
puts the parts together, and nothing else, so that no result depends on it. The last one sets the integer back to 0 for
the next launch; launches that share it must not overlap, hence one for each stream (see arrivals).

Loads. Rows that start at a 16-byte boundary and have a length divisible by 4 are read 16 bytes a thread, all others
element by element. The choice is made at run time and does not show in the result. Under a zero of the mask numbers may
be read, but are not used. One binary serves all sizes, strides and alignments.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

import triton
import triton.language as tl

from ._rows import on_device_of

NUM_WARPS = 4
CHUNK = 4096  # numbers a program: 32 a thread, all loaded before the first is used
LANES = 512  # parts that are put together at a time
GRANULE = 4  # fp32 numbers in 16 bytes
COUNTERS = 1024  # rows cut into chunks that one launch may have

_GRANULE = tl.constexpr(GRANULE)
_INFINITY = tl.constexpr(float("inf"))


# ------------------------------------------------------------------------------------------------- shared with others


@triton.jit
def _unaligned(ptr, BYTES: tl.constexpr):
    """How many bytes ptr lies behind a multiple of BYTES."""
    return (ptr.to(tl.int64) % BYTES).to(tl.int32)


@triton.jit
def _aligned(ptr, BYTES: tl.constexpr):
    """ptr, known to be a multiple of BYTES (a new value, so that only its users are told)."""
    behind = ptr.to(tl.int64) % BYTES // (BYTES // _GRANULE)
    return tl.multiple_of(ptr - behind, BYTES)


@triton.jit
def _read(row, first, length, other, WIDE: tl.constexpr, BYTES: tl.constexpr, LENGTH: tl.constexpr):
    """LENGTH elements from row + first; those at length and beyond are other. WIDE: row is aligned to BYTES, which is
    _GRANULE elements, and length is divisible by _GRANULE."""
    at = first + tl.arange(0, LENGTH)
    if WIDE:
        x = tl.load(_aligned(row, BYTES) + at, mask=at // _GRANULE * _GRANULE < length, other=other)
    else:
        x = tl.load(row + at, mask=at < length, other=other)
    return x


@triton.jit
def _write(row, first, length, x, WIDE: tl.constexpr, BYTES: tl.constexpr, LENGTH: tl.constexpr):
    """The reverse of _read."""
    at = first + tl.arange(0, LENGTH)
    if WIDE:
        tl.store(_aligned(row, BYTES) + at, x, mask=at // _GRANULE * _GRANULE < length)
    else:
        tl.store(row + at, x, mask=at < length)


@triton.jit
def _moments_of(x, kept):
    """(count, pivot, offset, squares) of the numbers kept."""
    count = tl.sum(kept.to(tl.float32), 0)
    pivot = tl.min(tl.where(kept, x, _INFINITY), 0)
    pivot = tl.where(count > 0.0, pivot, 0.0)
    distance = tl.where(kept, x - pivot, 0.0)
    offset = tl.sum(distance, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(kept, distance - offset, 0.0)
    return count, pivot, offset, tl.sum(deviation * deviation, 0)


@triton.jit
def _moments_joined(n, p, m, s, n2, p2, m2, s2):
    """The moments (n, p, m, s) and (n2, p2, m2, s2) put together."""
    total = n + n2
    share = n2 / tl.maximum(total, 1.0)
    step = (p2 - p) + (m2 - m)
    offset = m + step * share
    squares = s + s2 + step * step * (n * share)
    first = n == 0.0
    only = first | (n2 == 0.0)
    return (
        total,
        tl.where(first, p2, p),
        tl.where(only, tl.where(first, m2, m), offset),
        tl.where(only, s + s2, squares),
    )


@triton.jit
def _moments_of_lanes(n, p, m, s):
    """A tensor of moments put together: _moments_of, of numbers that have weights and squares of their own."""
    kept = n > 0.0
    count = tl.sum(n, 0)
    pivot = tl.min(tl.where(kept, p, _INFINITY), 0)
    pivot = tl.where(count > 0.0, pivot, 0.0)
    distance = tl.where(kept, (p - pivot) + m, 0.0)
    offset = tl.sum(distance * n, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(kept, distance - offset, 0.0)
    return count, pivot, offset, tl.sum(s + deviation * deviation * n, 0)


@triton.jit
def _moments_stored(parts_ptr, part, parts, moments):
    """Leaves the moments of one part of many where _moments_of_parts finds them."""
    for i in tl.static_range(4):
        tl.store(parts_ptr + i * parts.to(tl.int64) + part, moments[i])


@triton.jit
def _moments_of_parts(parts_ptr, parts, LENGTH: tl.constexpr):
    """All that _moments_stored left, put together in an order that depends on nothing but their number."""
    parts_64 = parts.to(tl.int64)
    n = tl.zeros([LENGTH], tl.float32)
    p = tl.zeros([LENGTH], tl.float32)
    m = tl.zeros([LENGTH], tl.float32)
    s = tl.zeros([LENGTH], tl.float32)
    for first in range(0, parts, LENGTH):
        at = first + tl.arange(0, LENGTH)
        there = at < parts
        found = ()
        for i in tl.static_range(4):
            found += (tl.load(parts_ptr + i * parts_64 + at, mask=there, other=0.0, cache_modifier=".cg"),)
        n, p, m, s = _moments_joined(n, p, m, s, found[0], found[1], found[2], found[3])
    return _moments_of_lanes(n, p, m, s)


@triton.jit
def _reciprocal_deviation(count, squares, unbiased, eps):
    """1 / std, from the sum of the squared distances to the mean; unbiased is 1 or 0."""
    freedom = tl.maximum(count - unbiased, 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, freedom) + eps))


@triton.jit
def _arrived_last(arrivals_ptr, programs):
    """Whether all other programs that arrive here have done so. What they stored before can then be read, past L1."""
    tl.debug_barrier()
    before = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)  # nobody else comes any more: ready for the next launch
    return last


_arrivals = {}


def arrivals(like):
    """COUNTERS int32 zeros on the device of `like`, which kernels of the current stream may count on and leave at 0.

    They are kept, since zeroing an integer takes a launch of its own, and one set for each stream, since kernels of
    different streams may overlap. Two things must not get into what is kept. A graph being captured may later be
    replayed beside anything, so it gets its own, zeroed at every replay. And a memory pool that somebody allocates from
    just now (cudagraph trees do so before they capture) must not own them: pools belong to threads, so they are made in
    another one. That happens once a stream, and waits for the zeros.
    """
    if not like.is_cuda:  # the interpreter
        return _arrivals.setdefault(None, torch.zeros(COUNTERS, dtype=torch.int32))
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=like.device)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    if key not in _arrivals:
        with ThreadPoolExecutor(1) as thread:
            _arrivals[key] = thread.submit(_zeros_on, like.device).result()
    return _arrivals[key]


def _zeros_on(device):
    with torch.cuda.device(device):
        zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.current_stream().synchronize()
    return zeros


def check(name, x, shape, dtype=torch.float32):
    """The kernels trust shapes and dtypes, so that what comes past the public functions is looked at here."""
    if x is not None and (x.shape != shape or x.dtype != dtype):
        raise ValueError(f"{name}: got {tuple(x.shape)}, {x.dtype}, wanted {tuple(shape)}, {dtype}")


def rows_of(x):
    """x [R, C] and its row stride, copied only if neighbours in a row do not lie side by side."""
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


# -------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _chunk(x_ptr, mask_ptr, C, chunk, CHUNK: tl.constexpr):
    """(numbers, which of them count) of one chunk of a row of C."""
    first = chunk.to(tl.int64) * CHUNK
    length = tl.minimum(C - first, CHUNK).to(tl.int32)
    wide = (_unaligned(x_ptr, 16) + _unaligned(mask_ptr, 4) + length % 4) == 0
    # One branch for both loads, so that neither waits for the other.
    if wide:
        x = _read(x_ptr + first, 0, length, 0.0, True, 16, CHUNK)
        kept = _read(mask_ptr + first, 0, length, 0, True, 4, CHUNK)
    else:
        x = _read(x_ptr + first, 0, length, 0.0, False, 16, CHUNK)
        kept = _read(mask_ptr + first, 0, length, 0, False, 4, CHUNK)
    return x, kept != 0


@triton.jit(
    do_not_specialize=["C", "stride_x", "stride_mask", "chunks", "rows"],
    do_not_specialize_on_alignment=["x_ptr", "mask_ptr", "mean_ptr", "count_ptr", "parts_ptr", "arrivals_ptr"],
)
def _mean_kernel(
    x_ptr,
    mask_ptr,
    mean_ptr,
    count_ptr,
    parts_ptr,
    arrivals_ptr,
    C: tl.int64,
    stride_x: tl.int64,
    stride_mask: tl.int64,
    chunks: tl.int32,  # of a row
    rows: tl.int32,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid: chunks of row 0, of row 1, ..."""
    program = tl.program_id(0)
    row = program // chunks
    x_row = x_ptr + row.to(tl.int64) * stride_x
    mask_row = mask_ptr + row.to(tl.int64) * stride_mask
    x, kept = _chunk(x_row, mask_row, C, program % chunks, CHUNK)
    total = tl.sum(tl.where(kept, x, 0.0), 0)
    count = tl.sum(kept.to(tl.float32), 0)
    complete = chunks == 1
    if chunks > 1:
        counts_ptr = parts_ptr + rows.to(tl.int64) * chunks
        tl.store(parts_ptr + program, total)
        tl.store(counts_ptr + program, count)
        complete = _arrived_last(arrivals_ptr + row, chunks)
        if complete:
            totals = tl.zeros([LANES], tl.float32)
            counts = tl.zeros([LANES], tl.float32)
            for first in range(0, chunks, LANES):
                at = first + tl.arange(0, LANES)
                there = at < chunks
                at += row * chunks
                totals += tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
                counts += tl.load(counts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
            total = tl.sum(totals, 0)
            count = tl.sum(counts, 0)
    if complete:
        tl.store(mean_ptr + row, tl.where(count > 0.0, tl.div_rn(total, tl.maximum(count, 1.0)), 0.0))
        tl.store(count_ptr + row, count)


@triton.jit(
    do_not_specialize=["N", "chunks"],
    do_not_specialize_on_alignment=["x_ptr", "mask_ptr", "stats_ptr", "centre_ptr", "parts_ptr", "arrivals_ptr"],
)
def _moments_kernel(
    x_ptr,
    mask_ptr,
    stats_ptr,  # mean, 1 / std, count
    centre_ptr,  # pivot, offset
    parts_ptr,
    arrivals_ptr,
    N: tl.int64,
    chunks: tl.int32,
    unbiased: tl.float32,  # 1 or 0
    eps: tl.float32,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    x, kept = _chunk(x_ptr, mask_ptr, N, program, CHUNK)
    _moments_stored(parts_ptr, program, chunks, _moments_of(x, kept))
    if _arrived_last(arrivals_ptr, chunks):
        count, pivot, offset, squares = _moments_of_parts(parts_ptr, chunks, LANES)
        tl.store(stats_ptr, pivot + offset)
        tl.store(stats_ptr + 1, _reciprocal_deviation(count, squares, unbiased, eps))
        tl.store(stats_ptr + 2, count)
        tl.store(centre_ptr, pivot)
        tl.store(centre_ptr + 1, offset)


@triton.jit(
    do_not_specialize=["N", "keep_mean"],
    do_not_specialize_on_alignment=["out_ptr", "x_ptr", "mask_ptr", "stats_ptr", "centre_ptr"],
)
def _whiten_kernel(
    out_ptr,
    x_ptr,
    mask_ptr,
    stats_ptr,
    centre_ptr,
    N: tl.int64,
    keep_mean: tl.int32,  # 1 or 0
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    mean = tl.where(keep_mean != 0, tl.load(stats_ptr), 0.0)
    rstd = tl.load(stats_ptr + 1)
    pivot = tl.load(centre_ptr)
    offset = tl.load(centre_ptr + 1)
    x, kept = _chunk(x_ptr, mask_ptr, N, program, CHUNK)
    whitened = tl.where(kept, (x - pivot - offset) * rstd + mean, 0.0)
    first = program.to(tl.int64) * CHUNK
    length = tl.minimum(N - first, CHUNK).to(tl.int32)
    if (_unaligned(out_ptr, 16) + length % 4) == 0:
        _write(out_ptr + first, 0, length, whitened, True, 16, CHUNK)
    else:
        _write(out_ptr + first, 0, length, whitened, False, 16, CHUNK)


_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def masked_mean(x, mask):
    """Mean of each row over the positions that count, and their number.

    x: [R, C], fp32. mask: [R, C], bool. Returns mean [R] (0 where nothing counts) and count [R], fp32.
    """
    R, C = x.shape
    check("x", x, x.shape)
    check("mask", mask, x.shape, torch.bool)
    if R == 0 or C == 0:
        return x.new_zeros(R), x.new_zeros(R)
    (x, stride_x), (mask, stride_mask) = rows_of(x), rows_of(mask)
    mean, count = x.new_empty(R), x.new_empty(R)
    chunks = triton.cdiv(C, CHUNK)
    step = R if chunks == 1 else COUNTERS
    parts = x.new_empty(1 if chunks == 1 else 2 * min(step, R) * chunks)
    with on_device_of(x):
        counters = arrivals(x)
        for first in range(0, R, step):
            some = slice(first, first + step)
            rows = min(step, R - first)
            _mean_kernel[(rows * chunks,)](
                x[some],
                mask[some],
                mean[some],
                count[some],
                parts,
                counters,
                C,
                stride_x,
                stride_mask,
                chunks,
                rows,
                CHUNK=CHUNK,
                LANES=LANES,
                **_OPTIONS,
            )
    return mean, count


def masked_whiten(x, mask, shift_mean, unbiased, eps):
    """(x - mean) / std over the positions that count, 0 elsewhere, and what it took.

    x: [...], fp32. mask: [...], bool. shift_mean: False adds the mean back. unbiased: divide by count - 1.
    eps: added to the variance, a number as a tensor in CPU memory.
    Returns whitened [...] and stats [3]: mean, 1 / std and count; fp32.
    """
    check("x", x, x.shape)
    check("mask", mask, x.shape, torch.bool)
    eps = eps.item()
    if x.numel() == 0:
        stats = x.new_zeros(3)
        stats[1] = eps**-0.5 if eps else float("inf")
        return x.new_empty(x.shape), stats
    x, mask = x.contiguous(), mask.contiguous()
    whitened, stats, centre = torch.empty_like(x), x.new_empty(3), x.new_empty(2)
    chunks = triton.cdiv(x.numel(), CHUNK)
    parts = x.new_empty(4 * chunks)
    with on_device_of(x):
        _moments_kernel[(chunks,)](
            x,
            mask,
            stats,
            centre,
            parts,
            arrivals(x),
            x.numel(),
            chunks,
            float(unbiased),
            eps,
            CHUNK=CHUNK,
            LANES=LANES,
            **_OPTIONS,
        )
        _whiten_kernel[(chunks,)](
            whitened, x, mask, stats, centre, x.numel(), int(not shift_mean), CHUNK=CHUNK, **_OPTIONS
        )
    return whitened, stats
