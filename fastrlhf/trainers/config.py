"""The arguments of SFT and reward models: `transformers.TrainingArguments` plus what each algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from fastrlhf.data.pairs import PairRules
from fastrlhf.rewards.settings import RewardSettings


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
    num_heads: int = field(
        default=1,
        metadata={
            "help": "Score heads on one trunk, an ensemble: each begins elsewhere and learns from its own bootstrap "
            "sample of the pairs."
        },
    )
    objectives: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of numbers, one head each: above 0 where the chosen text is the better one by that "
            "objective, below 0 where the rejected is, 0 or nothing where neither."
        },
    )
    score_turns: Literal["last", "all"] = field(
        default="last",
        metadata={
            "help": "last scores a text at its end; all scores a conversation at the end of every assistant turn and "
            "compares the sums (Christiano et al. 2017)."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations in a row without a lower held-out loss after which training ends, at the best "
            "checkpoint. Evaluates and saves after every epoch, unless eval_strategy says otherwise."
        },
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self._stop_early()
        super().__post_init__()
        positive(self, "max_length", "num_heads")
        one_of(self, "score_turns", ("last", "all"))
        _ = self.pair_rules  # an error for a wrong choice
        if self.objectives is not None and len(set(self.objectives)) != max(len(self.objectives), 1):
            raise ValueError(f"objectives={self.objectives} must be names of columns, each once")
        if self.objectives and self.num_heads > 1:
            raise ValueError(
                f"num_heads={self.num_heads} with objectives={self.objectives}: these have one head each; for an "
                "ensemble of them, train several models"
            )

    def _stop_early(self) -> None:
        positive(self, "early_stopping_patience")
        self.load_best_model_at_end = True
        self.metric_for_best_model = self.metric_for_best_model or "loss"
        self.restore_callback_states_from_checkpoint = True  # how long there was nothing better
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_strategy = "epoch"
        self.save_strategy = self.eval_strategy
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "steps":
            self.save_steps = self.logging_steps if self.eval_steps is None else self.eval_steps

    @property
    def num_labels(self) -> int:
        """Heads of the model."""
        return len(self.objectives or []) or self.num_heads

    @property
    def reward_settings(self) -> RewardSettings:
        """What the model's folder will say of its heads."""
        if self.objectives:
            return RewardSettings("objectives", list(self.objectives), self.score_turns)
        if self.num_heads > 1:
            return RewardSettings("ensemble", [f"head_{i}" for i in range(self.num_heads)], self.score_turns)
        return RewardSettings(turns=self.score_turns)


@dataclass
class ProcessRewardConfig(TrainingArguments):
    """A process reward model on steps that are labelled right or wrong."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens; a longer one is an error."})
    step_separator: str = field(
        default="\n",
        metadata={"help": "What stands between the steps, and parts a response into steps when it is scored."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length")
        if not self.step_separator:
            raise ValueError("step_separator: empty, wanted what stands between steps, such as '\\n'")
