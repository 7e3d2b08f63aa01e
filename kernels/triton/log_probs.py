"""Log-probability and entropy of tokens from logits, one pass over memory: Triton kernels behind torch.ops.fastrlhf.

Forward: one program a row. Column j belongs to lane j mod LANES; every lane keeps its own running maximum m,
s = sum of 2^d and u = sum of 2^d d, where d = (z - m) log2(e) / T. Lanes meet once, after the loop. UNROLL loads
are issued before the first is used, and their shared maximum makes a rescaling of (s, u) UNROLL times rarer.

Backward: dz = (1/T) [g (onehot - p) - h p (log p + H)], element by element, from the stored logsumexp and entropy. In
a row whose logsumexp is so large that its rounding would show in p, peak and sum are computed again.

Vector width. A row that starts at a 16-byte boundary is read and written 16 bytes a thread, whatever V is. Other rows
(odd V without padding: seven of eight in bf16) take the same steps with loads of one element, coalesced by warp. The
choice is made per row at run time and does not show in the result: lanes follow the column, not the address, so a
row gives the same bits wherever it lies. (Shifting the lanes to the alignment would vectorise every row, but the
order of summation would then depend on the row's place in the batch.) To be fast with an odd V, pad the row stride.

Compilation. One binary per dtype and op. Sizes, strides and the alignment of pointers are excluded from Triton's
specialisation, since the kernels test alignment themselves; floats are never specialised.
"""

import contextlib
import math

import torch

import triton
import triton.language as tl

IGNORE_INDEX = -100
NUM_WARPS = 4
UNROLL = 4
VECTOR_BYTES = 16
LOG2_E = math.log2(math.e)

# Constants read inside kernels have to be constexpr.
_IGNORE = tl.constexpr(IGNORE_INDEX)
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(math.log(2.0))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, so that -inf - m is -inf and never NaN
_ROUNDING_SHOWS = tl.constexpr(64.0)  # |logsumexp| beyond which half an ulp is above 4e-6
_CLAMP = tl.constexpr(-200.0)  # 2^-200 and e^-200 are 0 in fp32; below this, 0 * d must not become 0 * inf


@triton.jit
def _clamp(d):
    return tl.maximum(d, _CLAMP, propagate_nan=tl.PropagateNan.ALL)  # a NaN logit has to show in the result


