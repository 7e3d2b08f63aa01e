"""ppo_loss and value_loss: numbers by hand, the oracle, and the properties PPO is known by."""

import itertools
import math
import random

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, random_tokenwise

from fastrlhf import functional as F
from fastrlhf import reference

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
ESTIMATORS = ("k1", "k2", "k3", "abs")


def ppo_case(shape=(5, 37), seed=0):
    log_probs, old, advantages, weights, entropy, ref, mask = random_tokenwise(6, *shape, seed=seed)
    mask[1] = False  # a sequence without a single token
    arguments = [log_probs, old, advantages + 1.5, mask]
    return arguments, {"weights": weights.abs(), "entropy": entropy.abs(), "ref_log_probs": ref}


def run(function, arguments, tensors, options, dtype):
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    log_probs = arguments[0] = arguments[0].clone().requires_grad_()
    inputs = [log_probs]
    if "entropy" in tensors:
        tensors["entropy"] = tensors["entropy"].clone().requires_grad_()
        inputs.append(tensors["entropy"])
    loss, stats = function(*arguments, **tensors, **options)
    grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return loss.detach(), torch.as_tensor(list(stats), dtype=torch.float64), *grads


def compare(function, oracle, arguments, tensors, options, stats_slack=64 * EPS):
    ours = run(function, arguments, tensors, options, torch.float32)
    eager = run(oracle, arguments, tensors, options, torch.float32)
    exact = run(oracle, arguments, tensors, options, torch.float64)
    size = max(1.0, exact[0].abs().item())
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 8 * EPS * size, "loss")
    assert_as_good_as_eager(ours[1], eager[1], exact[1], stats_slack, "stats")
    for i, name in enumerate(("gradient", "entropy gradient")[: len(ours) - 2]):
        assert_as_good_as_eager(ours[2 + i], eager[2 + i], exact[2 + i], 8 * EPS * exact[2 + i].abs().max(), name)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 7.0])
def test_ppo_loss_against_the_oracle(ratio_level, aggregation, denominator):
    arguments, tensors = ppo_case()
    for names in itertools.chain.from_iterable(itertools.combinations(tensors, k) for k in range(4)):
        options = {"ratio_level": ratio_level, "aggregation": aggregation, "denominator": denominator}
        options |= {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.4, "log_ratio_clamp": 0.6}
        options |= {"entropy_coef": 0.3} if "entropy" in names else {}
        options |= {"kl_coef": 0.2} if "ref_log_probs" in names else {}
        compare(F.ppo_loss, reference.ppo_loss, arguments, {name: tensors[name] for name in names}, options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ppo_loss_with_every_kl_estimator(estimator):
    arguments, tensors = ppo_case()
    options = {"kl_coef": 0.5, "kl_estimator": estimator}
    compare(F.ppo_loss, reference.ppo_loss, arguments, {"ref_log_probs": tensors["ref_log_probs"]}, options)


@pytest.mark.parametrize("seed", range(40))
def test_ppo_loss_and_gradient_with_any_options(seed):
    """Against autograd through the reference, in fp64."""
    choose = random.Random(seed)
    shape = choose.choice([(2, 1), (3, 15), (2, 16), (5, 37), (3, 513), (2, 5003)])
    arguments, tensors = ppo_case(shape, seed)
    arguments[3] = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < choose.choice([0.1, 0.6, 1.0])
    options = {
        "clip_low": choose.choice([0.0, 0.1, 1.0]),
        "clip_high": choose.choice([0.0, 0.28, 5.0]),
        "dual_clip": choose.choice([None, 1.2, 3.0]),
        "log_ratio_clamp": choose.choice([None, 0.5, 20.0]),
        "ratio_level": choose.choice(["token", "sequence"]),
        "aggregation": choose.choice(AGGREGATIONS),
        "denominator": choose.choice([None, 11.0]),
        "advantage_stats": choose.choice([None, torch.tensor([0.5, 2.0])]),
        "entropy_coef": choose.choice([0.0, 0.01, -0.3]),
        "kl_coef": choose.choice([0.0, 0.05, -1.0]),
        "kl_estimator": choose.choice(ESTIMATORS),
    }
    names = [name for name in tensors if choose.random() < 0.5]
    for tensor, coefficient in (("entropy", "entropy_coef"), ("ref_log_probs", "kl_coef")):
        options[coefficient] = options[coefficient] if tensor in names else 0.0
    compare(F.ppo_loss, reference.ppo_loss, arguments, {name: tensors[name] for name in names}, options)


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5003), (3, 15), (2, 257)])
def test_ppo_loss_shapes(shape):
    arguments, _ = ppo_case((max(shape[0], 2), shape[1]))
    arguments = [x[: shape[0]] for x in arguments]
    arguments[3][0, 0] = True
    for options in ({}, {"aggregation": "seq-mean-token-mean", "ratio_level": "sequence"}):
        compare(F.ppo_loss, reference.ppo_loss, arguments, {}, options)


def test_ppo_loss_by_hand():
    """Ratios 2 and 1/2, advantages +1 and -1, clip 0.2: both clipped, at 1.2 and 0.8."""
    old = torch.zeros(1, 4)
    log_probs = torch.log(torch.tensor([[2.0, 0.5, 1.1, 9.0]])).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0]])
    loss, stats = F.ppo_loss(log_probs, old, torch.tensor([[1.0, -1.0, 2.0, 5.0]]), mask)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 0.8 - 2.2) / 3, rel=1e-6)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, 0.0, -2.2 / 3, 0.0]]))
    assert stats.clip_fraction.item() == pytest.approx(2 / 3)
    assert stats.ratio_mean.item() == pytest.approx(3.6 / 3, rel=1e-6)
    assert (stats.ratio_min.item(), stats.ratio_max.item()) == (pytest.approx(0.5), pytest.approx(2.0))
    assert stats.tokens.item() == 3
    assert stats.approx_kl.item() == pytest.approx((3.6 - 3 - math.log(2 * 0.5 * 1.1)) / 3, rel=1e-5)


