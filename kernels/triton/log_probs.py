"""Log-probability and entropy of tokens from logits, one pass over memory: Triton kernels behind torch.ops.fastrlhf.

Forward: every lane keeps its own running maximum m, s = sum of 2^d and u = sum of 2^d d, where d = (z - m) log2(e) / T.
Lanes meet once a chunk; see _rows.py. UNROLL loads are issued before the first is used, and their shared maximum makes
a rescaling of (s, u) UNROLL times rarer.

Backward: dz = (1/T) [g (onehot - p) - h p (log p + H)], element by element, from the stored m, log s and entropy.

Few rows. Each chunk of a row has a program, and what the programs of the forward pass leave is merged by a second, tiny
launch.

Vector width. A row that starts at a 16-byte boundary is read and written 16 bytes a thread, whatever V is. Other rows
(odd V without padding: seven of eight in bf16) take the same steps with loads of one element, coalesced by warp. The
choice is made per row at run time and does not show in the result. (Shifting the lanes to the alignment would vectorise
every row, but the order of summation would then depend on the row's place in the batch.) To be fast with an odd V, pad
the row stride.

Compilation. One binary per dtype and op. Sizes, strides and the alignment of pointers are excluded from Triton's
specialisation, since the kernels test alignment themselves; floats are never specialised.
"""

import torch

import triton
import triton.language as tl

from . import _rows
from ._rows import (
    _LN_2,
    _LOG2_E,
    _STEPS,
    LOG2_E,
    _aligned_down,
    _clamp,
    _finished,
    _merge_parts,
    _row_statistics,
    _store_end,
    _store_part,
    _which_chunks,
)

IGNORE_INDEX = -100

# Constants read inside kernels have to be constexpr.
_IGNORE = tl.constexpr(IGNORE_INDEX)


_RUN_TIME = ["V", "splits", "inner", "stride_outer", "stride_inner", "grad_stride_outer", "grad_stride_inner"]
_POINTERS = [
    *("logits_ptr", "tokens_ptr", "log_probs_ptr", "entropy_ptr", "normaliser_ptr", "parts_ptr"),
    *("grad_ptr", "grad_log_probs_ptr", "grad_entropy_ptr"),
]


@triton.jit
def _load_token(row, token, V, bias=None, softcap=None):
    inside = (token >= 0) & (token < V)
    z = tl.load(row + token, mask=inside, other=float("nan")).to(tl.float32)
    return _finished(z, token, inside, bias, softcap)


@triton.jit
def _store_results(z, m, s, u, inv_t, n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY: tl.constexpr):
    """From the logit of the token and the statistics of the whole row."""
    log_total = tl.log(s)
    tl.store(log_probs_ptr + n, (z - m) * inv_t - log_total)
    # Both, and not their sum: as one number it would lose the digits that p is made of.
    tl.store(normaliser_ptr + 2 * n.to(tl.int64), m)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64) + 1, log_total)
    if ENTROPY:
        tl.store(entropy_ptr + n, log_total - u / s * _LN_2)


