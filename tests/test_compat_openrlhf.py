"""fastrlhf.compat.openrlhf beside OpenRLHF's own functions and losses: values, gradients, every option."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Optional, Union

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import PEERS, definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrlhf.bench import sources
from fastrlhf.bench.peers.base import keep
from fastrlhf.compat import openrlhf as ours

pytestmark = pytest.mark.usefixtures("peers")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = torch.finfo(torch.float32).eps


class Functions(SimpleNamespace):
    __repr__ = object.__repr__  # hypothesis shows the arguments of a failing test


@pytest.fixture(scope="module")
def openrlhf(peers):
    names = [function.__name__ for function in ours._UTILS] + ["KL_IS_WEIGHT_CLIP", "_logsumexp_by_chunk"]
    context = {"torch": torch, "F": nn.functional, "Optional": Optional, "Union": Union, "Tuple": tuple}
    decorated = keep(*names) | {"compute_entropy": False}  # it is compiled, which takes long
    utils = definitions("openrlhf", "models/utils.py", decorated, context)
    context |= {"nn": nn, "masked_mean": utils["masked_mean"]}
    losses = definitions("openrlhf", "models/loss.py", keep(*(x.__name__ for x in ours._LOSSES)), context)
    path = PEERS / "openrlhf" / "trainer" / "ppo_utils" / "experience_maker.py"
    method = sources.method(path, "RemoteExperienceMaker", "get_advantages_and_returns")
    gae = sources.function(path, method, {"torch": torch})
    found = utils | losses | {"get_advantages_and_returns": gae}
    return Functions(**{place.rpartition(".")[2]: found[place.rpartition(".")[2]] for place in ours.REPLACEMENTS})


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw, empty_rows: bool = True):
    """(shape, mask with gaps, of one of the dtypes that OpenRLHF can multiply with, seed)."""
    shape, seed = (draw(st.integers(1, 5)), draw(st.integers(1, 17))), draw(st.integers(0, 2**16))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    if empty_rows and shape[0] > 1 and draw(st.booleans()):
        mask[0] = False
    if not mask.any():
        mask[:] = True
    if not empty_rows:
        mask[~mask.any(-1)] = True
    return shape, mask.to(draw(st.sampled_from([torch.float32, torch.int64, torch.bool]))), seed


def draw_counts(draw) -> dict:
    return draw(st.sampled_from([{}, {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 6.0}]))


@settings(deadline=None, max_examples=150)
@given(
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    unbiased=st.booleans(),
    with_old=st.booleans(),
    dtype=st.sampled_from(sorted(FLOATS)),
    spread=st.sampled_from([0.0, 0.1, 1.0, 40.0, 200.0]),
    seed=st.integers(0, 2**16),
)
def test_approx_kl(estimator, unbiased, with_old, dtype, spread, seed, openrlhf):
    p = -randn(3, 7, seed=seed).abs()
    pair = [p.to(FLOATS[dtype]), (p + randn(3, 7, seed=seed + 1, scale=spread)).to(FLOATS[dtype])]
    old = (p + randn(3, 7, seed=seed + 2)).to(FLOATS[dtype]) if with_old else None
    mine = outcome(lambda p, q: ours.compute_approx_kl(p, q, old, estimator, unbiased), pair, [0, 1])
    theirs = outcome(lambda p, q: openrlhf.compute_approx_kl(p, q, old, estimator, unbiased), pair, [0, 1])
    grad = max(x.abs().max().item() for x in theirs[1])
    # The straight-through gradient adds and takes away a number of the size of spread^2.
    assert_same(mine, theirs, 1e-5 + 20 * EPS * spread**2, 1e-5 + 4 * torch.finfo(FLOATS[dtype]).eps * grad)


@settings(deadline=None, max_examples=60)
@given(case=batches(), coef=st.sampled_from([0.0, 0.1, -1.0]), clip=st.sampled_from([None, (-0.5, 0.5)]))
def test_reward(case, coef, clip, openrlhf):
    shape, mask, seed = case
    scores, kl = randn(shape[0], seed=seed), randn(*shape, seed=seed + 1)
    mine = outcome(lambda r, kl: ours.compute_reward(r, coef, kl, mask, clip), [scores, kl], [0, 1])
    theirs = outcome(lambda r, kl: openrlhf.compute_reward(r, coef, kl, mask, clip), [scores, kl], [0, 1])
    assert_same(mine, theirs, 1e-6, 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    vocabulary=st.integers(1, 50),
    dtype=st.sampled_from(sorted(FLOATS)),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    temperature=st.sampled_from([1.0, 0.5]),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_from_logits(shape, vocabulary, dtype, scale, temperature, exact, seed, openrlhf):
    logits = randn(*shape, vocabulary, seed=seed, scale=scale).to(FLOATS[dtype])
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    kept = logits.clone()
    size = 5 * scale / temperature + 4
    atol = 8 * torch.finfo(FLOATS[dtype]).eps * size
    mine = outcome(lambda x: ours.log_probs_from_logits(x, labels, temperature, exact_dtype=exact), [logits], [0])
    assert torch.equal(logits, kept)
    # OpenRLHF divides the logits in place, which leaves cannot be.
    theirs = outcome(lambda x: openrlhf.log_probs_from_logits(x * 1.0, labels, temperature), [logits], [0])
    assert_same(mine, theirs, atol, atol / temperature, dtypes=exact)
    mine = outcome(lambda x: ours.compute_entropy(x, exact_dtype=exact), [logits], [0])
    # Its own rounds sums of products in half precision: the entropy of the same logits in fp32, rounded once.
    wide = torch.float32 if not exact else logits.dtype
    theirs = outcome(lambda x: openrlhf.compute_entropy(x.float()).to(wide), [logits], [0])
    atol = 8 * torch.finfo(FLOATS[dtype]).eps * (5 * scale + 4)
    assert_same(mine, theirs, atol, 4 * atol)


@settings(deadline=None, max_examples=80)
@given(case=batches(), dim=st.sampled_from([None, 0, 1, -1]), dtype=st.sampled_from(sorted(FLOATS)))
def test_masked_statistics(case, dim, dtype, openrlhf):
    shape, mask, seed = case
    x = randn(*shape, seed=seed).to(FLOATS[dtype])
    eps = torch.finfo(FLOATS[dtype]).eps
    mine = outcome(lambda x: ours.masked_mean(x, mask, dim), [x], [0])
    theirs = outcome(lambda x: openrlhf.masked_mean(x.float(), mask, dim), [x], [0])
    # Where nothing counts the mean is nan, and so is OpenRLHF's gradient; ours is 0.
    empty = ~(mask.bool() if dim is None else mask.bool().any(dim, keepdim=True).expand(shape))
    theirs[1][0] = torch.where(empty, 0.0, theirs[1][0]) if dim is not None else theirs[1][0]
    assert_same(mine, theirs, 1e-5, 8 * eps, dtypes=False)
    if dim is not None:
        theirs = openrlhf.masked_normalize(x.float(), mask, dim)
        torch.testing.assert_close(ours.masked_normalize(x, mask, dim), theirs, atol=1e-4, rtol=1e-4)


def test_normalize_has_a_gradient(openrlhf):
    x, mask = randn(4, 9), torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    mine = outcome(lambda x: ours.masked_normalize(x, mask), [x], [0])
    assert_same(mine, outcome(lambda x: openrlhf.masked_normalize(x, mask), [x], [0]), 1e-5, 1e-5)


@settings(deadline=None, max_examples=80)
@given(case=batches(), by_token=st.booleans(), data=st.data())
def test_losses_are_aggregated(case, by_token, data, openrlhf):
    shape, mask, seed = case
    counts, x = draw_counts(data.draw), randn(*shape, seed=seed)
    mine = outcome(lambda x: ours.aggregate_loss(x, mask, by_token, **counts), [x], [0])
    assert_same(mine, outcome(lambda x: openrlhf.aggregate_loss(x, mask, by_token, **counts), [x], [0]), 1e-5, 1e-5)
    mine = outcome(lambda x: ours.SFTLoss(by_token)(x, mask, **counts), [x], [0])
    assert_same(mine, outcome(lambda x: openrlhf.SFTLoss(by_token)(x, mask, **counts), [x], [0]), 1e-5, 1e-5)


CORRECTIONS = [
    {},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    *(
        {"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": (0.0, 0.05)}
        for level, gating in itertools.product(("token", "seq"), ("binary_kl", "tv"))
    ),
]


@settings(deadline=None, max_examples=250)
@given(
    case=batches(),
    dual_clip=st.sampled_from([None, 1.5]),
    by_token=st.booleans(),
    kind=st.sampled_from(["ppo", "gspo"]),
    correction=st.sampled_from(CORRECTIONS),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    data=st.data(),
)
def test_policy_loss(case, dual_clip, by_token, kind, correction, spread, data, openrlhf):
    shape, mask, seed = case
    counts = draw_counts(data.draw)
    spread = min(spread, 1.0) if kind == "gspo" else spread  # it has no clamp: all would be inf
    log_probs = -randn(*shape, seed=seed).abs()
    old, rollout = (log_probs + randn(*shape, seed=seed + 1 + i, scale=s) for i, s in enumerate((spread, 0.1)))
    old = old.clamp(max=0.0)
    advantages = randn(*shape, seed=seed + 3)

    def run(losses):
        loss = losses.PolicyLoss(0.2, 0.3, dual_clip, by_token, kind, **correction)
        return outcome(lambda x: loss(x, old, advantages, mask, rollout, **counts), [log_probs], [0])

    mine, theirs = run(ours), run(openrlhf)
    size, grad = (x.abs().max().nan_to_num(posinf=1e30).item() for x in (theirs[0][0], theirs[1][0]))
    atol = 300 * EPS * (1 + size)
    assert_same((mine[0][:1], mine[1]), (theirs[0][:1], theirs[1]), atol, 300 * EPS * max(grad, 1e-3))
    assert_same((mine[0][1:], []), (theirs[0][1:], []), 1e-4 * (1 + spread), 0.0)


def test_policy_loss_without_a_mask(openrlhf):
    inputs = [randn(3, 7, seed=i) for i in range(3)]
    mine, theirs = (outcome(lambda x, m=m: m.PolicyLoss()(x, *inputs[1:]), inputs[:1], [0]) for m in (ours, openrlhf))
    assert_same(mine, theirs, 1e-5, 1e-5)


def test_options_that_do_not_go_together(openrlhf):
    for losses in (ours, openrlhf):
        for wrong in (
            {"is_correction_level": "row"},
            {"is_correction_mode": "drop"},
            {"is_correction_gating": "kl"},
            {"is_correction_level": "seq", "is_correction_mode": "clip"},
            {"is_correction_level": "token", "is_correction_gating": "tv"},
        ):
            with pytest.raises(ValueError, match="is_correction"):
                losses.PolicyLoss(**wrong)
        with pytest.raises(AssertionError, match="dual_clip"):
            losses.PolicyLoss(dual_clip=1.0)
        with pytest.raises(ValueError, match=r"policy.loss.type"):
            losses.PolicyLoss(policy_loss_type="dro")(*(torch.ones(1, 2) for _ in range(4)))


@settings(deadline=None, max_examples=80)
@given(case=batches(), clip=st.sampled_from([None, 0.1, 100.0]), by_token=st.booleans(), data=st.data())
def test_value_loss(case, clip, by_token, data, openrlhf):
    shape, mask, seed = case
    counts = draw_counts(data.draw)
    values, old, returns = (randn(*shape, seed=seed + i) for i in range(3))
    mine, theirs = (
        outcome(lambda x, m=m: m.ValueLoss(clip, by_token)(x, old, returns, mask, **counts), [values], [0])
        for m in (ours, openrlhf)
    )
    assert_same(mine, theirs, 1e-5, 1e-5)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 6), scale=st.sampled_from([0.0, 1.0, 15.0]), margin=st.booleans(), seed=st.integers(0, 2**16)
)
def test_pairwise_losses(size, scale, margin, seed, openrlhf):
    scores = [randn(size, seed=seed + i, scale=scale) for i in range(2)]
    margins = randn(size, seed=seed + 2).abs() if margin else None
    for name in ("PairWiseLoss", "LogExpLoss"):
        mine, theirs = (
            outcome(lambda a, b, m=m: getattr(m, name)()(a, b, margins), scores, [0, 1])  # noqa: B023
            for m in (ours, openrlhf)
        )
        assert_same(mine, theirs, 1e-5 * (1 + scale), 1e-5)


def test_a_score_far_ahead(openrlhf):
    chosen, rejected = torch.zeros(1), torch.full((1,), 200.0)
    assert openrlhf.LogExpLoss()(chosen, rejected).isinf()
    assert ours.LogExpLoss()(chosen, rejected).item() == 200.0


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    beta=st.sampled_from([0.1, 1.0]),
    smoothing=st.sampled_from([0.0, 0.3]),
    ipo=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dpo_loss(size, scale, beta, smoothing, ipo, seed, openrlhf):
    pairs = [randn(size, seed=seed + i, scale=scale) for i in range(4)]
    mine, theirs = (
        outcome(lambda *pairs, m=m: m.DPOLoss(beta, smoothing, ipo)(*pairs), pairs, [0, 1]) for m in (ours, openrlhf)
    )
    assert_same(mine, theirs, 1e-5 * (1 + scale) ** 2, 1e-4 * (1 + scale))


@settings(deadline=None, max_examples=80)
@given(case=batches(), masked=st.booleans(), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([1.0, 0.95, 0.0]))
def test_gae(case, masked, gamma, lam, openrlhf):
    shape, mask, seed = case
    rewards, values = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    mine = ours.get_advantages_and_returns(None, values, rewards, mask if masked else None, gamma, lam)
    theirs = openrlhf.get_advantages_and_returns(None, values, rewards, mask if masked else None, gamma, lam)
    counts = mask.bool() if masked else torch.ones(shape, dtype=torch.bool)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a[counts], b[counts], atol=1e-4, rtol=1e-5)
        assert not a[~counts].any()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_values_change_no_bit(garbage):
    shape = (4, 9)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = [randn(*shape, seed=i) for i in range(4)]
    dirty = [torch.where(mask, x, garbage) for x in clean]

    def results(x, old, advantages, rollout):
        x = x.clone().requires_grad_()
        losses = [
            ours.ValueLoss(0.2)(x, old, advantages, mask),
            ours.SFTLoss(False)(x, mask),
            *(ours.PolicyLoss(**correction)(x, old, advantages, mask, rollout)[0] for correction in CORRECTIONS),
            ours.PolicyLoss(policy_loss_type="gspo")(x, old, advantages, mask)[0],
        ]
        grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
        targets = ours.get_advantages_and_returns(None, old, advantages, mask, 0.9, 0.95)
        return [*losses, *grads, *targets, ours.masked_mean(x, mask, 1), ours.masked_normalize(x, mask)]

    for a, b in zip(results(*clean), results(*dirty), strict=True):
        assert torch.equal(a, b)


def test_half_precision(openrlhf):
    """fp32, or with exact_dtype what OpenRLHF's own have."""
    x, mask = [randn(3, 7, seed=i).bfloat16() for i in range(3)], torch.ones(3, 7, dtype=torch.bool)
    exact = {
        name: type(name, (getattr(ours, name),), {"exact_dtype": True})
        for name in ("PolicyLoss", "ValueLoss", "SFTLoss", "PairWiseLoss", "LogExpLoss")
    }
    exact["DPOLoss"] = type("DPOLoss", (ours.DPOLoss,), {"exact_dtype": True})
    calls = {
        "PolicyLoss": lambda cls: cls()(*x, mask)[:3],
        "ValueLoss": lambda cls: [cls(0.2)(*x, mask)],
        "SFTLoss": lambda cls: [cls()(x[0], mask)],
        "PairWiseLoss": lambda cls: [cls()(x[0][0], x[1][0])],
        "LogExpLoss": lambda cls: [cls()(x[0][0], x[1][0])],
        "DPOLoss": lambda cls: cls(0.1)(*(y[0] for y in (*x, x[0]))),
    }
    for name, call in calls.items():
        theirs = call(getattr(openrlhf, name))
        assert [y.dtype for y in call(getattr(ours, name))] == [torch.float32] * len(theirs), name
        for a, b in zip(call(exact[name]), theirs, strict=True):
            # clip fractions are counted in fp32
            assert a.dtype == torch.bfloat16, name
            torch.testing.assert_close(a.float(), b.float(), atol=0.1, rtol=0.1)
    functions = {"masked_mean": (x[0], mask), "masked_normalize": (x[0], mask), "aggregate_loss": (x[0], mask)}
    functions["get_advantages_and_returns"] = (None, *x[:2], mask, 1.0, 0.95)
    for name, arguments in functions.items():
        results = getattr(ours, name)(*arguments, exact_dtype=True)
        assert all(y.dtype == torch.bfloat16 for y in (results if isinstance(results, tuple) else (results,))), name


