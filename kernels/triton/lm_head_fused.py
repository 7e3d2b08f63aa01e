"""Log-probs and entropies from hidden states with no logits in memory at all: a product whose tiles end in statistics.

A program computes [BLOCK_M, BLOCK_V] tiles of logits, one after the other, for a block of rows and a split of the
vocabulary. A tile stays in registers, in fp32, and is never rounded; of it remain, for every row, the running
statistics of _rows.py and the logit of the token. A second launch merges the splits of a row, in their order.

Splits are cut by the vocabulary alone, so that a row gives the same bits wherever it lies and however many there are.
Programs that run at the same time share rows of hidden and weight in L2: they take the splits of GROUP blocks of rows,
then those of the next.

Products of fp32 numbers are in fp32, as eager PyTorch's are unless told otherwise. Rows of hidden and weight that start
at 16-byte boundaries are read 16 bytes a thread; others, as with an odd H, element by element, and slowly: one binary
for each of the two, whatever the sizes.
"""

import torch

import triton
import triton.language as tl

from . import _rows
from ._rows import _LN_2, _LOWEST, LOG2_E, _clamp, _finished, _merge
from .log_probs import _IGNORE

TILES = 4  # of a split
GROUP = 16  # blocks of rows
STAGES = 3
PART = 4  # numbers a row leaves for each split: m, s, u and the token's logit
MERGED = 32  # rows a program of the second launch

_TILES = tl.constexpr(TILES)
_GROUP = tl.constexpr(GROUP)
_PART = tl.constexpr(PART)

_RUN_TIME = ["N", "V", "H", "hidden_stride", "weight_stride", "splits"]
_POINTERS = [
    *("hidden_ptr", "weight_ptr", "bias_ptr", "tokens_ptr", "parts_ptr"),
    *("log_probs_ptr", "entropy_ptr", "normaliser_ptr"),
]


