"""From hidden states: log-probs and losses through the LM head, beside its bare matrix products.

Every token counts, as they do where a trainer passes on the hidden states of response tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.bench import eager
from fastrlhf.bench.contests import OURS, forward, forward_backward
from fastrlhf.bench.limits import Products
from fastrlhf.bench.measure import Contender, Row
from fastrlhf.bench.settings import FLOATS, Setting, generator, sizes

LOG_PROBS, WITH_ENTROPY = "linear_token_log_probs", "linear_token_log_probs_and_entropy"
PPO, CROSS_ENTROPY = "linear_ppo_loss", "linear_cross_entropy"
SEQUENCE = 512  # tokens; of a response, where a peer works on one at a time
# With a larger tokens x hidden size x vocabulary a call takes many seconds on CPU, and few run.
LARGE = 5 * 10**10
BESIDE_LARGE = (OURS, "eager", "torch.compile")


class Work(NamedTuple):
    """A row of the table: what of (hidden, weight) gets a gradient, and how often the logits must be computed."""

    op: str
    title: str
    leaves: tuple[int, ...] = (0, 1)
    logits: int = 1


STATISTICS = Work(WITH_ENTROPY, "linear → log-prob + entropy, forward", ())
# The gradient that comes in is unknown until the backward pass, which computes the logits again.
COMPOSABLE = Work(LOG_PROBS, "linear → log-prob, forward + backward", logits=2)
PPO_LOSS = Work(PPO, "linear → PPO loss + metrics, forward + backward")
FROZEN = Work(PPO, "linear → PPO loss + metrics, frozen head, forward + backward", (0,))
SFT_LOSS = Work(CROSS_ENTROPY, "linear → cross entropy, forward + backward")
WORKS = (STATISTICS, COMPOSABLE, PPO_LOSS, FROZEN, SFT_LOSS)

# Written down before measuring: at most so many times the bare products, at least so many times as fast as a peer.
# The peers' come from what they took, in units of the products, before ours was written.
ON_CPU = {
    ("fp32", STATISTICS): {"limit": 0.92, "eager": 1.38, "torch.compile": 1.25, "TRL": 1.41, "Liger": 1.09},
    ("bf16", STATISTICS): {"limit": 1.0, "TRL": 2.7, "Liger": 2.4},
    ("fp32", COMPOSABLE): {"limit": 1.0, "TRL chunked": 1.2, "Liger": 1.12},
    ("bf16", COMPOSABLE): {"limit": 1.1, "TRL chunked": 2.4, "Liger": 2.2},
    ("fp32", PPO_LOSS): {"limit": 1.05, "eager": 1.14, "torch.compile": 1.05, "Liger": 2.0},
    ("bf16", PPO_LOSS): {"limit": 1.15, "Liger": 3.6},
    ("fp32", FROZEN): {"limit": 1.05},
    ("bf16", FROZEN): {"limit": 1.15},
    ("fp32", SFT_LOSS): {"limit": 1.05},
    ("bf16", SFT_LOSS): {"limit": 1.15},
}
ON_CPU_MIB = 32.0  # beside the gradients, and beside the fp32 sums that make the weight's in bf16
# On an H100: milliseconds, and MiB in all, the gradients counted in.
ON_GPU = {
    (STATISTICS, 4096, 131_072): {"ms": 6.5},
    (COMPOSABLE, 4096, 131_072): {"ms": 27.0, "mib": 2.5 * 1024},
    (PPO_LOSS, 4096, 131_072): {"ms": 21.0},
    (FROZEN, 4096, 131_072): {"ms": 14.0},
    (PPO_LOSS, 8192, 151_936): {"ms": 48.0, "mib": 5.0 * 1024},
}


def rows(setting: Setting) -> Iterator[Row]:
    for shapes, works in ((setting.lm_heads, WORKS), (setting.lm_heads_of_ppo, (PPO_LOSS,))):
        for shape in shapes:
            for dtype in setting.dtypes:
                yield from _rows(setting, dtype, shape, works)


def _rows(setting: Setting, dtype: str, shape: tuple[int, int, int], works: Iterable[Work]) -> Iterator[Row]:
    n, size, vocabulary = shape
    random, batch = generator(setting), (n // min(n, SEQUENCE), min(n, SEQUENCE))
    on_device = {"generator": random, "device": setting.device}
    hidden = torch.randn(*batch, size, **on_device).to(FLOATS[dtype])
    weight = (3 * size**-0.5 * torch.randn(vocabulary, size, **on_device)).to(FLOATS[dtype])  # logits of deviation 3
    tokens = torch.randint(vocabulary, batch, **on_device)
    grad, noise, advantages = (torch.randn(batch, **on_device) for _ in range(3))
    old = torch.stack([eager.linear_token_log_probs(x, weight, y) for x, y in zip(hidden, tokens, strict=True)])
    head = (hidden, weight, tokens)
    ppo = (*head, old + 0.1 * noise, advantages, torch.ones(batch, dtype=torch.bool, device=setting.device))
    products = Products(hidden.flatten(0, 1), weight)

    for work in works:
        inputs, grads = (ppo if work.op == PPO else head), ([grad] if work.op == LOG_PROBS else [])
        everyone = forward_backward(work.op, inputs, work.leaves, grads) if work.leaves else forward(work.op, inputs)
        targets = _targets(setting, dtype, work, shape, [head[i] for i in work.leaves])
        if setting.on_cpu and n * size * vocabulary > LARGE:
            left_out = [name for name, x in everyone.items() if isinstance(x, Contender) and name not in BESIDE_LARGE]
            everyone |= dict.fromkeys(left_out, "left out at this size, where it takes minutes")
            targets = {name: x for name, x in targets.items() if name not in left_out}
        limit = products.limit(logits=work.logits, grad_hidden=0 in work.leaves, grad_weight=1 in work.leaves)
        yield Row(work.op, work.title, sizes(*shape), dtype, everyone, limit, targets)


def _targets(
    setting: Setting, dtype: str, work: Work, shape: tuple[int, int, int], leaves: list[Tensor]
) -> dict[str, float]:
    if setting.on_cpu:
        sums = 4 * leaves[1].numel() / 2**20 if dtype == "bf16" and len(leaves) > 1 else 0.0
        return ON_CPU[dtype, work] | {"extra_mib": ON_CPU_MIB + sums}
    targets = dict(ON_GPU.get((work, shape[0], shape[2]), {}))
    if "mib" in targets:
        targets["extra_mib"] = targets.pop("mib") - sum(x.numel() * x.element_size() for x in leaves) / 2**20
    return targets
