"""What torch.compile makes of the ops: one graph, and no new one for new numbers or sizes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import functional as F

ONES = torch.ones(3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
LOGITS, TOKENS = torch.randn(3, 7), torch.tensor([1, 2, -100])
CU_SEQLENS = torch.tensor([0, 1, 3])
HIDDEN, HEAD = torch.randn(3, 4), torch.randn(7, 4)
PPO = (HIDDEN, HEAD, TOKENS, -ONES[:, 0], ONES[:, 0], MASK[:, 0])
SEQUENCES = (HIDDEN.view(1, 3, 4), HEAD, *(x.view(1, 3) for x in PPO[2:]))

WITH_A_NUMBER = {
    "token_log_probs": lambda x: F.token_log_probs(LOGITS, TOKENS, temperature=x),
    "token_log_probs_and_entropy": lambda x: F.token_log_probs_and_entropy(LOGITS, TOKENS, temperature=x)[1],
    "linear_token_log_probs": lambda x: F.linear_token_log_probs(HIDDEN, HEAD, TOKENS, temperature=x, softcap=9 * x),
    "linear_cross_entropy": lambda x: F.linear_cross_entropy(HIDDEN, HEAD, TOKENS, temperature=x, denominator=x)[0],
    "linear_ppo_loss": lambda x: F.linear_ppo_loss(
        *PPO, softcap=9 * x, clip_low=x, entropy_coef=x, ref_log_probs=-ONES[:, 0], kl_coef=x, denominator=x
    )[0],
    "linear_ppo_loss, sequence": lambda x: F.linear_ppo_loss(
        *SEQUENCES, temperature=x, softcap=9 * x, clip_high=x, entropy_coef=x, ratio_level="sequence", denominator=x
    )[0],
    "linear_dpo_loss": lambda x: F.linear_dpo_loss(
        HIDDEN, HEAD, TOKENS, CU_SEQLENS, ONES[0, :1], ONES[0, :1], temperature=x, softcap=9 * x, beta=x
    )[0],
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


def test_a_new_count_of_sequences_compiles_nothing_anew():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def loss(hidden, tokens, cu_seqlens, ref_log_probs):
        return F.linear_dpo_loss(hidden, HEAD, tokens, cu_seqlens, ref_log_probs, ref_log_probs + 1)[0]

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for pairs in (2, 3, 4, 5):
        call = (
            torch.randn(6 * pairs, 4),
            TOKENS.repeat(2 * pairs),
            3 * torch.arange(2 * pairs + 1),
            torch.randn(pairs),
        )
        torch.testing.assert_close(compiled(*call), loss(*call))
    assert counter.frame_count <= 2
