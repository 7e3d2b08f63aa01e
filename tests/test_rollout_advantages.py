"""rollout_advantages: KL penalty, score, GAE, returns and whitening statistics, as the steps one by one give them."""

import itertools
import math

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

MODES = ("carry", "zero", "none")
ESTIMATORS = ("k1", "k2", "k3", "abs")


def case(shape=(6, 41), seed=0):
    """Scores, the tensors of the tokens, token rewards, bootstrap values; a row that is masked, a row of one token."""
    log_probs, ref, values, token_rewards, mask = random_tokenwise(4, *shape, seed=seed)
    if shape[0] > 2 and shape[1]:
        mask[1] = False
        mask[2] = torch.arange(shape[1]) == shape[1] // 2
    generator = torch.Generator().manual_seed(seed + 1)
    scores, last = torch.randn(2, shape[0], generator=generator)
    return [scores, log_probs, ref, values, mask], {"token_rewards": token_rewards, "bootstrap_values": last}


def run(function, arguments, tensors, options, dtype=torch.float32):
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    return function(*arguments, **{name: x.to(dtype) for name, x in tensors.items()}, **options)


def compare(arguments, tensors, options):
    ours = run(F.rollout_advantages, arguments, tensors, options)
    eager, exact = (
        run(reference.rollout_advantages, arguments, tensors, options, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name, a, b, c in zip(ours._fields, ours, eager, exact, strict=True):
        assert a.shape == c.shape
        size = max(1.0, c.abs().max().item() if c.numel() else 0.0)
        assert_as_good_as_eager(a, b, c, 64 * EPS * size, name)


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
@pytest.mark.parametrize("score_clip", [None, 0.5])
def test_against_the_oracle(mask_mode, kl_estimator, score_clip):
    arguments, tensors = case()
    options = {"kl_coef": 0.3, "kl_estimator": kl_estimator, "score_clip": score_clip, "mask_mode": mask_mode}
    for names in itertools.chain.from_iterable(itertools.combinations(tensors, k) for k in range(3)):
        compare(arguments, {name: tensors[name] for name in names}, options | {"gamma": 0.98, "lam": 0.9})


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize(
    "shape", [(3, 1), (0, 4), (4, 0), (0, 0), (1, 15), (1, 16), (3, 17), (3, 1023), (3, 1024), (3, 2061), (40, 3)]
)
def test_shapes(mask_mode, shape):
    compare(*case(shape), {"kl_coef": 0.1, "mask_mode": mask_mode})


def by_steps(scores, log_probs, ref_log_probs, values, mask, kl_coef, **options):
    rewards = -kl_coef * F.kl_divergence(log_probs, ref_log_probs)
    for b in range(len(scores)):
        (kept,) = mask[b].nonzero(as_tuple=True)
        if len(kept):
            rewards[b, kept[-1]] += scores[b]
    return F.gae(rewards, values, mask, **options)


@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize("shape", [(6, 41), (4, 1500)])
def test_it_is_the_steps_one_by_one(mask_mode, shape):
    arguments, _ = case(shape)
    result = F.rollout_advantages(*arguments, kl_coef=0.2, mask_mode=mask_mode, gamma=0.9)
    advantages, returns = by_steps(*arguments, kl_coef=0.2, mask_mode=mask_mode, gamma=0.9)
    torch.testing.assert_close(result.advantages, advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.returns, returns, rtol=1e-5, atol=1e-6)
    mean, rstd = result.advantage_stats
    mask = arguments[4]
    whitened = torch.where(mask, (advantages - mean) * rstd, 0.0)
    torch.testing.assert_close(whitened, F.masked_whiten(advantages, mask), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """Two tokens count, then padding. With gamma = lam = 1: returns are the rewards to go."""
    log_probs, ref = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, 9.0]])
    values, mask = torch.tensor([[0.25, 0.5, 9.0]]), torch.tensor([[1, 1, 0]])
    result = F.rollout_advantages(
        torch.tensor([2.0]), log_probs, ref, values, mask, kl_coef=0.1, score_clip=1.5, gamma=1.0, lam=1.0
    )
    last = -0.1 * (-1.0) + 1.5
    torch.testing.assert_close(result.returns, torch.tensor([[-0.1 * 0.5 + last, last, 0.0]]))
    torch.testing.assert_close(result.advantages, torch.tensor([[last - 0.05 - 0.25, last - 0.5, 0.0]]))
    torch.testing.assert_close(result.kl, torch.tensor([-0.5]))
    kept = result.advantages[0, :2]
    torch.testing.assert_close(result.advantage_stats, torch.stack([kept.mean(), 1 / kept.std()]))


