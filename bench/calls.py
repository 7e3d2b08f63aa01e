"""What one call costs when there is next to nothing to compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrlhf.bench.advantages import response_mask
from fastrlhf.bench.contests import forward, forward_backward
from fastrlhf.bench.measure import Row
from fastrlhf.bench.settings import Setting, generator, sizes

# Written down before measuring. Microseconds are for the call and its backward pass together.
WITHOUT_AUTOGRAD = {"eager": 10}
WITH_AUTOGRAD = {"eager": 10, "us": 25}
# Matrix products take as long with everybody.
LM_HEAD = {"linear_token_log_probs": {"eager": 2, "us": 50}, "linear_ppo_loss": {"eager": 3, "us": 50}}


def rows(setting: Setting) -> Iterator[Row]:
    random, shape, calls = generator(setting), setting.small, setting.small_calls
    on_device = {"generator": random, "device": setting.device}
    x, old, ref, advantages, values = (torch.randn(shape, **on_device) for _ in range(5))
    tokens = torch.randint(shape[1], shape[:1], **on_device)
    mask = response_mask(*shape, random)
    per_row = [torch.randn(shape[0], **on_device) for _ in range(4)]
    cu_seqlens = torch.arange(0, x.numel() + 1, shape[1], device=setting.device)

    head = (torch.randn(1, shape[0], shape[0], **on_device), x.T.contiguous(), tokens[None])

    inputs = {
        "token_log_probs": (x, tokens),
        "token_log_probs_and_entropy": (x, tokens),
        "linear_token_log_probs": head,
        "linear_ppo_loss": (*head, per_row[0][None], per_row[1][None], mask[:, 0][None]),
        "full_kl": (x, ref),
        "kl_divergence": (x, ref),
        "gae": (old, values, mask),
        "gae_packed": (old.flatten(), values.flatten(), cu_seqlens),
        "rollout_advantages": (per_row[0], old, ref, values, mask),
        "masked_mean": (x, mask),
        "masked_whiten": (x, mask),
        "ppo_loss": (x, old, advantages, mask, ref),
        "value_loss": (x, old, advantages, mask),
        "pairwise_reward_loss": (per_row[0], per_row[1]),
        "dpo_loss": tuple(per_row),
    }
    for op, arguments in inputs.items():
        yield Row(
            op,
            f"{op}, without autograd",
            sizes(*shape),
            "fp32",
            _without_long_compilations(setting, forward(op, arguments, calls)),
            targets={"eager": LM_HEAD[op]["eager"]} if op in LM_HEAD else WITHOUT_AUTOGRAD,
            calls=calls,
        )
    # The first inputs that get a gradient, and the gradients that come in, where the result is no scalar.
    differentiable = {
        "token_log_probs": ([0], per_row[:1]),
        "token_log_probs_and_entropy": ([0], per_row[:2]),
        "linear_token_log_probs": ([0, 1], [per_row[0][None]]),
        "linear_ppo_loss": ([0, 1], []),
        "full_kl": ([0], per_row[:1]),
        "kl_divergence": ([0], [values]),
        "masked_mean": ([0], []),
        "masked_whiten": ([0], [values]),
        "ppo_loss": ([0], []),
        "value_loss": ([0], []),
        "pairwise_reward_loss": ([0, 1], []),
        "dpo_loss": ([0, 1], []),
    }
    for op, (leaves, grads) in differentiable.items():
        yield Row(
            op,
            f"{op}, forward + backward",
            sizes(*shape),
            "fp32",
            _without_long_compilations(setting, forward_backward(op, inputs[op], leaves, grads, calls)),
            targets=LM_HEAD.get(op, WITH_AUTOGRAD),
            calls=calls,
        )


def _without_long_compilations(setting: Setting, contenders: dict) -> dict:
    if setting.on_cpu or "torch.compile" not in contenders:
        return contenders
    return contenders | {"torch.compile": "left out on GPUs, where compiling all these takes minutes"}
