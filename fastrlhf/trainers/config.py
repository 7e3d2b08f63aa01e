"""The arguments of SFT and reward models: `transformers.TrainingArguments` plus what each algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from fastrlhf.data.pairs import PairRules


def positive(args: object, *names: str) -> None:
    for name in names:
        if getattr(args, name) <= 0:
            raise ValueError(f"{name}={getattr(args, name)} must be greater than 0")


def one_of(args: object, name: str, choices: tuple[str, ...]) -> None:
    if getattr(args, name) not in choices:
        raise ValueError(f"{name}={getattr(args, name)!r} must be one of {', '.join(choices)}")


LM_HEADS = ("fused", "logits")
LM_HEAD_HELP = (
    "fused computes losses and log-probs from the last hidden states, with no logits in memory; logits has the model "
    "compute its own logits at every position, for heads that fused does not know."
)


@dataclass
class SFTConfig(TrainingArguments):
    """Supervised fine-tuning: maximum likelihood of the completion given the prompt."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batches of similar length, which need little padding."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Longest sequence in tokens; what is longer loses its end."}
    )
    completion_only_loss: bool = field(
        default=True,
        metadata={"help": "Train on the completion only; False trains on the prompt as well."},
    )
    lm_head: Literal["fused", "logits"] = field(default="fused", metadata={"help": LM_HEAD_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length")
        one_of(self, "lm_head", LM_HEADS)


@dataclass
class PairArguments:
    """What becomes of pairs that say little or the wrong thing; see fastrlhf.data.PairRules."""

    pair_ties: Literal["keep", "drop"] = field(
        default="keep",
        metadata={"help": "Pairs rated alike: column `tie`, equal `score_chosen` and `score_rejected`, or margin 0."},
    )
    pair_contradictions: Literal["keep", "drop"] = field(
        default="keep", metadata={"help": "Pairs of which another row says the opposite; drop leaves out both."}
    )
    pair_empty_completions: Literal["keep", "drop"] = field(
        default="drop", metadata={"help": "Pairs with a completion that has nothing but white space."}
    )
    pair_too_long: Literal["error", "drop"] = field(
        default="error", metadata={"help": "Pairs with a text longer than max_length."}
    )

    @property
    def pair_rules(self) -> PairRules:
        return PairRules(self.pair_ties, self.pair_contradictions, self.pair_empty_completions, self.pair_too_long)


@dataclass
class RewardConfig(PairArguments, TrainingArguments):
    """Bradley-Terry reward model on pairs of a chosen and a rejected text."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    max_length: int = field(
        default=1024, metadata={"help": "Longest sequence in tokens; pairs with a longer one are an error."}
    )
    center_rewards_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of (chosen + rejected)^2, which keeps the scores' mean at zero (Eisenstein 2023)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length")
        _ = self.pair_rules  # an error for a wrong choice
