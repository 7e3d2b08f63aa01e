"""The KL divergence, estimated from tokens and exact: Triton kernels behind torch.ops.fastrlhf.

full_kl reads both rows in lockstep, once. With t = (z - m) log2(e) / T, r the same of the reference, s and q the sums
of 2^t and 2^r, and u = sum of 2^t (t - r),

    KL = ln2 u / s + log(q / s).

Every lane keeps (m, s, u) and the reference's (m, q). u holds differences of numbers that are close where the rows are
close, however far from 0 the logits lie, and q / s is a ratio: nothing large cancels. Where p is 0 in fp32 a term is 0
whatever the reference holds; elsewhere r = -inf makes it infinite.

Its backward pass, dz = (g/T) p (log p - log q - KL) and dz_ref = (g/T) (q - p), starts from the stored m and log s of
both rows. Few rows, vector width and compilation are as in log_probs.py and _rows.py; the wide path needs all addresses
of a row at 16-byte boundaries.

kl_divergence works element by element; what it computes stands in _math.py.
"""

import torch

import triton
import triton.language as tl

from . import _rows
from ._math import kl_estimate_clamped
from ._rows import (
    _AT_A_TIME,
    _LN_2,
    _LOG2_E,
    _LOWEST,
    _PART,
    _STEPS,
    LOG2_E,
    _aligned_down,
    _clamp,
    _load_end,
    _store_end,
    _which_chunks,
)

ROLL = 2  # of two rows: as many loads in flight as log_probs has
BLOCK = 2048  # elements a program of kl_divergence
GRANULE = 4  # fp32 numbers in 16 bytes

_GRANULE = tl.constexpr(GRANULE)
_FAR = tl.constexpr(-1e30)  # finite, so that 0 times it is 0
_NO_POWER = tl.constexpr(-126.0)  # 2 to less is 0 in fp32 without subnormal numbers

_RUN_TIME = [
    *("V", "splits", "inner", "stride_outer", "stride_inner", "ref_stride_outer", "ref_stride_inner"),
    *("grad_stride_outer", "grad_stride_inner", "count", "estimator"),
]
_POINTERS = [
    *("logits_ptr", "ref_logits_ptr", "mask_ptr", "kl_ptr", "normaliser_ptr", "ref_normaliser_ptr", "parts_ptr"),
    *("grad_ptr", "grad_logits_ptr", "grad_ref_logits_ptr", "log_probs_ptr", "ref_log_probs_ptr", "result_ptr"),
]


# ------------------------------------------------------------------------------------------------------ token-wise


