"""What kernels that walk over rows of a vocabulary share: wide accesses, statistics in chunks, layout, launches.

Order of summation. Column j belongs to lane j mod LANES; every lane keeps its own running statistics over a chunk of
LANES * ROLL * STEPS columns. At its end the lanes meet, and the chunk is merged into what the row has so far. Lanes and
chunks follow the column, not the address or the number of rows, so a row gives the same bits wherever it lies and
however many there are. With many rows one program walks all chunks of its row. With few, which would leave most of the
GPU idle, each chunk has a program, and the parts are merged afterwards, in the same order by the same arithmetic.
"""

import contextlib
import functools
import math

import torch

import triton
import triton.language as tl

from ._math import tanh

NUM_WARPS = 4
UNROLL = 4
STEPS = 4  # turns of the loop in a chunk: 32 KiB of a row
VECTOR_BYTES = 16
PROGRAMS_PER_MULTIPROCESSOR = 4  # as many keep enough loads in flight to use all of the memory's bandwidth
PART = 8  # numbers set aside for each chunk of a row that is split
LOG2_E = math.log2(math.e)

# Constants read inside kernels have to be constexpr.
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(math.log(2.0))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, so that -inf - m is -inf and never NaN
_CLAMP = tl.constexpr(-200.0)  # 2^-200 and e^-200 are 0 in fp32; below this, 0 * d must not become 0 * inf
_STEPS = tl.constexpr(STEPS)
_PART = tl.constexpr(PART)
_AT_A_TIME = tl.constexpr(8)  # parts whose loads are issued together


@triton.jit
def _clamp(d):
    return tl.maximum(d, _CLAMP, propagate_nan=tl.PropagateNan.ALL)  # a NaN logit has to show in the result


@triton.jit
def _aligned_down(ptr, GRANULE: tl.constexpr):
    """The nearest 16-byte boundary at or before ptr, and how many elements lie between."""
    skip = (ptr.to(tl.int64) % 16) // (16 // GRANULE)
    return tl.multiple_of(ptr - skip, 16), skip


@triton.jit
def _finished(x, column, inside, bias, softcap):
    """The logits of some columns from what a matrix product left there: plus bias [V], capped. Both may be None."""
    if bias is not None:
        if inside is None:
            x += tl.load(bias + column).to(tl.float32)
        else:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        x = softcap * tanh(x * tl.div_rn(1.0, softcap))
    return x


@triton.jit
def _load_end(row, column, stop, GRANULE: tl.constexpr, bias=None, softcap=None):
    """Columns of row, -inf from stop on.

    Masking whole granules keeps the load wide. A granule that straddles the end lies inside one aligned 16-byte unit,
    so it cannot fault; what it holds beyond the end is thrown away.
    """
    inside = column // GRANULE * GRANULE < stop
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(column < stop, _finished(x, column, inside, bias, softcap), float("-inf"))


@triton.jit
def _store_end(out, column, x, stop, GRANULE: tl.constexpr):
    """Unlike a load, a store must not touch what lies beyond the end: whole granules wide, the last one by element."""
    granule = column // GRANULE * GRANULE
    tl.store(out + column, x, mask=granule + GRANULE <= stop)
    if GRANULE > 1 and stop % GRANULE != 0:
        tl.store(out + column, x, mask=(column < stop) & (granule + GRANULE > stop))


@triton.jit
def _which_chunks(V, splits, LANES: tl.constexpr, ROLL: tl.constexpr):
    """Row of this program, and its chunks: all of them, or one if the row is split."""
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits
    stop = tl.where(splits == 1, tl.cdiv(V, LANES * ROLL * _STEPS), first + 1)
    return n, first, stop


# ------------------------------------------------------------------------------- statistics of softmax: m, s and u
# m is the maximum, s the sum of 2^d and u the sum of 2^d d, where d = (z - m) log2(e) / T.


@triton.jit
def _accumulate(tile, m, s, u, scale, ENTROPY: tl.constexpr):
    """Adds a tuple of [LANES] tensors to the running statistics m, s, u of each lane."""
    peak = m
    for i in tl.static_range(len(tile)):
        peak = tl.maximum(peak, tile[i])
    shift = (m - peak) * scale
    if ENTROPY:
        shift = _clamp(shift)
        u = tl.fma(shift, s, u) * tl.exp2(shift)
    s = s * tl.exp2(shift)
    for i in tl.static_range(len(tile)):
        d = (tile[i] - peak) * scale
        if ENTROPY:
            d = _clamp(d)
        e = tl.exp2(d)
        s += e
        if ENTROPY:
            u = tl.fma(e, d, u)
    return peak, s, u


@triton.jit
def _chunk_statistics(
    row,
    chunk,
    V,
    scale,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
    ENTROPY: tl.constexpr,
    bias=None,
    softcap=None,
):
    """Lane-wise (m, s, u) of one chunk. Loads are GRANULE elements wide where row and bias are known to be aligned."""
    lane = tl.arange(0, LANES)
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    first = chunk * (LANES * ROLL * _STEPS)
    length = tl.minimum(V - first, LANES * ROLL * _STEPS)
    body = first + length // (LANES * ROLL) * (LANES * ROLL)
    for start in range(first, body, LANES * ROLL):
        tile = ()
        for i in tl.static_range(ROLL):
            column = start + i * LANES + lane
            tile += (_finished(tl.load(row + column).to(tl.float32), column, None, bias, softcap),)
        m, s, u = _accumulate(tile, m, s, u, scale, ENTROPY)
    if body < first + length:
        tile = ()
        for i in tl.static_range(ROLL):
            tile += (_load_end(row, body + i * LANES + lane, V, GRANULE, bias, softcap),)
        m, s, u = _accumulate(tile, m, s, u, scale, ENTROPY)
    return m, s, u


