"""What each of two processes does (gloo, CPU) for test_distributed: many checks in one start, their results in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from fastrlhf import functional as F
from fastrlhf.trainers.reductions import (
    any_rank,
    gather_varying,
    global_advantage_stats,
    max_over_ranks,
    mean_over_ranks,
)

RANKS = 2


def rollouts() -> list[tuple[torch.Tensor, ...]]:
    """Scores, log-probs, reference log-probs, values and mask, of a rank each: 3 responses of up to 7 tokens, 2 of 4."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for lengths, width in (((7, 2, 5), 7), ((1, 4), 4)):
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()
        log_probs, reference, values = (torch.randn(len(lengths), width, generator=generator) for _ in range(3))
        results.append((torch.randn(len(lengths), generator=generator), log_probs, reference, values + 3, mask))
    return results


def reductions(rank: int, folder: Path) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    rollout = rollouts()[rank]
    target = F.rollout_advantages(*rollout, kl_coef=0.1)
    nothing = torch.zeros(0, 2)
    return {
        "rows": gather_varying(torch.arange(6.0).view(3, 2)[: 1 + 2 * rank] + 10 * rank, accelerator),
        "some": gather_varying(torch.ones(2, 2) if rank else nothing, accelerator),
        "none": gather_varying(nothing, accelerator),
        "stats": global_advantage_stats(target.advantage_stats, target.advantages, rollout[-1], accelerator),
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (rank + 1), accelerator),
        "any": [any_rank(flag, accelerator) for flag in (False, rank == 1, True)],
        "max": max_over_ranks(3 - rank, accelerator),
    }


CHECKS: tuple[Callable[[int, Path], dict[str, Any]], ...] = (reductions,)


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {check.__name__: check(rank, folder) for check in CHECKS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
