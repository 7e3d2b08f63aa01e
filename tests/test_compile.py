"""What torch.compile makes of the ops: one graph, and no new one for new numbers or sizes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import functional as F

ONES = torch.ones(3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
LOGITS, TOKENS = torch.randn(3, 7), torch.tensor([1, 2, -100])
CU_SEQLENS = torch.tensor([0, 1, 3])

WITH_A_NUMBER = {
    "token_log_probs": lambda x: F.token_log_probs(LOGITS, TOKENS, temperature=x),
    "token_log_probs_and_entropy": lambda x: F.token_log_probs_and_entropy(LOGITS, TOKENS, temperature=x)[1],
    "full_kl": lambda x: F.full_kl(LOGITS, LOGITS + 1, temperature=x),
    "kl_divergence": lambda x: F.kl_divergence(ONES, ONES - 1, clamp=x),
    "gae": lambda x: F.gae(ONES, ONES, gamma=x, lam=x / 2)[0],
    "gae_packed": lambda x: F.gae_packed(ONES[0, :3], ONES[0, :3], CU_SEQLENS, lam=x)[0],
    "rollout_advantages": lambda x: F.rollout_advantages(ONES[:, 0], ONES, ONES, ONES, MASK, kl_coef=x, gamma=x)[0],
    "ppo_loss": lambda x: F.ppo_loss(
        ONES, ONES - 1, ONES, MASK, clip_low=x, clip_high=x, ref_log_probs=ONES, kl_coef=x
    )[0],
    "ppo_loss, denominator": lambda x: F.ppo_loss(ONES, ONES - 1, ONES, MASK, denominator=x)[0],
    "value_loss": lambda x: F.value_loss(ONES, ONES - 1, ONES, MASK, clip=x)[0],
    "masked_whiten": lambda x: F.masked_whiten(ONES, MASK, eps=x),
    "pairwise_reward_loss": lambda x: F.pairwise_reward_loss(ONES[0], ONES[1], center_coef=x)[0],
    "dpo_loss": lambda x: F.dpo_loss(*LOGITS.T[:4], beta=x, label_smoothing=x / 3)[0],
}


@pytest.mark.parametrize("name", WITH_A_NUMBER)
def test_a_new_number_compiles_nothing_anew(name):
    """Twice at most: for the first number, which torch takes as a constant, and for any number."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(WITH_A_NUMBER[name], fullgraph=True, backend=counter)
    for number in (0.5, 0.6, 0.7, 0.8, 0.9):
        torch.testing.assert_close(compiled(number), WITH_A_NUMBER[name](number))
    assert counter.frame_count <= 2
