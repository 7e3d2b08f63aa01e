"""Log-probs and losses from hidden states: products by cuBLAS, a chunk of tokens at a time, and one kernel on its rows.

The logits of a chunk go to a buffer that all chunks share. Its rows are padded to a multiple of 64 elements, so that
each starts at a 16-byte boundary whatever V is. One program walks over a row: bias, softcap, log-sum-exp, log-prob and
entropy; where the op is a loss, then its slopes, and the gradient of the logits in their place. Two more products make
that the gradients of hidden and weight. The same logits give the same bits as in log_probs.py, statistics and gradient.
Few rows are not split over programs as there: beside a product that reads the whole weight, they take no time.

The weight's gradient is summed over the chunks in fp32 and rounded once. Each chunk reads and writes it again, which is
why chunks are large. The bias's, the sums of the columns, likewise.

Ignored rows are not taken out, which would need their number on the host. Their logits are not read, the gradient
written there is 0, and zeros replace their hidden states in the weight's gradient, where 0 * nan would be a nan.

FASTRLHF_LM_HEAD=fused, read once, keeps logits from ever being rounded to the inputs' dtype: where no gradient goes
with them, lm_head_fused.py computes log-probs without logits in memory; elsewhere chunks are in fp32, and the gradient
of the logits has a buffer of its own. With "chunked", the default, logits are rounded as nn.Linear would.
"""

import os

import torch

import triton
import triton.language as tl

from . import _rows, lm_head_fused, losses
from ._math import kl_estimate
from ._rows import _LN_2, _LOWEST, _STEPS, LOG2_E, _chunk_statistics, _meet, _merge
from .log_probs import _IGNORE, IGNORE_INDEX, _load_token, _row_gradient, _store_results, _store_zeros
from .losses import TOKEN_MEAN, _like, _surrogate

STRATEGIES = ("chunked", "fused")
ROWS = 64  # chunks are a multiple of this
PADDED = 64  # elements; rows of the buffer are a multiple of this
REGISTERS = 128  # a thread may have: four programs fit on a multiprocessor

_RUN_TIME = ["V", "stride", "estimator"]
_POINTERS = [
    *("tokens_ptr", "log_probs_ptr", "entropy_ptr", "normaliser_ptr", "shares_ptr", "grad_log_probs_ptr"),
    *("grad_entropy_ptr", "old_ptr", "advantages_ptr", "weights_ptr", "advantage_stats_ptr", "ref_ptr"),
]


# ------------------------------------------------------------------------------------------------------ rows of logits


@triton.jit
def _row(logits_ptr, stride):
    """The row of this program. The host sees to rows and the bias starting at 16-byte boundaries."""
    return tl.multiple_of(logits_ptr + tl.program_id(0).to(tl.int64) * stride, 16)


@triton.jit
def _statistics(row, bias, V, scale, softcap, GRANULE: tl.constexpr, LANES: tl.constexpr, ROLL: tl.constexpr):
    """(m, s, u) of a row."""
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.full([], 0.0, tl.float32)
    u = tl.full([], 0.0, tl.float32)
    for chunk in range(0, tl.cdiv(V, LANES * ROLL * _STEPS)):
        lanes_m, lanes_s, lanes_u = _chunk_statistics(row, chunk, V, scale, GRANULE, LANES, ROLL, True, bias, softcap)
        m2, s2, u2 = _meet(lanes_m, lanes_s, lanes_u, scale, True)
        m, s, u = _merge(m, s, u, m2, s2, u2, scale, True)
    return m, s, u


