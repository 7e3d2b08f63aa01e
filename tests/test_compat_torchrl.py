"""fastrlhf.compat.torchrl beside torchrl's own functions: values, gradients, flags, shapes."""

from __future__ import annotations

import inspect

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import module
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.compat import torchrl as ours

pytestmark = pytest.mark.usefixtures("peers")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("generalized_advantage_estimate", "vec_generalized_advantage_estimate")


@pytest.fixture(scope="module")
def torchrl(peers):
    return module("torchrl.objectives.value.functional")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def rollouts(draw, features: tuple[int, ...] = (1, 1, 3)):
    """(value, next value, reward, done, terminated), [*batch, T, F]."""
    batch = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    shape = (*batch, draw(st.integers(1, 17)), draw(st.sampled_from(features)))
    seed = draw(st.integers(0, 2**16))
    values = [randn(*shape, seed=seed + i) for i in range(3)]
    generator = torch.Generator().manual_seed(seed)
    done = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    if draw(st.booleans()):
        done[..., -1, :] = True
    terminated = done & (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    if draw(st.booleans()):
        values[1] = torch.cat([values[0][..., 1:, :], values[1][..., -1:, :]], -2)  # as one critic gives them
    return *values, done, terminated


@settings(deadline=None, max_examples=100)
@given(
    case=rollouts(),
    name=st.sampled_from(NAMES),
    gamma=st.sampled_from([1.0, 0.99, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    as_tensors=st.booleans(),
    with_grad=st.booleans(),
    with_terminated=st.booleans(),
)
def test_gae(case, name, gamma, lam, as_tensors, with_grad, with_terminated, torchrl):
    *values, done, terminated = case
    flags = (done, terminated) if with_terminated else (done,)
    discounts = (torch.tensor(gamma), torch.tensor(lam)) if as_tensors else (gamma, lam)
    leaves = [0, 1, 2] if with_grad else []
    mine = outcome(lambda *x: getattr(ours, name)(*discounts, *x, *flags), values, leaves)
    if gamma * lam == 0.0:
        name = "generalized_advantage_estimate"  # the other one fails there
    theirs = outcome(lambda *x: getattr(torchrl, name)(*discounts, *x, *flags), values, leaves)
    assert_same(mine, theirs, 1e-4, 1e-4)


@settings(deadline=None, max_examples=60)
@given(case=rollouts(), name=st.sampled_from(NAMES), dim=st.integers(-3, 2))
def test_time_anywhere(case, name, dim, torchrl):
    dims = case[0].dim()
    if not -dims <= dim < dims or case[0].numel() == 1:
        return
    case = [x.transpose(-2, dim) for x in case]
    mine, theirs = (getattr(m, name)(0.9, 0.95, *case, time_dim=dim) for m in (ours, torchrl))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_dimension(name, torchrl):
    case = [randn(7, seed=i) for i in range(3)]
    done = torch.tensor([False, False, True, False, False, False, True])
    mine, theirs = (getattr(m, name)(0.9, 0.95, *case, done, time_dim=-1) for m in (ours, torchrl))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_as_in_training():
    """512 tokens in a row, against the recurrence in fp64."""
    value, following, reward = (randn(3, 512, 1, seed=i) for i in range(3))
    done = torch.rand(3, 512, 1, generator=torch.Generator().manual_seed(0)) < 0.01
    for flags in (done, torch.zeros_like(done)):
        results = ours.generalized_advantage_estimate(0.99, 0.95, value, following, reward, flags)
        advantage, wanted = torch.zeros(3, 1, dtype=torch.float64), []
        for t in reversed(range(512)):
            ends = flags[:, t].double()
            delta = reward[:, t].double() + 0.99 * (1 - ends) * following[:, t] - value[:, t]
            advantage = delta + 0.99 * 0.95 * (1 - ends) * advantage
            wanted.append(advantage)
        wanted = torch.stack(wanted[::-1], 1)
        for a, b in zip(results, (wanted, wanted + value), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(name, dtype):
    case = [randn(2, 9, 1, seed=i).to(FLOATS[dtype]) for i in range(3)]
    done = torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(0)) < 0.2
    wide = getattr(ours, name)(0.9, 0.95, *(x.float() for x in case), done)
    for x, y in zip(getattr(ours, name)(0.9, 0.95, *case, done), wide, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, atol=20 * torch.finfo(FLOATS[dtype]).eps, rtol=0.0)
    for x, y in zip(getattr(ours, name)(0.9, 0.95, *case, done, exact_dtype=True), wide, strict=True):
        assert x.dtype == FLOATS[dtype]
        torch.testing.assert_close(x.float(), y, atol=40 * torch.finfo(FLOATS[dtype]).eps, rtol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    torch.compiler.reset()
    compiled = torch.compile(getattr(ours, name), fullgraph=True, backend="aot_eager")
    case = [randn(2, 9, 1, seed=i) for i in range(3)]
    done = torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(0)) < 0.2
    arguments = (0.9, 0.95, *case, done)
    for a, b in zip(compiled(*arguments), getattr(ours, name)(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_what_goes_back_to_torchrl(torchrl):
    """fp64, discounts for every step, and its errors."""
    case, done = [randn(2, 5, 1, seed=i) for i in range(3)], torch.zeros(2, 5, 1, dtype=torch.bool)
    for name in NAMES:
        mine = getattr(ours, name)(0.9, 0.95, *(x.double() for x in case), done)
        assert all(x.dtype == torch.float64 for x in mine)
        gammas = torch.full_like(case[0], 0.9)
        theirs = getattr(torchrl, name)(gammas, 0.95, *case, done)
        for a, b in zip(getattr(ours, name)(gammas, 0.95, *case, done), theirs, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(RuntimeError, match="share a unique shape"):
            getattr(ours, name)(0.9, 0.95, *case, done[:1])
        with pytest.raises(RuntimeError, match="time dimension"):
            getattr(ours, name)(0.9, 0.95, *case, done, time_dim=3)


def test_signatures(torchrl):
    for name in NAMES:
        mine = {key: p for key, p in inspect.signature(getattr(ours, name)).parameters.items() if key != "exact_dtype"}
        theirs = inspect.signature(getattr(torchrl, name)).parameters
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
