"""kl_divergence: the four estimators, their clamps and gradients."""

import math

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

ESTIMATORS = ("k1", "k2", "k3", "abs")
CLAMPS = (None, 0.3, (0.5, 0.2), (None, 0.1), (0.4, None))


def run(function, p, q, dtype, **options):
    p, q = (x.to(dtype).clone().requires_grad_() for x in (p, q))
    kl = function(p, q, **options)
    weights = torch.linspace(-1, 2, kl.numel()).reshape(kl.shape).to(dtype)
    return kl.detach(), *torch.autograd.grad((kl * weights).sum(), (p, q))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", [(7,), (3, 41), (0, 4), (1, 5003)])
def test_against_the_oracle(estimator, clamp, shape):
    p, q, _ = random_tokenwise(2, *shape)
    options = {"estimator": estimator, "clamp": clamp}
    ours = run(F.kl_divergence, p, q, torch.float32, **options)
    eager = run(reference.kl_divergence, p, q, torch.float32, **options)
    exact = run(reference.kl_divergence, p, q, torch.float64, **options)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(a, b, c, 4 * EPS)


def test_by_hand():
    p, q = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    log2 = math.log(2)
    for estimator, expected in (
        ("k1", [log2, -log2]),
        ("k2", [log2**2 / 2] * 2),
        ("k3", [0.5 - 1 + log2, 2 - 1 - log2]),
        ("abs", [log2, log2]),
    ):
        torch.testing.assert_close(F.kl_divergence(p, q, estimator=estimator), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_give_exactly_zero(estimator):
    p = -3 * torch.rand(1000)
    assert not F.kl_divergence(p, p.clone(), estimator=estimator).any()


def test_k3_is_precise_where_the_policies_are_close():
    """exp(-d) - 1 + d in fp32 is all rounding for d around 1e-4; its value is d^2 / 2."""
    d = torch.tensor([1e-4, -1e-4, 1e-3, 1e-2, 0.3, 0.4, -0.34])
    exact = torch.expm1(-d.double()) + d.double()
    ours = F.kl_divergence(d, torch.zeros_like(d), estimator="k3").double()
    assert ((ours - exact) / exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_the_reference_is_precise_too(dtype):
    """It is the oracle. Exact: sums of x^n / n! in whole numbers, for d = k / 2^20."""
    from fractions import Fraction

    for numerator in (1, -1, 1000, -77_777, 300_000, -900_000, 1_048_575, -1_048_575):
        x = Fraction(-numerator, 2**20)
        term, exact = x, Fraction(0)
        for n in range(2, 40):
            term = term * x / n
            exact += term
        d = torch.tensor([numerator / 2**20], dtype=dtype)
        ours = reference.kl_divergence(d, torch.zeros_like(d), estimator="k3").item()
        assert ours == pytest.approx(float(exact), rel=16 * torch.finfo(dtype).eps, abs=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", CLAMPS)
def test_a_nan_shows_in_the_gradient(estimator, clamp):
    """A slope of 0 means that a limit holds, and nothing holds a nan."""
    p = torch.tensor([math.nan, 0.0, 0.01], requires_grad=True)
    q = torch.tensor([0.0, math.nan, 0.0])
    kl = F.kl_divergence(p, q, estimator=estimator, clamp=clamp)
    assert kl.isnan().tolist() == [True, True, False]
    kl.sum().backward()
    assert p.grad.isnan().tolist() == [True, True, False]


def test_k1_and_k3_are_unbiased():
    torch.manual_seed(0)
    p_logits, q_logits = torch.randn(2, 8)
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True)
    exact = (p.exp() * (p - q)).sum().item()
    for estimator in ("k1", "k3"):
        assert F.kl_divergence(p[tokens], q[tokens], estimator=estimator).mean().item() == pytest.approx(
            exact, rel=0.02
        )


def test_extremes():
    inf, nan = math.inf, math.nan
    p, q = torch.tensor([-inf, 0.0, -inf, nan, 300.0, -300.0]), torch.tensor([0.0, -inf, -inf, 0.0, 0.0, 0.0])
    k3 = F.kl_divergence(p, q, estimator="k3")
    assert k3[0] == k3[1] == k3[5] == inf
    assert k3[2:4].isnan().all()
    assert k3[4] == 299.0
    held = F.kl_divergence(p, q, estimator="k3", clamp=(20, 10))
    assert held[:2].tolist() == held[4:].tolist() == [10.0, 10.0]
    assert held[2:4].isnan().all()


def test_inputs_in_low_precision_and_strided():
    p, q, _ = random_tokenwise(2, 6, 8)
    low = F.kl_divergence(p.bfloat16(), q.bfloat16())
    assert low.dtype == torch.float32
    assert same_bits(low, F.kl_divergence(p.bfloat16().float(), q.bfloat16().float()))
    assert torch.equal(F.kl_divergence(p.T, q.T), F.kl_divergence(p, q).T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "k5"}, "estimator: got 'k5', wanted one of 'k1', 'k2', 'k3', 'abs'"),
        ({"clamp": -1.0}, "clamp: got -1.0, wanted a finite number > 0.0"),
        ({"clamp": [20, 10]}, "clamp: got list, wanted a number"),
        ({"clamp": (20, 10, 3)}, r"clamp: got \(20, 10, 3\), wanted c, \(a, c\) or None"),
        ({"clamp": ()}, r"clamp: got \(\), wanted c, \(a, c\) or None"),
        ({"clamp": ("a", 1.0)}, "clamp: got str, wanted a number"),
        ({"estimator": ["k1"]}, r"estimator: got \['k1'\], wanted one of"),
        ({"ref_log_probs": torch.zeros(3)}, r"ref_log_probs: got shape \(3,\), wanted \(2, 3\)"),
        ({"log_probs": torch.zeros(2, 3, dtype=torch.int64)}, "log_probs: got dtype int64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        F.kl_divergence(**({"log_probs": torch.zeros(2, 3), "ref_log_probs": torch.zeros(2, 3)} | change))


def test_opcheck_and_compile():
    p, q, _ = random_tokenwise(2, 3, 5)
    ops = torch.ops.fastrlhf
    leaves = (p.clone().requires_grad_(), q.clone().requires_grad_())
    torch.library.opcheck(ops.kl_divergence.default, (*leaves, 2, torch.tensor([20.0, math.inf])))
    torch.library.opcheck(ops.kl_divergence_backward.default, (p + 1, p, q, 1, torch.tensor([math.inf, 10.0])))
    compiled = torch.compile(F.kl_divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p, q, estimator="k3"), F.kl_divergence(p, q, estimator="k3"))