@triton.jit
def _write_gradient(
    out,
    row,
    bias,
    token,
    g,
    h,
    peak,
    log_total,
    entropy,
    V,
    inv_t,
    softcap,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Of a row of logits, which is not read if nobody wants its gradient; that is then exactly 0."""
    g *= inv_t
    h *= inv_t
    live = (token != _IGNORE) & ((g != 0.0) | (h != 0.0))
    g = tl.where(live, g, 0.0)
    h = tl.where(live, h, 0.0)
    peak = tl.where(live, peak, 0.0)
    log_total = tl.where(live, log_total, 0.0)
    entropy = tl.where(live, entropy, 0.0)
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
    numbers = (token, g, h, peak, log_total, entropy, inv_t)
    _row_gradient(row, out, 0, V, live, *numbers, GRANULE, LANES, ROLL, ENTROPY, bias, softcap)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _forward_kernel(
    logits_ptr,
    bias_ptr,  # or None
    tokens_ptr,
    log_probs_ptr,
    entropy_ptr,
    normaliser_ptr,
    V: tl.int32,
    stride: tl.int64,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    softcap,  # or None
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n)
    if token != _IGNORE:
        row = _row(logits_ptr, stride)
        z = _load_token(row, token, V, bias_ptr, softcap)
        m, s, u = _statistics(row, bias_ptr, V, scale, softcap, GRANULE, LANES, ROLL)
        _store_results(z, m, s, u, inv_t, n, log_probs_ptr, entropy_ptr, normaliser_ptr, True)
    else:
        _store_zeros(n, log_probs_ptr, entropy_ptr, normaliser_ptr, True)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _backward_kernel(
    grad_ptr,  # the logits' memory, or other of that stride
    logits_ptr,
    bias_ptr,  # or None
    tokens_ptr,
    normaliser_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,  # or None
    V: tl.int32,
    stride: tl.int64,
    inv_t: tl.float32,  # 1 / T
    softcap,  # or None
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n)
    peak = tl.load(normaliser_ptr + 2 * n.to(tl.int64))
    log_total = tl.load(normaliser_ptr + 2 * n.to(tl.int64) + 1)
    g = tl.load(grad_log_probs_ptr + n)
    h = 0.0
    entropy = 0.0
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + n)
        entropy = tl.load(entropy_ptr + n)
    row = _row(logits_ptr, stride)
    with_entropy: tl.constexpr = grad_entropy_ptr is not None
    numbers = (token, g, h, peak, log_total, entropy, V, inv_t, softcap)
    _write_gradient(_row(grad_ptr, stride), row, bias_ptr, *numbers, GRANULE, LANES, ROLL, with_entropy)


@triton.jit
def _ppo_slopes(
    n,
    log_prob,
    share,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    ref_ptr,
    advantage_stats_ptr,
    low,
    high,
    dual_clip,
    log_ratio_clamp,
    entropy_coef,
    kl_coef,
    estimator,
):
    """Of ppo_loss, by the log-prob and by the entropy of a token: what losses.py writes as gradients, to the bit."""
    advantage = tl.load(advantages_ptr + n)
    if advantage_stats_ptr is not None:
        advantage = (advantage - tl.load(advantage_stats_ptr)) * tl.load(advantage_stats_ptr + 1)
    log_ratio = log_prob - tl.load(old_ptr + n)
    _, _, slope, _, _, _ = _surrogate(log_ratio, advantage, low, high, dual_clip, log_ratio_clamp)
    if weights_ptr is not None:
        slope *= tl.load(weights_ptr + n)
    if ref_ptr is not None:
        _, kl_slope = kl_estimate(log_prob - tl.load(ref_ptr + n), estimator)
        slope += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    return slope * share, -entropy_coef * share


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def _loss_kernel(
    grad_ptr,  # the logits' memory, or other of that stride
    logits_ptr,
    bias_ptr,  # or None
    tokens_ptr,
    log_probs_ptr,
    entropy_ptr,
    shares_ptr,
    old_ptr,  # None: the loss is cross-entropy, of which all that follows is not used
    advantages_ptr,
    weights_ptr,  # or None
    ref_ptr,  # or None
    advantage_stats_ptr,  # or None
    V: tl.int32,
    stride: tl.int64,
    scale: tl.float32,  # log2(e) / T
    inv_t: tl.float32,  # 1 / T
    softcap,  # or None
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,
    log_ratio_clamp: tl.float32,
    entropy_coef: tl.float32,
    kl_coef: tl.float32,
    estimator: tl.int32,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    ROLL: tl.constexpr,
):
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n)
    row = _row(logits_ptr, stride)
    zero = tl.full([], 0.0, tl.float32)
    log_prob, entropy, m, log_total, g, h = zero, zero, zero, zero, zero, zero
    if token != _IGNORE:
        z = _load_token(row, token, V, bias_ptr, softcap)
        m, s, u = _statistics(row, bias_ptr, V, scale, softcap, GRANULE, LANES, ROLL)
        log_total = tl.log(s)
        log_prob = (z - m) * inv_t - log_total
        entropy = log_total - u / s * _LN_2
        share = tl.load(shares_ptr + n)
        if old_ptr is None:
            g = -share
        else:
            inputs = (old_ptr, advantages_ptr, weights_ptr, ref_ptr, advantage_stats_ptr)
            limits = (low, high, dual_clip, log_ratio_clamp)
            g, h = _ppo_slopes(n, log_prob, share, *inputs, *limits, entropy_coef, kl_coef, estimator)
    tl.store(log_probs_ptr + n, log_prob)
    tl.store(entropy_ptr + n, entropy)
    numbers = (token, g, h, m, log_total, entropy, V, inv_t, softcap)
    _write_gradient(_row(grad_ptr, stride), row, bias_ptr, *numbers, GRANULE, LANES, ROLL, True)


# ---------------------------------------------------------------------------------------------------------- the host


def _strategy():
    asked = os.environ.get("FASTRLHF_LM_HEAD") or STRATEGIES[0]
    if asked not in STRATEGIES:
        raise ValueError(
            f"FASTRLHF_LM_HEAD: got {asked!r}, wanted one of {', '.join(map(repr, STRATEGIES))}, or nothing"
        )
    return asked


STRATEGY = _strategy()


def _at_16_bytes(x):
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _product(total, a, b, add=False):
    """total = a b, or += it, in the dtype of total: that of a and b, or fp32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(add), out=total)
    elif not total.is_cuda:  # where the interpreter runs; only CUDA has products of one dtype into another
        product = a.float() @ b.float()
        total.copy_(total + product if add else product)
    elif not add:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:  # not addmm, which in some versions of torch refuses a total of another dtype than a
        batch = total.unsqueeze(0)
        torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=total.dtype, out=batch)


