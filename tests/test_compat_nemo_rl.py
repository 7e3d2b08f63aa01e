"""fastrlhf.compat.nemo_rl beside NeMo-RL's formulas, which are written out here: its package on PyPI is empty."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compat_checks import assert_same, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.compat import nemo_rl as ours

EPS = torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw):
    """(shape, token mask with gaps and perhaps empty rows, sample mask, seed)."""
    shape, seed = (draw(st.integers(1, 5)), draw(st.integers(1, 17))), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    mask[0, 0] = True
    samples = torch.rand(shape[:1], generator=generator) < 0.7
    samples[0] = True
    dtype = draw(st.sampled_from([torch.float32, torch.int64]))
    return shape, mask.to(dtype), samples.to(dtype), seed


def mean(x, mask, dim=None, total=None):
    """sum(x m) / (sum(m) + 1e-8), or over a given total."""
    total = mask.sum(dim=dim) if total is None else total
    return (x * mask).sum(dim=dim) / (total + 1e-8)


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(["k1", "k2", "k3"]),
    limits=st.sampled_from([(20.0, 10.0), (None, None), (1.0, None), (None, 0.5)]),
    weighted=st.booleans(),
    spread=st.sampled_from([0.0, 0.1, 1.0, 40.0]),
    seed=st.integers(0, 2**16),
)
def test_kl(kind, limits, weighted, spread, seed):
    p = -randn(3, 7, seed=seed).abs()
    spread = min(spread, 1.0) if limits[0] is None else spread
    inputs = [p, p + randn(3, 7, seed=seed + 1, scale=spread)]
    inputs += [randn(3, 7, seed=seed + 2).abs()] if weighted else []

    def formula(p, q, weights=None):
        d = q - p
        held = d if limits[0] is None else d.clamp(-limits[0], limits[0])
        if weights is not None and limits[0] is not None:
            weights = torch.where(held == d, weights, weights.detach())
        kl = {"k1": -held, "k2": held**2 / 2, "k3": held.exp() - 1 - held}[kind]
        kl = kl if weights is None else kl * weights
        return kl if limits[1] is None else kl.clamp(-limits[1], limits[1])

    leaves = range(len(inputs))
    mine = outcome(lambda p, q, w=None: ours.calculate_kl(p, q, kind, *limits, w), inputs, leaves)
    theirs = outcome(formula, inputs, leaves)
    size = max(x.abs().max().item() for x in (*theirs[0], *theirs[1]))
    assert_same(mine, theirs, 20 * EPS * (1 + size), 20 * EPS * (1 + size))


@settings(deadline=None, max_examples=60)
@given(case=batches(), dim=st.sampled_from([None, 0, 1, -1]), total=st.sampled_from([None, 37.0, torch.tensor(5.0)]))
def test_masked_mean(case, dim, total):
    shape, mask, _, seed = case
    x = randn(*shape, seed=seed)
    mine = outcome(lambda x: ours.masked_mean(x, mask, dim, total), [x], [0])
    assert_same(mine, outcome(lambda x: mean(x, mask, dim, total), [x], [0]), 1e-5, 1e-5)


@settings(deadline=None, max_examples=60)
@given(case=batches(), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([None, 1.0, 0.0]))
def test_gae(case, gamma, lam):
    shape, mask, _, seed = case
    rewards, values = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    estimator = SimpleNamespace(gae_gamma=gamma, gae_lambda=0.95)
    advantages, returns = ours._compute_gae(estimator, rewards, values, mask, lam)
    following, running = torch.zeros(shape[0]), torch.zeros(shape[0])
    for t in reversed(range(shape[1])):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = m * (delta + gamma * (0.95 if lam is None else lam) * running) + (1 - m) * running
        following = m * values[:, t] + (1 - m) * following
        torch.testing.assert_close(advantages[:, t], m * running, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(returns[:, t], m * (running + values[:, t]), atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=80)
@given(case=batches(), clip=st.sampled_from([None, 0.1, 100.0]), scale=st.sampled_from([1.0, 0.3]), empty=st.booleans())
def test_value_loss(case, clip, scale, empty):
    shape, token_mask, sample_mask, seed = case
    values, old, returns = (randn(*shape, seed=seed + i) for i in range(3))
    data = {"token_mask": token_mask * (not empty), "sample_mask": sample_mask, "returns": returns, "values": old}
    total = torch.tensor(41.0)
    loss_fn = SimpleNamespace(scale=scale, cliprange=clip)
    found = []

    def mine(values):
        loss, metrics = ours.value_loss(loss_fn, values.unsqueeze(-1), data, None, total)
        found.append(metrics)
        return loss

    mask = data["token_mask"] * sample_mask.unsqueeze(-1)

    def formula(values):
        losses, clipped = (values - returns) ** 2, None
        if clip is not None:
            clipped = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
        larger = losses if clip is None else torch.maximum(losses, clipped)
        chosen = values.detach()[mask.bool()]
        wanted = {
            "vf_clipfrac": 0.0 if clip is None else mean((clipped > losses).float(), mask, total=total).item(),
            "returns_mean": mean(returns, mask, total=total).item(),
            "values_mean": mean(values, mask, total=total).item(),
            "values_min": chosen.min().item() if chosen.numel() else 0.0,
            "values_max": chosen.max().item() if chosen.numel() else 0.0,
            "returns_sq_mean": mean(returns**2, mask, total=total).item(),
            "residual_sq_mean": mean(losses, mask, total=total).item(),
            "num_valid_samples": shape[0],
        }
        loss = 0.5 * scale * mean(larger, mask, total=total)
        found.append({"loss": loss.item()} | wanted)
        return loss

    assert_same(outcome(mine, [values], [0]), outcome(formula, [values], [0]), 1e-5, 1e-5)
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert found[0][name] == pytest.approx(value, abs=1e-5), name


@settings(deadline=None, max_examples=100)
@given(
    case=batches(),
    kind=st.sampled_from(["ppo", "gspo", "cispo"]),
    by_token=st.booleans(),
    dual_clip=st.sampled_from([None, 1.5]),
    weighted=st.booleans(),
    global_counts=st.booleans(),
    spread=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_policy_loss(case, kind, by_token, dual_clip, weighted, global_counts, spread):
    shape, token_mask, sample_mask, seed = case
    by_token = by_token or kind == "cispo"
    token_mask[token_mask.sum(-1) == 0] = 1  # NeMo-RL counts a sequence without tokens, we do not
    curr = -randn(*shape, seed=seed).abs()
    prev, advantages = curr + randn(*shape, seed=seed + 1, scale=spread), randn(*shape, seed=seed + 2)
    weights = randn(*shape, seed=seed + 3).abs() if weighted else None
    counts = {"global_valid_seqs": torch.tensor(7.0), "global_valid_toks": torch.tensor(50.0)} if global_counts else {}
    mask = token_mask * sample_mask.unsqueeze(-1)

    def formula(curr):
        log_ratio = curr - prev
        if kind == "gspo":
            log_ratio = mean(log_ratio, token_mask, dim=-1).unsqueeze(-1).expand(shape)
        ratio = log_ratio.exp()
        clamped = ratio.clamp(0.8, 1.3)
        if kind == "cispo":
            losses = -advantages * clamped.detach() * curr
        else:
            losses = torch.maximum(-advantages * ratio, -advantages * clamped)
            if dual_clip is not None:
                losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
        losses = losses if weights is None else losses * weights
        if by_token:
            return mean(losses, mask, total=counts.get("global_valid_toks"))
        return mean(mean(losses, token_mask, dim=-1), sample_mask, total=counts.get("global_valid_seqs"))

    options = {"ratio_clip_max": 0.3, "ratio_clip_c": dual_clip, "token_level_loss": by_token, **counts}
    options |= {"sequence_level_importance_ratios": kind == "gspo", "use_cispo": kind == "cispo"}
    options["importance_weights"] = weights

    def mine(curr):
        return ours.clipped_pg_loss(curr, prev, advantages, token_mask, sample_mask, **options)[0]

    theirs = outcome(formula, [curr], [0])
    size = max(x.abs().max().item() for x in (*theirs[0], *theirs[1]))
    assert_same(outcome(mine, [curr], [0]), theirs, 100 * EPS * (1 + size), 100 * EPS * (1 + size))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_values_change_no_bit(garbage):
    shape = (4, 9)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = [randn(*shape, seed=i) for i in range(3)]
    dirty = [torch.where(mask, x, garbage) for x in clean]

    def results(x, old, other):
        x = x.clone().requires_grad_()
        samples = torch.ones(4, dtype=torch.bool)
        data = {"token_mask": mask, "sample_mask": samples, "returns": other, "values": old}
        losses = [ours.clipped_pg_loss(x, old, other, mask, samples, use_cispo=flag)[0] for flag in (False, True)]
        loss, metrics = ours.value_loss(SimpleNamespace(scale=1.0, cliprange=0.2), x, data, None, 10)
        losses += [loss, ours.masked_mean(x, mask)]
        grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
        estimator = SimpleNamespace(gae_gamma=0.9, gae_lambda=0.95)
        return [*losses, *grads, *ours._compute_gae(estimator, other, old, mask)], metrics

    (a, more_a), (b, more_b) = results(*clean), results(*dirty)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    assert more_a == more_b


def test_half_precision():
    x, y, z, mask = *(randn(3, 7, seed=i).bfloat16() for i in range(3)), torch.ones(3, 7, dtype=torch.bool)
    samples = torch.ones(3, dtype=torch.bool)
    data = {"token_mask": mask, "sample_mask": samples, "returns": y, "values": z}
    loss_fn, estimator = SimpleNamespace(scale=1.0, cliprange=0.2), SimpleNamespace(gae_gamma=1.0, gae_lambda=0.95)
    calls = (
        lambda **exact: ours.calculate_kl(x, y, **exact),
        lambda **exact: ours.masked_mean(x, mask, **exact),
        lambda **exact: ours._compute_gae(estimator, x, y, mask, **exact)[0],
        lambda **exact: ours.value_loss(loss_fn, x, data, None, 21, **exact)[0],
    )
    for call in calls:
        assert call().dtype == torch.float32
        assert call(exact_dtype=True).dtype == torch.bfloat16


def test_what_goes_back_to_nemo_rl(monkeypatch):
    """fp64, weights in masks, a lambda for every sample."""
    gone = []
    monkeypatch.setattr(ours, "original", lambda place: lambda *_: gone.append(place))
    x, mask = randn(3, 7), torch.ones(3, 7)
    estimator, loss_fn = SimpleNamespace(gae_gamma=1.0, gae_lambda=0.95), SimpleNamespace(scale=1.0, cliprange=None)
    ours.calculate_kl(x.double(), x.double())
    ours.calculate_kl(x, x, "k4")
    ours.masked_mean(x, mask / 2)
    ours._compute_gae(estimator, x, x, mask / 2)
    ours._compute_gae(estimator, x, x, mask, torch.ones(3))
    ours.value_loss(loss_fn, x, {"token_mask": mask, "sample_mask": mask[:, 0] / 2, "returns": x}, None, 21)
    kl, mean_of = f"{ours.UTILS}.calculate_kl", f"{ours.UTILS}.masked_mean"
    assert gone == [kl, kl, mean_of, ours.GAE, ours.GAE, ours.VALUE_LOSS]