@triton.jit
def _meet(m, s, u, scale, ENTROPY: tl.constexpr):
    """The lanes put together."""
    peak = tl.max(m, 0)
    shift = _clamp((m - peak) * scale)
    weight = tl.exp2(shift)
    moment = 0.0
    if ENTROPY:
        moment = tl.sum(tl.fma(shift, s, u) * weight, 0)
    return peak, tl.sum(s * weight, 0), moment


@triton.jit
def _merge(m, s, u, m2, s2, u2, scale, ENTROPY: tl.constexpr):
    """Two parts of a row put together. A part without columns (_LOWEST, 0, 0) changes no bit."""
    peak = tl.maximum(m, m2)
    shift, shift2 = _clamp((m - peak) * scale), _clamp((m2 - peak) * scale)
    weight, weight2 = tl.exp2(shift), tl.exp2(shift2)
    if ENTROPY:
        u = tl.fma(shift, s, u) * weight + tl.fma(shift2, s2, u2) * weight2
    return peak, s * weight + s2 * weight2, u


@triton.jit
def _row_statistics(
    row,
    first,
    stop,
    V,
    scale,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """(m, s, u) of the chunks from first to stop of a row."""
    aligned, skip = _aligned_down(row, GRANULE)
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.full([], 0.0, tl.float32)
    u = tl.full([], 0.0, tl.float32)
    for chunk in range(first, stop):
        # The branch ends before the lanes meet, so that both ways meet in the same order.
        if skip == 0:
            lanes_m, lanes_s, lanes_u = _chunk_statistics(aligned, chunk, V, scale, GRANULE, LANES, ROLL, ENTROPY)
        else:
            lanes_m, lanes_s, lanes_u = _chunk_statistics(row, chunk, V, scale, 1, LANES, ROLL, ENTROPY)
        m2, s2, u2 = _meet(lanes_m, lanes_s, lanes_u, scale, ENTROPY)
        m, s, u = _merge(m, s, u, m2, s2, u2, scale, ENTROPY)
    return m, s, u


@triton.jit
def _store_part(parts_ptr, m, s, u):
    part = parts_ptr + tl.program_id(0).to(tl.int64) * _PART
    tl.store(part, m)
    tl.store(part + 1, s)
    tl.store(part + 2, u)


@triton.jit
def _merge_parts(parts_ptr, n, splits, scale, ENTROPY: tl.constexpr):
    """(m, s, u) of row n from the parts its chunks left."""
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.full([], 0.0, tl.float32)
    u = tl.full([], 0.0, tl.float32)
    row = parts_ptr + n.to(tl.int64) * splits * _PART
    for first in range(0, splits, _AT_A_TIME):
        parts = ()
        for i in tl.static_range(_AT_A_TIME):
            part = row + (first + i) * _PART
            there = first + i < splits
            parts += (tl.load(part, mask=there, other=_LOWEST),)
            parts += (tl.load(part + 1, mask=there, other=0.0),)
            parts += (tl.load(part + 2, mask=there, other=0.0),)
        for i in tl.static_range(_AT_A_TIME):
            m, s, u = _merge(m, s, u, parts[3 * i], parts[3 * i + 1], parts[3 * i + 2], scale, ENTROPY)
    return m, s, u


# ---------------------------------------------------------------------------------------------------------- the host


def row_groups(*tensors):
    """Cuts [..., V] tensors of one shape into groups of rows that a kernel can address: one, for almost any layout.

    Yields (slice of the rows, size of the inner dimension, [(tensor, outer stride, inner stride), ...]). Neighbouring
    dimensions that a single stride describes are merged; two strides are what a kernel takes, and they cover
    logits[:, :-1]. Only stranger views need a launch for each index of their first dimension. Nothing is copied.
    """
    groups = [(tensors, 0)]
    while groups:
        views, first = groups.pop(0)
        dims = [(1, (0,) * len(views))] * 2
        for size, *strides in zip(views[0].shape[:-1], *(x.stride()[:-1] for x in views), strict=True):
            if size == 1:
                continue
            if dims[-1][1] == tuple(size * stride for stride in strides) and dims[-1][0] > 1:
                dims[-1] = (dims[-1][0] * size, tuple(strides))
            else:
                dims.append((size, tuple(strides)))
        n = math.prod(size for size, _ in dims)
        if len(dims) <= 4:
            (_, outer), (inner, within) = dims[-2:]
            yield slice(first, first + n), inner, list(zip(views, outer, within, strict=True))
        else:
            each = n // len(views[0])
            groups += [([x[i] for x in views], first + i * each) for i in range(len(views[0]))]


def on_device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def constants(*tensors):
    """Compile-time arguments of kernels that read rows of these tensors."""
    granules = [VECTOR_BYTES // x.element_size() for x in tensors]
    # Contracting a * b + c at will could make the two copies of a loop differ in the last bit; fma is written out.
    return {
        "LANES": 32 * NUM_WARPS * max(granules),
        "ROLL": UNROLL,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def granule(tensor):
    return VECTOR_BYTES // tensor.element_size()


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def splits(rows, V, device, *, LANES, ROLL, **_):
    """Programs a row: 1, or one for each chunk where there are too few rows to keep the device busy."""
    busy = rows >= PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)
    return 1 if busy else triton.cdiv(V, LANES * ROLL * STEPS)


def new_parts(rows, splits, like):
    """Memory for what the programs leave behind."""
    return like.new_empty(rows * splits * PART, dtype=torch.float32)


def check_layout(name, logits):
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous (stride 1), its stride is {logits.stride(-1)}")
