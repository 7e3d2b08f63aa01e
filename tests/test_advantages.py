"""gae: the three ways to treat masked tokens, bootstrapping, and the cases with a known answer."""

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

MODES = ("carry", "zero", "none")


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("shape", [(5, 37), (3, 1), (1, 1000), (0, 4), (4, 0), (70, 3)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_against_the_oracle(mask_mode, bootstrap, shape, with_mask):
    rewards, values, last, mask = random_tokenwise(3, *shape)
    mask = mask if with_mask else None
    last = last[:, 0] if shape[1] else torch.randn(shape[0])
    options = {"gamma": 0.99, "lam": 0.9, "mask_mode": mask_mode}

    def run(function, dtype):
        bootstrap_values = last.to(dtype) if bootstrap else None
        return function(rewards.to(dtype), values.to(dtype), mask, bootstrap_values=bootstrap_values, **options)

    ours, eager, exact = run(F.gae, torch.float32), run(reference.gae, torch.float32), run(reference.gae, torch.float64)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.shape == shape
        assert_as_good_as_eager(a, b, c, 64 * EPS)


def test_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = F.gae(rewards, values, gamma=0.9, lam=0.5)
    a2 = 1.0 - 0.7
    a1 = 0.9 * 0.7 - 0.6 + 0.45 * a2
    a0 = 0.9 * 0.6 - 0.5 + 0.45 * a1
    torch.testing.assert_close(advantages, torch.tensor([[a0, a1, a2]]))
    torch.testing.assert_close(returns, advantages + values)


def test_masked_by_hand():
    """The middle token is tool output. carry: as if it were cut out. zero: a step of reward 0 and value 0."""
    rewards, values = torch.tensor([[0.1, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.7]])
    mask = torch.tensor([[1, 0, 1]])
    carried, _ = F.gae(rewards, values, mask, gamma=0.9, lam=0.5, mask_mode="carry")
    a2 = 1.0 - 0.7
    torch.testing.assert_close(carried, torch.tensor([[0.1 + 0.9 * 0.7 - 0.5 + 0.45 * a2, 0.0, a2]]))
    zeroed, returns = F.gae(rewards, values, mask, gamma=0.9, lam=0.5, mask_mode="zero")
    a1 = 0.9 * 0.7 + 0.45 * a2
    torch.testing.assert_close(zeroed, torch.tensor([[0.1 - 0.5 + 0.45 * a1, 0.0, a2]]))
    assert returns[0, 1] == 0.0


def test_lambda_one_is_monte_carlo_minus_the_baseline():
    rewards, values, mask = random_tokenwise(2, 4, 50)
    advantages, returns = F.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    kept = torch.where(mask, rewards, 0.0)
    to_go = torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(returns, to_go, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0), rtol=1e-5, atol=1e-4)


def test_lambda_zero_is_the_one_step_error():
    rewards, values, _ = random_tokenwise(2, 4, 50)
    advantages, _ = F.gae(rewards, values, gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_carry_equals_the_sequence_with_the_masked_tokens_cut_out():
    rewards, values, mask = random_tokenwise(2, 1, 60)
    options = {"gamma": 0.97, "lam": 0.9, "bootstrap_values": torch.tensor([0.3])}
    padded, _ = F.gae(rewards, values, mask, **options)
    packed, _ = F.gae(rewards[mask][None], values[mask][None], **options)
    assert same_bits(padded[mask], packed[0])


@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_a_masked_value_of_100_leaks_nothing_roll_447(mode):
    rewards, values, mask = random_tokenwise(2, 6, 41)
    clean = F.gae(rewards, values, mask, mask_mode=mode)
    for dirt in (poison, lambda x, m: torch.where(m, x, 100.0)):
        dirty = F.gae(dirt(rewards, mask), dirt(values, mask), mask, mask_mode=mode)
        assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[0][~mask].any()
    assert not clean[1][~mask].any()


def test_everything_masked_gives_zeros():
    nan = torch.full((2, 5), float("nan"))
    for mode in ("carry", "zero"):
        assert not torch.stack(F.gae(nan, nan, torch.zeros(2, 5), mask_mode=mode)).any()


def test_rows_are_independent_and_threads_change_nothing():
    rewards, values, mask = random_tokenwise(2, 64, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    batch = F.gae(rewards, values, mask)
    torch.set_num_threads(1)
    single = F.gae(rewards, values, mask)
    torch.set_num_threads(before)
    alone = F.gae(rewards[7:8], values[7:8], mask[7:8])
    assert all(same_bits(a, b) for a, b in zip(batch, single, strict=True))
    assert all(same_bits(a[7:8], b) for a, b in zip(batch, alone, strict=True))


def test_targets_carry_no_gradient_and_low_precision_is_computed_in_fp32():
    rewards, values, _ = random_tokenwise(2, 3, 4)
    advantages, returns = F.gae(rewards.bfloat16(), values.bfloat16().requires_grad_())
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert advantages.dtype == returns.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, r"values: got shape \(3,\), wanted \(3, 4\), the shape of rewards"),
        ({"rewards": torch.zeros(3)}, r"rewards: got shape \(3,\), wanted 2 dimensions"),
        ({"mask": torch.ones(3, 1)}, r"mask: got shape \(3, 1\)"),
        ({"mask_mode": "skip"}, "mask_mode: got 'skip', wanted one of 'carry', 'zero', 'none'"),
        ({"gamma": 1.1}, "gamma: got 1.1, wanted a finite number >= 0.0 and <= 1.0"),
        ({"lam": -0.1}, "lam: got -0.1"),
        ({"bootstrap_values": torch.zeros(4)}, r"bootstrap_values: got shape \(4,\), wanted \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        F.gae(**({"rewards": torch.zeros(3, 4), "values": torch.zeros(3, 4)} | change))


def test_opcheck_and_compile():
    rewards, values, mask = random_tokenwise(2, 3, 5)
    op = torch.ops.fastrlhf.gae.default
    torch.library.opcheck(op, (rewards, values, mask, torch.zeros(3), torch.tensor([0.9, 0.8]), 0))
    torch.library.opcheck(op, (rewards, values, None, None, torch.tensor([0.9, 0.8]), 2))
    compiled = torch.compile(F.gae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, values, mask), F.gae(rewards, values, mask))