@triton.jit
def _block(ptr, first, size, stride, GRANULE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows from first on start: of the first, 64 bits, and how far the others are from it, 32.

    Beyond the last row of size it stays: that is cheaper than to mask, and nobody looks at the results.
    """
    start = ptr + tl.cast(first, tl.int64) * stride
    offsets = tl.minimum(tl.arange(0, BLOCK), size - 1 - first) * stride.to(tl.int32)
    if GRANULE > 1:
        start = tl.multiple_of(start, 16)
        offsets = tl.multiple_of(offsets, (GRANULE,))
    return start, offsets[:, None]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _tiles_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,  # or None
    tokens_ptr,
    parts_ptr,
    N: tl.int32,
    V: tl.int32,
    H: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    splits: tl.int32,
    scale: tl.float32,  # log2(e) / T
    softcap,  # or None
    GRANULE: tl.constexpr,  # elements of a row that are read at a time
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) // (_GROUP * splits) * _GROUP
    blocks = tl.minimum(tl.cdiv(N, BLOCK_M) - first, _GROUP)
    within = tl.program_id(0) - first * splits
    split = within // blocks
    row = (first + within % blocks) * BLOCK_M
    n = row + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + n, mask=n < N, other=_IGNORE)
    if tl.max((token != _IGNORE).to(tl.int32), 0) > 0:
        column = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
        hidden, rows = _block(hidden_ptr, row, N, hidden_stride, GRANULE, BLOCK_M)
        m = tl.full([BLOCK_M], _LOWEST, tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        u = tl.zeros([BLOCK_M], tl.float32)
        at_token = tl.zeros([BLOCK_M], tl.float32)
        for tile in range(split * _TILES, tl.minimum((split + 1) * _TILES, tl.cdiv(V, BLOCK_V))):
            weight, columns = _block(weight_ptr, tile * BLOCK_V, V, weight_stride, GRANULE, BLOCK_V)
            z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for start in range(0, H, BLOCK_K):
                k = (start + tl.arange(0, BLOCK_K))[None, :]
                inside = k // GRANULE * GRANULE < H
                x = tl.load(hidden + (rows + k), mask=inside, other=0.0)
                w = tl.load(weight + (columns + k), mask=inside, other=0.0)
                z = tl.dot(x, w.T, z, input_precision="ieee")
            v = (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
            z = tl.where(v < V, _finished(z, v, v < V, bias_ptr, softcap), float("-inf"))
            at_token += tl.sum(tl.where(v == column[:, None], z, 0.0), 1)
            peak = tl.maximum(m, tl.max(z, 1))
            shift = _clamp((m - peak) * scale)
            d = _clamp((z - peak[:, None]) * scale)
            e = tl.exp2(d)
            u = tl.fma(shift, s, u) * tl.exp2(shift) + tl.sum(e * d, 1)
            s = s * tl.exp2(shift) + tl.sum(e, 1)
            m = peak
        part = parts_ptr + split.to(tl.int64) * _PART * N + n
        tl.store(part, m, mask=n < N)
        tl.store(part + N, s, mask=n < N)
        tl.store(part + 2 * N.to(tl.int64), u, mask=n < N)
        tl.store(part + 3 * N.to(tl.int64), at_token, mask=n < N)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _merge_kernel(
    tokens_ptr,
    parts_ptr,
    log_probs_ptr,
    entropy_ptr,
    normaliser_ptr,
    N: tl.int32,
    V: tl.int32,
    splits: tl.int32,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    ROWS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < N
    token = tl.load(tokens_ptr + n, mask=there, other=_IGNORE)
    counts = token != _IGNORE
    m = tl.full([ROWS], _LOWEST, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    u = tl.zeros([ROWS], tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    part = parts_ptr + n
    for _ in range(splits):
        m2 = tl.load(part, mask=counts, other=_LOWEST)
        s2 = tl.load(part + N, mask=counts, other=0.0)
        u2 = tl.load(part + 2 * N.to(tl.int64), mask=counts, other=0.0)
        z += tl.load(part + 3 * N.to(tl.int64), mask=counts, other=0.0)
        m, s, u = _merge(m, s, u, m2, s2, u2, scale, True)
        part += _PART * N.to(tl.int64)
    log_total = tl.log(s)
    z = tl.where((token >= 0) & (token < V), z, float("nan"))
    tl.store(log_probs_ptr + n, tl.where(counts, (z - m) * inv_t - log_total, 0.0), mask=there)
    tl.store(entropy_ptr + n, tl.where(counts, log_total - u / s * _LN_2, 0.0), mask=there)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64), tl.where(counts, m, 0.0), mask=there)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64) + 1, tl.where(counts, log_total, 0.0), mask=there)


def _granule(*matrices):
    """Elements of a row that can be read at a time: 16 bytes, where rows start at and are multiples of that, or 1."""
    granule = _rows.granule(matrices[0])
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % granule == x.shape[1] % granule == 0 for x in matrices)
    return granule if aligned else 1


def _tile(dtype, granule, plain):
    """The largest that spills no registers: sm_90 and sm_100 have room for 256 columns, without bias and softcap."""
    if granule == 1 or dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_V": 128, "BLOCK_K": 16}
    arch = 0 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
    return {"BLOCK_M": 128, "BLOCK_V": 256 if plain and 90 <= arch < 120 else 128, "BLOCK_K": 64}


def linear_token_log_probs(hidden, weight, bias, tokens, numbers):
    """As linear_token_log_probs of lm_head.py, without chunks, of logits in fp32."""
    hidden, weight = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (hidden, weight))
    tokens = tokens.contiguous()
    bias = bias if bias is None else bias.contiguous()
    temperature, softcap = numbers.tolist()
    softcap = softcap if softcap < float("inf") else None
    n, V = hidden.shape[0], weight.shape[0]
    shapes = (tokens.shape, tokens.shape, (*tokens.shape, 2))
    results = tuple(torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in shapes)
    if n == 0:
        return results
    scale, inv_t = LOG2_E / temperature, 1.0 / temperature
    granule = _granule(hidden, weight)
    with _rows.on_device_of(hidden):
        tile = _tile(hidden.dtype, granule, bias is None and softcap is None)
        splits = triton.cdiv(V, tile["BLOCK_V"] * TILES)
        parts = torch.empty(splits * PART * n, dtype=torch.float32, device=hidden.device)
        _tiles_kernel[(triton.cdiv(n, tile["BLOCK_M"]) * splits,)](
            hidden,
            weight,
            bias,
            tokens,
            parts,
            n,
            V,
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            splits,
            scale,
            softcap,
            GRANULE=granule,
            **tile,
            num_warps=8,
            num_stages=STAGES,
            enable_fp_fusion=True,
        )
        _merge_kernel[(triton.cdiv(n, MERGED),)](
            tokens, parts, *results, n, V, splits, scale, inv_t, ROWS=MERGED, num_warps=1, enable_fp_fusion=False
        )
    return results
