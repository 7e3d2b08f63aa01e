"""From rewards and values: advantages and returns."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrlhf.bench import limits
from fastrlhf.bench.contests import forward
from fastrlhf.bench.measure import Limit, Row
from fastrlhf.bench.settings import Setting, generator, sizes

# Written down before measuring.
GAE = {"limit": 2.0, "TRL": 50, "verl": 50, "OpenRLHF": 50, "torchrl": 50, "extra_mib": 1.0}
PACKED = {"limit": 2.0, "eager": 50, "extra_mib": 1.0}
ROLLOUT = {"limit": 2.0, "TRL": 100, "verl": 100, "extra_mib": 1.0}
WHITEN = {"limit": 2.0, "eager": 5, "extra_mib": 1.0}
ON_GPU = {("rollout_advantages", 512, 1024): {"launches": 1, "device_us": 6.0}}


def rows(setting: Setting) -> Iterator[Row]:
    for shape in setting.batches:
        yield from _rows(setting, *shape)


def _rows(setting: Setting, sequences: int, length: int) -> Iterator[Row]:
    random, n = generator(setting), sequences * length
    on_device = {"generator": random, "device": setting.device}
    rewards, values, log_probs, ref = (torch.randn(sequences, length, **on_device) for _ in range(4))
    scores = torch.randn(sequences, **on_device)
    mask = response_mask(sequences, length, random)

    def limit(what: str, *, reads: int, writes: int, masks: int = 0) -> Limit:
        loops = limits.streams(n, reads=reads, writes=writes, masks=masks) if setting.on_cpu else None
        return Limit(what, 4 * n * (reads + writes) + n * masks, loops)

    def row(op: str, work: str, inputs: tuple, limit: Limit, targets: dict) -> Row:
        targets = targets if setting.on_cpu else ON_GPU.get((op, sequences, length), {})
        return Row(op, work, sizes(sequences, length), "fp32", forward(op, inputs), limit, targets)

    yield row(
        "gae",
        "GAE, masks inside the response",
        (rewards, values, mask),
        limit("rewards, values and mask read, two results written", reads=2, writes=2, masks=1),
        GAE,
    )
    yield row(
        "gae_packed",
        "GAE, packed sequences",
        (rewards.flatten(), values.flatten(), _boundaries(n, length, random)),
        limit("rewards and values read, two results written", reads=2, writes=2),
        PACKED,
    )
    yield row(
        "rollout_advantages",
        "KL penalty + score + GAE + whitening",
        (scores, log_probs, ref, values, mask),
        limit("log-probs, reference, values and mask read, two results written", reads=3, writes=2, masks=1),
        ROLLOUT,
    )
    yield row(
        "masked_whiten",
        "whitening",
        (values, mask),
        limit("values and mask read twice, result written", reads=2, writes=1, masks=2),
        WHITEN,
    )


def response_mask(sequences: int, length: int, random: torch.Generator) -> torch.Tensor:
    """Responses of different lengths, with a gap in their first half, as a tool's output leaves it."""
    device = random.device
    ends = torch.randint(length // 2 + 1, length + 1, (sequences, 1), generator=random, device=device)
    gaps = torch.randint(max(1, length // 4), (sequences, 1), generator=random, device=device)
    positions = torch.arange(length, device=device)
    return (positions < ends) & ~((positions > gaps) & (positions <= gaps + length // 16))


def _boundaries(n: int, longest: int, random: torch.Generator) -> torch.Tensor:
    """cu_seqlens of sequences between a quarter of the longest and the longest, n tokens together."""
    lengths = torch.randint(
        max(1, longest // 4), longest + 1, (4 * n // longest + 1,), generator=random, device=random.device
    )
    ends = lengths.cumsum(0)
    ends = ends[ends < n]
    edges = torch.zeros(1, dtype=ends.dtype, device=ends.device), ends, torch.full_like(ends[:1], n)
    return torch.cat(edges)