class _Head:
    """The LM head, applied to a chunk of tokens at a time."""

    def __init__(self, hidden, weight, bias, numbers, chunk_bytes):
        self.hidden, self.weight, self.bias = hidden, weight, _at_16_bytes(bias)
        temperature, softcap = numbers.tolist()
        self.scale, self.inv_t = LOG2_E / temperature, 1.0 / temperature
        self.softcap = softcap if softcap < float("inf") else None
        n, self.V = hidden.shape[0], weight.shape[0]
        self.stride = triton.cdiv(self.V, PADDED) * PADDED
        self.dtypes = [hidden.dtype]
        if STRATEGY == "fused" and hidden.dtype != torch.float32:
            self.dtypes = [torch.float32, hidden.dtype]  # of the logits, of their gradient
        self.tile = {"GRANULE": _rows.VECTOR_BYTES // self.dtypes[0].itemsize, "maxnreg": REGISTERS}
        self.tile |= _rows.constants(hidden)
        most = chunk_bytes // (sum(x.itemsize for x in self.dtypes) * self.stride)
        most = max(ROWS, most // ROWS * ROWS)
        chunks = triton.cdiv(n, most)
        each = triton.cdiv(n, max(chunks, 1) * ROWS) * ROWS
        self.chunks = [slice(i * each, min((i + 1) * each, n)) for i in range(chunks)]

    def logits(self):
        """Yields (slice of the tokens, logits without bias and softcap, where their gradient goes), in memory that the
        next ones take again."""
        most = max((x.stop - x.start for x in self.chunks), default=0)
        buffers = [self.hidden.new_empty(most, self.stride, dtype=dtype) for dtype in self.dtypes]
        for rows in self.chunks:
            logits, grad_logits = (buffers[i][: rows.stop - rows.start, : self.V] for i in (0, -1))
            _product(logits, self.hidden[rows], self.weight.t())
            yield rows, logits, grad_logits


class _Gradients:
    """Of hidden, weight and bias, from the gradients of the logits, a chunk at a time; empty where not needed."""

    def __init__(self, head, tokens, needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32):
        self.head, self.needs = head, (needs_hidden, needs_weight, needs_bias)
        hidden, weight = head.hidden, head.weight
        self.weight_dtype = torch.float32 if weight_grad_in_fp32 else weight.dtype
        # A single chunk is rounded once by its product.
        dtype = torch.float32 if len(head.chunks) > 1 else self.weight_dtype
        new = torch.empty if head.chunks else torch.zeros
        self.hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
        self.weight = new(weight.shape if needs_weight else 0, dtype=dtype, device=weight.device)
        self.bias = torch.zeros(head.V if needs_bias else 0, dtype=torch.float32, device=weight.device)
        self.counts = (tokens != IGNORE_INDEX).unsqueeze(-1) if needs_weight else None

    def add(self, rows, grad_logits):
        needs_hidden, needs_weight, needs_bias = self.needs
        if needs_hidden:
            _product(self.hidden[rows], grad_logits, self.head.weight)
        if needs_weight:
            hidden = torch.where(self.counts[rows], self.head.hidden[rows], 0)
            _product(self.weight, grad_logits.t(), hidden, add=rows.start > 0)
        if needs_bias:
            self.bias += grad_logits.sum(0, dtype=torch.float32)

    def result(self):
        return self.hidden, self.weight.to(self.weight_dtype), self.bias.to(self.head.hidden.dtype)


def _shares(mask, denominator, aggregation):
    """What ppo_loss multiplies a token's terms with: the gradient of its loss, were that minus the mean entropy."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    options = torch.tensor([0.0, 0.0, float("inf"), float("inf"), -1.0, 0.0])
    constants = (zeros, zeros, zeros, mask, None, None, zeros, None)
    return losses.ppo_loss(*constants, denominator, options, 0, False, aggregation, True)[3]


def _differentiated(head, tokens, shares, gradients, ppo=(None,) * 4, stats=None, options=(0.0,) * 6, estimator=0):
    """Log-probs and entropy [N]; into gradients goes that of ppo_loss, or of the cross-entropy if nothing is given.

    shares: what a token's loss is multiplied with. ppo: old_log_probs, advantages, weights, ref_log_probs, all [N].
    """
    log_probs, entropy = torch.empty_like(shares), torch.empty_like(shares)
    clip_low, clip_high, *others = options
    with _rows.on_device_of(tokens):
        for rows, logits, grad_logits in head.logits():
            _loss_kernel[(len(logits),)](
                grad_logits,
                logits,
                head.bias,
                *(x if x is None else x[rows] for x in (tokens, log_probs, entropy, shares, *ppo)),
                stats,
                head.V,
                head.stride,
                head.scale,
                head.inv_t,
                head.softcap,
                1.0 - clip_low,
                1.0 + clip_high,
                *others,
                estimator,
                **head.tile,
            )
            gradients.add(rows, grad_logits)
    return log_probs, entropy


def linear_token_log_probs(hidden, weight, bias, tokens, numbers, chunk_bytes):
    """Log-probability of each token and entropy under the softmax of the head's logits, and the normaliser.

    hidden: [N, H]; weight: [V, H]; bias: [V] or None; all fp32, bf16 or fp16. tokens: [N], int64, -100 = ignored.
    numbers: [2], temperature and softcap (inf for none), in CPU memory. chunk_bytes: of logits in memory at a time.
    Returns (log_probs [N], entropy [N], normaliser [N, 2]) as token_log_probs_and_entropy, in fp32, of logits in the
    inputs' dtype (fp32 where fused). A token outside [0, V) gives NaN.
    """
    if STRATEGY == "fused":
        return lm_head_fused.linear_token_log_probs(hidden, weight, bias, tokens, numbers)
    head = _Head(hidden, weight, bias, numbers, chunk_bytes)
    shapes = (tokens.shape, tokens.shape, (*tokens.shape, 2))
    results = tuple(torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in shapes)
    tokens = tokens.contiguous()
    with _rows.on_device_of(hidden):
        for rows, logits, _ in head.logits():
            _forward_kernel[(len(logits),)](
                logits,
                head.bias,
                tokens[rows],
                *(x[rows] for x in results),
                head.V,
                head.stride,
                head.scale,
                head.inv_t,
                head.softcap,
                **head.tile,
            )
    return results


def linear_token_log_probs_backward(
    grad_log_probs,
    grad_entropy,
    hidden,
    weight,
    bias,
    tokens,
    normaliser,
    entropy,
    numbers,
    chunk_bytes,
    needs_hidden,
    needs_weight,
    needs_bias,
    weight_grad_in_fp32,
):
    """Gradient of linear_token_log_probs: grad_log_probs and grad_entropy (or None), [N], and its inputs and results.

    Returns (grad_hidden [N, H], grad_weight [V, H], grad_bias [V]) in the inputs' dtype, grad_weight in fp32 if so
    wanted; empty where not needed.
    """
    tokens = tokens.contiguous()
    head = _Head(hidden, weight, bias, numbers, chunk_bytes)
    gradients = _Gradients(head, tokens, needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32)
    arrays = (tokens, normaliser, entropy, grad_log_probs, grad_entropy)
    arrays = [x if x is None else x.contiguous() for x in arrays]
    with _rows.on_device_of(hidden):
        for rows, logits, grad_logits in head.logits():
            _backward_kernel[(len(logits),)](
                grad_logits,
                logits,
                head.bias,
                *(x if x is None else x[rows] for x in arrays),
                head.V,
                head.stride,
                head.inv_t,
                head.softcap,
                **head.tile,
            )
            gradients.add(rows, grad_logits)
    return gradients.result()


def linear_cross_entropy(hidden, weight, bias, tokens, numbers, chunk_bytes, denominator, *needs):
    """Mean of -log p over the tokens that count, and its gradients.

    As linear_token_log_probs. denominator: one fp32 number on the device that replaces their count, or None. needs: of
    hidden, weight, bias, which gradients; whether the weight's in fp32.
    Returns (loss, stats [2]: mean entropy and count, grad_hidden, grad_weight, grad_bias), gradients empty where not
    needed.
    """
    tokens = tokens.contiguous()
    mask = tokens != IGNORE_INDEX
    head = _Head(hidden, weight, bias, numbers, chunk_bytes)
    gradients = _Gradients(head, tokens, *needs)
    if any(gradients.needs):
        log_probs, entropy = _differentiated(head, tokens, _shares(mask, denominator, TOKEN_MEAN), gradients)
    else:
        log_probs, entropy, _ = linear_token_log_probs(hidden, weight, bias, tokens, numbers, chunk_bytes)
    count = mask.sum().float()

    def divided(total, by):
        return torch.where(by == 0, 0.0, total / by)

    stats = torch.stack([divided(entropy.sum(), count), count])
    return divided(-log_probs.sum(), count if denominator is None else denominator), stats, *gradients.result()


def linear_ppo_loss(
    hidden,
    weight,
    bias,
    tokens,
    numbers,
    chunk_bytes,
    old_log_probs,
    advantages,
    mask,
    weights,
    advantage_stats,
    ref_log_probs,
    denominator,
    options,
    kl_estimator,
    aggregation,
    *needs,
):
    """ppo_loss of the head's log-probs and entropies, and its gradients.

    hidden, weight, bias, numbers, chunk_bytes: as for linear_token_log_probs; needs: as for linear_cross_entropy; all
    else as for ppo_loss, in the shape of tokens, of N elements, -100 where the mask is 0.
    Returns (loss, stats [10], grad_hidden, grad_weight, grad_bias), gradients empty where not needed.
    """
    per_token = {
        "old_log_probs": old_log_probs,
        "advantages": advantages,
        "weights": weights,
        "ref_log_probs": ref_log_probs,
    }
    old, advantages, weights, ref = (_like(name, x, tokens) for name, x in per_token.items())
    advantage_stats = _like("advantage_stats", advantage_stats, tokens.new_empty(2))
    mask = _like("mask", mask, tokens, torch.bool)
    flat = tokens.reshape(-1)
    head = _Head(hidden, weight, bias, numbers, chunk_bytes)
    gradients = _Gradients(head, flat, *needs)
    if any(gradients.needs):
        shares = _shares(mask, denominator, aggregation).view(-1)
        ppo = [x if x is None else x.view(-1) for x in (old, advantages, weights, ref)]
        options_and_estimator = (advantage_stats, options.tolist(), kl_estimator)
        log_probs, entropy = _differentiated(head, flat, shares, gradients, ppo, *options_and_estimator)
    else:
        log_probs, entropy, _ = linear_token_log_probs(hidden, weight, bias, flat, numbers, chunk_bytes)
    log_probs, entropy = log_probs.view(tokens.shape), entropy.view(tokens.shape)
    constants = (old, advantages, mask, weights, advantage_stats, entropy, ref, denominator, options)
    loss, stats, _, _ = losses.ppo_loss(log_probs, *constants, kl_estimator, False, aggregation, False)
    return loss, stats, *gradients.result()
