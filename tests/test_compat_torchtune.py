"""fastrlhf.compat.torchtune beside torchtune's own functions: values, gradients, every option."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Optional

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrlhf.bench.peers.base import keep
from fastrlhf.compat import torchtune as ours

pytestmark = pytest.mark.usefixtures("peers")
EPS = torch.finfo(torch.float32).eps


class Functions(SimpleNamespace):
    __repr__ = object.__repr__  # hypothesis shows the arguments of a failing test


@pytest.fixture(scope="module")
def torchtune(peers):
    context = {"torch": torch, "nn": nn, "F": nn.functional, "Optional": Optional, "Tuple": tuple}
    context["CROSS_ENTROPY_IGNORE_IDX"] = -100
    names = [function.__name__ for function in ours._REWARDS]
    found = definitions("torchtune", "rlhf/rewards.py", keep(*names), context)
    context["rlhf"] = SimpleNamespace(**found)
    names = ("logits_to_logprobs", "get_batch_log_probs")
    found |= definitions("torchtune", "rlhf/sequence_processing.py", keep(*names), context)
    found |= definitions("torchtune", "rlhf/loss/ppo.py", keep("PPOLoss"), context)
    return Functions(**{place.rpartition(".")[2]: found[place.rpartition(".")[2]] for place in ours.REPLACEMENTS})


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw):
    """(shape, bool mask with gaps and perhaps empty rows, at least two True, seed)."""
    shape, seed = (draw(st.integers(1, 5)), draw(st.integers(2, 17))), draw(st.integers(0, 2**16))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    if shape[0] > 1 and draw(st.booleans()):
        mask[0] = False
    if mask.sum() < 2:
        mask[:] = True
    return shape, mask, seed


@settings(deadline=None, max_examples=60)
@given(case=batches(), at_index=st.booleans(), coef=st.sampled_from([0.0, 0.2]))
def test_rewards(case, at_index, coef, torchtune):
    shape, _, seed = case
    scores, p, q = randn(shape[0], seed=seed), randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2)
    index = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(seed)) if at_index else None
    mine, theirs = (
        outcome(lambda *x, m=m: m.get_rewards_ppo(*x, coef, index), [scores, p, q], [1, 2]) for m in (ours, torchtune)
    )
    assert_same(mine, theirs, 1e-5, 1e-5)


@settings(deadline=None, max_examples=100)
@given(
    case=batches(),
    masked=st.booleans(),
    with_grad=st.booleans(),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_advantages(case, masked, with_grad, gamma, lam, torchtune):
    shape, mask, seed = case
    values, rewards = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    mask = mask if masked else None
    leaves = [0, 1] if with_grad else []
    mine, theirs = (
        outcome(lambda *x, m=m: m.estimate_advantages(*x, gamma, lam, mask), [values, rewards], leaves)
        for m in (ours, torchtune)
    )
    raw = ours.F.gae(rewards, values, gamma=gamma, lam=lam)[0]
    spread = 1.0 / (raw if mask is None else raw[mask]).std().item()
    assert_same(mine, theirs, 1e-4 * (1 + spread), 1e-3 * (1 + spread) ** 2)


@settings(deadline=None, max_examples=80)
@given(case=batches(), dim=st.sampled_from([None, 0, 1, -1]), masked=st.booleans(), flag=st.booleans())
def test_masked_statistics(case, dim, masked, flag, torchtune):
    shape, mask, seed = case
    x = randn(*shape, seed=seed)
    grad = torch.where(mask, randn(*shape, seed=seed + 1), 0.0)
    spread = 1.0 / (x[mask] if masked else x).std().item()
    calls = {
        "masked_mean": lambda f, x: f(x, mask, dim),
        "masked_var": lambda f, x: f(x, mask, flag),
        "whiten": lambda f, x: f(x, mask if masked else None, flag) * grad,
    }
    for name, call in calls.items():
        mine, theirs = (
            outcome(lambda x, m=m: call(getattr(m, name), x), [x], [0])  # noqa: B023
            for m in (ours, torchtune)
        )
        assert_same(mine, theirs, 1e-4 * (1 + spread), 1e-4 * (1 + spread) ** 2)


@settings(deadline=None, max_examples=150)
@given(
    case=batches(),
    masked=st.booleans(),
    value_masked=st.booleans(),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    epsilon=st.sampled_from([0.1, 0.3]),
)
def test_ppo_loss(case, masked, value_masked, spread, epsilon, torchtune):
    shape, mask, seed = case
    new, old_values, values = (randn(*shape, seed=seed + i) for i in range(3))
    # Where the ratio overflows, torchtune's gradient is nan and ours is not.
    old = new + randn(*shape, seed=seed + 3, scale=spread).clamp(-85, 85)
    advantages, returns = randn(*shape, seed=seed + 4), randn(*shape, seed=seed + 5)
    masks = (mask if masked else None, ~mask if value_masked and not mask.all() else None)

    def run(m):
        loss = m.PPOLoss(epsilon, 0.3, 0.5)
        forward = lambda new, values: loss(old, new, advantages, old_values, values, returns, *masks)  # noqa: E731
        return outcome(forward, [new, values], [0, 1])

    mine, theirs = run(ours), run(torchtune)
    sizes = [x.abs().max().item() for x in (*theirs[0][:2], *theirs[1])]
    atol = 300 * EPS * (1 + max(sizes))
    assert_same((mine[0][:3], mine[1]), (theirs[0][:3], theirs[1]), atol, atol)
    ratio = theirs[0][3].item()
    assert_same((mine[0][3:], []), (theirs[0][3:], []), 300 * EPS * (1 + ratio), 0.0)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    vocabulary=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([1.0, 0.5]),
    mean=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_log_probs(shape, vocabulary, dtype, temperature, mean, exact, seed, torchtune):
    logits = randn(*shape, vocabulary, seed=seed, scale=3.0).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, shape, generator=generator)
    eps = torch.finfo(dtype).eps
    mine = outcome(lambda x: ours.logits_to_logprobs(x, tokens, temperature, exact_dtype=exact), [logits], [0])
    theirs = outcome(lambda x: torchtune.logits_to_logprobs(x, tokens, temperature), [logits], [0])
    assert_same(mine, theirs, 200 * eps, 16 * eps, dtypes=exact)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.3, -100, tokens)
    for pad in (-100, 0):
        mine, theirs = (
            outcome(lambda x, m=m: m.get_batch_log_probs(x, labels.clamp(min=pad), pad, mean), [logits.float()], [0])  # noqa: B023
            for m in (ours, torchtune)
        )
        assert_same(mine, theirs, 1e-4, 1e-5)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_values_change_no_bit(garbage):
    shape = (4, 9)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = [randn(*shape, seed=i) for i in range(3)]
    dirty = [torch.where(mask, x, garbage) for x in clean]

    def results(new, old, other):
        new = new.clone().requires_grad_()
        loss, *more = ours.PPOLoss()(old, new, other, old, new, other, mask, mask)
        (grad,) = torch.autograd.grad(loss, new)
        # The mean ratio is torchtune's: over all positions.
        return [loss, grad, *more[:2], more[3], ours.whiten(new, mask), ours.masked_mean(new, mask, 1)]

    for a, b in zip(results(*clean), results(*dirty), strict=True):
        assert torch.equal(a, b)


def test_half_precision():
    x, mask = [randn(3, 7, seed=i).bfloat16() for i in range(6)], torch.ones(3, 7, dtype=torch.bool)
    exact = type("PPOLoss", (ours.PPOLoss,), {"exact_dtype": True})
    assert [y.dtype for y in ours.PPOLoss()(*x, mask, mask)] == [torch.float32] * 5
    assert [y.dtype for y in exact()(*x, mask, mask)] == [torch.bfloat16] * 5
    calls = {
        "get_rewards_ppo": (x[0][:, 0], x[1], x[2], 0.1),
        "estimate_advantages": (*x[:2], 1.0, 0.95, mask),
        "masked_mean": (x[0], mask),
        "masked_var": (x[0], mask),
        "whiten": (x[0], mask),
        "get_batch_log_probs": (x[0][None], torch.zeros(1, 3, dtype=torch.int64)),
    }
    for name, arguments in calls.items():
        wide = (y.float() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for y in arguments)
        results = [getattr(ours, name)(*arguments), getattr(ours, name)(*arguments, exact_dtype=True)]
        results.append(getattr(ours, name)(*wide))
        results = [y if isinstance(y, tuple) else (y,) for y in results]
        for fp32, bf16, wanted in zip(*results, strict=True):
            assert (fp32.dtype, bf16.dtype) == (torch.float32, torch.bfloat16), name
            torch.testing.assert_close(fp32, wanted, atol=1e-5, rtol=1e-5)


def test_what_goes_back_to_torchtune(monkeypatch, torchtune):
    """fp64, shapes that broadcast, a temperature of 0, and its errors."""
    monkeypatch.setattr(ours, "original", lambda place: getattr(torchtune, place.rpartition(".")[2]))
    x, mask = [randn(3, 7, seed=i).double() for i in range(6)], torch.ones(3, 7, dtype=torch.bool)
    assert ours.PPOLoss()(*x, mask, mask)[0].dtype == torch.float64
    assert all(y.dtype == torch.float64 for y in ours.estimate_advantages(*x[:2], 1.0, 0.95, mask))
    assert ours.get_rewards_ppo(x[0][:, 0], *x[1:3], 0.1)[0].dtype == torch.float64
    for name in ("masked_mean", "masked_var", "whiten"):
        assert getattr(ours, name)(x[0], mask).dtype == torch.float64
    torch.testing.assert_close(ours.masked_mean(randn(3, 7), mask[:, :1]), randn(3, 7).sum() / 3)
    with pytest.raises(ValueError, match="same shape"):
        ours.get_batch_log_probs(randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_signatures(torchtune):
    for place, mine in ours.REPLACEMENTS.items():
        theirs = getattr(torchtune, place.rpartition(".")[2])
        pairs = [(mine, theirs), (mine.forward, theirs.forward)] if inspect.isclass(mine) else [(mine, theirs)]
        for a, b in pairs:
            parameters = {name: p for name, p in inspect.signature(a).parameters.items() if name != "exact_dtype"}
            defaults = [(p.name, p.default) for p in inspect.signature(b).parameters.values()]
            assert [(p.name, p.default) for p in parameters.values()] == defaults, place