@triton.jit
def _aligned_down(ptr, GRANULE: tl.constexpr):
    """The nearest 16-byte boundary at or before ptr, and how many elements lie between."""
    skip = (ptr.to(tl.int64) % 16) // (16 // GRANULE)
    return tl.multiple_of(ptr - skip, 16), skip


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
def _row_statistics(
    row, V, scale, GRANULE: tl.constexpr, LANES: tl.constexpr, ROLL: tl.constexpr, ENTROPY: tl.constexpr
):
    """Lane-wise (m, s, u) of one row. Loads are GRANULE elements wide where row is known to be aligned."""
    lane = tl.arange(0, LANES)
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    body = V // (LANES * ROLL) * (LANES * ROLL)
    for start in range(0, body, LANES * ROLL):
        tile = ()
        for i in tl.static_range(ROLL):
            tile += (tl.load(row + (start + i * LANES + lane)).to(tl.float32),)
        m, s, u = _accumulate(tile, m, s, u, scale, ENTROPY)
    if body < V:
        tile = ()
        for i in tl.static_range(ROLL):
            column = body + i * LANES + lane
            # Masking whole granules keeps the load wide. A granule that straddles the end lies inside one aligned
            # 16-byte unit, so it cannot fault; what it holds beyond V is thrown away.
            x = tl.load(row + column, mask=column // GRANULE * GRANULE < V, other=0.0).to(tl.float32)
            tile += (tl.where(column < V, x, float("-inf")),)
        m, s, u = _accumulate(tile, m, s, u, scale, ENTROPY)
    return m, s, u


@triton.jit
def _meet(m, s, scale):
    """The lanes put together: the row's peak and its sum of 2^d, and what each lane was shifted and weighted by."""
    peak = tl.max(m, 0)
    shift = _clamp((m - peak) * scale)
    weight = tl.exp2(shift)
    return peak, tl.sum(s * weight, 0), shift, weight


_RUN_TIME = ["V", "inner", "stride_outer", "stride_inner", "grad_stride_outer", "grad_stride_inner"]


@triton.jit(
    do_not_specialize=_RUN_TIME,
    do_not_specialize_on_alignment=["logits_ptr", "tokens_ptr", "log_probs_ptr", "entropy_ptr", "logsumexp_ptr"],
)
def _forward_kernel(
    logits_ptr,
    tokens_ptr,
    log_probs_ptr,
    entropy_ptr,
    logsumexp_ptr,
    V: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    ENTROPY: tl.constexpr,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n)
    log_prob = 0.0
    entropy = 0.0
    logsumexp = 0.0
    if token != _IGNORE:
        row = logits_ptr + (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner
        aligned, skip = _aligned_down(row, GRANULE)
        if skip == 0:
            m, s, u = _row_statistics(aligned, V, scale, GRANULE, LANES, ROLL, ENTROPY)
        else:
            m, s, u = _row_statistics(row, V, scale, 1, LANES, ROLL, ENTROPY)
        peak, total, shift, weight = _meet(m, s, scale)
        log_total = tl.log(total)
        # From the difference to the peak, not from logsumexp: large logits would cost digits.
        inside = (token >= 0) & (token < V)
        z = tl.load(row + token, mask=inside, other=float("nan")).to(tl.float32)
        log_prob = (z - peak) * inv_t - log_total
        logsumexp = peak * inv_t + log_total
        if ENTROPY:
            entropy = log_total - tl.sum(tl.fma(shift, s, u) * weight, 0) / total * _LN_2
    tl.store(log_probs_ptr + n, log_prob)
    tl.store(logsumexp_ptr + n, logsumexp)
    if ENTROPY:
        tl.store(entropy_ptr + n, entropy)


@triton.jit
def _gradient(x, hit, g, h, peak, log_total, entropy, inv_t, ENTROPY: tl.constexpr):
    """dz of one tile; hit marks the token's column; log p = (x - peak)/T - log_total; g and h come divided by T."""
    log_p = tl.fma(x - peak, inv_t, -log_total)
    coefficient = g
    if ENTROPY:
        log_p = _clamp(log_p)
        coefficient = tl.fma(log_p + entropy, h, g)
    p = tl.exp2(log_p * _LOG2_E)
    return tl.fma(-p, coefficient, tl.where(hit, g, 0.0))


@triton.jit
def _row_gradient(
    row,
    out,
    V,
    live,
    token,
    g,
    h,
    peak,
    log_total,
    entropy,
    inv_t,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of one row; row and out may be the same memory: a tile is loaded before it is stored."""
    lane = tl.arange(0, LANES)
    read = tl.zeros([LANES], tl.int32) + live.to(tl.int32) != 0  # the same in every lane, so loads stay wide
    body = V // (LANES * ROLL) * (LANES * ROLL)
    for start in range(0, body, LANES * ROLL):
        tile = ()
        for i in tl.static_range(ROLL):
            tile += (tl.load(row + (start + i * LANES + lane), mask=read, other=0.0).to(tl.float32),)
        for i in tl.static_range(ROLL):
            first = start + i * LANES
            dz = _gradient(tile[i], lane == token - first, g, h, peak, log_total, entropy, inv_t, ENTROPY)
            tl.store(out + (first + lane), dz.to(out.dtype.element_ty))
    for start in range(body, V, LANES):
        column = start + lane
        granule = column // GRANULE * GRANULE
        x = tl.load(row + column, mask=read & (granule < V), other=0.0).to(tl.float32)
        dz = _gradient(x, column == token, g, h, peak, log_total, entropy, inv_t, ENTROPY).to(out.dtype.element_ty)
        # Unlike a load, a store must not touch what lies beyond V: whole granules wide, the last one by element.
        whole = granule + GRANULE <= V
        tl.store(out + column, dz, mask=whole)
        if GRANULE > 1 and V % GRANULE != 0:
            tl.store(out + column, dz, mask=(column < V) & (granule + GRANULE > V))


@triton.jit(
    do_not_specialize=_RUN_TIME,
    do_not_specialize_on_alignment=[
        "grad_ptr",
        "logits_ptr",
        "tokens_ptr",
        "logsumexp_ptr",
        "entropy_ptr",
        "grad_log_probs_ptr",
        "grad_entropy_ptr",
    ],
)
def _backward_kernel(
    grad_ptr,
    logits_ptr,
    tokens_ptr,
    logsumexp_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,
    V: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    grad_stride_outer: tl.int64,
    grad_stride_inner: tl.int64,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    ENTROPY: tl.constexpr,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n = tl.program_id(0)
    outer = (n // inner).to(tl.int64)
    within = (n % inner).to(tl.int64)
    token = tl.load(tokens_ptr + n)
    log_total = tl.load(logsumexp_ptr + n)
    peak = 0.0
    g = tl.load(grad_log_probs_ptr + n) * inv_t
    h = 0.0
    entropy = 0.0
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + n) * inv_t
        entropy = tl.load(entropy_ptr + n)
    # A row nobody wants a gradient of is not read, and stays exactly 0 whatever stands in it.
    live = (token != _IGNORE) & ((g != 0.0) | (h != 0.0))
    g = tl.where(live, g, 0.0)
    h = tl.where(live, h, 0.0)
    log_total = tl.where(live, log_total, 0.0)
    entropy = tl.where(live, entropy, 0.0)
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)  # 32 bits halve the comparisons
    row = logits_ptr + outer * stride_outer + within * stride_inner
    out = grad_ptr + outer * grad_stride_outer + within * grad_stride_inner
    row_aligned, row_skip = _aligned_down(row, GRANULE)
    out_aligned, out_skip = _aligned_down(out, GRANULE)
    if tl.abs(log_total) > _ROUNDING_SHOWS:
        if row_skip == 0:
            m, s, _ = _row_statistics(row_aligned, V, scale, GRANULE, LANES, ROLL, False)
        else:
            m, s, _ = _row_statistics(row, V, scale, 1, LANES, ROLL, False)
        peak, total, _, _ = _meet(m, s, scale)
        log_total = tl.log(total)
    if row_skip + out_skip == 0:
        row = row_aligned
        out = out_aligned
        _row_gradient(row, out, V, live, token, g, h, peak, log_total, entropy, inv_t, GRANULE, LANES, ROLL, ENTROPY)
    else:
        _row_gradient(row, out, V, live, token, g, h, peak, log_total, entropy, inv_t, 1, LANES, ROLL, ENTROPY)


def _row_groups(logits):
    """Cuts [..., V] into (view, slice of its rows, inner, (outer stride, inner stride)): one, for almost any layout.

    Neighbouring dimensions that a single stride describes are merged; two strides are what a kernel takes, and they
    cover logits[:, :-1]. Only stranger views need a launch for each index of their first dimension. Nothing is copied.
    """
    groups = [(logits, 0)]
    while groups:
        view, first = groups.pop(0)
        dims = [(1, 0), (1, 0)]
        for size, stride in zip(view.shape[:-1], view.stride()[:-1], strict=True):
            if size == 1:
                continue
            if dims[-1][1] == size * stride and dims[-1][0] > 1:
                dims[-1] = (dims[-1][0] * size, stride)
            else:
                dims.append((size, stride))
        n = math.prod(size for size, _ in dims)
        if len(dims) <= 4:
            (_, stride_outer), (inner, stride_inner) = dims[-2:]
            yield view, slice(first, first + n), inner, (stride_outer, stride_inner)
        else:
            groups += [(view[i], first + i * (n // len(view))) for i in range(len(view))]


def _on_device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _constants(logits, entropy):
    granule = VECTOR_BYTES // logits.element_size()
    lanes = 32 * NUM_WARPS * granule
    # Contracting a * b + c at will could make the two copies of a loop differ in the last bit; fma is written out.
    return {
        "ENTROPY": entropy,
        "GRANULE": granule,
        "LANES": lanes,
        "ROLL": UNROLL,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def _check_layout(logits):
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"logits: the last dimension must be contiguous (stride 1), its stride is {logits.stride(-1)}")


def _forward(logits, tokens, temperature, entropy):
    _check_layout(logits)
    temperature = float(temperature)
    V = logits.shape[-1]
    tokens = tokens.contiguous()
    log_probs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty_like(log_probs)
    entropies = torch.empty_like(log_probs) if entropy else None
    if tokens.numel() == 0:
        return log_probs, entropies, logsumexp
    outputs = [x if x is None else x.view(-1) for x in (tokens, log_probs, entropies, logsumexp)]
    with _on_device_of(logits):
        for view, rows, inner, strides in _row_groups(logits):
            _forward_kernel[(rows.stop - rows.start,)](
                view,
                *(x if x is None else x[rows] for x in outputs),
                V,
                inner,
                *strides,
                LOG2_E / temperature,
                1.0 / temperature,
                **_constants(logits, entropy),
            )
    return log_probs, entropies, logsumexp


def _backward(grad_logits, grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature):
    """Writes into grad_logits, which is contiguous or the same tensor as logits."""
    _check_layout(logits)
    temperature = float(temperature)
    V = logits.shape[-1]
    if tokens.numel() == 0:
        return
    inputs = (tokens, logsumexp, entropy, grad_log_probs, grad_entropy)
    inputs = [x if x is None else x.contiguous().view(-1) for x in inputs]
    with _on_device_of(logits):
        for view, rows, inner, strides in _row_groups(logits):
            if grad_logits is logits:
                out, out_strides = view, strides
            else:
                out, out_strides = grad_logits.view(-1, V)[rows], (inner * V, V)
            _backward_kernel[(rows.stop - rows.start,)](
                out,
                view,
                *(x if x is None else x[rows] for x in inputs),
                V,
                inner,
                *strides,
                *out_strides,
                LOG2_E / temperature,
                1.0 / temperature,
                **_constants(logits, entropy is not None),
            )


def token_log_probs(logits, tokens, temperature):
    """Log-probability of each token under softmax(logits / temperature), and the logsumexp the backward needs.

    logits: [..., V], fp32, bf16 or fp16; any strides but the last, which is 1. tokens: [...], int64, -100 = ignored.
    temperature: a number, as a tensor in CPU memory.
    Returns log_probs [...] and logsumexp(logits / temperature) [...], fp32, 0 where ignored. A GPU cannot raise for a
    token outside [0, V) without a host sync: it reads nothing and gives NaN.
    """
    log_probs, _, logsumexp = _forward(logits, tokens, temperature, entropy=False)
    return log_probs, logsumexp


def token_log_probs_and_entropy(logits, tokens, temperature):
    """As token_log_probs, and the entropy [...] of softmax(logits / temperature) in nats, in the same pass.

    Returns (log_probs, entropy, logsumexp), each [...], fp32, 0 where ignored.
    """
    return _forward(logits, tokens, temperature, entropy=True)


def token_log_probs_backward(grad_log_probs, logits, tokens, logsumexp, temperature):
    """Gradient of token_log_probs: grad_log_probs [...], logits [..., V] -> grad_logits [..., V] in logits' dtype."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(grad_logits, grad_log_probs, None, logits, tokens, logsumexp, None, temperature)
    return grad_logits


def token_log_probs_backward_(grad_log_probs, logits, tokens, logsumexp, temperature):
    """As token_log_probs_backward, written over logits [..., V], whose rows must not overlap. Returns None."""
    _backward(logits, grad_log_probs, None, logits, tokens, logsumexp, None, temperature)


def token_log_probs_and_entropy_backward(grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature):
    """Gradient of token_log_probs_and_entropy: two gradients [...] -> grad_logits [..., V] in logits' dtype."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(grad_logits, grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature)
    return grad_logits


def token_log_probs_and_entropy_backward_(
    grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature
):
    """As token_log_probs_and_entropy_backward, written over logits [..., V]. Returns None."""
    _backward(logits, grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature)
