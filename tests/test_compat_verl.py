"""fastrlhf.compat.verl beside verl's own functions: values, gradients, metrics, every option."""

from __future__ import annotations

import inspect
import os
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import definitions
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.bench.peers.base import bare, keep
from fastrlhf.compat import _verl_policy_losses, _verl_vocabulary
from fastrlhf.compat import verl as ours

pytestmark = pytest.mark.usefixtures("peers")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
POLICY_LOSSES = ("vanilla", "gspo", "cispo", "geo_mean")
EPS = torch.finfo(torch.float32).eps


class Functions(SimpleNamespace):
    __repr__ = object.__repr__  # hypothesis shows the arguments of a failing test


class Config(dict):
    """As much of verl's ActorConfig as its losses read."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def verl(peers):
    """verl.utils.torch_functional and verl.trainer.ppo.core_algos, as far as they are replaced."""
    names = ("logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_flash_attn")
    names += ("gather_from_labels", "clip_by_value")
    names += tuple(function.__name__ for function in ours._FUNCTIONAL if function is not ours.logprobs_from_logits)
    context = {"torch": torch, "F": torch.nn.functional, "os": os, "NPU_CROSS_ENTROPY_LOSS_AVAILABLE": False}
    context["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"] = False
    functional = definitions("verl", "utils/torch_functional.py", keep(*names), context)
    context = {"torch": torch, "verl_F": SimpleNamespace(**functional), "AlgoConfig": type("AlgoConfig", (), {})}
    context |= {"ActorConfig": Config, "Optional": Optional, "Any": Any}
    names = tuple(function.__name__ for function in ours._ALGOS)
    algos = definitions("verl", "trainer/ppo/core_algos.py", bare(*names), context)
    context = {"torch": torch, "Optional": Optional, "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE": False}
    names = ("_fused_linear_for_ppo_fwd", "_fused_linear_for_ppo_bwd", "FusedLinearForPPOFunction", "FusedLinearForPPO")
    fused = definitions("verl", "utils/experimental/torch_functional.py", keep(*names), context)
    found = functional | algos | {"FusedLinearForPPO": fused["FusedLinearForPPO"]}
    return Functions(**{place.rpartition(".")[2]: found.get(place.rpartition(".")[2]) for place in ours.REPLACEMENTS})


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw, least: int = 0):
    """(shape, mask with gaps and perhaps empty rows, seed); at least `least` tokens count."""
    shape, seed = (draw(st.integers(1, 5)), draw(st.integers(max(least, 1), 17))), draw(st.integers(0, 2**16))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    if shape[0] > 1 and draw(st.booleans()):
        mask[0] = False
    if mask.sum() < max(least, 1):
        mask[:] = True
    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.bool]))
    return shape, mask, mask.to(dtype), seed


@st.composite
def policy_batches(draw):
    """(log_prob, old_log_prob, advantages, weights, mask, how large a loss can be)."""
    shape, _, mask, seed = draw(batches())
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))  # of log-ratios; the last is beyond the clamp
    log_prob = -randn(*shape, seed=seed).abs()
    old = log_prob + randn(*shape, seed=seed + 1, scale=spread)
    advantages = randn(*shape, seed=seed + 2)
    if draw(st.booleans()):
        advantages = advantages[:, :1].expand(shape).contiguous()
    weights = draw(st.sampled_from([None, randn(*shape, seed=seed + 3).abs()]))
    return log_prob, old, advantages, weights, mask


def counts_of(draw, modes=MODES) -> tuple[str, dict[str, Any]]:
    mode, factor = draw(st.sampled_from(modes)), draw(st.sampled_from([None, 100]))
    if draw(st.booleans()):
        return mode, {"loss_scale_factor": factor}
    return mode, {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 6, "loss_scale_factor": factor}


def flags(mask: torch.Tensor) -> torch.Tensor:
    """A mask that verl can multiply with and subtract from 1."""
    return mask.float() if mask.dtype == torch.bool else mask


def assert_near(mine: dict, theirs: dict, atol: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert isinstance(mine[name], float)
        assert mine[name] == pytest.approx(value, abs=atol, rel=1e-5), name


@settings(deadline=None, max_examples=100)
@given(case=batches(least=2), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([1.0, 0.95, 0.0]))
def test_gae(case, gamma, lam, verl):
    shape, counts, mask, seed = case
    rewards, values = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    mine = ours.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    theirs = verl.compute_gae_advantage_return(rewards, values, flags(mask), gamma, lam)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        # A chain of up to 17 sums, and a whitening that may divide by a small deviation.
        torch.testing.assert_close(a[counts], b[counts], atol=2e-4, rtol=1e-4)
        assert (a[~counts] == 0).all()


@settings(deadline=None, max_examples=200)
@given(case=policy_batches(), name=st.sampled_from(POLICY_LOSSES), data=st.data())
def test_policy_losses(case, name, data, verl):
    log_prob, old, advantages, weights, mask = case
    mode, counts = counts_of(data.draw)
    low, high = data.draw(st.sampled_from([(0.2, 0.2), (0.1, 0.3), (None, None)]))
    config = Config(clip_ratio=0.25, clip_ratio_low=low, clip_ratio_high=high, global_batch_info=counts)
    config |= data.draw(st.sampled_from([{}, {"clip_ratio_c": 1.5}]))
    found = []

    def run(function, mask):
        def call(log_prob):
            loss, metrics = function(old, log_prob, advantages, mask, mode, config, weights)
            found.append(metrics)
            return loss

        return outcome(call, [log_prob], [0])

    mine = run(getattr(ours, f"compute_policy_loss_{name}"), mask)
    theirs = run(getattr(verl, f"compute_policy_loss_{name}"), flags(mask))
    # A ratio has the relative error of its log-ratio, up to 30 of them roundings; the losses are sums of them.
    size = theirs[0][0].abs().item() + 1.0
    grad = theirs[1][0].abs().max().item()
    assert_same(mine, theirs, 300 * EPS * size, 300 * EPS * max(grad, 1e-3), dtypes=True)
    assert_near(found[0], found[1], 1e-5)


@settings(deadline=None, max_examples=100)
@given(case=batches(), data=st.data())
def test_losses_are_aggregated(case, data, verl):
    shape, _, mask, seed = case
    mode, counts = counts_of(data.draw)
    x = randn(*shape, seed=seed)
    mine = outcome(lambda x: ours.agg_loss(x, mask, mode, **counts), [x], [0])
    theirs = outcome(lambda x: verl.agg_loss(x, flags(mask), mode, **counts), [x], [0])
    assert_same(mine, theirs, 1e-5, 1e-5)


def test_a_mode_that_is_not_there(verl):
    x = torch.ones(2, 3)
    for agg_loss in (ours.agg_loss, verl.agg_loss):
        with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
            agg_loss(x, x, "mean")
        for mode in ("token-mean", "seq-mean-token-sum"):
            with pytest.raises(ValueError, match="is required when dp_size > 1"):
                agg_loss(x, x, mode, dp_size=2)


@settings(deadline=None, max_examples=100)
@given(case=batches(), clip=st.sampled_from([0.1, 0.5, 100.0]), data=st.data())
def test_value_loss(case, clip, data, verl):
    shape, _, mask, seed = case
    mode, counts = counts_of(data.draw)
    values, returns, old = (randn(*shape, seed=seed + i) for i in range(3))
    mine = outcome(lambda x: ours.compute_value_loss(x, returns, old, mask, clip, mode, **counts), [values], [0])
    theirs = outcome(
        lambda x: verl.compute_value_loss(x, returns, old, flags(mask), clip, mode, **counts), [values], [0]
    )
    assert_same(mine, theirs, 1e-4, 1e-5)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from([*ours.KL_ESTIMATORS, *(f"{name}+" for name in ours.KL_ESTIMATORS)]),
    dtype=st.sampled_from(sorted(FLOATS)),
    spread=st.sampled_from([0.0, 0.1, 1.0, 40.0]),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kl_penalty(name, dtype, spread, exact, seed, verl):
    p = -randn(3, 7, seed=seed).abs()
    pair = [p.to(FLOATS[dtype]), (p + randn(3, 7, seed=seed + 1, scale=spread)).to(FLOATS[dtype])]
    mine = outcome(lambda p, q: ours.kl_penalty(p, q, name, exact_dtype=exact), pair, [0, 1])
    theirs = outcome(lambda p, q: verl.kl_penalty(p, q, name), [x.float() for x in pair], [0, 1])
    # verl in fp32 is what we are to be compared with, in half precision up to one rounding of results and gradients.
    half = 0.0 if dtype == "fp32" else torch.finfo(FLOATS[dtype]).eps
    (value,), grads = theirs
    atol = 100 * EPS * (1 + spread**2) + (half * value.abs().max().item() if exact else 0.0)
    grad_atol = 100 * EPS * (1 + spread) * 20 + half * max(x.abs().max().item() for x in grads)
    assert_same(mine, theirs, atol, grad_atol, dtypes=False)
    assert mine[0][0].dtype == (FLOATS[dtype] if exact else torch.float32)
    if "+" not in name:
        assert torch.equal(ours.kl_penalty_forward(*pair, name, exact_dtype=exact), mine[0][0])


def test_a_kl_penalty_that_is_not_there(monkeypatch, verl):
    monkeypatch.setattr(ours, "original", lambda place: getattr(verl, place.rpartition(".")[2]))
    x = torch.zeros(1, 2)
    for name in ("full", "no such thing"):
        with pytest.raises(NotImplementedError):
            ours.kl_penalty(x, x, name)


def test_rewards(verl):
    scores, p, q = (randn(3, 5, seed=i) for i in range(3))
    torch.testing.assert_close(ours.compute_rewards(scores, p, q, 0.1), verl.compute_rewards(scores, p, q, 0.1))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    vocabulary=st.integers(1, 50),
    dtype=st.sampled_from(sorted(FLOATS)),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    exact=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_from_logits(shape, vocabulary, dtype, scale, exact, seed, verl):
    logits = randn(*shape, vocabulary, seed=seed, scale=scale).to(FLOATS[dtype])
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    eps = torch.finfo(FLOATS[dtype]).eps
    atol = 8 * eps * (5 * scale + 4)
    mine = outcome(lambda x: ours.logprobs_from_logits(x, labels, exact_dtype=exact), [logits], [0])
    if len(shape) > 1 or dtype == "fp32":  # verl has no half precision for one dimension
        theirs = outcome(lambda x: verl.logprobs_from_logits(x, labels), [logits], [0])
        assert_same(mine, theirs, atol, atol, dtypes=exact)
    mine = outcome(lambda x: ours.entropy_from_logits(x, exact_dtype=exact), [logits], [0])
    theirs = outcome(
        lambda x: verl.entropy_from_logits(x.float()).to(x.dtype if exact else torch.float32), [logits], [0]
    )
    assert_same(mine, theirs, atol, 8 * eps * (5 * scale + 4))
    if len(shape) == 1:
        theirs = verl.entropy_from_logits_with_chunking(logits, 3)
        torch.testing.assert_close(ours.entropy_from_logits_with_chunking(logits, 3), theirs, atol=atol, rtol=0.0)


def test_compiled_entropy(verl):
    """As verl's engines call it."""
    torch.compiler.reset()
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        mine = outcome(compiled, [randn(rows, 40)], [0])
        assert_same(mine, outcome(verl.entropy_from_logits, [randn(rows, 40)], [0]), 1e-5, 1e-5)