@pytest.mark.parametrize("mask_mode", MODES)
def test_the_score_lands_on_the_last_token_that_counts_trl_3750_trl_5338(mask_mode):
    """Not on the padding after it: with lam = 0 and no values its advantage is that token's alone."""
    length = 70
    for last in (0, 15, 16, 40, 69):
        mask = torch.arange(length)[None] <= last
        if last > 20:
            mask[0, 7:12] = False  # tool output
        zeros = torch.zeros(1, length)
        options = {"kl_coef": 0.0, "lam": 0.0, "mask_mode": mask_mode}
        advantages = F.rollout_advantages(torch.tensor([3.0]), zeros, zeros, zeros, mask, **options).advantages[0]
        expected = torch.zeros(length)
        expected[last] = 3.0
        if mask_mode == "carry":
            assert torch.equal(advantages, expected)
        else:
            assert torch.equal(advantages[mask[0]], expected[mask[0]])


def test_pad_equal_to_eos_is_a_matter_of_the_mask_alone_trl_5303():
    """The mask ends at the EOS; the same token as padding behind it changes nothing."""
    arguments, _ = case((3, 20))
    mask = torch.arange(20)[None] < torch.tensor([[20], [9], [1]])
    whole = F.rollout_advantages(*arguments[:4], mask, kl_coef=0.1)
    for b, n in enumerate((20, 9, 1)):
        alone = F.rollout_advantages(
            arguments[0][b : b + 1], *(x[b : b + 1, :n] for x in arguments[1:4]), mask[b : b + 1, :n], kl_coef=0.1
        )
        assert same_bits(whole.advantages[b, :n], alone.advantages[0])
        assert same_bits(whole.returns[b, :n], alone.returns[0])
        assert not whole.advantages[b, n:].any()


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
@pytest.mark.parametrize("mask_mode", MODES)
def test_an_infinite_kl_that_is_only_monitored_is_no_reward(kl_estimator, mask_mode):
    arguments, _ = case()
    far = [x.clone() for x in arguments]
    far[4][0, 3] = arguments[4][0, 3] = True
    far[2][0, 3] = -math.inf
    for function in (F.rollout_advantages, reference.rollout_advantages):
        near, result = (
            function(*x, kl_coef=0.0, kl_estimator=kl_estimator, mask_mode=mask_mode) for x in (arguments, far)
        )
        assert torch.equal(near[0], result[0])
        assert torch.equal(near[3], result[3])
        assert result[2][0] == math.inf
        assert result[2][1:].isfinite().all()


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_bad_score_shows_unless_it_can_be_clipped(score):
    arguments, _ = case()
    arguments[0][0] = score
    assert not F.rollout_advantages(*arguments, kl_coef=0.1).advantages[0][arguments[4][0]].isfinite().any()
    clipped = F.rollout_advantages(*arguments, kl_coef=0.1, score_clip=1.0)
    assert clipped.advantages[0].isnan().any() == math.isnan(score)
    assert clipped.advantages[1:].isfinite().all()


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("shape", [(6, 41), (5, 1100)])
def test_what_stands_under_the_mask_changes_no_bit_roll_447(mask_mode, shape):
    arguments, tensors = case(shape)
    mask = arguments[4]
    dirty = [x if x.dim() == 1 else poison(x, mask) for x in arguments[:4]]
    if mask_mode == "none":
        dirty[3] = arguments[3]  # whose values are used
    rewards = tensors | {"token_rewards": poison(tensors["token_rewards"], mask)}
    options = {"kl_coef": 0.1, "mask_mode": mask_mode, "kl_estimator": "k3"}
    clean = F.rollout_advantages(*arguments, **tensors, **options)
    soiled = F.rollout_advantages(*dirty, mask, **rewards, **options)
    assert all(same_bits(a, b) for a, b in zip(clean, soiled, strict=True))


def test_everything_masked_gives_zeros_and_drops_the_scores():
    nan, scores = torch.full((3, 20), math.nan), torch.ones(3)
    for mask_mode in ("carry", "zero"):
        result = F.rollout_advantages(scores, nan, nan, nan, torch.zeros(3, 20), kl_coef=0.1, mask_mode=mask_mode)
        assert not any(x.any() for x in result[:3])
        assert result.advantage_stats.tolist() == [0.0, 1e4]


