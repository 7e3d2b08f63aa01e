"""The arguments of PPO: `transformers.TrainingArguments` plus what the algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from fastrlhf.rollout import ENGINES
from fastrlhf.trainers.config import LM_HEAD_HELP, LM_HEADS, one_of, positive


@dataclass
class PPOConfig(TrainingArguments):
    """PPO on a language model (Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022).

    One training step is one PPO iteration: a rollout of `rollout_batch_size` responses on each device, then
    `num_ppo_epochs` passes over it in `num_mini_batches` optimiser steps each. A forward and backward takes
    `per_device_train_batch_size` responses at a time; gradients accumulate over a mini-batch by themselves, so
    `gradient_accumulation_steps` stays 1.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many PPO iterations."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Responses sampled per iteration and device."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in each pass over a rollout."})
    max_prompt_length: int = field(
        default=512, metadata={"help": "Longest prompt in tokens; a longer one is an error, not cut in silence."}
    )
    response_length: int = field(default=128, metadata={"help": "Most tokens of a response."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the log-probs in the loss."})
    rollout_engine: Literal["native", "transformers", "vllm"] = field(
        default="native",
        metadata={
            "help": "What samples the responses: native decodes with kernels of fastrlhf, transformers calls the "
            "model's generate, for architectures that native does not know, vllm needs the package vllm."
        },
    )
    rollout_server: str | None = field(
        default=None,
        metadata={
            "help": "URL of the vLLM server that rollout_engine=vllm uses; without one, vLLM runs in the trainer."
        },
    )
    rollout_weight_clip: float | None = field(
        default=None,
        metadata={
            "help": "For an engine whose numerics are not the trainer's: weigh each token's loss by the ratio of the "
            "trainer's probability to the engine's, at most this (truncated importance sampling, Yao et al. 2025). "
            "Old log-probs then come from a forward of the trainer; without it, from the engine."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each when not given."}
    )
    reward_normalization: Literal["none", "batch", "running"] = field(
        default="none",
        metadata={
            "help": "Scores divided by their standard deviation after subtracting their mean: over this batch, or "
            "over all batches so far."
        },
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the per-token KL penalty in the reward."})
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = field(
        default="k1", metadata={"help": "Estimator of the per-token KL (Schulman 2020)."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Advantages to mean 0 and variance 1."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value's change."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    lm_head: Literal["fused", "logits"] = field(default="fused", metadata={"help": LM_HEAD_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self,
            "rollout_batch_size",
            "num_ppo_epochs",
            "num_mini_batches",
            "max_prompt_length",
            "response_length",
            "temperature",
        )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} must be 1 in PPOConfig: gradients "
                "accumulate over each mini-batch in pieces of per_device_train_batch_size. Set rollout_batch_size, "
                "num_mini_batches and per_device_train_batch_size instead."
            )
        # Every iteration has rollout_batch_size prompts; what is left over at the end of an epoch waits for the next.
        self.dataloader_drop_last = True
        mini_batch_size, rest = divmod(self.rollout_batch_size, self.num_mini_batches)
        if rest or mini_batch_size % self.micro_batch_size:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} must be a multiple of num_mini_batches="
                f"{self.num_mini_batches} times per_device_train_batch_size={self.per_device_train_batch_size}"
            )
        one_of(self, "reward_normalization", ("none", "batch", "running"))
        one_of(self, "kl_estimator", ("k1", "k2", "k3", "abs"))
        one_of(self, "lm_head", LM_HEADS)
        one_of(self, "rollout_engine", ENGINES)
        if self.rollout_server is not None and self.rollout_engine != "vllm":
            raise ValueError(f"rollout_server={self.rollout_server!r} needs rollout_engine='vllm'")
        if self.rollout_weight_clip is not None:
            positive(self, "rollout_weight_clip")

    @property
    def micro_batch_size(self) -> int:
        """Responses in one forward and backward: per_device_train_batch_size, at most a mini-batch."""
        return min(self.per_device_train_batch_size, self.rollout_batch_size // self.num_mini_batches)
