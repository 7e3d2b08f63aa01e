"""The Triton kernels of kl_divergence and full_kl against fp64; where and how as in test_triton_log_probs.py."""

import importlib
import itertools
import json
import math
import sys
import time
import traceback
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import EPS, assert_as_good_as_eager

from fastrlhf import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("k1", "k2", "k3", "abs")
CLAMPS = (None, 0.3, (0.5, 0.2), (None, 0.1), (0.4, None))
INF, NAN = math.inf, math.nan


class Interpreter:
    """The raw kernels on CPU tensors."""

    device = "cpu"
    bf16_slack = 2**-7  # the interpreter truncates fp32 to bf16 where a GPU rounds: one unit in the last place more

    def __init__(self):
        self.ops = importlib.import_module("fastrlhf.kernels.kl")

    def full_kl(self, logits, ref_logits, g=None, mask=None, temperature=1.0, needs=(True, True)):
        """kl [...], and given g the two gradients."""
        temperature = torch.tensor(temperature)
        kl, *normalisers = self.ops.full_kl(logits, ref_logits, mask, temperature)
        if g is None:
            return (kl,)
        rest = (mask, kl, *normalisers, temperature, *needs)
        return kl, *self.ops.full_kl_backward(g, logits, ref_logits, *rest)

    def kl_divergence(self, p, q, g, estimator, clamp):
        """The estimates, and the gradient of p."""
        limits = clamp if isinstance(clamp, tuple) else (None, clamp)
        options = (ESTIMATORS.index(estimator), torch.tensor([INF if x is None else x for x in limits]))
        return self.ops.kl_divergence(p, q, *options), self.ops.kl_divergence_backward(g, p, q, *options)


class Functional:
    """The public functions on CUDA tensors."""

    device = "cuda"
    bf16_slack = 0.0

    def full_kl(self, logits, ref_logits, g=None, mask=None, temperature=1.0, needs=(True, True)):
        from fastrlhf import functional as F

        leaves = [x.detach().requires_grad_(need) for x, need in zip((logits, ref_logits), needs, strict=True)]
        kl = F.full_kl(*leaves, mask, temperature=temperature)
        if g is None:
            return (kl.detach(),)
        wanted = [x for x in leaves if x.requires_grad]
        grads = iter(torch.autograd.grad(kl, wanted, g))
        return kl.detach(), *(next(grads) if need else logits.new_empty(0) for need in needs)

    def kl_divergence(self, p, q, g, estimator, clamp):
        from fastrlhf import functional as F

        p = p.detach().requires_grad_()
        kl = F.kl_divergence(p, q, estimator=estimator, clamp=clamp)
        return kl.detach(), torch.autograd.grad(kl, p, g)[0]


def oracle(logits, ref_logits, g, mask, temperature, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (logits, ref_logits)]
    kl = reference.full_kl(*leaves, mask, temperature=temperature)
    return kl.detach(), *torch.autograd.grad((kl * g.to(dtype)).sum(), leaves)


