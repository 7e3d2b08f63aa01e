"""TRL's trainers on pairs, of the later of the two releases that `make bench` installs, which lies beside the other."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

from fastrlhf.bench.sources import folder


def version() -> str:
    """Raises NotThere where that release is missing."""
    latest = folder("trl_latest")
    return next(iter(metadata.distributions(name="trl", path=[str(latest)]))).version


def trainer(plan: Any, phases: Any, memory: Any) -> Any:
    """A DPOTrainer or RewardTrainer; `reference` is the time in which it computes log-probs before the training."""
    sys.path.insert(0, str(folder("trl_latest")))
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    from fastrlhf.bench.pair_worker import load

    DPOTrainer._precompute_ref_logps = phases.of("reference", DPOTrainer._precompute_ref_logps)
    config, made = {"dpo": (DPOConfig, DPOTrainer), "reward": (RewardConfig, RewardTrainer)}[plan.trainer]
    return made(args=config(**plan.arguments), **load(plan))
