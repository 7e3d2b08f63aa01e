"""The arguments of `fastrlhf judge` and `fastrlhf constitutional`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class WriterArguments:
    """The model, and how it writes."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder of the language model."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Type of the weights; auto takes the type they were saved in."}
    )
    dataset: str = field(
        default="", metadata={"help": "Hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz)."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration, for data sets that have several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split; train[:1000] takes a part."})
    output_dir: str = field(
        default="runs/feedback", metadata={"help": "Where the records go; the same command goes on from there."}
    )
    response_length: int = field(default=128, metadata={"help": "Most tokens of a text that is written."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling: the fewest tokens with this mass."})
    batch_size: int = field(default=16, metadata={"help": "Rows that are worked on, and then written, together."})
    seed: int = field(default=0, metadata={"help": "Of all random numbers."})

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset: none given")
        for name in ("response_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass
class JudgeArguments(WriterArguments):
    """Pairs of answers, and which of each two is the better one."""

    judge_function: str | None = field(
        default=None,
        metadata={
            "help": "In place of the model: f(prompts, firsts, seconds, questions) -> probabilities that the first is "
            "better, None for neither; as package.module:function or file.py:function."
        },
    )
    question: str = field(default="", metadata={"help": "What the judge is asked of the two answers."})
    principles: str | None = field(
        default=None,
        metadata={"help": "YAML file of principles, one of whose questions is drawn for each pair; or `default`."},
    )
    min_mass: float = field(
        default=0.1, metadata={"help": "Least probability of A and B together; below it the verdict is neither."}
    )
    tie_threshold: float = field(default=0.02, metadata={"help": "A probability so near to 1/2 is a tie."})
    keep_ties: bool = field(default=False, metadata={"help": "Ties are among the preferences, marked `tie`."})
    policy: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model that answers prompts without answers."}
    )
    num_responses: int = field(default=2, metadata={"help": "Answers of the policy to each prompt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.judge_function is None):
            raise ValueError("give one judge: model (a language model) or judge_function (file.py:function)")
        if self.question and self.principles:
            raise ValueError("question and principles: the latter bring their own questions; give one of the two")
        if self.num_responses < 2:
            raise ValueError(f"num_responses={self.num_responses} must be at least 2")


@dataclass
class ConstitutionalArguments(WriterArguments):
    """Answers of a model, and their revisions by principles."""

    principles: str | None = field(
        default=None, metadata={"help": "YAML file of principles; those that come with fastrlhf when not given."}
    )
    rounds: int = field(default=1, metadata={"help": "Critiques and revisions of each answer, one after the other."})
    judge_revisions: bool = field(
        default=False, metadata={"help": "Keep the pairs alone whose revision the model, as a judge, finds better."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise ValueError("model: none given")
