"""Attention of single rows to a paged KV cache: Triton kernels behind torch.ops.fastrlhf.

The first launch has a program for each row and key head: it normalises and rotates the key and writes key and value to
their page. The second has one for each row and key head again, for all the query heads that share it, up to HEADS: a
key that was loaded serves all of them. Scores, weights and sums are in fp32, with the largest score so far taken out
(Milakov and Gimelshein 2018).

Order of summation. Positions are cut into chunks of CHUNK, each of which is summed up by itself; then the chunks are
put together in their order. Where chunks lie follows the position alone. With many rows a program walks over all of its
row's chunks. With few, which would leave most of the GPU idle, each chunk has a program, and a third launch puts them
together by the same arithmetic. So a row's result has the same bits alone or in a batch, and with its prompt or after
it. How many chunks a row has is known on the device only: a chunk beyond its position has a program that ends at once.

Products are in fp32 and not on tensor cores: queries and weights are not rounded to the cache's 16 bits. What the pages
hold beyond a row's position is read, in its last page, but not used.
"""

import math

import torch

import triton
import triton.language as tl

from ._math import tanh
from ._rows import _LOG2_E, _LOWEST, PROGRAMS_PER_MULTIPROCESSOR, multiprocessors, on_device_of

PAGE = 16  # positions
CHUNK = 256  # positions
HEADS = 8  # query heads of a program
BLOCK = 32  # positions whose keys and values a program holds at a time; 16 of heads as wide as 256
NUM_WARPS = 4
REGISTERS = 128  # four programs on a multiprocessor; without being told, the compiler takes more or spills
LARGEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PAGE = tl.constexpr(PAGE)
_CHUNK = tl.constexpr(CHUNK)
_AT_A_TIME = tl.constexpr(4)  # chunks whose loads are issued together

_RUN_TIME = ["qkv_stride", "pages_stride", "heads", "kv_heads", "splits", "window", "rotary"]
_POINTERS = [
    *("out_ptr", "sums_ptr", "parts_ptr", "qkv_ptr", "pages_ptr"),  # keys and values are aligned
    *("sequence_ptr", "position_ptr", "cos_ptr", "sin_ptr", "norm_ptr"),
]