def pair(run, *shape, dtypes=(torch.float32, torch.float32), near=0.5, scale=3.0, seed=0):
    """Logits of a policy, of a reference that is `near` away, and upstream gradients."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=rng) * scale
    ref_logits = logits + near * torch.randn(shape, generator=rng)
    g = torch.randn(shape[:-1], generator=rng)
    return logits.to(dtypes[0]).to(run.device), ref_logits.to(dtypes[1]).to(run.device), g.to(run.device)


def assert_accurate(run, logits, ref_logits, g, mask=None, temperature=1.0):
    """At most twice the error of eager PyTorch on the same values in fp32, plus an epsilon.

    The epsilon: sums of 2^t are rounded at each step, by a few EPS of themselves; of the gradients also what
    that makes of p, and results in 16 bits once more.
    """
    ours = run.full_kl(logits, ref_logits, g, mask, temperature)
    exact = oracle(logits, ref_logits, g, mask, temperature, torch.float64)
    eager = oracle(logits, ref_logits, g, mask, temperature, torch.float32)
    assert ours[0].dtype == torch.float32
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 16 * EPS * max(1.0, exact[0].abs().max().item()), "kl")
    for i, x in ((1, logits), (2, ref_logits)):
        assert ours[i].dtype == x.dtype
        largest = exact[i].abs().max().item()
        slack = 4e-6 * g.abs().max().item() / temperature * (1 + exact[0].abs().max().item())
        slack += largest * (run.bf16_slack if x.dtype == torch.bfloat16 else torch.finfo(x.dtype).eps)
        assert_as_good_as_eager(ours[i], eager[i].to(x.dtype), exact[i], slack, f"gradient {i}")


def same(a, b):
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- the checks


def check_estimates_against_the_oracle(run):
    for estimator, clamp, n in itertools.product(ESTIMATORS, CLAMPS, (7, 2049)):
        rng = torch.Generator().manual_seed(n)
        p = -3 * torch.rand(n, generator=rng)
        q, g = p + 0.4 * torch.randn(n, generator=rng), torch.randn(n, generator=rng)
        ours = run.kl_divergence(*(x.to(run.device) for x in (p, q, g)), estimator, clamp)
        results = []
        for dtype in (torch.float32, torch.float64):
            leaf = p.to(dtype).requires_grad_()
            kl = reference.kl_divergence(leaf, q.to(dtype), estimator=estimator, clamp=clamp)
            results.append((kl.detach(), torch.autograd.grad((kl * g.to(dtype)).sum(), leaf)[0]))
        for x, eager, exact in zip(ours, *results, strict=True):
            assert_as_good_as_eager(x.cpu(), eager, exact, 4 * EPS, f"{estimator} {clamp}")


def check_estimates_far_out(run):
    p = torch.tensor([-INF, 0.0, -INF, NAN, 300.0, -300.0, 0.0, 20.0, -20.0, -88.5], device=run.device)
    q = torch.tensor([0.0, -INF, -INF, 0.0, 0.0, 0.0, NAN, 0.0, 0.0, 0.0], device=run.device)
    for estimator, clamp in itertools.product(ESTIMATORS, (None, (20.0, 10.0))):
        kl, slope = run.kl_divergence(p, q, torch.ones_like(p), estimator, clamp)
        exact = reference.kl_divergence(p.double(), q.double(), estimator=estimator, clamp=clamp)
        exact = torch.where(exact > torch.finfo(torch.float32).max, INF, exact)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0, equal_nan=True)
        assert slope.isnan().tolist() == (p - q).isnan().tolist()


def check_k3_is_precise_where_the_policies_are_close(run):
    d = torch.tensor([1e-4, -1e-4, 1e-3, 1e-2, 0.3, 0.4, -0.34], device=run.device)
    exact = torch.expm1(-d.double()) + d.double()
    kl, slope = run.kl_divergence(d, torch.zeros_like(d), torch.ones_like(d), "k3", None)
    assert ((kl.double() - exact) / exact).abs().max() < 2e-6
    assert ((slope.double() + torch.expm1(-d.double())) / d).abs().max() < 2e-6


def check_full_kl_in_every_pair_of_dtypes(run):
    for dtypes in itertools.product(DTYPES, DTYPES):
        for V in (7, 2304, 4099):
            assert_accurate(run, *pair(run, 2, V, dtypes=dtypes, seed=V), temperature=0.9)


def check_full_kl_near_and_far(run):
    for near, scale in itertools.product((0.0, 1e-3, 3.0), (1.0, 10.0, 100.0)):
        for V in (1, 1003):
            assert_accurate(run, *pair(run, 3, V, near=near * scale, scale=scale), temperature=0.3)


def check_equal_distributions_have_none(run):
    logits, _, g = pair(run, 3, 5003)
    kl, grad, ref_grad = run.full_kl(logits, logits.clone(), g)
    assert kl.tolist() == [0.0] * 3
    assert grad.abs().max() < 1e-6
    assert ref_grad.abs().max() < 1e-6


def check_shifting_all_logits_changes_nothing(run):
    logits, ref_logits, g = pair(run, 3, 3001)
    logits, ref_logits = ((x * 16).round() / 16 for x in (logits, ref_logits))  # stays exact under the shift
    plain = run.full_kl(logits, ref_logits, g)
    for shift, ref_shift in ((1e4, -1e3), (-1e5, 1e5), (0.0, 100.0)):
        shifted = run.full_kl(logits + shift, ref_logits + ref_shift, g)
        for a, b in zip(plain, shifted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_impossible_tokens(run):
    logits = torch.tensor([[-INF, 1.0, 2.0], [0.0, 1.0, 2.0], [-INF, 1.0, 2.0], [-500.0, 1.0, 2.0]], device=run.device)
    ref_logits = torch.tensor([[0.5, 1.0, 2.0], [-INF, 1.0, 2.0], [-INF, 0.0, 2.0], [-INF, 1.0, 2.0]]).to(logits)
    one = torch.ones(4, device=run.device)
    kl, grad, ref_grad = run.full_kl(logits, ref_logits, one)
    exact = reference.full_kl(logits[:3].double(), ref_logits[:3].double())
    torch.testing.assert_close(kl[:3].double(), exact)
    assert kl[1] == INF
    assert kl[3].abs() < 1e-6  # a probability that is 0 in fp32 counts as impossible
    for x in (grad[[0, 2, 3]], ref_grad):
        assert x.isfinite().all()
    assert grad[0, 0] == grad[2, 0] == ref_grad[2, 0] == 0.0


def check_rows_with_few_possible_tokens_or_that_grow_late(run):
    logits, ref_logits, _ = pair(run, 5, 9000)
    logits[0, :8500] = -INF
    ref_logits[1, 8000:] += 60.0
    logits[2, 8000:] += 90.0
    ref_logits[2] = logits[2].flip(0)
    logits[3, :8500] = ref_logits[3, :8500] = -INF
    low = torch.finfo(torch.float32).min
    logits[4, 1:8500] = ref_logits[4, 1:8500] = low
    exact = reference.full_kl(logits.double(), ref_logits.double())
    torch.testing.assert_close(run.full_kl(logits, ref_logits)[0].double(), exact, rtol=1e-5, atol=1e-5)


def check_nan_and_infinity_show(run):
    for bad, position, which in itertools.product((NAN, INF), (0, 2500), (0, 1)):
        both = list(pair(run, 1, 2600)[:2])
        both[which][0, position] = bad
        assert run.full_kl(*both)[0].isnan().all()


def check_masked_rows_are_zero_and_unread(run):
    for dtype in (torch.float32, torch.bfloat16):
        logits, ref_logits, g = pair(run, 2, 3, 70, dtypes=(dtype, dtype))
        mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=run.device).bool()
        plain = run.full_kl(logits, ref_logits, g, mask)
        g[0, 2] = 0.0  # nobody wants its gradient
        logits[~mask], ref_logits[~mask], g[~mask] = NAN, INF, NAN
        ours = run.full_kl(logits, ref_logits, g, mask)
        assert same(ours[:1], plain[:1])
        for x, y in zip(ours[1:], plain[1:], strict=True):
            assert not x[~mask].any()
            assert not x[0, 2].any()
            assert torch.equal(x[1], y[1])


def check_strided_rows_and_no_rows(run):
    logits, ref_logits, g = pair(run, 2, 4, 257)
    turned = ref_logits.transpose(0, 1).contiguous().transpose(0, 1)  # another layout than the policy's
    assert same(run.full_kl(logits, turned, g), run.full_kl(logits, ref_logits, g))
    assert_accurate(run, logits[:, :-1], ref_logits[:, 1:], g[:, 1:])
    logits, ref_logits, g = pair(run, 2, 3, 4, 2, 65)
    assert_accurate(run, *(x[:, ::2, ::3] for x in (logits, ref_logits, g)))
    assert [x.numel() for x in run.full_kl(*pair(run, 0, 50))] == [0, 0, 0]


def check_only_the_gradients_that_are_needed(run):
    logits, ref_logits, g = pair(run, 3, 1001)
    _, grad, ref_grad = run.full_kl(logits, ref_logits, g)
    _, only, none = run.full_kl(logits, ref_logits, g, needs=(True, False))
    assert torch.equal(only, grad)
    assert none.numel() == 0
    _, none, only = run.full_kl(logits, ref_logits, g, needs=(False, True))
    assert torch.equal(only, ref_grad)
    assert none.numel() == 0


def check_same_bits_alone_or_in_a_batch_split_or_whole_aligned_or_not(run):
    rows = importlib.import_module("fastrlhf.kernels._rows")
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        logits, ref_logits, g = pair(run, 4, 10_001, dtypes=dtypes)
        logits[1] += 1000.0  # its backward pass computes the statistics again
        logits[2], logits[2, 10_000] = -INF, 0.0
        split = run.full_kl(logits, ref_logits, g, temperature=0.8)
        with mock.patch.object(rows, "PROGRAMS_PER_MULTIPROCESSOR", 0):
            assert same(split, run.full_kl(logits, ref_logits, g, temperature=0.8))
        padded = []
        for x in (logits, ref_logits):
            padded.append(torch.zeros(4, 10_008, dtype=x.dtype, device=run.device)[:, :10_001])
            padded[-1].copy_(x)
        assert same(split, run.full_kl(*padded, g, temperature=0.8))
        alone = run.full_kl(logits[1:2], ref_logits[1:2], g[1:2], temperature=0.8)
        assert same([x[1:2] for x in split], alone)


def check_bug_liger_803_and_trl_int32_offsets(run):
    """Two rows more than 2^31 elements apart. On CPU the pages between are never touched, so they cost nothing."""
    stride = 2**31 + 1000
    far = torch.empty(stride + 100, dtype=torch.bfloat16, device=run.device).as_strided((2, 100), (stride, 1))
    logits, ref_logits, g = pair(run, 2, 100, dtypes=(torch.bfloat16, torch.bfloat16))
    far.copy_(logits)
    near = run.full_kl(logits, ref_logits, g)
    assert same(run.full_kl(far, ref_logits, g), near)
    far.copy_(ref_logits)
    assert same(run.full_kl(logits, far, g), near)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def interpreted():
    return run_checks(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Functional())


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("V", [50_257, 151_936])
@pytest.mark.parametrize("rows", [1, 300, 1024])
def test_on_gpu_at_real_sizes(V, rows):
    run = Functional()
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        assert_accurate(run, *pair(run, rows, V, dtypes=dtypes), temperature=0.7)
        torch.cuda.empty_cache()


@pytest.mark.gpu
@ON_GPU
def test_on_gpu_bug_liger_1294_more_than_65535_rows():
    run = Functional()
    assert_accurate(run, *pair(run, 65_600, 9))


def main():
    run, results = Interpreter(), {}
    for name, check in CHECKS.items():
        began = time.perf_counter()
        try:
            check(run)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
        print(f"{time.perf_counter() - began:5.1f} s  {name}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