def test_a_single_token_has_no_variance():
    one = torch.ones(1, 1)
    result = F.rollout_advantages(torch.tensor([3.0]), one, one, one, one, kl_coef=0.1)
    assert result.advantages.item() == 2.0
    assert result.advantage_stats.tolist() == [2.0, 1e4]


@pytest.mark.parametrize("mask_mode", MODES)
def test_rows_are_independent_and_threads_change_no_bit(mask_mode):
    arguments, tensors = case((40, 1300))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(F.rollout_advantages(*arguments, **tensors, kl_coef=0.1, mask_mode=mask_mode))
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    for rows in (slice(2, 3), slice(7, 9)):
        alone = F.rollout_advantages(
            *(x[rows] for x in arguments), **{k: x[rows] for k, x in tensors.items()}, kl_coef=0.1, mask_mode=mask_mode
        )
        assert all(same_bits(a[rows], b) for a, b in zip(results[0][:3], alone[:3], strict=True))


def test_whitening_statistics_of_equal_numbers():
    """All advantages equal: no deviation at all, however their mean rounds."""
    zeros, mask = torch.zeros(3, 333), torch.arange(333)[None] < torch.tensor([[333], [100], [1]])
    rewards = torch.full((3, 333), 0.1)
    result = F.rollout_advantages(
        torch.zeros(3), zeros, zeros, zeros, mask, kl_coef=0.0, token_rewards=rewards, lam=0.0
    )
    assert result.advantage_stats[0] == rewards[0, 0]
    assert result.advantage_stats[1] == 1e4


def test_statistics_far_from_zero():
    values = torch.randn(4, 3000) - 1000.0
    zeros, mask = torch.zeros(4, 3000), torch.rand(4, 3000) > 0.3
    result = F.rollout_advantages(zeros[:, 0], zeros, zeros, values, mask, kl_coef=0.0, gamma=0.0)
    kept = result.advantages[mask].double()
    torch.testing.assert_close(
        result.advantage_stats.double(), torch.stack([kept.mean(), 1 / kept.std()]), rtol=1e-4, atol=0
    )


def test_low_precision_is_computed_in_fp32_and_carries_no_gradient():
    arguments, _ = case()
    low = [x.bfloat16() if x.is_floating_point() else x for x in arguments]
    low[1].requires_grad_()
    result = F.rollout_advantages(*low, kl_coef=0.1)
    expected = F.rollout_advantages(*(x.float() if x.is_floating_point() else x for x in low), kl_coef=0.1)
    assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))
    assert not any(x.requires_grad for x in result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(3, 1)}, r"scores: got shape \(3, 1\), wanted \(3,\): one a response"),
        (
            {"ref_log_probs": torch.zeros(3)},
            r"ref_log_probs: got shape \(3,\), wanted \(3, 4\), the shape of log_probs",
        ),
        ({"values": torch.zeros(3, 1)}, r"values: got shape \(3, 1\)"),
        ({"mask": torch.ones(4)}, r"mask: got shape \(4,\)"),
        ({"token_rewards": torch.zeros(3)}, r"token_rewards: got shape \(3,\)"),
        ({"bootstrap_values": torch.zeros(4)}, r"bootstrap_values: got shape \(4,\), wanted \(3,\)"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4', wanted one of 'k1', 'k2', 'k3', 'abs'"),
        ({"score_clip": 0.0}, "score_clip: got 0.0, wanted a finite number > 0"),
        ({"kl_coef": math.nan}, "kl_coef: got nan"),
        ({"mask_mode": "skip"}, "mask_mode: got 'skip'"),
        ({"lam": 1.1}, "lam: got 1.1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("log_probs", "ref_log_probs", "values", "mask")
    arguments = {name: torch.zeros(3, 4) for name in names} | {"scores": torch.zeros(3), "kl_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        F.rollout_advantages(**(arguments | change))


def test_opcheck_and_compile():
    arguments, tensors = case((3, 5))
    op = torch.ops.fastrlhf.rollout_advantages.default
    numbers = torch.tensor([0.1, math.inf, 0.9, 0.8])
    torch.library.opcheck(op, (*arguments, tensors["token_rewards"], tensors["bootstrap_values"], numbers, 2, 0))
    torch.library.opcheck(op, (*arguments, None, None, numbers, 0, 2))
    compiled = torch.compile(
        lambda *x: F.rollout_advantages(*x, kl_coef=0.1, score_clip=1.0), fullgraph=True, backend="aot_eager"
    )
    expected = F.rollout_advantages(*arguments, kl_coef=0.1, score_clip=1.0)
    torch.testing.assert_close(tuple(compiled(*arguments)), tuple(expected))