@triton.jit
def _kl_block(
    grad, log_probs, ref_log_probs, result, first, count, estimator, clamp_input, clamp_output, BLOCK: tl.constexpr
):
    i = first + tl.arange(0, BLOCK)
    inside = i < count
    log_ratio = tl.load(log_probs + i, mask=inside, other=0.0) - tl.load(ref_log_probs + i, mask=inside, other=0.0)
    value, slope = kl_estimate_clamped(log_ratio, estimator, clamp_input, clamp_output)
    if grad is not None:
        value = slope * tl.load(grad + i, mask=inside, other=0.0)
    tl.store(result + i, value, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _kl_divergence_kernel(
    grad_ptr,  # None: the estimates; else their gradient
    log_probs_ptr,
    ref_log_probs_ptr,
    result_ptr,
    count: tl.int64,
    estimator: tl.int32,
    clamp_input: tl.float32,
    clamp_output: tl.float32,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    p, p_skip = _aligned_down(log_probs_ptr, _GRANULE)
    q, q_skip = _aligned_down(ref_log_probs_ptr, _GRANULE)
    out, out_skip = _aligned_down(result_ptr, _GRANULE)
    grad = None
    skip = p_skip + q_skip + out_skip
    if grad_ptr is not None:
        grad, grad_skip = _aligned_down(grad_ptr, _GRANULE)
        skip += grad_skip
    whole = first + BLOCK <= count
    if (skip == 0) & whole:
        _kl_block(grad, p, q, out, first, first + BLOCK, estimator, clamp_input, clamp_output, BLOCK)
    else:
        p, q, out = log_probs_ptr, ref_log_probs_ptr, result_ptr
        _kl_block(grad_ptr, p, q, out, first, count, estimator, clamp_input, clamp_output, BLOCK)


def _elementwise(grad, log_probs, ref_log_probs, estimator, clamp):
    inputs = [x if x is None else x.contiguous() for x in (grad, log_probs, ref_log_probs)]
    result = torch.empty(log_probs.shape, dtype=torch.float32, device=log_probs.device)
    count = result.numel()
    if count:
        with _rows.on_device_of(log_probs):
            _kl_divergence_kernel[(triton.cdiv(count, BLOCK),)](
                *inputs,
                result,
                count,
                estimator,
                *clamp.tolist(),
                BLOCK=BLOCK,
                num_warps=_rows.NUM_WARPS,
                enable_fp_fusion=False,
            )
    return result


def kl_divergence(log_probs, ref_log_probs, estimator, clamp):
    """Estimates of KL(policy || reference), token by token: two tensors [...], fp32 -> [...], fp32.

    estimator: 0 to 3, for k1, k2, k3 and abs. clamp: [2], of the log-ratio and of the estimate, in CPU memory.
    """
    return _elementwise(None, log_probs, ref_log_probs, estimator, clamp)


def kl_divergence_backward(grad, log_probs, ref_log_probs, estimator, clamp):
    """Gradient of kl_divergence to log_probs; that to ref_log_probs is its negative."""
    return _elementwise(grad, log_probs, ref_log_probs, estimator, clamp)


# ------------------------------------------------------------------------------------------------- over the vocabulary


@triton.jit
def _shifted(u, s, shift, ref_shift, weight):
    """u of a part whose maxima rise by -shift and -ref_shift. Where nothing of the part is left, 0 and not 0 inf."""
    return tl.where(weight == 0.0, 0.0, tl.fma(shift - tl.maximum(ref_shift, _FAR), s, u) * weight)


@triton.jit
def _accumulate_pair(tile, ref_tile, m, s, u, ref_m, ref_s, scale):
    """Adds two tuples of [LANES] tensors to the running statistics of each lane."""
    peak = m
    ref_peak = ref_m
    for i in tl.static_range(len(tile)):
        peak = tl.maximum(peak, tile[i])
        ref_peak = tl.maximum(ref_peak, ref_tile[i])
    shift = _clamp((m - peak) * scale)
    ref_shift = (ref_m - ref_peak) * scale
    weight = tl.exp2(shift)
    u = _shifted(u, s, shift, ref_shift, weight)
    s = s * weight
    ref_s = ref_s * tl.exp2(ref_shift)
    for i in tl.static_range(len(tile)):
        t = (tile[i] - peak) * scale
        r = (ref_tile[i] - ref_peak) * scale
        e = tl.exp2(t)
        s += e
        ref_s += tl.exp2(r)
        u += tl.where(t < _NO_POWER, 0.0, e * (t - r))
    return peak, s, u, ref_peak, ref_s


@triton.jit
def _chunk_of_pair(
    row,
    ref_row,
    chunk,
    V,
    scale,
    GRANULE: tl.constexpr,
    REF_GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    """Lane-wise statistics of one chunk of two rows."""
    lane = tl.arange(0, LANES)
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    ref_m = m
    ref_s = s
    first = chunk * (LANES * ROLL * _STEPS)
    length = tl.minimum(V - first, LANES * ROLL * _STEPS)
    body = first + length // (LANES * ROLL) * (LANES * ROLL)
    for start in range(first, body, LANES * ROLL):
        tile = ()
        ref_tile = ()
        for i in tl.static_range(ROLL):
            tile += (tl.load(row + (start + i * LANES + lane)).to(tl.float32),)
            ref_tile += (tl.load(ref_row + (start + i * LANES + lane)).to(tl.float32),)
        m, s, u, ref_m, ref_s = _accumulate_pair(tile, ref_tile, m, s, u, ref_m, ref_s, scale)
    if body < first + length:
        tile = ()
        ref_tile = ()
        for i in tl.static_range(ROLL):
            tile += (_load_end(row, body + i * LANES + lane, V, GRANULE),)
            ref_tile += (_load_end(ref_row, body + i * LANES + lane, V, REF_GRANULE),)
        m, s, u, ref_m, ref_s = _accumulate_pair(tile, ref_tile, m, s, u, ref_m, ref_s, scale)
    return m, s, u, ref_m, ref_s


@triton.jit
def _meet_pair(m, s, u, ref_m, ref_s, scale):
    """The lanes put together."""
    peak = tl.max(m, 0)
    ref_peak = tl.max(ref_m, 0)
    shift = _clamp((m - peak) * scale)
    ref_shift = (ref_m - ref_peak) * scale
    weight = tl.exp2(shift)
    u = tl.sum(_shifted(u, s, shift, ref_shift, weight), 0)
    return peak, tl.sum(s * weight, 0), u, ref_peak, tl.sum(ref_s * tl.exp2(ref_shift), 0)


@triton.jit
def _merge_pair(m, s, u, ref_m, ref_s, m2, s2, u2, ref_m2, ref_s2, scale):
    """Two parts of the rows put together. A part without columns (_LOWEST, 0, 0, _LOWEST, 0) changes no bit."""
    peak = tl.maximum(m, m2)
    ref_peak = tl.maximum(ref_m, ref_m2)
    shift, shift2 = _clamp((m - peak) * scale), _clamp((m2 - peak) * scale)
    ref_shift, ref_shift2 = (ref_m - ref_peak) * scale, (ref_m2 - ref_peak) * scale
    weight, weight2 = tl.exp2(shift), tl.exp2(shift2)
    u = _shifted(u, s, shift, ref_shift, weight) + _shifted(u2, s2, shift2, ref_shift2, weight2)
    ref_s = ref_s * tl.exp2(ref_shift) + ref_s2 * tl.exp2(ref_shift2)
    return peak, s * weight + s2 * weight2, u, ref_peak, ref_s


@triton.jit
def _merge_parts_of_pair(parts_ptr, n, splits, scale):
    """Statistics of rows n from the parts their chunks left."""
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.full([], 0.0, tl.float32)
    u = tl.full([], 0.0, tl.float32)
    ref_m = m
    ref_s = s
    row = parts_ptr + n.to(tl.int64) * splits * _PART
    for first in range(0, splits, _AT_A_TIME):
        parts = ()
        for i in tl.static_range(_AT_A_TIME):
            part = row + (first + i) * _PART
            there = first + i < splits
            parts += (tl.load(part, mask=there, other=_LOWEST),)
            parts += (tl.load(part + 1, mask=there, other=0.0),)
            parts += (tl.load(part + 2, mask=there, other=0.0),)
            parts += (tl.load(part + 3, mask=there, other=_LOWEST),)
            parts += (tl.load(part + 4, mask=there, other=0.0),)
        for i in tl.static_range(_AT_A_TIME):
            m2, s2, u2 = parts[5 * i], parts[5 * i + 1], parts[5 * i + 2]
            ref_m2, ref_s2 = parts[5 * i + 3], parts[5 * i + 4]
            m, s, u, ref_m, ref_s = _merge_pair(m, s, u, ref_m, ref_s, m2, s2, u2, ref_m2, ref_s2, scale)
    return m, s, u, ref_m, ref_s


@triton.jit
def _store_results(m, s, u, ref_m, ref_s, n, kl_ptr, normaliser_ptr, ref_normaliser_ptr):
    kl = u / s * _LN_2 + tl.log(ref_s / s)
    tl.store(kl_ptr + n, tl.where(kl < 0.0, 0.0, kl))  # below 0 by rounding alone
    tl.store(normaliser_ptr + 2 * n.to(tl.int64), m)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64) + 1, tl.log(s))
    tl.store(ref_normaliser_ptr + 2 * n.to(tl.int64), ref_m)
    tl.store(ref_normaliser_ptr + 2 * n.to(tl.int64) + 1, tl.log(ref_s))


@triton.jit
def _store_zeros(n, kl_ptr, normaliser_ptr, ref_normaliser_ptr):
    tl.store(kl_ptr + n, 0.0)
    for i in tl.static_range(2):
        tl.store(normaliser_ptr + 2 * n.to(tl.int64) + i, 0.0)
        tl.store(ref_normaliser_ptr + 2 * n.to(tl.int64) + i, 0.0)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _full_kl_kernel(
    logits_ptr,
    ref_logits_ptr,
    mask_ptr,
    kl_ptr,
    normaliser_ptr,
    ref_normaliser_ptr,
    parts_ptr,
    V: tl.int32,
    splits: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64,
    scale: tl.float32,  # log2(e) / T
    GRANULE: tl.constexpr,
    REF_GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n, first, stop = _which_chunks(V, splits, LANES, ROLL)
    wanted = True
    if mask_ptr is not None:
        wanted = tl.load(mask_ptr + n) != 0
    if wanted:
        outer, within = (n // inner).to(tl.int64), (n % inner).to(tl.int64)
        row = logits_ptr + outer * stride_outer + within * stride_inner
        ref_row = ref_logits_ptr + outer * ref_stride_outer + within * ref_stride_inner
        skip = _aligned_down(row, GRANULE)[1] + _aligned_down(ref_row, REF_GRANULE)[1]
        m = tl.full([], _LOWEST, tl.float32)
        s = tl.full([], 0.0, tl.float32)
        u = tl.full([], 0.0, tl.float32)
        ref_m = tl.full([], _LOWEST, tl.float32)
        ref_s = tl.full([], 0.0, tl.float32)
        for chunk in range(first, stop):
            # The branch ends before the lanes meet, so that both ways meet in the same order.
            if skip == 0:
                aligned = _aligned_down(row, GRANULE)[0]
                ref_aligned = _aligned_down(ref_row, REF_GRANULE)[0]
                m2, s2, u2, ref_m2, ref_s2 = _chunk_of_pair(
                    aligned, ref_aligned, chunk, V, scale, GRANULE, REF_GRANULE, LANES, ROLL
                )
            else:
                m2, s2, u2, ref_m2, ref_s2 = _chunk_of_pair(row, ref_row, chunk, V, scale, 1, 1, LANES, ROLL)
            met_m, met_s, met_u, met_ref_m, met_ref_s = _meet_pair(m2, s2, u2, ref_m2, ref_s2, scale)
            m, s, u, ref_m, ref_s = _merge_pair(m, s, u, ref_m, ref_s, met_m, met_s, met_u, met_ref_m, met_ref_s, scale)
        if splits == 1:
            _store_results(m, s, u, ref_m, ref_s, n, kl_ptr, normaliser_ptr, ref_normaliser_ptr)
        else:
            part = parts_ptr + tl.program_id(0).to(tl.int64) * _PART
            tl.store(part, m)
            tl.store(part + 1, s)
            tl.store(part + 2, u)
            tl.store(part + 3, ref_m)
            tl.store(part + 4, ref_s)
    elif splits == 1:
        _store_zeros(n, kl_ptr, normaliser_ptr, ref_normaliser_ptr)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _full_kl_merge_kernel(
    mask_ptr,
    kl_ptr,
    normaliser_ptr,
    ref_normaliser_ptr,
    parts_ptr,
    splits: tl.int32,
    scale: tl.float32,
):
    n = tl.program_id(0)
    wanted = True
    if mask_ptr is not None:
        wanted = tl.load(mask_ptr + n) != 0
    if wanted:
        m, s, u, ref_m, ref_s = _merge_parts_of_pair(parts_ptr, n, splits, scale)
        _store_results(m, s, u, ref_m, ref_s, n, kl_ptr, normaliser_ptr, ref_normaliser_ptr)
    else:
        _store_zeros(n, kl_ptr, normaliser_ptr, ref_normaliser_ptr)


@triton.jit
def _gradients(x, y, g, kl, peak, log_total, ref_peak, ref_log_total, inv_t):
    """Of both logits; g comes divided by T."""
    log_p = tl.fma(x - peak, inv_t, -log_total)
    log_q = tl.fma(y - ref_peak, inv_t, -ref_log_total)
    p = tl.exp2(log_p * _LOG2_E)
    q = tl.exp2(log_q * _LOG2_E)
    # Where p is 0 its token pulls nowhere, however far the reference is.
    return tl.where(p == 0.0, 0.0, g * p * (log_p - log_q - kl)), g * (q - p)


@triton.jit
def _pair_gradient(
    row,
    ref_row,
    out,
    ref_out,
    first,
    stop,
    live,
    g,
    kl,
    peak,
    log_total,
    ref_peak,
    ref_log_total,
    inv_t,
    GRANULE: tl.constexpr,
    REF_GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    """Gradients of some columns; out or ref_out is None where it is not needed."""
    lane = tl.arange(0, LANES)
    read = tl.zeros([LANES], tl.int32) + live.to(tl.int32) != 0  # the same in every lane, so loads stay wide
    body = first + (stop - first) // (LANES * ROLL) * (LANES * ROLL)
    for start in range(first, body, LANES * ROLL):
        tile = ()
        ref_tile = ()
        for i in tl.static_range(ROLL):
            tile += (tl.load(row + (start + i * LANES + lane), mask=read, other=0.0).to(tl.float32),)
            ref_tile += (tl.load(ref_row + (start + i * LANES + lane), mask=read, other=0.0).to(tl.float32),)
        for i in tl.static_range(ROLL):
            at = start + i * LANES + lane
            d, ref_d = _gradients(tile[i], ref_tile[i], g, kl, peak, log_total, ref_peak, ref_log_total, inv_t)
            if out is not None:
                tl.store(out + at, d.to(out.dtype.element_ty))
            if ref_out is not None:
                tl.store(ref_out + at, ref_d.to(ref_out.dtype.element_ty))
    for start in range(body, stop, LANES):
        at = start + lane
        x = tl.load(row + at, mask=read & (at // GRANULE * GRANULE < stop), other=0.0).to(tl.float32)
        y = tl.load(ref_row + at, mask=read & (at // REF_GRANULE * REF_GRANULE < stop), other=0.0).to(tl.float32)
        d, ref_d = _gradients(x, y, g, kl, peak, log_total, ref_peak, ref_log_total, inv_t)
        if out is not None:
            _store_end(out, at, d.to(out.dtype.element_ty), stop, GRANULE)
        if ref_out is not None:
            _store_end(ref_out, at, ref_d.to(ref_out.dtype.element_ty), stop, REF_GRANULE)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _full_kl_backward_kernel(
    grad_logits_ptr,  # contiguous, as is the next; None if not needed
    grad_ref_logits_ptr,
    grad_ptr,
    logits_ptr,
    ref_logits_ptr,
    mask_ptr,
    kl_ptr,
    normaliser_ptr,
    ref_normaliser_ptr,
    V: tl.int32,
    splits: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64,
    inv_t: tl.float32,  # 1 / T
    GRANULE: tl.constexpr,
    REF_GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n, chunk, end = _which_chunks(V, splits, LANES, ROLL)
    first = chunk * (LANES * ROLL * _STEPS)
    stop = first + tl.minimum(V - first, (end - chunk) * (LANES * ROLL * _STEPS))
    # A row nobody wants a gradient of is not read, and stays exactly 0 whatever stands in it.
    g = tl.load(grad_ptr + n) * inv_t
    live = g != 0.0
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + n) != 0)
    g = tl.where(live, g, 0.0)
    kl = tl.load(kl_ptr + n, mask=live, other=0.0)
    peak = tl.load(normaliser_ptr + 2 * n.to(tl.int64), mask=live, other=0.0)
    log_total = tl.load(normaliser_ptr + 2 * n.to(tl.int64) + 1, mask=live, other=0.0)
    ref_peak = tl.load(ref_normaliser_ptr + 2 * n.to(tl.int64), mask=live, other=0.0)
    ref_log_total = tl.load(ref_normaliser_ptr + 2 * n.to(tl.int64) + 1, mask=live, other=0.0)
    outer, within = (n // inner).to(tl.int64), (n % inner).to(tl.int64)
    row = logits_ptr + outer * stride_outer + within * stride_inner
    ref_row = ref_logits_ptr + outer * ref_stride_outer + within * ref_stride_inner
    row_aligned, row_skip = _aligned_down(row, GRANULE)
    ref_row_aligned, ref_row_skip = _aligned_down(ref_row, REF_GRANULE)
    skip = row_skip + ref_row_skip
    out = None
    ref_out = None
    if grad_logits_ptr is not None:
        out = grad_logits_ptr + n.to(tl.int64) * V
        out_aligned, out_skip = _aligned_down(out, GRANULE)
        skip += out_skip
    if grad_ref_logits_ptr is not None:
        ref_out = grad_ref_logits_ptr + n.to(tl.int64) * V
        ref_out_aligned, ref_out_skip = _aligned_down(ref_out, REF_GRANULE)
        skip += ref_out_skip
    numbers = (first, stop, live, g, kl, peak, log_total, ref_peak, ref_log_total, inv_t)
    if skip == 0:
        row = row_aligned
        ref_row = ref_row_aligned
        if out is not None:
            out = out_aligned
        if ref_out is not None:
            ref_out = ref_out_aligned
        _pair_gradient(row, ref_row, out, ref_out, *numbers, GRANULE, REF_GRANULE, LANES, ROLL)
    else:
        _pair_gradient(row, ref_row, out, ref_out, *numbers, 1, 1, LANES, ROLL)


def _registers():
    """A thread of full_kl may have 128: four programs fit on a multiprocessor. sm_100 would spill; there, three fit."""
    if triton.knobs.runtime.interpret:
        return None
    return 128 if triton.runtime.driver.active.get_current_target().arch < 100 else 168


def _prepared(logits, ref_logits, mask, temperature):
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        _rows.check_layout(name, x)
    temperature = float(temperature)
    tile = _rows.constants(logits, ref_logits) | {"ROLL": ROLL}
    tile |= {"GRANULE": _rows.granule(logits), "REF_GRANULE": _rows.granule(ref_logits)}
    mask = None if mask is None else mask.contiguous().view(-1).view(torch.uint8)
    return mask, tile, LOG2_E / temperature, 1.0 / temperature


def full_kl(logits, ref_logits, mask, temperature):
    """KL of softmax(logits / temperature) from softmax(ref_logits / temperature), and what the backward needs.

    logits, ref_logits: [..., V], fp32, bf16 or fp16, each its own; any strides but the last, which is 1. mask: [...],
    bool, or None. temperature: a number, as a tensor in CPU memory.
    Returns kl [...], 0 where the mask is, and the normalisers [..., 2] of both: m and log s with logsumexp(logits /
    temperature) = m / temperature + log s; all fp32.
    """
    mask, tile, scale, _ = _prepared(logits, ref_logits, mask, temperature)
    V = logits.shape[-1]
    shape = logits.shape[:-1]
    results = [torch.empty(x, dtype=torch.float32, device=logits.device) for x in (shape, (*shape, 2), (*shape, 2))]
    if results[0].numel() == 0:
        return tuple(results)
    arrays = [mask, results[0].view(-1), *(x.view(-1, 2) for x in results[1:])]
    with _rows.on_device_of(logits):
        for rows, inner, [(view, *strides), (ref_view, *ref_strides)] in _rows.row_groups(logits, ref_logits):
            n = rows.stop - rows.start
            splits = _rows.splits(n, V, logits.device, **tile)
            parts = results[0] if splits == 1 else _rows.new_parts(n, splits, results[0])
            args = [x if x is None else x[rows] for x in arrays]
            sizes = (V, splits, inner, *strides, *ref_strides)
            _full_kl_kernel[(n * splits,)](view, ref_view, *args, parts, *sizes, scale, **tile, maxnreg=_registers())
            if splits > 1:
                _full_kl_merge_kernel[(n,)](*args, parts, splits, scale, num_warps=1, enable_fp_fusion=False)
    return tuple(results)


def full_kl_backward(
    grad, logits, ref_logits, mask, kl, normaliser, ref_normaliser, temperature, needs_grad, needs_ref_grad
):
    """Gradient of full_kl: grad [...] -> grad_logits, grad_ref_logits [..., V] in their dtypes, [0] if not needed."""
    mask, tile, _, inv_t = _prepared(logits, ref_logits, mask, temperature)
    V = logits.shape[-1]
    pairs = ((logits, needs_grad), (ref_logits, needs_ref_grad))
    grads = [torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device) for x, need in pairs]
    if kl.numel() == 0 or not (needs_grad or needs_ref_grad):
        return tuple(grads)
    outputs = [x.view(-1, V) if need else None for x, (_, need) in zip(grads, pairs, strict=True)]
    arrays = [mask, kl.contiguous().view(-1), *(x.contiguous().view(-1, 2) for x in (normaliser, ref_normaliser))]
    grad = grad.contiguous().view(-1)
    with _rows.on_device_of(logits):
        for rows, inner, [(view, *strides), (ref_view, *ref_strides)] in _rows.row_groups(logits, ref_logits):
            n = rows.stop - rows.start
            splits = _rows.splits(n, V, logits.device, **tile)
            args = [x if x is None else x[rows] for x in arrays]
            sizes = (V, splits, inner, *strides, *ref_strides)
            out = [x if x is None else x[rows] for x in outputs]
            _full_kl_backward_kernel[(n * splits,)](*out, grad[rows], view, ref_view, *args, *sizes, inv_t, **tile)
    return tuple(grads)
