"""One trainer on pairs in a process of its own: ours, or TRL's; see ppo_worker.py for what it answers.

python -m fastrlhf.bench.pair_worker PLAN.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.bench.peers import trl_pairs
from fastrlhf.bench.ppo_worker import OURS, TRL, work

LOSS = "loss"


@dataclass
class Plan:
    """trainer: "dpo" or "reward". provider: OURS or TRL. model: the folder of a language model; a reward model gets new
    heads. dtype: of all weights. pairs: rows of prompt, chosen and rejected, in the order of training. arguments: of
    the provider's configuration."""

    trainer: str
    provider: str
    model: str
    dtype: str
    attention: str
    pairs: list[dict[str, str]]
    arguments: dict[str, Any]
    threads: int
    heads: int = 1


def load(plan: Plan) -> dict[str, Any]:
    """What both sides take."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from fastrlhf.loading import tokenizer_with_pad

    options = {"dtype": getattr(torch, plan.dtype), "attn_implementation": plan.attention}
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    if plan.trainer == "dpo":
        model = AutoModelForCausalLM.from_pretrained(plan.model, **options)
    else:
        torch.manual_seed(0)  # the heads are drawn
        model = AutoModelForSequenceClassification.from_pretrained(plan.model, num_labels=plan.heads, **options)
        tokenizer = tokenizer_with_pad(tokenizer, model, unlike_eos=True)
    return {"model": model, "train_dataset": Dataset.from_list(plan.pairs), "processing_class": tokenizer}


def ours(plan: Plan, phases: Any, memory: Any) -> Any:
    from fastrlhf.trainers import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    from fastrlhf.trainers.reference_log_probs import ReferenceLogProbs

    ReferenceLogProbs.added_to = phases.of("reference", ReferenceLogProbs.added_to)
    config, trainer = {"dpo": (DPOConfig, DPOTrainer), "reward": (RewardConfig, RewardTrainer)}[plan.trainer]
    return trainer(args=config(**plan.arguments), **load(plan))


def main(path: str) -> None:
    plan = Plan(**json.loads(Path(path).read_text(encoding="utf-8")))
    work(plan, {OURS: ours, TRL: trl_pairs.trainer}, LOSS)


if __name__ == "__main__":
    main(*sys.argv[1:])