@settings(deadline=None, max_examples=100)
@given(case=batches(least=2), axis=st.sampled_from([None, 0, 1, -1]), dtype=st.sampled_from(sorted(FLOATS)))
def test_masked_statistics(case, axis, dtype, verl):
    shape, counts, mask, seed = case
    x, dtype = randn(*shape, seed=seed).to(FLOATS[dtype]), FLOATS[dtype]
    # In half precision verl's sums are rounded again and again: what it has in fp32 is what ours should be.
    atol = 1e-5 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    exact = flags(mask).dtype != torch.float32 or dtype == torch.float32
    spread = verl.masked_var(x.float(), flags(mask)).rsqrt().item()
    grad = torch.where(counts, randn(*shape, seed=seed + 1), 0.0)

    def check(name, *options, scale=1.0, weights=1.0, **more):
        mine = outcome(lambda x: getattr(ours, name)(x, mask, *options, **more) * weights, [x], [0])
        theirs = outcome(lambda x: getattr(verl, name)(x.float(), flags(mask), *options) * weights, [x], [0])
        assert_same(mine, theirs, 1e-5 * scale + (atol if more else 0.0), atol * scale**2, dtypes=False)
        return mine[0][0].dtype

    for name in ("masked_mean", "masked_sum"):
        assert check(name, axis, exact_dtype=exact) == (dtype if exact else torch.float32)
    for flag in (True, False):
        check("masked_var", flag)
        check("masked_whiten", flag, scale=10 * (1 + spread), weights=grad)


