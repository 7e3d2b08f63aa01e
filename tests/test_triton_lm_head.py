"""The GPU side of the LM head, by both strategies: chunks of cuBLAS and a row kernel, and the fused product.

Without a GPU, in a child process with Triton's interpreter, where the kernels serve the CPU and ATen multiplies in
cuBLAS's place: the `check_*` of this file. `TRITON_INTERPRET=1 python tests/test_triton_lm_head.py` runs them by hand,
and with `contract` behind it test_lm_head.py as it is. With a GPU: the checks, compiled.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import assert_as_good_as_eager, poison
from test_lm_head import (
    AGGREGATIONS,
    ALL_ON,
    DTYPES,
    ESTIMATORS,
    HEADS,
    PAIR,
    eager,
    outcome,
    random_head,
    random_ppo,
    slack_of_gradient,
    slack_of_logits,
    wide,
)

OPS = (
    "linear_token_log_probs",
    "linear_token_log_probs_backward",
    "linear_cross_entropy",
    "linear_ppo_loss",
)
STRATEGIES = ("chunked", "fused")
INF, NAN = float("inf"), float("nan")
CHUNK = 8  # tokens, in place of 64: several chunks of few rows
ROW = 8192 + 5  # two turns of a 16-bit row kernel's loop, and an end


class Run:
    """The public functions and the raw ops on one device, behind which the Triton kernels stand."""

    def __init__(self, device):
        from fastrlhf import functional, reference
        from fastrlhf.kernels import lm_head, lm_head_fused, log_probs, losses

        self.device, self.F, self.reference = device, functional, reference
        self.lm_head, self.fused, self.log_probs, self.losses = lm_head, lm_head_fused, log_probs, losses
        if device == "cpu":
            self.library = torch.library.Library("fastrlhf", "IMPL")
            for name in OPS:
                self.library.impl(name, getattr(lm_head, name), "CPU")

    @contextlib.contextmanager
    def by(self, strategy):
        self.strategy = strategy
        interpreter = sixteen_bits_as_on_a_gpu() if self.device == "cpu" else contextlib.nullcontext()
        chunks = mock.patch.object(self.lm_head, "ROWS", CHUNK)
        with interpreter, chunks, mock.patch.object(self.lm_head, "STRATEGY", strategy):
            yield

    def on(self, *tensors):
        return tuple(x.to(self.device) if isinstance(x, torch.Tensor) else x for x in tensors)


@contextlib.contextmanager
def sixteen_bits_as_on_a_gpu():
    """The interpreter truncates where a GPU rounds, and multiplies the bits of bf16 as if they were integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, x, dtype):
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.as_tensor(x.data).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), dtype.scalar)
        return cast(self, x, dtype)

    def float_dot(self, a, b, *others):
        a, b = (x if x.dtype.scalar == tl.float32 else cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *others)

    with (
        mock.patch.object(InterpreterBuilder, "cast_impl", rounding_cast),
        mock.patch.object(InterpreterBuilder, "create_dot", float_dot),
    ):
        yield


def head(n, h, v, dtype, *, temperature=1.0, softcap=None, bias=False, seed=0):
    """As the raw ops take it: (hidden, weight, bias, tokens, numbers)."""
    hidden, weight, tokens, bias = random_head(n, h, v, dtype, bias=bias, seed=seed)
    return hidden, weight, bias, tokens, torch.tensor([temperature, INF if softcap is None else softcap])