def test_dual_clip_by_hand():
    log_probs = torch.log(torch.tensor([[10.0, 10.0]])).requires_grad_()
    advantages = torch.tensor([[-1.0, 1.0]])
    loss, stats = F.ppo_loss(log_probs, torch.zeros(1, 2), advantages, torch.ones(1, 2), dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((3.0 - 1.2) / 2)
    assert log_probs.grad.tolist() == [[0.0, 0.0]]
    assert stats.dual_clip_fraction.item() == 0.5


def test_at_step_zero_the_ratio_is_one():
    log_probs, advantages, mask = random_tokenwise(2, 6, 50)
    loss, stats = F.ppo_loss(log_probs, log_probs.clone(), F.masked_whiten(advantages, mask), mask, dual_clip=3.0)
    assert (stats.ratio_mean, stats.ratio_min, stats.ratio_max) == (1.0, 1.0, 1.0)
    assert (stats.approx_kl, stats.clip_fraction, stats.dual_clip_fraction) == (0.0, 0.0, 0.0)
    assert abs(loss.item()) < 1e-6
    assert stats.policy_loss == loss


def test_whitening_on_the_way_in_is_whitening_before():
    arguments, _ = ppo_case()
    stats = torch.tensor([0.4, 1.7])
    inside, _ = F.ppo_loss(*arguments, advantage_stats=stats)
    arguments[2] = (arguments[2] - 0.4) * 1.7
    torch.testing.assert_close(inside, F.ppo_loss(*arguments)[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_a_global_denominator_give_the_gradient_of_the_batch_liger_1082(aggregation):
    """A wrong normaliser under gradient accumulation: TRL #3021, #5890, #6024; verl #3741."""
    arguments, _ = ppo_case((6, 33))
    mask = arguments[3]
    count = mask.sum() if aggregation == "token-mean" else (mask.sum(-1) > 0).sum()

    def gradient(slices):
        log_probs = arguments[0].clone().requires_grad_()
        for rows in slices:
            micro = [x[rows] for x in (log_probs, *arguments[1:])]
            F.ppo_loss(*micro, aggregation=aggregation, denominator=count)[0].backward()
        return log_probs.grad

    whole, parts = gradient([slice(0, 6)]), gradient([slice(0, 1), slice(1, 4), slice(4, 6)])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)
    log_probs = arguments[0].clone().requires_grad_()
    F.ppo_loss(log_probs, *arguments[1:], aggregation=aggregation)[0].backward()
    torch.testing.assert_close(log_probs.grad, whole)


def test_sequence_ratio_is_the_geometric_mean():
    log_probs = torch.tensor([[0.3, 0.1, 7.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    loss, stats = F.ppo_loss(log_probs, torch.zeros(1, 3), torch.ones(1, 3), mask, ratio_level="sequence", clip_high=1)
    loss.backward()
    ratio = math.exp(0.2)
    assert loss.item() == pytest.approx(-ratio, rel=1e-6)
    assert stats.ratio_max.item() == pytest.approx(ratio, rel=1e-6)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-ratio / 2, -ratio / 2, 0.0]]))


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(5, 37), (2, 5003)])
def test_value_loss_against_the_oracle(clip, aggregation, shape):
    values, old, returns, mask = random_tokenwise(3, *shape)
    mask[1] = False
    compare(
        F.value_loss, reference.value_loss, [values, old, returns, mask], {}, {"clip": clip, "aggregation": aggregation}
    )


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.9, 0.0]]), torch.tensor([[0.5, 2.0, 1.0]])
    loss, stats = F.value_loss(values, old, returns, torch.tensor([[1, 1, 0]]), clip=0.2)
    loss.backward()
    # First: |1 - .5| against |.2 - .5|, the plain one is larger. Second: inside the clip.
    assert loss.item() == pytest.approx((0.25 + 1.0) / 2 / 2)
    torch.testing.assert_close(values.grad, torch.tensor([[0.25, -0.5, 0.0]]))
    assert (stats.clip_fraction, stats.value_mean, stats.return_mean) == (0.0, 1.0, 1.25)
    far = torch.tensor([[2.0]], requires_grad=True)
    loss, stats = F.value_loss(far, torch.tensor([[0.0]]), torch.tensor([[3.0]]), torch.ones(1, 1), clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(2.5**2 / 2)
    assert far.grad.item() == 0.0
    assert stats.clip_fraction == 1.0


def test_explained_variance():
    returns = torch.randn(4, 3000) + 1000.0  # far from 0: a difference of squares would be all rounding
    mask = torch.rand(4, 3000) > 0.5
    noise = 0.5 * torch.randn(4, 3000)
    _, stats = F.value_loss(returns + noise, None, returns, mask)
    exact = 1 - noise[mask].double().var() / returns[mask].double().var()
    assert stats.explained_variance.item() == pytest.approx(exact.item(), abs=1e-3)


@pytest.mark.parametrize("constant", [0.1, 0.3, 1000.1])
@pytest.mark.parametrize("n", [37, 333, 5003])
def test_nothing_is_explained_where_all_returns_are_equal(constant, n):
    values, mask = random_tokenwise(1, 1, n)
    returns = torch.full((1, n), constant)
    assert F.value_loss(values, None, returns, mask)[1].explained_variance == 0.0
    assert reference.value_loss(values, None, returns, mask)[1][3] == 0.0
