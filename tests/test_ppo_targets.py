"""Rewards, advantages and returns of a rollout, by hand."""

import pytest
import torch

from fastrlhf.trainers import PPOConfig
from fastrlhf.trainers.ppo.targets import ppo_targets


def targets(tmp_path, **options):
    args = PPOConfig(str(tmp_path), report_to="none", rollout_batch_size=8, **options)
    scores = torch.tensor([2.0, -1.0])
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
    ref_log_probs = torch.tensor([[-1.5, -1.0, -0.5], [-3.0, 0.0, 0.0]])
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    return ppo_targets(scores, log_probs, ref_log_probs, values, mask, args)


def test_three_tokens_by_hand(tmp_path):
    result = targets(tmp_path, kl_coef=0.1, gamma=1.0, lam=0.5, whiten_advantages=False)
    torch.testing.assert_close(result.kl, torch.tensor([-0.5, 0.0]))
    # rewards -0.05, 0.1, 2.0 and -1.0: the score stands on a response's last token, never after it (TRL #3750, #5338)
    d3 = 2.0 - 0.3
    d2 = 0.1 + 0.3 - 0.2
    d1 = -0.05 + 0.2 - 0.1
    advantages = torch.tensor([[d1 + 0.5 * (d2 + 0.5 * d3), d2 + 0.5 * d3, d3], [-1.4, 0.0, 0.0]])
    torch.testing.assert_close(result.advantages, advantages)
    torch.testing.assert_close(result.returns, torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]) + advantages)


def test_whitening_counts_the_responses_tokens_only(tmp_path):
    result = targets(tmp_path, kl_coef=0.1, lam=0.5)
    counted = result.advantages[result.mask.bool()]
    mean, rstd = result.advantage_stats
    assert mean.item() == pytest.approx(counted.mean().item(), abs=1e-6)
    assert rstd.item() == pytest.approx(1 / counted.std().item(), rel=1e-5)
    assert not result.advantages[~result.mask.bool()].any()
    assert targets(tmp_path, whiten_advantages=False).advantage_stats is None
