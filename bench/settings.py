"""Where the benchmarks run, and how large their inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    ),
}
QUICK = {
    device: Setting(device, 32, (49_152,), ((32, 128),), (16, 128), 20, FULL[device].dtypes, 0.05, ((64, 128, 8192),))
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
)


def generator(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(0)


def sizes(*shape: int) -> str:
    return " × ".join(map(str, shape))
