"""A step of our RewardTrainer beside one of TRL's, and what an ensemble of heads on one trunk costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastrlhf.bench import pair_step
from fastrlhf.bench.pair_step import AS_IT_COMES, TRL_BF16, TRL_FP32, TRL_MIXED, Contender, roll_call
from fastrlhf.bench.ppo_worker import TRL
from fastrlhf.bench.records import OURS, PEAK_OF_TRL
from fastrlhf.bench.settings import Setting

__all__ = ["STEP", "measure", "roll_call"]

HEADS = 5
ENSEMBLES = {dtype: f"ours, {HEADS} heads, {dtype}" for dtype in ("fp32", "bf16")}
STEP = pair_step.PairStep(
    op="reward_step",
    work="reward model step",
    trainer="reward",
    metric={OURS: "rewards/margins", TRL: "margin"},
    targets={
        "fp32": {TRL_FP32: 1.7, PEAK_OF_TRL: 1.0},
        "bf16": {TRL_BF16: 1.5, TRL_MIXED: 1.5, PEAK_OF_TRL: 1.0},
    },
    trl=pair_step.trl_contenders(),
    beside={
        "fp32": (ENSEMBLES["fp32"], TRL_FP32, AS_IT_COMES),
        "bf16": (ENSEMBLES["bf16"], TRL_FP32, TRL_BF16, TRL_MIXED),
    },
    variants={name: Contender(OURS, dtype, {"num_heads": HEADS}, HEADS) for dtype, name in ENSEMBLES.items()},
)


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    return pair_step.measure(STEP, setting.reward)
