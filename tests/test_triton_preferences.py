"""The Triton kernels of pairwise_reward_loss and dpo_loss against fp64; where and how as in test_triton_losses.py."""

import itertools
import math
import sys

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, same_bits
from test_triton_losses import Run, main, on_gpu, outcomes, results

VARIANTS = ("sigmoid", "robust", "hinge", "ipo")
INF, NAN = math.inf, math.nan
SIZES = (1, 3, 511, 512, 513, 1601)


def numbers(count, n, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(scale * torch.randn(count, n, generator=generator))


def run_pairs(function, device, arguments, optional, options, dtype=torch.float32):
    """Loss, statistics, and the gradients of the first two arguments."""
    second = {"rejected" if "margin" in optional or len(arguments) == 2 else "policy_rejected": arguments[1]}

    def call(first, *rest, **tensors):
        inputs = [first, tensors.pop(next(iter(second))), *rest]
        return function(*inputs, **tensors)

    return results(call, device, [arguments[0], *arguments[2:]], second | optional, options, dtype, leaves=second)


def assert_accurate(run, name, arguments, optional, options):
    """At most twice eager's error. The epsilon: a few roundings of the largest number in the result.

    h is a difference of four log-probabilities, whose rounding beta (for "ipo" 2) carries into slope and loss.
    """
    ours = run_pairs(getattr(run.F, name), run.device, arguments, optional, options)
    eager = run_pairs(getattr(run.reference, name), "cpu", arguments, optional, options)
    exact = run_pairs(getattr(run.reference, name), "cpu", arguments, optional, options, torch.float64)
    for i, what in enumerate(("loss", "stats", "first gradient", "second gradient")):
        slack = 8 * EPS * max(1.0 if i < 2 else 0.0, exact[i].abs().max().item())
        assert_as_good_as_eager(ours[i], eager[i], exact[i], slack, f"{what} of {name} with {options}")


# ------------------------------------------------------------------------------------------------------- the checks


def check_pairwise_reward_loss(run):
    for n, with_margin, center_coef in itertools.product(SIZES, (False, True), (0.0, 0.01)):
        chosen, rejected, margin = numbers(3, n, scale=3.0, seed=n)
        optional = {"margin": margin.abs()} if with_margin else {}
        assert_accurate(run, "pairwise_reward_loss", [chosen, rejected], optional, {"center_coef": center_coef})


def check_dpo_loss(run):
    for n, variant, smoothing in itertools.product(SIZES, VARIANTS, (0.0, 0.2)):
        if smoothing and variant not in ("sigmoid", "robust"):
            continue
        options = {"variant": variant, "label_smoothing": smoothing, "beta": 0.3}
        assert_accurate(run, "dpo_loss", numbers(4, n, scale=4.0, seed=n), {}, options)


def check_log_probs_of_long_responses(run):
    for variant in VARIANTS:
        arguments = [x - 1000.0 for x in numbers(4, 70, scale=50.0)]
        assert_accurate(run, "dpo_loss", arguments, {}, {"variant": variant, "beta": 0.05})


def check_small_losses_keep_their_digits(run):
    """log(1 + e^-x) at x = 20 is 2e-9: a sum with 1 would make it 0."""
    difference = torch.linspace(1, 80, 80)
    for x in difference.split(1):
        loss, _, grad, _ = run_pairs(run.F.pairwise_reward_loss, run.device, [x, torch.zeros(1)], {}, {})
        exact = math.log1p(math.exp(-x.item()))
        assert loss.item() == pytest.approx(exact, rel=1e-6)
        assert grad.item() == pytest.approx(-1 / (1 + math.exp(x.item())), rel=1e-6)


def check_far_out(run):
    loss, stats, grad, _ = run_pairs(
        run.F.pairwise_reward_loss, run.device, [torch.tensor([1e4, -1e4, 1e30]), torch.zeros(3)], {}, {}
    )
    assert loss.item() == pytest.approx(1e4 / 3)
    assert grad.tolist() == pytest.approx([0.0, -1 / 3, 0.0])
    assert stats[0].item() == pytest.approx(2 / 3)


def check_ties_are_half(run):
    same = torch.tensor([1.0, 2.0])
    assert run_pairs(run.F.pairwise_reward_loss, run.device, [same, same], {}, {})[1][0] == 0.5
    assert run_pairs(run.F.dpo_loss, run.device, [same, same, same, same], {}, {})[1][0] == 0.5


def check_nan_shows(run):
    for position, bad in itertools.product(range(4), (NAN, INF)):
        arguments = [torch.zeros(40) for _ in range(4)]
        arguments[position][7] = bad
        other = (position + 2) % 4
        if bad == INF:
            arguments[other][7] = bad  # inf - inf
        for variant in VARIANTS:
            loss, stats, *grads = run_pairs(run.F.dpo_loss, run.device, arguments, {}, {"variant": variant})
            assert loss.isnan()
            assert stats[1].isnan()
            for grad in grads:
                assert torch.equal(grad.isnan(), torch.arange(40) == 7)
        pair = [arguments[position], arguments[other]]
        loss, _, grad, _ = run_pairs(run.F.pairwise_reward_loss, run.device, pair, {}, {})
        assert loss.isnan()
        assert torch.equal(grad.isnan(), torch.arange(40) == 7)


def check_one_launch_and_none_for_no_pairs(run):
    for n, expected in ((600, 1), (0, 0)):
        with run.launches() as names:
            loss, stats, *grads = run_pairs(run.F.dpo_loss, run.device, numbers(4, n), {}, {})
            assert len(names) == expected
            pair = run_pairs(run.F.pairwise_reward_loss, run.device, numbers(2, n), {}, {})
        assert len(names) == 2 * expected
        if n == 0:
            assert not any(x.any() for x in (loss, stats, *pair))
        assert all(x.shape == (n,) for x in (*grads, *pair[2:]))


def check_what_lies_beside_the_pairs_changes_no_bit(run):
    arguments = numbers(4, 601)
    expected = run_pairs(run.F.dpo_loss, run.device, arguments, {}, {})
    beside = []
    for x in arguments:
        buffer = torch.full((700,), NAN, device=run.device)
        beside.append(buffer[1:602].copy_(x))
    for again in (arguments, beside):
        outcome = run_pairs(run.F.dpo_loss, run.device, again, {}, {})
        assert all(same_bits(a, b) for a, b in zip(expected, outcome, strict=True))


def check_no_gradient_unless_asked(run):
    with torch.no_grad():
        x = [y.to(run.device) for y in numbers(4, 9)]
        loss, _ = run.F.dpo_loss(*x)
        assert not loss.requires_grad
    options = torch.tensor([0.1, 0.0])
    from fastrlhf.kernels import preferences

    plain, graded = (preferences.dpo_loss(*x, options, 0, needs_grad) for needs_grad in (False, True))
    assert same_bits(plain[0], graded[0])
    assert plain[2].numel() == plain[3].numel() == 0
    with pytest.raises(ValueError, match="ref_chosen: got"):
        preferences.dpo_loss(*x[:2], x[2][:3], x[3], options, 0, True)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def interpreted():
    return outcomes(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Run("cuda"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("n", [64, 4096, 100_003])
def test_on_gpu_at_real_sizes(n):
    assert_accurate(Run("cuda"), "dpo_loss", numbers(4, n, scale=4.0), {}, {})
    assert_accurate(Run("cuda"), "pairwise_reward_loss", numbers(2, n, scale=4.0), {}, {"center_coef": 0.01})


if __name__ == "__main__":
    sys.exit(main(CHECKS, sys.argv[1:]))
