"""A step of our DPOTrainer beside one of TRL's.

Ours computes the reference's log-probs before the training, always. TRL is told to (`precompute_ref_log_probs`), and to
keep activations; one contender more is TRL as it comes, which runs the reference in every step and recomputes
activations. What the reference takes before the training stands beside the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastrlhf.bench import pair_step
from fastrlhf.bench.pair_step import AS_IT_COMES, TRL_BF16, TRL_FP32, TRL_MIXED, roll_call
from fastrlhf.bench.ppo_worker import TRL
from fastrlhf.bench.records import OURS, PEAK_OF_TRL
from fastrlhf.bench.settings import Setting

__all__ = ["STEP", "measure", "roll_call"]

STEP = pair_step.PairStep(
    op="dpo_step",
    work="DPO step",
    trainer="dpo",
    metric={OURS: "logps/chosen", TRL: "logps/chosen"},
    targets={
        "fp32": {TRL_FP32: 1.5, PEAK_OF_TRL: 1.0},
        "bf16": {TRL_BF16: 1.5, TRL_MIXED: 1.5, PEAK_OF_TRL: 1.0},
    },
    trl=pair_step.trl_contenders(precompute_ref_log_probs=True),
    beside={"fp32": (TRL_FP32, AS_IT_COMES), "bf16": (TRL_FP32, TRL_BF16, TRL_MIXED)},
    variants={},
)


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    return pair_step.measure(STEP, setting.dpo)
