"""One DPO trainer in a process of its own: ours, or TRL's; see ppo_worker.py for what it answers.

python -m fastrlhf.bench.dpo_worker PLAN.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.bench.peers import trl_dpo
from fastrlhf.bench.ppo_worker import OURS, TRL, work

MARGINS = "rewards/margins"


@dataclass
class Plan:
    """provider: OURS or TRL. policy: a folder. dtype: of all weights. pairs: rows of prompt, chosen and rejected, in
    the order of training. arguments: of the provider's DPOConfig."""

    provider: str
    policy: str
    dtype: str
    attention: str
    pairs: list[dict[str, str]]
    arguments: dict[str, Any]
    threads: int


def load(plan: Plan) -> dict[str, Any]:
    """What both trainers take."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": getattr(torch, plan.dtype), "attn_implementation": plan.attention}
    return {
        "model": AutoModelForCausalLM.from_pretrained(plan.policy, **options),
        "train_dataset": Dataset.from_list(plan.pairs),
        "processing_class": AutoTokenizer.from_pretrained(plan.policy),
    }


def ours(plan: Plan, phases: Any, memory: Any) -> Any:
    from fastrlhf.trainers import DPOConfig, DPOTrainer
    from fastrlhf.trainers.reference_log_probs import ReferenceLogProbs

    ReferenceLogProbs.added_to = phases.of("reference", ReferenceLogProbs.added_to)
    return DPOTrainer(args=DPOConfig(**plan.arguments), **load(plan))


def main(path: str) -> None:
    plan = Plan(**json.loads(Path(path).read_text(encoding="utf-8")))
    work(plan, {OURS: ours, TRL: trl_dpo.trainer}, MARGINS)


if __name__ == "__main__":
    main(*sys.argv[1:])