@settings(deadline=None, max_examples=20)
@given(three=st.booleans(), temperature=st.sampled_from([1.0, 0.7]), seed=st.integers(0, 2**16))
def test_fused_linear(three, temperature, seed, verl):
    shape = (2, 3) if three else (6,)
    hidden, weight = randn(*shape, 8, seed=seed), randn(40, 8, seed=seed + 1)
    tokens = torch.randint(40, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)

    def run(module):
        return outcome(lambda *head: module(*head, tokens, temperature), [hidden, weight], [0, 1])

    theirs = run(verl.FusedLinearForPPO(chunk_size=4))
    for backend in ("torch", "liger"):
        assert_same(run(ours.FusedLinearForPPO(4, impl_backend=backend)), theirs, 1e-5, 1e-4)

    def reduced(how):
        results = lambda *head: ours.linear_cross_entropy(*head, tokens, temperature, how)  # noqa: E731
        return outcome(results, [hidden, weight], [0, 1])

    (log_probs, entropies), _ = theirs
    for how, reduce in _verl_vocabulary.REDUCTIONS.items():
        (mine, entropy), _ = reduced(how)
        torch.testing.assert_close(mine, reduce(log_probs.flatten()))
        torch.testing.assert_close(entropy, entropies.flatten())


def test_fused_linear_in_half_precision():
    hidden, weight, tokens = randn(6, 8).bfloat16(), randn(40, 8).bfloat16(), torch.arange(6)
    exact = type("FusedLinearForPPO", (ours.FusedLinearForPPO,), {"exact_dtype": True})
    assert [x.dtype for x in ours.FusedLinearForPPO()(hidden, weight, tokens)] == [torch.float32] * 2
    assert [x.dtype for x in exact()(hidden, weight, tokens)] == [torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="impl_backend"):
        ours.FusedLinearForPPO(impl_backend="cuda")
    with pytest.raises(ValueError, match="reduction"):
        ours.linear_cross_entropy(hidden, weight, tokens, reduction="max")


