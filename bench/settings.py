"""Where the benchmarks run, and how large their inputs are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LongTail:
    """Responses whose lengths vary widely."""

    prompts: int = 128
    batch: int = 32
    least: int = 16  # tokens of a response
    most: int = 256


@dataclass(frozen=True)
class Rollouts:
    model: str = "SmolLM2-135M-Instruct"  # a name in decoding_models.py
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 32  # tokens
    new_tokens: int = 64
    long_tail: LongTail | None = field(default_factory=LongTail)
    samples: tuple[tuple[int, int], ...] = ((32, 49_152), (8, 151_936))  # rows x vocabulary
    product: int = 2048  # rows and columns of the matrices whose product shows the peak
    seconds: float = 8.0  # for each contender in a row of decoding: a call may take some


@dataclass(frozen=True)
class PPO:
    model: str = "SmolLM2-135M-Instruct"
    prompts: int = 16  # of an iteration
    prompt: int = 16  # tokens
    response: int = 32
    epochs: int = 4
    micro_batch: int = 4  # responses, of TRL
    turns: int = 2  # of every contender
    long: tuple[int, int] = (8, 512)  # responses x tokens, where memory is looked at
    attention: str = "eager"  # torch's fused one has a backward that is slow on short texts

    @property
    def stock(self) -> int:
        """Prompts of the data set: more than two iterations take, for at the end of an epoch of the data TRL makes an
        optimiser step after every micro-batch."""
        return 4 * self.prompts


@dataclass(frozen=True)
class Training:
    """A random model with a large vocabulary, as fastrlhf.compat is tried on."""

    vocabulary: int = 49_152
    hidden: int = 128
    layers: int = 2
    sequences: int = 8  # of a step
    length: int = 128  # tokens
    steps: int = 5
    turns: int = 2  # of every process


@dataclass(frozen=True)
class Pairs:
    model: str = "SmolLM2-135M-Instruct"
    pairs: int = 8  # of a step
    prompt: int = 32  # tokens
    least: int = 16  # tokens of a completion
    most: int = 96
    steps: int = 3  # of every process; the first one warms up
    turns: int = 2  # of every contender
    # Of TRL, its faster one here, by the dtype of the products: torch's fused attention or the plain one. (Steps of
    # reward models and DPO in bf16: 5.7 and 12.2 s or 4.4 and 10.8 s; of reward models in fp32 9.8 or 10.4 s, under
    # autocast 5.9 or 5.1 s.)
    attention: dict[str, str] = field(default_factory=lambda: {"fp32": "sdpa", "bf16": "eager"})


@dataclass(frozen=True)
class Scoring:
    """Texts of reward models and judges: every two of the answers to a prompt make a pair."""

    model: str = "SmolLM2-135M-Instruct"
    prompts: int = 8
    prompt: int = 48  # tokens
    answers: int = 4  # to each prompt
    answer: int = 48  # tokens, in the mean


@dataclass(frozen=True)
class Setting:
    device: str = "cpu"
    rows: int = 512  # of logits
    vocabularies: tuple[int, ...] = (49_152, 151_936)
    batches: tuple[tuple[int, int], ...] = ((512, 1024), (4096, 2048))  # sequences x tokens
    small: tuple[int, int] = (16, 128)
    small_calls: int = 200
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    seconds: float = 2.0  # for each contender in a row
    # tokens x hidden size x vocabulary
    lm_heads: tuple[tuple[int, int, int], ...] = ((4096, 576, 49_152), (512, 2048, 32_000))
    lm_heads_of_ppo: tuple[tuple[int, int, int], ...] = ()  # for the row of the PPO loss alone
    # tokens x hidden size x size between the MLP's products x heads
    layers: tuple[tuple[int, int, int, int], ...] = ((768, 576, 1536, 9), (4096, 2048, 8192, 32))
    rollouts: Rollouts = field(default_factory=Rollouts)
    ppo: PPO = field(default_factory=PPO)
    training: Training = field(default_factory=Training)
    dpo: Pairs = field(default_factory=Pairs)
    reward: Pairs = field(default_factory=Pairs)
    scoring: Scoring = field(default_factory=Scoring)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


FULL = {
    "cpu": Setting(),
    "cuda": Setting(
        "cuda",
        rows=8192,
        vocabularies=(151_936,),
        batches=((64, 1024), (512, 1024)),
        dtypes=("bf16",),
        seconds=1.0,
        lm_heads=((4096, 4096, 131_072),),
        lm_heads_of_ppo=((8192, 4096, 151_936),),
        rollouts=Rollouts("Qwen2-0.5B", (1, 8, 64, 256), long_tail=None, product=8192, seconds=2.0),
    ),
}
QUICK = {
    device: Setting(
        *(device, 32, (49_152,), ((32, 128),), (16, 128), 20, FULL[device].dtypes, 0.05, ((64, 128, 8192),)),
        layers=((64, 64, 128, 2),),
        rollouts=replace(
            FULL[device].rollouts,
            batches=(1, 8),
            new_tokens=4,
            long_tail=LongTail(8, 4, 2, 8),
            samples=((8, 49_152),),
            product=512,
            seconds=0.0,
        ),
        ppo=PPO(prompts=4, prompt=4, response=4, epochs=2, micro_batch=2, turns=1, long=(2, 16)),
        training=Training(sequences=4, length=16, turns=1),
        dpo=Pairs(pairs=2, prompt=4, least=2, most=6, steps=2, turns=1),
        reward=Pairs(pairs=2, prompt=4, least=2, most=6, steps=2, turns=1),
        scoring=Scoring(prompts=2, prompt=4, answers=2, answer=4),
    )
    for device in FULL
}
TINY = Setting(
    rows=4,
    vocabularies=(1000,),
    batches=((4, 24),),
    small=(2, 8),
    small_calls=2,
    seconds=0.0,
    lm_heads=((12, 8, 100),),
    lm_heads_of_ppo=((6, 8, 50),),
    layers=((6, 16, 24, 2),),
    rollouts=Rollouts("tiny", (1, 3), 5, 4, LongTail(6, 2, 2, 6), ((3, 1000),), 16, 0.0),
    ppo=PPO("tiny", 4, 4, 4, 2, 2, 1, (2, 8)),
    training=Training(300, 32, 2, 4, 16, 5, 1),
    dpo=Pairs("tiny", 2, 4, 2, 6, 2, 1),
    reward=Pairs("tiny", 2, 4, 2, 6, 2, 1),
    scoring=Scoring("tiny", 2, 4, 2, 4),
)


def generator(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(0)


def sizes(*shape: int) -> str:
    return " × ".join(map(str, shape))
