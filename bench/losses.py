"""The losses of PPO with their gradients and metrics."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrlhf.bench import limits
from fastrlhf.bench.advantages import response_mask
from fastrlhf.bench.contests import forward, forward_backward
from fastrlhf.bench.measure import Limit, Row
from fastrlhf.bench.settings import Setting, generator, sizes

# Written down before measuring.
PPO = {"limit": 1.4, "torch.compile": 3.5, "verl": 50, "OpenRLHF": 50, "extra_mib": 1.0}
VALUE = {"limit": 1.6, "torch.compile": 3.0, "extra_mib": 1.0}
KL = {"limit": 1.6, "extra_mib": 1.0}
ON_GPU = {("ppo_loss", 64, 1024): {"launches": 2, "device_us": 10.0}}


def rows(setting: Setting) -> Iterator[Row]:
    for shape in setting.batches:
        yield from _rows(setting, *shape)


def _rows(setting: Setting, sequences: int, length: int) -> Iterator[Row]:
    random, n = generator(setting), sequences * length
    on_device = {"generator": random, "device": setting.device}
    old = -torch.rand(sequences, length, **on_device)
    log_probs, ref = (old + 0.1 * torch.randn(sequences, length, **on_device) for _ in range(2))
    advantages, returns, old_values = (torch.randn(sequences, length, **on_device) for _ in range(3))
    values = old_values + 0.3 * torch.randn(sequences, length, **on_device)
    mask = response_mask(sequences, length, random)

    def limit(what: str, *, reads: int, writes: int, masks: int = 0) -> Limit:
        loops = limits.streams(n, reads=reads, writes=writes, masks=masks) if setting.on_cpu else None
        return Limit(what, 4 * n * (reads + writes) + n * masks, loops)

    def row(op: str, work: str, contenders: dict, limit: Limit, targets: dict) -> Row:
        targets = targets if setting.on_cpu else ON_GPU.get((op, sequences, length), {})
        return Row(op, work, sizes(sequences, length), "fp32", contenders, limit, targets)

    yield row(
        "ppo_loss",
        "PPO loss + KL + metrics, forward + backward",
        forward_backward("ppo_loss", (log_probs, old, advantages, mask, ref), [0]),
        limit("three log-probs, advantages and mask read, gradient written", reads=4, writes=1, masks=1),
        PPO,
    )
    yield row(
        "value_loss",
        "clipped value loss + metrics, forward + backward",
        forward_backward("value_loss", (values, old_values, returns, mask), [0]),
        limit("two values, returns and mask read, gradient written", reads=3, writes=1, masks=1),
        VALUE,
    )
    yield row(
        "kl_divergence",
        "KL a token (k3), forward",
        forward("kl_divergence", (log_probs, ref)),
        limit("two log-probs read, result written", reads=2, writes=1),
        KL,
    )
