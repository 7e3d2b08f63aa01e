"""Rewards, advantages and returns of a rollout: by hand, against fp64 loops over tokens, and their properties."""

from functools import partial

import pytest
import torch

from fastrlhf.trainers import PPOConfig
from fastrlhf.trainers.ppo.rollout_weights import rollout_weights
from fastrlhf.trainers.ppo.targets import ppo_targets, response_kl

SCORES = torch.tensor([2.0, -1.0])
LOG_PROBS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
REF_LOG_PROBS = torch.tensor([[-1.5, -1.0, -0.5], [-3.5, 0.0, 0.0]])
VALUES = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
# k1 is 0.5, -1, 0 and 0.5: with kl_coef 0.1, the penalties are -0.05, 0.1, 0 and -0.05.
KL = torch.tensor([-0.5, 0.5])
CRITIC_FREE = ("rloo", "grpo", "reinforce++")


@pytest.fixture
def config(tmp_path):
    return partial(PPOConfig, str(tmp_path), report_to="none", rollout_batch_size=8)


def by_hand(args, kl_coef=0.1, **options):
    values = VALUES if args.has_critic else None
    return ppo_targets(SCORES, LOG_PROBS, REF_LOG_PROBS, values, MASK, args, kl_coef=kl_coef, **options)


def random_rollout(groups=3, size=4, length=9, seed=0):
    """Responses with gaps in them; what stands under the mask's zeros is NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    mask = (torch.rand(rows, length, generator=generator) < 0.7).float()
    mask[:, 0] = 1.0
    mask[0] = torch.tensor([1.0] * 4 + [0.0] * 3 + [1.0] + [0.0] * (length - 8))  # tool output, then one token
    scores, *tokenwise = (torch.randn(shape, generator=generator) for shape in ((rows,), *[(rows, length)] * 3))
    log_probs, ref_log_probs, values = (torch.where(mask.bool(), x, float("nan")) for x in tokenwise)
    return scores, log_probs, ref_log_probs, values, mask


def token_lists(scores, log_probs, ref_log_probs, values, mask, kl_coef):
    """In fp64, of the tokens that count alone: rewards, values and where they stand, for each response."""
    for row in range(len(scores)):
        where = mask[row].nonzero().flatten()
        kl = log_probs[row, where].double() - ref_log_probs[row, where].double()
        rewards = -kl_coef * kl
        rewards[-1] += scores[row].double()
        yield where, rewards, values[row, where].double()


def discounted_advantages(rewards, values, gamma, lam):
    advantages, later, later_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * later_value - values[t] + gamma * lam * later
        advantages[t], later_value = later, values[t]
    return advantages


def assert_close(result, wanted):
    """fp32 arithmetic on a few dozen numbers near 1."""
    torch.testing.assert_close(result.double(), wanted.double(), rtol=2e-5, atol=2e-6)


class TestGAE:
    def test_three_tokens_by_hand(self, config):
        result = by_hand(config(lam=0.5, whiten_advantages=False))
        torch.testing.assert_close(result.kl, KL)
        # the score stands on a response's last token, never after it (TRL #3750, #5338)
        d3 = 2.0 - 0.3
        d2 = 0.1 + 0.3 - 0.2
        d1 = -0.05 + 0.2 - 0.1
        advantages = torch.tensor([[d1 + 0.5 * (d2 + 0.5 * d3), d2 + 0.5 * d3, d3], [-1.05 - 0.4, 0.0, 0.0]])
        torch.testing.assert_close(result.advantages, advantages)
        torch.testing.assert_close(result.returns, VALUES + advantages)
        assert result.values is VALUES
        assert result.ref_log_probs is REF_LOG_PROBS
        assert result.advantage_stats is None

    @pytest.mark.parametrize("gamma", [1.0, 0.9])
    def test_tokens_in_a_gap_do_not_exist(self, config, gamma):
        rollout = random_rollout()
        args = config(gamma=gamma, lam=0.8, whiten_advantages=False)
        result = ppo_targets(*rollout, args, kl_coef=0.1)
        for row, (where, rewards, values) in enumerate(token_lists(*rollout, kl_coef=0.1)):
            assert_close(result.advantages[row, where], discounted_advantages(rewards, values, gamma, 0.8))
        assert not result.advantages[rollout[-1] == 0].any()

    def test_gae_mask_mode_is_passed_on(self, config):
        # One token, a gap, the last one; gamma 0.5: the gap costs a step only where it is one.
        mask, zeros = torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3)
        first = {}
        for mode in ("carry", "zero", "none"):
            args = config(gamma=0.5, lam=1.0, gae_mask_mode=mode, whiten_advantages=False)
            target = ppo_targets(torch.tensor([4.0]), zeros, zeros, zeros, mask, args, kl_coef=0.0)
            first[mode] = target.advantages[0, 0].item()
        assert first == {"carry": 2.0, "zero": 1.0, "none": 1.0}

    def test_without_values(self, config):
        with pytest.raises(ValueError, match="values: got None"):
            ppo_targets(SCORES, LOG_PROBS, REF_LOG_PROBS, None, MASK, config(), kl_coef=0.1)


class TestRLOO:
    def test_three_tokens_by_hand(self, config):
        result = by_hand(config(advantage_estimator="rloo", num_generations=2))
        # R = 2 + 0.05 and -1 - 0.05; of two, the others' mean is the other one
        assert_close(result.advantages, torch.tensor([[3.1, 3.1, 3.1], [-3.1, 0.0, 0.0]]))
        torch.testing.assert_close(result.kl, KL)
        assert result.values is result.returns is result.advantage_stats is None

    def test_each_against_the_mean_of_the_others(self, config):
        rollout = random_rollout()
        result = ppo_targets(*rollout, config(advantage_estimator="rloo", num_generations=4), kl_coef=0.1)
        rewards = [rewards.sum() for _, rewards, _ in token_lists(*rollout, kl_coef=0.1)]
        for row, reward in enumerate(rewards):
            start = row // 4 * 4
            others = [rewards[i] for i in range(start, start + 4) if i != row]
            assert_close(result.advantages[row], rollout[-1][row] * (reward - sum(others) / 3))

    def test_a_groups_advantages_sum_to_0(self, config):
        rollout = random_rollout()
        result = ppo_targets(*rollout, config(advantage_estimator="rloo", num_generations=4), kl_coef=0.1)
        each = result.advantages[:, 0].view(-1, 4)  # the first token always counts
        assert_close(each.sum(1), torch.zeros(3))


class TestGRPO:
    def test_three_tokens_by_hand(self, config):
        result = by_hand(config(advantage_estimator="grpo", num_generations=2))
        # R = 2.05 and -1.05: mean 0.5, unbiased std 3.1 / sqrt(2)
        a = 1.55 / (3.1 / 2**0.5 + 1e-4)
        assert_close(result.advantages, torch.tensor([[a, a, a], [-a, 0.0, 0.0]]))
        assert result.values is result.returns is result.advantage_stats is None

    def test_affine_changes_of_a_groups_scores_change_nothing(self, config):
        scores, *rest = random_rollout()
        moved = scores.clone()
        moved[4:8] = 7 * moved[4:8] + 30
        args = config(advantage_estimator="grpo", num_generations=4)
        before, after = (ppo_targets(x, *rest, args, kl_coef=0.0).advantages for x in (scores, moved))
        # exact but for 1e-4 beside the std, and for scores near 30 in fp32
        smallest = scores.view(-1, 4).std(1).min().item()
        torch.testing.assert_close(after, before, rtol=1e-4 / smallest + 1e-5, atol=1e-5)

    def test_equal_scores_teach_nothing(self, config):
        _, *rest = random_rollout()
        args = config(advantage_estimator="grpo", num_generations=4)
        result = ppo_targets(torch.full((12,), 1 / 3), *rest, args, kl_coef=0.0)
        assert not result.advantages.any()


class TestReinforcePlusPlus:
    def test_three_tokens_by_hand(self, config):
        result = by_hand(config(advantage_estimator="reinforce++", gamma=0.5, lam=0.1))
        # rewards -0.05, 0.1, 2 and -1.05, discounted by gamma; lambda has no part
        advantages = torch.tensor([[-0.05 + 0.5 * (0.1 + 0.5 * 2), 0.1 + 0.5 * 2, 2.0], [-1.05, 0.0, 0.0]])
        torch.testing.assert_close(result.advantages, advantages)
        counted = advantages[MASK.bool()]
        torch.testing.assert_close(result.advantage_stats, torch.stack([counted.mean(), 1 / counted.std()]))
        assert result.values is result.returns is None

    def test_returns_to_go_over_gaps(self, config):
        rollout = random_rollout()
        result = ppo_targets(*rollout, config(advantage_estimator="reinforce++", gamma=0.9), kl_coef=0.1)
        for row, (where, rewards, values) in enumerate(token_lists(*rollout, kl_coef=0.1)):
            assert_close(result.advantages[row, where], discounted_advantages(rewards, 0 * values, 0.9, 1.0))

    def test_groups_have_their_mean_score_as_baseline(self, config):
        result = by_hand(config(advantage_estimator="reinforce++", num_generations=2), kl_coef=0.0)
        torch.testing.assert_close(result.advantages, torch.tensor([[1.5, 1.5, 1.5], [-1.5, 0.0, 0.0]]))


class TestAllEstimators:
    @pytest.mark.parametrize(
        ("estimator", "whiten_rewards"),
        [
            ("gae", False),
            ("gae", True),
            ("rloo", False),
            ("grpo", False),
            ("reinforce++", False),
            ("reinforce++", True),
        ],
    )
    def test_without_kl_coef_the_kl_is_watched_only(self, config, estimator, whiten_rewards):
        scores, log_probs, ref_log_probs, values, mask = random_rollout()
        args = config(advantage_estimator=estimator, num_generations=4, whiten_rewards=whiten_rewards)
        one, other = (
            ppo_targets(scores, log_probs, ref, values, mask, args, kl_coef=0.0) for ref in (log_probs, ref_log_probs)
        )
        assert torch.equal(one.advantages, other.advantages)
        assert not one.kl.any()
        gap = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0)
        assert_close(other.kl, gap.double().sum(1))

    @pytest.mark.parametrize("estimator", ["gae", *CRITIC_FREE])
    def test_estimator_of_the_kl(self, config, estimator):
        scores, log_probs, ref_log_probs, values, mask = random_rollout()
        args = config(advantage_estimator=estimator, num_generations=4, kl_estimator="k3")
        result = ppo_targets(scores, log_probs, ref_log_probs, values, mask, args, kl_coef=0.1)
        gap = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0).double()
        assert_close(result.kl, ((-gap).exp() - 1 + gap).sum(1))
        assert_close(response_kl(log_probs, ref_log_probs, mask, "k3"), result.kl)

    @pytest.mark.parametrize("estimator", CRITIC_FREE)
    def test_values_are_not_looked_at(self, config, estimator):
        scores, log_probs, ref_log_probs, values, mask = random_rollout()
        args = config(advantage_estimator=estimator, num_generations=4)
        one, other = (ppo_targets(scores, log_probs, ref_log_probs, x, mask, args, kl_coef=0.1) for x in (None, values))
        assert torch.equal(one.advantages, other.advantages)
        assert other.values is None

    @pytest.mark.parametrize("estimator", CRITIC_FREE)
    def test_groups_must_be_whole(self, config, estimator):
        rollout = (x[:7] for x in random_rollout())
        with pytest.raises(ValueError, match="got 7, wanted a multiple of num_generations=4"):
            ppo_targets(*rollout, config(advantage_estimator=estimator, num_generations=4), kl_coef=0.1)


class TestWhitening:
    @pytest.mark.parametrize("estimator", ["gae", *CRITIC_FREE])
    def test_statistics_of_the_tokens_that_count(self, config, estimator):
        args = config(advantage_estimator=estimator, num_generations=4, whiten_advantages=True)
        rollout = random_rollout()
        result = ppo_targets(*rollout, args, kl_coef=0.1)
        counted = result.advantages[rollout[-1].bool()].double()
        assert_close(result.advantage_stats, torch.stack([counted.mean(), 1 / counted.std()]))

    def test_which_estimators_whiten_by_themselves(self, config):
        whitened = {
            name
            for name in ("gae", *CRITIC_FREE)
            if by_hand(config(advantage_estimator=name, num_generations=2)).advantage_stats is not None
        }
        assert whitened == {"gae", "reinforce++"}

    def test_statistics_of_all_ranks_come_from_outside(self, config):
        def whitening(stats, advantages, mask):
            assert torch.equal(mask, MASK)
            assert_close(stats[0], advantages.sum() / 4)
            return torch.tensor([3.0, 5.0])

        assert by_hand(config(), whitening=whitening).advantage_stats.tolist() == [3.0, 5.0]

    @pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
    def test_rewards_get_variance_1_and_keep_their_mean(self, config, estimator):
        rollout = random_rollout()
        args = config(advantage_estimator=estimator, gamma=0.9, lam=0.8, whiten_rewards=True)
        result = ppo_targets(*rollout, args, kl_coef=0.1)
        tokens = list(token_lists(*rollout, kl_coef=0.1))
        all_rewards = torch.cat([rewards for _, rewards, _ in tokens])
        mean, std = all_rewards.mean(), all_rewards.std()
        for row, (where, rewards, values) in enumerate(tokens):
            whitened = (rewards - mean) / std + mean
            values, lam = (values, 0.8) if estimator == "gae" else (0 * values, 1.0)
            assert_close(result.advantages[row, where], discounted_advantages(whitened, values, 0.9, lam))
        plain = ppo_targets(*rollout, config(advantage_estimator=estimator), kl_coef=0.1)
        assert torch.equal(result.kl, plain.kl)

    def test_rewards_by_the_statistics_of_all_ranks(self, config):
        # r = -0.05, 0.1, 2 and -1.05 -> (r - 1) 2 + 1
        given = iter([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
        args = config(whiten_rewards=True, lam=1.0, advantage_estimator="reinforce++")
        result = by_hand(args, whitening=lambda stats, x, mask: next(given))
        a, b, c, d = (2 * (r - 1) + 1 for r in (-0.05, 0.1, 2.0, -1.05))
        assert_close(result.advantages, torch.tensor([[a + b + c, b + c, c], [d, 0.0, 0.0]]))
        assert result.advantage_stats.tolist() == [0.0, 1.0]


class TestRolloutWeights:
    # Ratios 1.5, 3, 0.25 and, in the second response, 1 and 1.5; under the mask's zeros stands NaN.
    MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    SAMPLED = torch.tensor([[-1.0, -2.0, torch.nan, -0.5], [-3.0, -1.0, torch.nan, torch.nan]])
    LOG_PROBS = SAMPLED + torch.tensor([[1.5, 3.0, 1.0, 0.25], [1.0, 1.5, 1.0, 1.0]]).log()

    @pytest.mark.parametrize(
        ("mode", "clip", "wanted"),
        [
            ("truncate", 2.0, [[1.5, 2.0, 0.0, 0.25], [1.0, 1.5, 0.0, 0.0]]),
            ("truncate", 0.5, [[0.5, 0.5, 0.0, 0.25], [0.5, 0.5, 0.0, 0.0]]),
            ("mask", 2.0, [[1.5, 0.0, 0.0, 0.0], [1.0, 1.5, 0.0, 0.0]]),
            ("mask", 5.0, [[1.5, 3.0, 0.0, 0.25], [1.0, 1.5, 0.0, 0.0]]),
            # products 1.125 and 1.5
            ("sequence_mask", 1.2, [[1.125, 1.125, 0.0, 1.125], [0.0, 0.0, 0.0, 0.0]]),
            ("sequence_mask", 2.0, [[1.125, 1.125, 0.0, 1.125], [1.5, 1.5, 0.0, 0.0]]),
        ],
    )
    def test_by_hand(self, mode, clip, wanted):
        torch.testing.assert_close(
            rollout_weights(self.LOG_PROBS, self.SAMPLED, self.MASK, clip, mode), torch.tensor(wanted)
        )

    def test_a_product_too_small_is_left_out_as_well(self):
        weights = rollout_weights(
            torch.tensor([[-2.0, -2.0]]), torch.tensor([[-1.0, -1.5]]), torch.ones(1, 2), 4.0, "mask"
        )
        assert weights.all()
        # e^-1.5 < 1/4
        both = (torch.tensor([[-2.0, -2.0]]), torch.tensor([[-1.0, -1.5]]), torch.ones(1, 2))
        assert not rollout_weights(*both, 4.0, "sequence_mask").any()
        assert rollout_weights(*both, 5.0, "sequence_mask").all()

    @pytest.mark.parametrize("mode", ["truncate", "mask", "sequence_mask"])
    def test_one_numerics_has_weight_1(self, mode):
        mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        log_probs = torch.tensor([[-1.0, -torch.inf], [-2.0, -3.0]])
        assert torch.equal(rollout_weights(log_probs, log_probs, mask, 1.0, mode), mask)

    def test_overflow(self):
        log_probs, sampled = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-500.0, -1.0]])
        weights = {
            mode: rollout_weights(log_probs, sampled, torch.ones(1, 2), 2.0, mode).tolist()
            for mode in ("truncate", "mask", "sequence_mask")
        }
        assert weights == {"truncate": [[2.0, 1.0]], "mask": [[0.0, 1.0]], "sequence_mask": [[0.0, 0.0]]}

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match="rollout_weight_mode='clamp'"):
            rollout_weights(*[torch.zeros(1, 1)] * 3, 2.0, "clamp")