def test_a_spread_vocabulary_leaves_the_sum_to_megatron(monkeypatch):
    """Our op sums the gradient of the hidden states over the ranks, and so will Megatron."""
    hidden, weight, tokens = randn(6, 8).requires_grad_(), randn(40, 8, seed=1), torch.arange(6)
    op = ours.F.linear_token_log_probs_and_entropy
    monkeypatch.setattr(ours.F, "linear_token_log_probs_and_entropy", lambda *head, group, **rest: op(*head, **rest))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: {"two ranks": 2}[group])
    whole, part = (
        torch.autograd.grad(ours.linear_cross_entropy(hidden, weight, tokens, 1.0, "sum", group)[0], hidden)[0]
        for group in (None, "two ranks")
    )
    assert torch.equal(whole, 2 * part)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("weighted", [False, True])
def test_masked_values_change_no_bit(garbage, weighted):
    """verl's own demand, and more: nothing that stands under a 0 is seen, in values, gradients or metrics."""
    shape = (4, 9)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    clean = [randn(*shape, seed=i) for i in range(4)]
    dirty = [torch.where(mask, x, garbage) for x in clean]
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})

    def results(x, old, advantages, other):
        x = x.clone().requires_grad_()
        weights = other.abs() if weighted else None
        losses = [ours.compute_value_loss(x, advantages, old, mask, 0.2), (ours.agg_loss(x, mask, "token-mean"), 0)]
        for name in POLICY_LOSSES:
            for mode in MODES:
                function = getattr(ours, f"compute_policy_loss_{name}")
                losses.append(function(old, x, advantages, mask, mode, config, weights))
        grads = [torch.autograd.grad(loss, x)[0] for loss, _ in losses]
        targets = ours.compute_gae_advantage_return(advantages, old, mask, 0.9, 0.95)
        statistics = (ours.masked_mean(x, mask), ours.masked_var(x, mask), ours.masked_whiten(x, mask))
        return [*targets, *statistics, *grads, *(loss for loss, _ in losses)], [more for _, more in losses]

    (a, more_a), (b, more_b) = results(*clean), results(*dirty)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    assert more_a == more_b


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_half_precision(name):
    """The loss of the same numbers in fp32, and with exact_dtype in verl's dtype."""
    inputs = [randn(3, 8, seed=i).bfloat16() for i in range(3)]
    mask = torch.ones(3, 8, dtype=torch.int64)
    config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.3, global_batch_info={})
    function = getattr(ours, f"compute_policy_loss_{name}")
    loss, metrics = function(*inputs, mask, config=config)
    wanted, wanted_metrics = function(*(x.float() for x in inputs), mask, config=config)
    torch.testing.assert_close(loss, wanted)
    assert_near(metrics, wanted_metrics, 1e-6)
    assert function(*inputs, mask, config=config, exact_dtype=True)[0].dtype == torch.bfloat16
    assert function(*inputs, mask.float(), config=config, exact_dtype=True)[0].dtype == torch.float32


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_tokens_no_loss(name):
    x, mask = randn(2, 3).requires_grad_(), torch.zeros(2, 3)
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    for mode in MODES:
        loss, metrics = getattr(ours, f"compute_policy_loss_{name}")(x.detach(), x, x.detach(), mask, mode, config)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].abs().sum().item() == 0
        assert not any(metrics.values())


