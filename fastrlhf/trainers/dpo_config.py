"""The arguments of direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from fastrlhf.fallback import DPO_VARIANTS
from fastrlhf.trainers.config import LM_HEAD_HELP, LM_HEADS, PairArguments, one_of, positive

SIMPO = "simpo"
LOSS_TYPES = (*DPO_VARIANTS, SIMPO)


@dataclass
class DPOConfig(PairArguments, TrainingArguments):
    """DPO on pairs of a chosen and a rejected completion (Rafailov et al. 2023), and the losses of its kind."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    max_length: int = field(
        default=1024, metadata={"help": "Longest text in tokens, prompt included; see pair_too_long for longer ones."}
    )
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "simpo"] = field(
        default="sigmoid",
        metadata={
            "help": "sigmoid is DPO's own; robust is unbiased for labels that are wrong with probability "
            "label_smoothing (Chowdhury et al. 2024); hinge is SLiC's (Zhao et al. 2023); ipo squares the distance "
            "to a margin (Azar et al. 2023); simpo has mean log-probs for rewards and no reference (Meng et al. 2024)."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the pull to the reference; for simpo the scale of its rewards, 2 to 10 there."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of wrong labels, below 0.5, that sigmoid and robust reckon with."}
    )
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "Margin that simpo asks between the rewards of a pair; usually 0.3 to 0.6 beta."}
    )
    padding_free: bool = field(
        default=True,
        metadata={"help": "Forward passes on sequences one after the other, without padding; False pads."},
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Without padding, what several texts of a batch begin with is computed once: a prompt, for all "
            "completions that follow it, and the words that these begin with alike."
        },
    )
    lm_head: Literal["fused", "logits"] = field(default="fused", metadata={"help": LM_HEAD_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length", "beta")
        one_of(self, "loss_type", LOSS_TYPES)
        one_of(self, "lm_head", LM_HEADS)
        _ = self.pair_rules  # an error for a wrong choice
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing={self.label_smoothing}: loss_type={self.loss_type!r} has none")
        if self.simpo_gamma < 0:
            raise ValueError(f"simpo_gamma={self.simpo_gamma} must be at least 0")

    @property
    def has_reference(self) -> bool:
        return self.loss_type != SIMPO

    @property
    def normalizes_length(self) -> bool:
        """Whether the loss is of mean log-probs; of sums otherwise."""
        return self.loss_type in ("ipo", SIMPO)
