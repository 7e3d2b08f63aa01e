"""Advantages and returns."""

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import MASK_MODES
from fastrlhf.functional import _checks as check

ops = torch.ops.fastrlhf


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns advantages + values.

    rewards, values: [B, T], fp32, bf16 or fp16; values[b, t] is the value before token t.
    mask: [B, T], 1 = counts. Masked positions are not read, and their results are 0.
    mask_mode: "carry": masked tokens (tool output, other turns, padding) are skipped as if they did not exist; "zero":
        they are steps with reward 0 and value 0; "none": the mask is ignored.
    bootstrap_values: [B], the value after the last token, for responses that were cut off; 0 without it.
    Returns (advantages, returns), [B, T], fp32, without gradient: they are targets. Raises ValueError.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}. Schulman et al. 2016 (arXiv:1506.02438),
    equations 11 and 16.
    """
    check.tensor("rewards", rewards, dims=2)
    check.like("values", values, "rewards", rewards)
    index = check.option("mask_mode", mask_mode, MASK_MODES)
    if mask is not None:
        mask = check.mask("mask", mask, "rewards", rewards)
    if bootstrap_values is not None:
        check.tensor("bootstrap_values", bootstrap_values)
        if bootstrap_values.shape != rewards.shape[:1]:
            raise ValueError(
                f"bootstrap_values: got shape {tuple(bootstrap_values.shape)}, wanted {tuple(rewards.shape[:1])}"
            )
        check.same_device("bootstrap_values", bootstrap_values, "rewards", rewards)
        bootstrap_values = bootstrap_values.detach().float()
    gamma = check.number("gamma", gamma, least=0.0, most=1.0)
    lam = check.number("lam", lam, least=0.0, most=1.0)
    return ops.gae(rewards.detach().float(), values.detach().float(), mask, bootstrap_values, gamma, lam, index)


@torch.library.register_fake("fastrlhf::gae")
def _(rewards, values, mask, bootstrap_values, gamma, lam, mask_mode):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