def test_what_goes_back_to_openrlhf(monkeypatch, openrlhf):
    """fp64, shapes that broadcast, options out of our range."""
    theirs = lambda place: getattr(openrlhf, place.rpartition(".")[2])  # noqa: E731
    monkeypatch.setattr(ours, "original", theirs)
    monkeypatch.setattr(inspect.getmodule(ours.PolicyLoss), "original", theirs)
    x, mask = [randn(3, 7, seed=i).double() for i in range(3)], torch.ones(3, 7)
    assert ours.PolicyLoss()(*x, mask)[0].dtype == torch.float64
    assert ours.ValueLoss(0.2)(*x, mask).dtype == torch.float64
    assert ours.masked_mean(x[0], mask).dtype == torch.float64
    assert ours.compute_approx_kl(randn(3, 7), randn(3, 1)).shape == (3, 7)
    assert ours.masked_mean(randn(3, 7), None).shape == ()
    pairs = [randn(4, seed=i) for i in range(4)]
    torch.testing.assert_close(ours.DPOLoss(0.1, 0.7)(*pairs), openrlhf.DPOLoss(0.1, 0.7)(*pairs))
    with pytest.raises(ValueError, match="Unknown kl_estimator"):
        ours.compute_approx_kl(x[0], x[1], kl_estimator="k4")


def test_signatures(openrlhf):
    for place, mine in ours.REPLACEMENTS.items():
        theirs = getattr(openrlhf, place.rpartition(".")[2])
        pairs = [(mine, theirs), (mine.forward, theirs.forward)] if inspect.isclass(mine) else [(mine, theirs)]
        for a, b in pairs:
            parameters = {name: p for name, p in inspect.signature(a).parameters.items() if name != "exact_dtype"}
            assert list(parameters) == list(inspect.signature(b).parameters), place
            defaults = [p.default for p in inspect.signature(b).parameters.values()]
            assert [p.default for p in parameters.values()] == defaults, place
        exact = inspect.isclass(mine) or "exact_dtype" in inspect.signature(mine).parameters
        assert exact == (place in ours.MORE_ACCURATE), place