@triton.jit
def _store_zeros(n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY: tl.constexpr):
    tl.store(log_probs_ptr + n, 0.0)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64), 0.0)
    tl.store(normaliser_ptr + 2 * n.to(tl.int64) + 1, 0.0)
    if ENTROPY:
        tl.store(entropy_ptr + n, 0.0)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _forward_kernel(
    logits_ptr,
    tokens_ptr,
    log_probs_ptr,
    entropy_ptr,
    normaliser_ptr,
    parts_ptr,
    V: tl.int32,
    splits: tl.int32,
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
    n, first, stop = _which_chunks(V, splits, LANES, ROLL)
    token = tl.load(tokens_ptr + n)
    if token != _IGNORE:
        row = logits_ptr + (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner
        z = _load_token(row, token, V)
        m, s, u = _row_statistics(row, first, stop, V, scale, GRANULE, LANES, ROLL, ENTROPY)
        if splits == 1:
            _store_results(z, m, s, u, inv_t, n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY)
        else:
            _store_part(parts_ptr, m, s, u)
    elif splits == 1:
        _store_zeros(n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _forward_merge_kernel(
    logits_ptr,
    tokens_ptr,
    log_probs_ptr,
    entropy_ptr,
    normaliser_ptr,
    parts_ptr,
    V: tl.int32,
    splits: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    scale: tl.float32,
    inv_t: tl.float32,
    ENTROPY: tl.constexpr,
):
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n)
    if token != _IGNORE:
        row = logits_ptr + (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner
        z = _load_token(row, token, V)
        m, s, u = _merge_parts(parts_ptr, n, splits, scale, ENTROPY)
        _store_results(z, m, s, u, inv_t, n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY)
    else:
        _store_zeros(n, log_probs_ptr, entropy_ptr, normaliser_ptr, ENTROPY)


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
def _uncapped(dz, z, softcap):
    """The gradient past the cap that z went through, if there is one."""
    if softcap is not None:
        held = z * tl.div_rn(1.0, softcap)
        dz *= tl.fma(-held, held, 1.0)
    return dz


@triton.jit
def _row_gradient(
    row,
    out,
    first,
    stop,
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
    bias=None,
    softcap=None,
):
    """Gradient of some columns; row and out may be the same memory: a tile is loaded before it is stored.

    With bias and softcap (see _finished), row holds what they have not been applied to, and the gradient is to that.
    """
    lane = tl.arange(0, LANES)
    read = tl.zeros([LANES], tl.int32) + live.to(tl.int32) != 0  # the same in every lane, so loads stay wide
    body = first + (stop - first) // (LANES * ROLL) * (LANES * ROLL)
    for start in range(first, body, LANES * ROLL):
        tile = ()
        for i in tl.static_range(ROLL):
            column = start + i * LANES + lane
            x = tl.load(row + column, mask=read, other=0.0).to(tl.float32)
            tile += (_finished(x, column, read, bias, softcap),)
        for i in tl.static_range(ROLL):
            column = start + i * LANES
            dz = _gradient(tile[i], lane == token - column, g, h, peak, log_total, entropy, inv_t, ENTROPY)
            dz = _uncapped(dz, tile[i], softcap)
            tl.store(out + (column + lane), dz.to(out.dtype.element_ty))
    for start in range(body, stop, LANES):
        column = start + lane
        inside = read & (column // GRANULE * GRANULE < stop)
        x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        x = _finished(x, column, inside, bias, softcap)
        dz = _gradient(x, column == token, g, h, peak, log_total, entropy, inv_t, ENTROPY)
        dz = _uncapped(dz, x, softcap)
        _store_end(out, column, dz.to(out.dtype.element_ty), stop, GRANULE)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _backward_kernel(
    grad_ptr,
    logits_ptr,
    tokens_ptr,
    normaliser_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,
    V: tl.int32,
    splits: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    grad_stride_outer: tl.int64,
    grad_stride_inner: tl.int64,
    inv_t: tl.float32,  # 1 / T
    ENTROPY: tl.constexpr,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n, chunk, end = _which_chunks(V, splits, LANES, ROLL)
    first = chunk * (LANES * ROLL * _STEPS)
    stop = first + tl.minimum(V - first, (end - chunk) * (LANES * ROLL * _STEPS))
    outer = (n // inner).to(tl.int64)
    within = (n % inner).to(tl.int64)
    token = tl.load(tokens_ptr + n)
    peak = tl.load(normaliser_ptr + 2 * n.to(tl.int64))
    log_total = tl.load(normaliser_ptr + 2 * n.to(tl.int64) + 1)
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
    peak = tl.where(live, peak, 0.0)
    log_total = tl.where(live, log_total, 0.0)
    entropy = tl.where(live, entropy, 0.0)
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)  # 32 bits halve the comparisons
    row = logits_ptr + outer * stride_outer + within * stride_inner
    out = grad_ptr + outer * grad_stride_outer + within * grad_stride_inner
    row_aligned, row_skip = _aligned_down(row, GRANULE)
    out_aligned, out_skip = _aligned_down(out, GRANULE)
    if row_skip + out_skip == 0:
        row = row_aligned
        out = out_aligned
        _row_gradient(
            row, out, first, stop, live, token, g, h, peak, log_total, entropy, inv_t, GRANULE, LANES, ROLL, ENTROPY
        )
    else:
        _row_gradient(
            row, out, first, stop, live, token, g, h, peak, log_total, entropy, inv_t, 1, LANES, ROLL, ENTROPY
        )


def _forward(logits, tokens, temperature, entropy):
    _rows.check_layout("logits", logits)
    temperature = float(temperature)
    V = logits.shape[-1]
    tokens = tokens.contiguous()
    log_probs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    normaliser = torch.empty((*tokens.shape, 2), dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(log_probs) if entropy else None
    if tokens.numel() == 0:
        return log_probs, entropies, normaliser
    arrays = [x if x is None else x.view(-1) for x in (tokens, log_probs, entropies)] + [normaliser.view(-1, 2)]
    tile, numbers = _rows.constants(logits), (LOG2_E / temperature, 1.0 / temperature)
    with _rows.on_device_of(logits):
        for rows, inner, [(view, *strides)] in _rows.row_groups(logits):
            n = rows.stop - rows.start
            splits = _rows.splits(n, V, logits.device, **tile)
            parts = log_probs if splits == 1 else _rows.new_parts(n, splits, log_probs)
            args = (view, *(x if x is None else x[rows] for x in arrays), parts, V, splits, inner, *strides)
            granule = _rows.granule(logits)
            _forward_kernel[(n * splits,)](*args, *numbers, ENTROPY=entropy, GRANULE=granule, **tile)
            if splits > 1:
                _forward_merge_kernel[(n,)](*args, *numbers, ENTROPY=entropy, num_warps=1, enable_fp_fusion=False)
    return log_probs, entropies, normaliser


def _backward(grad_logits, grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature):
    """Writes into grad_logits, which is contiguous or the same tensor as logits."""
    _rows.check_layout("logits", logits)
    temperature = float(temperature)
    V = logits.shape[-1]
    if tokens.numel() == 0:
        return
    arrays = (tokens, None, entropy, grad_log_probs, grad_entropy)
    arrays = [x if x is None else x.contiguous().view(-1) for x in arrays]
    arrays[1] = normaliser.contiguous().view(-1, 2)
    tile = {"GRANULE": _rows.granule(logits), **_rows.constants(logits)}
    with _rows.on_device_of(logits):
        for rows, inner, [(view, *strides), (out, *out_strides)] in _rows.row_groups(logits, grad_logits):
            n = rows.stop - rows.start
            splits = _rows.splits(n, V, logits.device, **tile)
            inputs = [x if x is None else x[rows] for x in arrays]
            _backward_kernel[(n * splits,)](
                out,
                view,
                *inputs,
                V,
                splits,
                inner,
                *strides,
                *out_strides,
                1.0 / temperature,
                ENTROPY=entropy is not None,
                **tile,
            )


def token_log_probs(logits, tokens, temperature):
    """Log-probability of each token under softmax(logits / temperature), and the normaliser the backward needs.

    logits: [..., V], fp32, bf16 or fp16; any strides but the last, which is 1. tokens: [...], int64, -100 = ignored.
    temperature: a number, as a tensor in CPU memory.
    Returns log_probs [...], 0 where ignored, and normaliser [..., 2], m and log s with logsumexp(logits / temperature)
    = m / temperature + log s; both fp32. A GPU cannot raise for a token outside [0, V) without a host sync: it reads
    nothing and gives NaN. All else of such a row, the gradient too, is right for a token of another shard of the
    vocabulary, whose log-prob nobody reads.
    """
    log_probs, _, normaliser = _forward(logits, tokens, temperature, entropy=False)
    return log_probs, normaliser


def token_log_probs_and_entropy(logits, tokens, temperature):
    """As token_log_probs, and the entropy [...] of softmax(logits / temperature) in nats, in the same pass.

    Returns (log_probs, entropy, normaliser).
    """
    return _forward(logits, tokens, temperature, entropy=True)


def token_log_probs_backward(grad_log_probs, logits, tokens, normaliser, temperature):
    """Gradient of token_log_probs: grad_log_probs [...], logits [..., V] -> grad_logits [..., V] in logits' dtype."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(grad_logits, grad_log_probs, None, logits, tokens, normaliser, None, temperature)
    return grad_logits


def token_log_probs_backward_(grad_log_probs, logits, tokens, normaliser, temperature):
    """As token_log_probs_backward, written over logits [..., V], whose rows must not overlap. Returns None."""
    _backward(logits, grad_log_probs, None, logits, tokens, normaliser, None, temperature)


def token_log_probs_and_entropy_backward(
    grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature
):
    """Gradient of token_log_probs_and_entropy: two gradients [...] -> grad_logits [..., V] in logits' dtype."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(grad_logits, grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature)
    return grad_logits


def token_log_probs_and_entropy_backward_(
    grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature
):
    """As token_log_probs_and_entropy_backward, written over logits [..., V]. Returns None."""
    _backward(logits, grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature)