def whole_numbers(n, h, v, dtype, seed=0):
    """A head whose logits are exact in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in ((n, h), (v, h)))
    return hidden, weight, None, torch.randint(v, (n,), generator=generator), torch.tensor([0.8, INF])


def slopes(n, seed=0):
    return torch.randn(2, n, generator=torch.Generator().manual_seed(seed))


def both_passes(run, inputs, chunk_bytes=1, entropy=1.0, needs=(True, True, True, False), dirt=None):
    """Results and gradients of the raw ops, on CPU: log_probs, entropy, normaliser, grad_hidden, _weight, _bias.

    entropy: its gradient is multiplied with that; None: it has none. dirt: stands in the gradients of ignored rows.
    """
    hidden, weight, bias, tokens, numbers = inputs
    g, h = slopes(len(tokens))
    g = g if dirt is None else torch.where(tokens == -100, dirt, g)
    hidden, weight, bias, tokens, g, h = run.on(hidden, weight, bias, tokens, g, h)
    results = run.lm_head.linear_token_log_probs(hidden, weight, bias, tokens, numbers, chunk_bytes)
    needs = (*needs[:2], needs[2] and bias is not None, needs[3])
    saved = (tokens, results[2], results[1], numbers, chunk_bytes)
    h = None if entropy is None else entropy * h
    grads = run.lm_head.linear_token_log_probs_backward(g, h, hidden, weight, bias, *saved, *needs)
    return [x.cpu() for x in (*results, *grads)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def assert_accurate(run, hidden, weight, tokens, bias=None, chunk_bytes=1, **options):
    """As test_lm_head.compare: log-probs, entropies and gradients against the oracle in fp64, beside eager PyTorch.

    Eager is in the same dtype; fused log-probs have to be as good as of logits that are never rounded.
    """
    h, size = hidden.shape[-1], min(options.get("temperature", 1.0), 1.0)
    inputs = (hidden, weight, tokens, *slopes(len(tokens)), bias)
    ours = outcome(run.F.linear_token_log_probs_and_entropy, *run.on(*inputs), chunk_bytes=chunk_bytes, **options)
    theirs = outcome(eager, *run.on(*inputs), **options)
    exact = outcome(
        run.reference.linear_token_log_probs_and_entropy, *(wide(x, torch.float64) for x in inputs), **options
    )
    results = theirs[0]
    if run.strategy == "fused":
        results = outcome(eager, *run.on(*(wide(x, torch.float32) for x in inputs)), **options)[0]
    for name, x, y, z in zip(("log_probs", "entropy"), ours[0], results, exact[0], strict=True):
        assert x.dtype == torch.float32
        assert_as_good_as_eager(x.cpu(), y.cpu(), z, slack_of_logits(h) / size, name)
    terms = [max(g.abs().max().item() for g in inputs[3:5]) * x.abs().max().item() for x in (weight, hidden)] + [1.0]
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for grads in zip(ours[1], theirs[1], exact[1], strict=True):
        for x, y, z, leaf, term in zip(*grads, leaves, terms, strict=False):
            assert x.dtype == leaf.dtype
            # The backward pass of fused log-probs multiplies in another order: p is off by what the logits are, over T.
            slack = slack_of_gradient(z, term, h, x.dtype) / size ** (2 if run.strategy == "fused" else 1)
            assert_as_good_as_eager(x.cpu(), y.cpu(), z, slack, f"gradient of {tuple(leaf.shape)}")


# ------------------------------------------------------------------------------------------------------- the checks


def check_against_the_oracle(run):
    shapes = ((5, 16, 1), (1, 3, 2), (1, 1, 1), (17, 16, 383), (9, 63, 1009), (3, 33, ROW))
    for shape, dtype in itertools.product(shapes, DTYPES):
        for name in ("plain", "everything"):
            options = dict(HEADS[name])
            hidden, weight, tokens, bias = random_head(*shape, dtype, bias=options.pop("bias", False))
            tokens[3::5] = -100
            assert_accurate(run, hidden, weight, tokens, bias, **options)


def check_every_head(run):
    for dtype in PAIR:
        for options in map(dict, HEADS.values()):
            hidden, weight, tokens, bias = random_head(10, 24, 383, dtype, bias=options.pop("bias", False))
            assert_accurate(run, hidden, weight, tokens, bias, **options)
    for options in ({"temperature": 0.01}, {"temperature": 100.0}, {"softcap": 0.1}, {"softcap": 1e6}):
        assert_accurate(run, *random_head(7, 24, 383)[:3], **options)


def check_equal_logits_give_the_bits_of_log_probs(run):
    """Statistics and gradient, where the strategies have exact logits in common."""
    for dtype, V in itertools.product(PAIR, (383, ROW)):
        inputs = whole_numbers(5, 16, V, dtype)
        inputs[3][1] = -100
        hidden, weight, _, tokens, numbers = run.on(*inputs)
        logits = hidden @ weight.T
        assert torch.equal(logits.double(), hidden.double() @ weight.double().T)
        g, h = run.on(*slopes(5))
        log_probs, entropy, normaliser = run.log_probs.token_log_probs_and_entropy(logits, tokens, numbers[0])
        grad = run.log_probs.token_log_probs_and_entropy_backward(g, h, logits, tokens, normaliser, entropy, numbers[0])
        ours = both_passes(run, inputs)
        if run.strategy == "chunked":
            assert_same(ours[:3], [x.cpu() for x in (log_probs, entropy, normaliser)])
        saved = (tokens, normaliser, entropy, numbers, 1, True, True, False, False)
        grads = run.lm_head.linear_token_log_probs_backward(g, h, hidden, weight, None, *saved)
        assert_same(grads[:2], (grad @ weight, grad.T @ hidden))


def check_chunks_of_any_size(run):
    """The same log-probs, and gradients up to the order of their sums."""
    for dtype in PAIR:
        inputs = whole_numbers(20, 16, 301, dtype)
        whole = both_passes(run, inputs, 1 << 30)
        for chunk_bytes in (1, 8 * 320 * 4, 17 * 320 * 6):
            parts = both_passes(run, inputs, chunk_bytes)
            assert_same(parts[:4], whole[:4])
            torch.testing.assert_close(parts[4], whole[4], rtol=torch.finfo(dtype).eps, atol=1e-4)


def check_the_size_of_chunks(run):
    """Multiples of ROWS of nearly equal size, within chunk_bytes, ROWS at least."""
    for n, V, dtype in itertools.product((0, 1, CHUNK, CHUNK + 1, 1000, 4097), (1, 1000), PAIR):
        for chunk_bytes in (1, 10**6, 10**9):
            inputs = torch.zeros(n, 1, dtype=dtype), torch.zeros(V, 1, dtype=dtype), None, torch.tensor([1.0, INF])
            chunks = run.lm_head._Head(*inputs, chunk_bytes).chunks
            sizes = [x.stop - x.start for x in chunks]
            assert [i for x in chunks for i in range(n)[x]] == list(range(n))
            assert all(x % CHUNK == 0 and x == sizes[0] for x in sizes[:-1])
            assert sizes == [] or 0 < sizes[-1] <= sizes[0]
            element = 6 if run.strategy == "fused" and dtype != torch.float32 else dtype.itemsize
            most = max(CHUNK, chunk_bytes // (element * -(-V // 64) * 64))
            assert max(sizes, default=0) <= most
            assert len(sizes) <= -(-n // (most // CHUNK * CHUNK))


def check_what_is_not_needed_is_not_computed(run):
    inputs = head(20, 16, 97, torch.bfloat16, bias=True)
    whole = both_passes(run, inputs)
    for needs in itertools.product((False, True), repeat=4):
        with mock.patch.object(run.lm_head, "_product", wraps=run.lm_head._product) as product:
            grads = both_passes(run, inputs, needs=needs)[3:]
        forward = 0 if run.strategy == "fused" else 3
        assert product.call_count == forward + 3 * (1 + needs[0] + needs[1])  # three chunks
        for x, y, needed in zip(grads, whole[3:], needs, strict=False):
            assert torch.equal(x.to(y.dtype), y) if needed else x.shape == (0,)
        assert grads[1].dtype == (torch.float32 if needs[3] else torch.bfloat16)


def check_no_entropy_and_an_entropy_without_gradient_are_one(run):
    for inputs in (head(5, 16, 383, torch.float32), head(5, 16, 383, torch.float16, bias=True, softcap=5.0)):
        assert_same(both_passes(run, inputs, entropy=None), both_passes(run, inputs, entropy=0.0))


def check_ignored_rows_change_no_bit_and_are_zero(run):
    for dtype, bias in itertools.product(DTYPES, (False, True)):
        hidden, weight, bias, tokens, numbers = head(20, 24, 383, dtype, bias=bias)
        counts = torch.arange(20) % 3 != 0
        tokens = torch.where(counts, tokens, -100)
        clean = both_passes(run, (hidden, weight, bias, tokens, numbers))
        dirty = poison(hidden, counts.unsqueeze(-1).expand_as(hidden))
        dirty = both_passes(run, (dirty, weight, bias, tokens, numbers), dirt=NAN)
        assert_same(clean, dirty)
        assert not any(x[~counts].any() for x in dirty[:4])
        assert all(x.isfinite().all() for x in dirty)


def check_a_bias_that_overflows_stays_out_of_ignored_rows(run):
    hidden, weight, bias, tokens, _ = head(5, 16, 97, torch.float32, bias=True)
    bias[40] = 3e38
    tokens[:] = -100
    results = both_passes(run, (hidden, weight, bias, tokens, torch.tensor([0.001, INF])))
    assert not any(x.any() for x in results)


def check_nothing_at_all(run):
    for n in (0, 3, 20):
        hidden, weight, bias, tokens, numbers = head(n, 16, 97, torch.bfloat16, bias=True)
        tokens[:] = -100
        results = both_passes(run, (hidden, weight, bias, tokens, numbers))
        assert not any(x.any() for x in results)
        assert [x.shape for x in results[3:]] == [hidden.shape, weight.shape, bias.shape]
        leaves = [x.requires_grad_() for x in run.on(hidden, weight, bias)]
        x, (tokens,) = torch.zeros(n, device=run.device), run.on(tokens)
        for loss, stats in (
            run.F.linear_cross_entropy(*leaves[:2], tokens, bias=leaves[2]),
            run.F.linear_ppo_loss(*leaves[:2], tokens, x, x, torch.zeros_like(x), bias=leaves[2]),
        ):
            grads = torch.autograd.grad(loss, leaves)
            assert not any(x.any() for x in (loss, *stats, *grads))
            assert [x.shape for x in grads] == [x.shape for x in leaves]


def check_tokens_of_other_shards(run):
    """The entropy is theirs too; the log-prob is not, and the gradient has no token to pull up."""
    hidden, weight, bias, tokens, numbers = head(5, 16, 383, torch.float32, bias=True, temperature=0.7)
    here = both_passes(run, (hidden, weight, bias, tokens, numbers))
    elsewhere = torch.where(torch.arange(5) < 3, run.reference.ELSEWHERE, tokens)
    ours = both_passes(run, (hidden, weight, bias, elsewhere, numbers))
    assert ours[0][:3].isnan().all()
    assert torch.equal(ours[0][3:], here[0][3:])
    assert_same(ours[1:3], here[1:3])
    pull = torch.zeros(5, 383).index_put_((torch.arange(3), tokens[:3]), slopes(5)[0][:3] / 0.7)
    torch.testing.assert_close(here[3] - ours[3], pull @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here[5] - ours[5], pull.sum(0), rtol=1e-5, atol=1e-5)


def check_tokens_outside_the_vocabulary_show(run):
    hidden, weight, bias, tokens, numbers = head(4, 16, 97, torch.float32)
    tokens[:] = torch.tensor([97, -1, -101, 2**33 + 1])
    results = both_passes(run, (hidden, weight, bias, tokens, numbers))
    assert results[0].isnan().all()
    assert results[1].isfinite().all()


def check_forbidden_tokens_have_probability_zero(run):
    for forbidden in (slice(0, 200), slice(150, 383), slice(0, None, 2)):
        hidden, weight, bias, _, numbers = head(5, 24, 383, torch.float32, bias=True)
        bias[forbidden] = -INF
        allowed = bias.isfinite().nonzero()[:, 0]
        among = torch.arange(5) % len(allowed)
        ours = both_passes(run, (hidden, weight, bias, allowed[among], numbers))
        fewer = both_passes(run, (hidden, weight[allowed], bias[allowed], among, numbers))
        assert not any(x[forbidden].any() for x in ours[4:])
        for x, y in zip(ours, fewer, strict=True):
            torch.testing.assert_close(x[allowed] if len(x) == 383 else x, y, rtol=1e-5, atol=1e-5)


def check_nan_and_infinity_are_not_hidden(run):
    for dtype, softcap in itertools.product(PAIR, (None, 5.0)):
        hidden, weight, bias, tokens, numbers = head(20, 24, 383, dtype, softcap=softcap)
        broken = weight.clone()
        broken[:, 3] = NAN
        assert all(x.isnan().all() for x in both_passes(run, (hidden, broken, bias, tokens, numbers))[:2])
        clean = both_passes(run, (hidden, weight, bias, tokens, numbers))
        hidden = hidden.clone()
        hidden[13, 7] = NAN
        ours = both_passes(run, (hidden, weight, bias, tokens, numbers))
        for x, y in zip(ours[:2], clean[:2], strict=True):
            assert torch.equal(x.isnan(), torch.arange(20) == 13)
            assert torch.equal(x[14:], y[14:])


def check_huge_and_far_logits(run):
    for shift in (-80.0, -1e4, 1e4):
        for v in (1, 95, 97, 383):
            hidden, weight = torch.zeros(3, 4), torch.zeros(v, 4)
            inputs = (hidden, weight, torch.full((v,), shift), torch.tensor([0, v // 2, v - 1]))
            log_probs, entropy, *_ = both_passes(run, (*inputs, torch.tensor([1.0, INF])))
            torch.testing.assert_close(log_probs, -torch.full((3,), float(v)).log(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(entropy, -log_probs, rtol=1e-6, atol=1e-6)
    weight = torch.zeros(300, 2)
    weight[270, 0] = 3e38
    inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), weight, None, torch.tensor([270, 270])
    log_probs, entropy, *_ = both_passes(run, (*inputs, torch.tensor([1.0, INF])))
    assert log_probs.tolist() == [0.0, pytest.approx(-3e38)]
    assert entropy.tolist() == [0.0, pytest.approx(torch.tensor(299.0).log().item(), rel=1e-6)]


def check_any_layout(run):
    """What lies between strided numbers is nan: nobody reads it, or nobody uses it."""
    for dtype, H in itertools.product(PAIR, (16, 7)):
        dense = head(10, H, 97, dtype, bias=True)
        expected = both_passes(run, dense)

        def apart(x, *steps):
            room = torch.full([n * step for n, step in zip(x.shape, steps, strict=True)], NAN, dtype=x.dtype)
            view = room[tuple(slice(0, None, step) for step in steps)]
            return view.copy_(x)

        def padded(x):  # rows at 16-byte boundaries that end between them
            room = torch.full((len(x), 24), NAN, dtype=x.dtype)
            return room[:, : x.shape[1]].copy_(x)

        hidden, weight, bias, *others = dense
        for layout in (
            (apart(hidden, 2, 1), apart(weight, 3, 1), apart(bias, 2)),
            (apart(hidden, 1, 2), apart(weight, 1, 2), apart(bias, 3)),
            (padded(hidden), padded(weight), torch.cat([bias[:1], bias])[1:]),
            (hidden.T.contiguous().T, weight.T.contiguous().T, bias),
        ):
            for x, y in zip(both_passes(run, (*layout, *others)), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=2 * torch.finfo(x.dtype).eps, atol=2**-5 * expected[5].std())


def log_probs_of(run, inputs, chunk_bytes=1):
    results = run.lm_head.linear_token_log_probs(*run.on(*inputs[:4]), inputs[4], chunk_bytes)
    return [x.cpu() for x in results]


def check_log_probs_of_many_rows(run):
    """Several blocks of rows of the fused product, and several groups of those."""
    hidden, weight, bias, tokens, numbers = head(2100, 8, 30, torch.float32, bias=True)
    few = slice(None, None, 1 if run.strategy == "fused" else 70)
    inputs = (hidden[few], weight, bias, tokens[few], numbers)
    exact = run.reference.linear_token_log_probs_and_entropy(
        *(x.double() for x in inputs[:2]), inputs[3], bias=bias.double()
    )
    for x, y in zip(log_probs_of(run, inputs), exact, strict=False):
        assert (x - y).abs().max() <= slack_of_logits(8)


def check_a_row_gives_the_same_bits_in_any_batch(run):
    """Of exact logits: cuBLAS chooses its way by the number of rows. The fused product is ours."""
    fused = run.strategy == "fused"
    for dtype, kind in itertools.product(PAIR, (whole_numbers, head) if fused else (whole_numbers,)):
        n = 300 if fused else 20
        hidden, weight, bias, tokens, numbers = kind(n, 24, 1009, dtype)
        batch = log_probs_of(run, (hidden, weight, bias, tokens, numbers))
        assert_same(batch, log_probs_of(run, (hidden, weight, bias, tokens, numbers)))
        for rows in (slice(0, 1), slice(7, 9), slice(n // 2, n)):
            alone = log_probs_of(run, (hidden[rows], weight, bias, tokens[rows], numbers))
            assert_same(alone, [x[rows] for x in batch])


def check_every_tile_of_the_fused_product(run):
    """The larger one, of GPUs that have room for it, and the one for rows that cannot be read 16 bytes at a time."""
    inputs = head(140, 72, 2100, torch.bfloat16)
    expected = run.fused.linear_token_log_probs(*run.on(*inputs[:4]), inputs[4])
    large = {"BLOCK_M": 128, "BLOCK_V": 256, "BLOCK_K": 64}
    if run.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        large = {"BLOCK_M": 64, "BLOCK_V": 128, "BLOCK_K": 16}
    with mock.patch.object(run.fused, "_tile", return_value=large):
        tiled = run.fused.linear_token_log_probs(*run.on(*inputs[:4]), inputs[4])
    with mock.patch.object(run.fused, "_granule", return_value=1):
        narrow = run.fused.linear_token_log_probs(*run.on(*inputs[:4]), inputs[4])
    for x, y, z in zip(expected, tiled, narrow, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-5)


def check_the_weights_gradient_is_rounded_once(run):
    inputs = head(50, 16, 97, torch.bfloat16)
    rounded, exact = (both_passes(run, inputs, needs=(False, True, False, fp32))[4] for fp32 in (False, True))
    assert exact.dtype == torch.float32
    assert torch.equal(rounded, exact.bfloat16())
    x, w = inputs[0].double(), inputs[1].double()
    g, h = (y.double() for y in slopes(50))
    log_p = torch.log_softmax(x @ w.T, -1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    dz = g[:, None] * (torch.nn.functional.one_hot(inputs[3], 97) - log_p.exp())
    dz -= h[:, None] * log_p.exp() * (log_p + entropy)
    # Terms are rounded to bf16, by half of 2^-7 at most; five standard deviations of their sum.
    walk = (dz.T**2 @ x**2).sqrt()
    logits_off = 2**-9 * 12 if run.strategy == "chunked" else 0.0  # those are rounded, too, and reach 12 or so
    assert ((exact.double() - dz.T @ x).abs() <= 5 * (2**-8 + 2 * logits_off) * walk + 1e-4).all()


def ppo_of(run, call, tensors, needs=(True, True, True, False), chunk_bytes=1, **options):
    """The raw op on random_ppo's numbers: loss, stats and gradients."""
    hidden, weight, bias, tokens, old, advantages, mask = run.on(*call)
    tensors = {name: run.on(x)[0] for name, x in tensors.items()}
    numbers, (estimator, _, aggregation) = ppo_numbers(options)
    tokens = torch.where(mask, tokens, -100)
    inputs = (hidden.flatten(0, 1), weight, bias, tokens, torch.tensor([0.9, INF]), chunk_bytes)
    optional = (tensors.get(name) for name in ("weights", "advantage_stats", "ref_log_probs", "denominator"))
    needs = (*needs[:2], needs[2] and bias is not None, needs[3])
    others = (old, advantages, mask, *optional, numbers, estimator, aggregation)
    return inputs, others, run.lm_head.linear_ppo_loss(*inputs, *others, *needs)