def test_what_goes_back_to_verl(monkeypatch, verl):
    """fp64, and shapes that broadcast."""
    for module in (ours, _verl_policy_losses, _verl_vocabulary):
        monkeypatch.setattr(module, "original", lambda place: getattr(verl, place.rpartition(".")[2]))
    x, mask = randn(3, 5).double(), torch.ones(3, 5)
    assert ours.masked_mean(x, mask).dtype == torch.float64
    assert ours.agg_loss(x, mask, "token-mean").dtype == torch.float64
    assert ours.logprobs_from_logits(x, torch.zeros(3, dtype=torch.int64)).dtype == torch.float64
    torch.testing.assert_close(ours.masked_mean(randn(3, 5), mask, (0, 1)), randn(3, 5).mean())
    torch.testing.assert_close(ours.masked_sum(randn(3, 5), mask[:, :1]), randn(3, 5).sum())
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    for name in POLICY_LOSSES:
        loss, _ = getattr(ours, f"compute_policy_loss_{name}")(x, x, x, mask, config=config)
        assert loss.dtype == torch.float64
        with pytest.raises(ValueError, match="config"):
            getattr(ours, f"compute_policy_loss_{name}")(x, x, x, mask)


def test_signatures(verl):
    """verl's own, but for exact_dtype."""
    for place, mine in ours.REPLACEMENTS.items():
        theirs = getattr(verl, place.rpartition(".")[2])
        if theirs is not None:
            parameters = {name: p for name, p in inspect.signature(mine).parameters.items() if name != "exact_dtype"}
            theirs = inspect.signature(theirs).parameters
            assert list(parameters) == list(theirs), place
            assert [p.default for p in parameters.values()] == [p.default for p in theirs.values()], place
        exact = inspect.isclass(mine) or "exact_dtype" in inspect.signature(mine).parameters
        assert exact == (place in ours.MORE_ACCURATE), place


def test_registered(monkeypatch):
    """Both functions under one more name, and not any more when they are taken back."""
    algos = SimpleNamespace(POLICY_LOSS_REGISTRY={}, ADV_ESTIMATOR_REGISTRY={})
    algos.register_policy_loss = lambda name: lambda f: algos.POLICY_LOSS_REGISTRY.setdefault(name, f)
    algos.register_adv_est = lambda name: lambda f: algos.ADV_ESTIMATOR_REGISTRY.setdefault(name, f)
    monkeypatch.setattr(ours.importlib, "import_module", lambda name: {ours.ALGOS: algos}[name])
    ours.register()
    assert {"fastrlhf": ours.compute_policy_loss_vanilla} == algos.POLICY_LOSS_REGISTRY
    assert {"fastrlhf": ours.compute_gae_advantage_return} == algos.ADV_ESTIMATOR_REGISTRY
    ours.unregister()
    assert not algos.POLICY_LOSS_REGISTRY
    assert not algos.ADV_ESTIMATOR_REGISTRY