@triton.jit
def _prepared(
    heads,
    norm_ptr,  # or None
    cos_ptr,  # or None, as sin
    sin_ptr,
    position,
    rotary,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Heads [heads, WIDTH], fp32, normalised and rotated to a position. heads: where they begin."""
    i = tl.arange(0, WIDTH)
    x = tl.load(heads[:, None] + i[None, :], mask=(i < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    if norm_ptr is not None:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), HEAD_DIM * 1.0) + eps))[:, None]
        x *= rstd * tl.load(norm_ptr + i, mask=i < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    if cos_ptr is not None:
        low, turned = i < rotary, i < 2 * rotary
        partner = tl.where(low, i + rotary, i - rotary)
        y = tl.load(heads[:, None] + partner[None, :], mask=turned[None, :], other=0.0).to(tl.float32)
        if norm_ptr is not None:
            y *= rstd * tl.load(norm_ptr + partner, mask=turned, other=0.0).to(tl.float32)[None, :]
        angle = position.to(tl.int64) * rotary + tl.where(low, i, i - rotary)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        x = x * cos[None, :] + y * tl.where(low, -sin, sin)[None, :]
    return x


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _write_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
    sequence_ptr,
    position_ptr,
    cos_ptr,  # or None, as sin
    sin_ptr,
    norm_ptr,  # or None
    qkv_stride: tl.int64,
    pages_stride: tl.int64,
    heads: tl.int32,
    kv_heads: tl.int32,
    rotary: tl.int32,
    eps: tl.float32,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    position = tl.load(position_ptr + n).to(tl.int32)
    page = tl.load(pages_ptr + tl.load(sequence_ptr + n) * pages_stride + position // _PAGE).to(tl.int64)
    row = qkv_ptr + n.to(tl.int64) * qkv_stride
    k_at = (heads + head + tl.arange(0, 1)) * HEAD_DIM
    k = _prepared(row + k_at, norm_ptr, cos_ptr, sin_ptr, position, rotary, eps, HEAD_DIM, WIDTH)
    i = tl.arange(0, WIDTH)[None, :]
    v = tl.load(row + (heads + kv_heads + head) * HEAD_DIM + i, mask=i < HEAD_DIM).to(tl.float32)
    place = (page * kv_heads + head) * (HEAD_DIM * _PAGE)
    slot = position % _PAGE
    tl.store(keys_ptr + place + i * _PAGE + slot, k.to(keys_ptr.dtype.element_ty), mask=i < HEAD_DIM)
    tl.store(values_ptr + place + slot * HEAD_DIM + i, v.to(values_ptr.dtype.element_ty), mask=i < HEAD_DIM)


@triton.jit
def _merge(m, s, sums, m2, s2, sums2):
    """Two parts of a row put together: largest score and sum of weights, [heads], and weighted values, [heads, WIDTH].

    A part without positions (_LOWEST, 0, 0) changes no bit. fma is written out, so that the compiler cannot contract
    anything else, and differently in the two kernels that merge.
    """
    peak = tl.maximum(m, m2)
    weight, weight2 = tl.exp2((m - peak) * _LOG2_E), tl.exp2((m2 - peak) * _LOG2_E)
    return (
        peak,
        tl.fma(s, weight, s2 * weight2),
        tl.fma(sums, tl.broadcast_to(weight[:, None], sums.shape), sums2 * weight2[:, None]),
    )


@triton.jit
def _chunk_attention(
    q,
    keys_ptr,
    values_ptr,
    table,
    head,
    kv_heads,
    chunk,
    first,
    last,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(m, s, sums) of those positions of a chunk that lie in first .. last, for queries q [heads, WIDTH]."""
    i = tl.arange(0, q.shape[1])
    m = tl.full([q.shape[0]], _LOWEST, tl.float32)
    s = tl.zeros([q.shape[0]], tl.float32)
    sums = tl.zeros(q.shape, tl.float32)
    blocks: tl.constexpr = _CHUNK // BLOCK
    stop = tl.minimum((chunk + 1) * blocks, last // BLOCK + 1)
    for block in range(tl.maximum(chunk * blocks, first // BLOCK), stop):
        at = block * BLOCK + tl.arange(0, BLOCK)
        page_start = at // _PAGE * _PAGE
        there = (page_start <= last) & (page_start > first - _PAGE)  # the same for a page, so that loads stay wide
        seen = (at <= last) & (at >= first)
        page = tl.load(table + at // _PAGE, mask=there, other=0).to(tl.int64)
        place = (page * kv_heads + head) * (HEAD_DIM * _PAGE)
        inside = i < HEAD_DIM
        k = tl.load(
            keys_ptr + (place + at % _PAGE)[None, :] + i[:, None] * _PAGE,
            mask=there[None, :] & inside[:, None],
            other=0.0,
        )
        v = tl.load(
            values_ptr + (place + at % _PAGE * HEAD_DIM)[:, None] + i[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        # Keys first: they reach shared memory just before, and what stands before them waits for that in registers.
        scores = tl.trans(tl.dot(tl.trans(k.to(tl.float32)), tl.trans(q), input_precision="ieee"))
        if softcap is not None:
            scores = softcap * tanh(scores * tl.div_rn(1.0, softcap))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2((scores - peak[:, None]) * _LOG2_E)
        rest = tl.exp2((m - peak) * _LOG2_E)
        s = s * rest + tl.sum(p, 1)
        sums = tl.dot(p, v.to(tl.float32), sums * rest[:, None], input_precision="ieee")
        m = peak
    return m, s, sums


@triton.jit
def _seen(position_ptr, n, window):
    """First and last position that row n attends to."""
    last = tl.load(position_ptr + n).to(tl.int32)
    return tl.where(window > 0, tl.maximum(last - window + 1, 0), 0), last


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _attend_kernel(
    out_ptr,
    sums_ptr,
    parts_ptr,
    qkv_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
    sequence_ptr,
    position_ptr,
    cos_ptr,  # or None, as sin
    sin_ptr,
    norm_ptr,  # or None
    qkv_stride: tl.int64,
    pages_stride: tl.int64,
    heads: tl.int32,
    kv_heads: tl.int32,
    splits: tl.int32,
    window: tl.int32,
    rotary: tl.int32,
    scale: tl.float32,
    softcap,  # or None
    eps: tl.float32,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: splits of a program's query heads, which are some of a key head's, which are some of a row's."""
    group = heads // kv_heads
    programs = tl.cdiv(group, HEADS)
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    head = program // programs % kv_heads
    n = program // (programs * kv_heads)
    first, last = _seen(position_ptr, n, window)
    begin, stop = first // _CHUNK, last // _CHUNK + 1
    if splits > 1:
        begin, stop = tl.maximum(begin, split), tl.minimum(stop, split + 1)
    if begin < stop:
        within = program % programs * HEADS + tl.arange(0, HEADS)
        query = head * group + tl.minimum(within, group - 1)
        queries = qkv_ptr + n.to(tl.int64) * qkv_stride + query * HEAD_DIM
        q = _prepared(queries, norm_ptr, cos_ptr, sin_ptr, last, rotary, eps, HEAD_DIM, WIDTH) * scale
        table = pages_ptr + tl.load(sequence_ptr + n) * pages_stride
        m = tl.full([HEADS], _LOWEST, tl.float32)
        s = tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, WIDTH], tl.float32)
        for chunk in range(begin, stop):
            m2, s2, sums2 = _chunk_attention(
                q, keys_ptr, values_ptr, table, head, kv_heads, chunk, first, last, softcap, HEAD_DIM, BLOCK
            )
            m, s, sums = _merge(m, s, sums, m2, s2, sums2)
        i = tl.arange(0, WIDTH)[None, :]
        there = (within < group)[:, None] & (i < HEAD_DIM)
        row = n.to(tl.int64) * heads + query
        if splits == 1:
            tl.store(out_ptr + row[:, None] * HEAD_DIM + i, tl.div_rn(sums, s[:, None]), mask=there)
        else:
            part = row * splits + split
            tl.store(sums_ptr + part[:, None] * HEAD_DIM + i, sums, mask=there)
            tl.store(parts_ptr + part * 2, m, mask=within < group)
            tl.store(parts_ptr + part * 2 + 1, s, mask=within < group)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _merge_kernel(
    out_ptr,
    sums_ptr,
    parts_ptr,
    position_ptr,
    heads: tl.int32,
    splits: tl.int32,
    window: tl.int32,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: the query heads of a row."""
    row = tl.program_id(0).to(tl.int64)
    first, last = _seen(position_ptr, tl.program_id(0) // heads, window)
    i = tl.arange(0, WIDTH)[None, :]
    one = tl.arange(0, 1)
    m = tl.full([1], _LOWEST, tl.float32)
    s = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, WIDTH], tl.float32)
    for start in range(first // _CHUNK, last // _CHUNK + 1, _AT_A_TIME):
        parts = ()
        for j in tl.static_range(_AT_A_TIME):
            part = row * splits + start + j + one
            there = start + j + one <= last // _CHUNK
            parts += (tl.load(parts_ptr + part * 2, mask=there, other=_LOWEST),)
            parts += (tl.load(parts_ptr + part * 2 + 1, mask=there, other=0.0),)
            mask = there[:, None] & (i < HEAD_DIM)
            parts += (tl.load(sums_ptr + part[:, None] * HEAD_DIM + i, mask=mask, other=0.0),)
        for j in tl.static_range(_AT_A_TIME):
            m, s, sums = _merge(m, s, sums, parts[3 * j], parts[3 * j + 1], parts[3 * j + 2])
    tl.store(out_ptr + row * HEAD_DIM + i, tl.div_rn(sums, s[:, None]), mask=i < HEAD_DIM)


# ---------------------------------------------------------------------------------------------------------- the host

_OPTIONS = {"enable_fp_fusion": True}  # most of the arithmetic is products that are added up


def _wanted(name, x, wanted, good):
    if not good:
        raise ValueError(f"{name}: got {tuple(x.shape)}, strides {x.stride()}, {x.dtype}, wanted {wanted}")


def _check(qkv, keys, values, pages, sequence, position, cos, sin, norms):
    """The kernels trust all of this. Returns the number of query heads."""
    _wanted("qkv", qkv, "[N, columns], fp32, bf16 or fp16", qkv.dim() == 2 and qkv.dtype in DTYPES)
    for name, x in (("keys", keys), ("values", values)):
        good = x.dim() == 4 and x.dtype in DTYPES and x.is_contiguous() and x.data_ptr() % 16 == 0
        _wanted(name, x, "[pages, kv_heads, ...], fp32, bf16 or fp16, contiguous, at a 16-byte boundary", good)
    count, kv_heads, d, page = keys.shape
    good = page == PAGE and d % 8 == 0 and 8 <= d <= LARGEST_HEAD
    _wanted("keys", keys, f"[pages, kv_heads, d, {PAGE}], d a multiple of 8 up to {LARGEST_HEAD}", good)
    shape = (count, kv_heads, PAGE, d)
    _wanted("values", values, f"{shape} in the dtype of keys", values.shape == shape and values.dtype == keys.dtype)
    heads = qkv.shape[1] // d - 2 * kv_heads
    good = qkv.shape[1] % d == 0 and heads >= 1 and heads % kv_heads == 0 and qkv.stride(1) == 1
    _wanted("qkv", qkv, f"(heads + 2 · {kv_heads}) · {d} columns side by side, heads a multiple of {kv_heads}", good)
    _wanted("pages", pages, "[sequences, pages of one], int32", pages.dim() == 2 and pages.dtype == torch.int32)
    for name, x in (("sequence", sequence), ("position", position)):
        good = x.shape == qkv.shape[:1] and x.dtype == torch.int64
        _wanted(name, x, "one int64 for each row of qkv", good)
    if (cos is None) != (sin is None):
        raise ValueError("sin: wanted with cos, or neither")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is not None:
            good = x.dim() == 2 and x.dtype == torch.float32 and 1 <= x.shape[1] <= d // 2 and x.shape == cos.shape
            _wanted(name, x, f"[positions, r], fp32, r at most {d // 2}, the same for both", good)
    for name, x in norms.items():
        if x is not None:
            _wanted(name, x, f"[{d}], fp32, bf16 or fp16", x.shape == (d,) and x.dtype in DTYPES)
    return heads


def paged_attention(qkv, keys, values, pages, sequence, position, cos, sin, q_norm, k_norm, numbers, window):
    """Causal attention of rows to the pages of their sequences, into which their own keys and values go first.

    qkv: [N, (heads + 2 kv_heads) d], fp32, bf16 or fp16; any row stride. keys: [pages, kv_heads, d, 16], values:
    [pages, kv_heads, 16, d], contiguous, of one dtype of these; written to. d: a multiple of 8, 256 at most.
    pages: [sequences, pages of one], int32. sequence, position: [N], int64; nobody checks that they lie in `pages`.
    cos, sin: [positions, r], fp32, or None. q_norm, k_norm: [d] or None. numbers: [3], in CPU memory: scale, softcap of
    the scores (infinity: none), eps of the norms. window: positions seen, 0: all.
    Returns [N, heads d], fp32.
    """
    heads = _check(qkv, keys, values, pages, sequence, position, cos, sin, {"q_norm": q_norm, "k_norm": k_norm})
    scale, softcap, eps = numbers.tolist()
    if window < 0:
        raise ValueError(f"window: got {window}, wanted at least 0")
    rows, (_, kv_heads, d, _) = qkv.shape[0], keys.shape
    out = torch.empty(rows, heads * d, dtype=torch.float32, device=qkv.device)
    if rows == 0:
        return out
    pages, sequence, position = (x.contiguous() for x in (pages, sequence, position))
    cos, sin, q_norm, k_norm = (x if x is None else x.contiguous() for x in (cos, sin, q_norm, k_norm))
    width = triton.next_power_of_2(d)
    group = heads // kv_heads
    together = min(HEADS, triton.next_power_of_2(group))
    programs = rows * kv_heads * triton.cdiv(group, together)
    splits = triton.cdiv(pages.shape[1] * PAGE, CHUNK)
    if programs >= PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(qkv.device):
        splits = 1
    size = {"HEAD_DIM": d, "WIDTH": width}
    rotary = 0 if cos is None else cos.shape[1]
    window = min(window, 2**31 - 1)
    cache = (qkv, keys, values, pages, sequence, position, cos, sin)
    with on_device_of(qkv):
        strides = (qkv.stride(0), pages.stride(0), heads, kv_heads)
        _write_kernel[(rows * kv_heads,)](*cache, k_norm, *strides, rotary, eps, **size, **_OPTIONS, num_warps=1)
        sums = out if splits == 1 else out.new_empty(rows * heads * splits * d)
        parts = out if splits == 1 else out.new_empty(rows * heads * splits * 2)
        _attend_kernel[(programs * splits,)](
            out,
            sums,
            parts,
            *cache,
            q_norm,
            *strides,
            splits,
            window,
            rotary,
            scale,
            None if math.isinf(softcap) else softcap,
            eps,
            HEADS=together,
            BLOCK=BLOCK if width < LARGEST_HEAD else PAGE,
            **size,
            **_OPTIONS,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS,
        )
        if splits > 1:
            _merge_kernel[(rows * heads,)](
                out, sums, parts, position, heads, splits, window, **size, **_OPTIONS, num_warps=1
            )
    return out