def ppo_numbers(options):
    from fastrlhf.functional.losses import ppo_options

    defaults = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "log_ratio_clamp": 20.0}
    defaults |= {"entropy_coef": 0.0, "kl_coef": 0.0, "kl_estimator": "k3", "ratio_level": "token"}
    return ppo_options(*(defaults | {"aggregation": "token-mean"} | options).values())


def check_ppo_has_the_bits_of_its_parts(run):
    """Loss and statistics are ppo_loss's of the log-probs, and its slopes those that the gradients start from."""
    choices = itertools.product(ESTIMATORS, AGGREGATIONS, (False, True), (1, 1 << 20))
    for i, (estimator, aggregation, everything, chunk_bytes) in enumerate(choices):
        call, tensors = random_ppo(3, 4, 16, 97, DTYPES[i % 3], bias=i % 2 == 0)
        call[-1][1] = False  # a sequence without a single token
        tensors |= {"advantage_stats": torch.tensor([0.3, 1.7]), "denominator": torch.tensor(37.0)}
        options = {"kl_estimator": estimator, "aggregation": aggregation} | (ALL_ON if everything else {})
        given = tensors if everything else {}
        inputs, others, ours = ppo_of(run, call, given, chunk_bytes=chunk_bytes, **options)
        flat = (*inputs[:3], inputs[3].flatten(), *inputs[4:])
        log_probs, entropy, normaliser = run.lm_head.linear_token_log_probs(*flat)
        if run.strategy == "fused":  # another product there; here, that of the losses
            with mock.patch.object(run.lm_head, "STRATEGY", "chunked"):
                flat = (*(wide(x, torch.float32) for x in flat[:3]), *flat[3:])
                mine = run.lm_head.linear_token_log_probs(*flat)
            torch.testing.assert_close(log_probs, mine[0], rtol=1e-5, atol=1e-5)
            log_probs, entropy, normaliser = mine
        shape = inputs[3].shape
        old, advantages, mask, weights, stats, ref, denominator, numbers, estimator, aggregation = others
        constants = (old, advantages, mask, weights, stats, entropy.view(shape), ref, denominator, numbers)
        parts = run.losses.ppo_loss(log_probs.view(shape), *constants, estimator, False, aggregation, True)
        if run.strategy == "chunked":
            assert_same(ours[:2], parts[:2])
            g, h = (x.flatten() for x in parts[2:])
            backward = run.lm_head.linear_token_log_probs_backward
            saved = (flat[3], normaliser, entropy, *inputs[4:], True, True, inputs[2] is not None, False)
            assert_same(ours[2:], backward(g, h, *inputs[:3], *saved))
        else:
            torch.testing.assert_close(ours[0], parts[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours[1], parts[1], rtol=1e-5, atol=1e-5)


def loss_and_gradients(function, device, call, dtype=None, **options):
    """Of hidden, weight (and bias), on CPU."""

    def convert(x):
        return wide(x, dtype or x.dtype).to(device) if isinstance(x, torch.Tensor) else x

    hidden, weight, bias, *arguments = map(convert, call)
    leaves = [x.requires_grad_() for x in (hidden.detach(), weight.detach(), bias) if x is not None]
    options = {name: convert(x) for name, x in options.items()}
    loss, stats = function(*leaves[:2], *arguments, **options, **({} if bias is None else {"bias": leaves[2]}))
    return [x.detach().cpu() for x in (loss, torch.stack([*stats]), *torch.autograd.grad(loss, leaves))]


def eager_ppo(run, hidden, weight, tokens, old, advantages, mask, *, bias=None, softcap=None, **options):
    head = {"bias": bias, "softcap": softcap}
    log_probs, entropy = eager(hidden, weight, torch.where(mask, tokens, -100), **head)
    return run.reference.ppo_loss(log_probs, old, advantages, mask, entropy=entropy, **options)


def check_ppo_against_the_oracle(run):
    for dtype, aggregation, softcap in itertools.product(DTYPES, AGGREGATIONS, (None, 6.0)):
        call, tensors = random_ppo(4, 5, 24, 383, dtype, bias=softcap is not None, softcap=softcap)
        call[-1][1] = False
        options = tensors | ALL_ON | {"aggregation": aggregation, "softcap": softcap}
        ours = loss_and_gradients(run.F.linear_ppo_loss, run.device, call, chunk_bytes=1, **options)
        theirs = loss_and_gradients(lambda *x, **y: eager_ppo(run, *x, **y), run.device, call, **options)
        exact = loss_and_gradients(run.reference.linear_ppo_loss, "cpu", call, torch.float64, **options)
        assert_losses_accurate(ours, theirs, exact, 24)


def assert_losses_accurate(ours, theirs, exact, h):
    """As test_lm_head.compare_loss, beside eager in the same dtype. Fractions of tokens at a clip may change by one."""
    for name, x, y, z in zip(("loss", "stats"), ours, theirs, exact, strict=False):
        size = z.abs().clamp(min=1.0)
        assert_as_good_as_eager(x / size, y / size, z / size, 2 * slack_of_logits(h), name)
    for x, y, z in zip(ours[2:], theirs[2:], exact[2:], strict=True):
        slack = 2 * slack_of_gradient(z, 0.0, h, x.dtype)
        assert_as_good_as_eager(x, y, z, slack, f"gradient of {tuple(z.shape)}")


def check_cross_entropy_against_the_oracle(run):
    def exact_loss(hidden, weight, tokens, *, denominator=None, head=eager, **options):
        log_probs, entropy = head(hidden, weight, tokens, **options)
        count = (tokens != -100).sum()
        loss = -log_probs.sum() / (count if denominator is None else denominator)
        return loss, (entropy.detach().sum() / count, count)

    oracle = run.reference.linear_token_log_probs_and_entropy
    for dtype, denominator, softcap in itertools.product(DTYPES, (None, 300.0), (None, 6.0)):
        hidden, weight, tokens, bias = random_head(20, 24, 383, dtype, bias=softcap is not None)
        tokens[1::4] = -100
        call, options = (hidden, weight, bias, tokens), {"denominator": denominator, "softcap": softcap}
        ours = loss_and_gradients(run.F.linear_cross_entropy, run.device, call, chunk_bytes=1, **options)
        theirs = loss_and_gradients(exact_loss, run.device, call, **options)
        exact = loss_and_gradients(exact_loss, "cpu", call, torch.float64, head=oracle, **options)
        assert_losses_accurate(ours, theirs, exact, 24)


def check_at_step_zero_the_ratio_is_one(run):
    """Exactly, where old and new log-probs are of the same product; up to fp32 where one of them is fused."""
    for dtype in DTYPES:
        (hidden, weight, bias, tokens, _, advantages, mask), _ = random_ppo(3, 7, 24, 383, dtype, bias=True)
        hidden, weight, bias, tokens, advantages, mask = run.on(hidden, weight, bias, tokens, advantages, mask)
        with torch.no_grad():
            old = run.F.linear_token_log_probs(hidden, weight, tokens, bias=bias)
        weight.requires_grad_()
        _, stats = run.F.linear_ppo_loss(hidden, weight, tokens, old, advantages, mask, bias=bias)
        if run.strategy == "chunked":
            assert [x.item() for x in stats[1:7]] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
        else:
            assert max(abs(x.item() - 1) for x in stats[4:7]) <= 2 * slack_of_logits(24)


def check_losses_without_gradients(run):
    """The same loss, and not one product more than the log-probs need."""
    (hidden, weight, _, tokens, old, advantages, mask), _ = random_ppo(1, 7, 24, 383, torch.bfloat16)
    hidden, weight, tokens, old, advantages, mask = run.on(hidden, weight, tokens, old, advantages, mask)
    for function, arguments in (
        (run.F.linear_cross_entropy, (tokens,)),
        (run.F.linear_ppo_loss, (tokens, old, advantages, mask)),
    ):
        with mock.patch.object(run.lm_head, "_product", wraps=run.lm_head._product) as product:
            loss, stats = function(hidden, weight, *arguments)
        assert product.call_count == (0 if run.strategy == "fused" else 1)
        again, others = function(hidden, weight.detach().requires_grad_(), *arguments)
        torch.testing.assert_close(loss, again.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack([*stats]), torch.stack([*others]), rtol=1e-5, atol=1e-5)


def check_wrong_tensors_are_refused_by_the_kernels_too(run):
    call, tensors = random_ppo(2, 5, 8, 17)
    for position, wrong in ((4, torch.zeros(2, 4)), (5, torch.zeros(2, 5).half())):
        broken = [*call]
        broken[position] = wrong
        with pytest.raises(ValueError, match="old_log_probs: got" if position == 4 else "advantages: got"):
            ppo_of(run, broken, tensors)


def check_strategies_go_by_name(run):
    with mock.patch.dict(os.environ, {"FASTRLHF_LM_HEAD": run.strategy}):
        assert run.lm_head._strategy() == run.strategy
    with mock.patch.dict(os.environ, {"FASTRLHF_LM_HEAD": ""}):
        assert run.lm_head._strategy() == "chunked"
    with (
        mock.patch.dict(os.environ, {"FASTRLHF_LM_HEAD": "quick"}),
        pytest.raises(ValueError, match="FASTRLHF_LM_HEAD: got 'quick', wanted one of 'chunked', 'fused'"),
    ):
        run.lm_head._strategy()


CHECKS = {
    f"{name.removeprefix('check_')}[{strategy}]": (check, strategy)
    for name, check in list(globals().items())
    if name.startswith("check_")
    for strategy in STRATEGIES
}


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def interpreted():
    return run_checks(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    run, (check, strategy) = Run("cuda"), CHECKS[check]
    with run.by(strategy):
        check(run)


def contract():
    """Tests of test_lm_head.py, but for what is slow here and the like of a check above."""
    left_out = ("against_the_oracle", "summed_in_fp32", "large_vocabulary", "any_options", "dpo", "layout", "two_step")
    left_out = " and ".join(f"not {name}" for name in left_out)
    file = str(Path(__file__).with_name("test_lm_head.py"))
    return pytest.main(["-q", "-p", "no:cacheprovider", "-k", left_out, file, "--durations=60"])


def main(arguments):
    run, found = Run("cpu"), {}
    if arguments == ["contract"]:
        with run.by(run.lm_head.STRATEGY):
            return contract()
    for name, (check, strategy) in CHECKS.items():
        if not any(x in name for x in arguments or [""]):
            continue
        began = time.perf_counter()
        try:
            with run.by(strategy):
                check(run)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name], sep="\n", file=sys.stderr)
        print(f"{time.perf_counter() - began:5.1f} s  {name}", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
