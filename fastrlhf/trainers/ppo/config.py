"""The arguments of PPO: `transformers.TrainingArguments` plus what the algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from fastrlhf.rewards.combine import ENSEMBLES
from fastrlhf.rollout import ENGINES
from fastrlhf.trainers.config import LM_HEAD_HELP, LM_HEADS, one_of, positive

ADVANTAGE_ESTIMATORS = ("gae", "rloo", "grpo", "reinforce++")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
CHOICES = {
    "advantage_estimator": ADVANTAGE_ESTIMATORS,
    "gae_mask_mode": ("carry", "zero", "none"),
    "kl_controller": ("fixed", "adaptive", "uncertainty"),
    "kl_estimator": KL_ESTIMATORS,
    "kl_loss_estimator": KL_ESTIMATORS,
    "lm_head": LM_HEADS,
    "loss_aggregation": AGGREGATIONS,
    "ratio_level": ("token", "sequence"),
    "reward_ensemble": ("none", *ENSEMBLES),
    "reward_normalization": ("none", "batch", "group", "running"),
    "rollout_engine": ENGINES,
    "rollout_weight_mode": ("truncate", "mask", "sequence_mask"),
}


@dataclass
class PPOConfig(TrainingArguments):
    """PPO on a language model (Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022), and its critic-free kin.

    One training step is one PPO iteration: a rollout of `rollout_batch_size` responses on each device, then
    `num_ppo_epochs` passes over it in `num_mini_batches` optimiser steps each. Gradients accumulate over a mini-batch
    by themselves, `per_device_train_batch_size` responses or `max_tokens_per_micro_batch` tokens at a time.
    """

    # The rollout
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many PPO iterations."})
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Responses sampled per iteration and device; 64 when not given or, with "
            "gradient_accumulation_steps, per_device_train_batch_size x gradient_accumulation_steps."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Responses to each prompt: a group."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Responses in the whole training, on all devices; sets max_steps, rounded up."},
    )
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
            "trainer's probability to the engine's, bounded by this as rollout_weight_mode says. Old log-probs then "
            "come from a forward of the trainer; without it, from the engine."
        },
    )
    rollout_weight_mode: Literal["truncate", "mask", "sequence_mask"] = field(
        default="truncate",
        metadata={
            "help": "truncate holds the ratios at rollout_weight_clip (Yao et al. 2025); mask leaves out tokens whose "
            "ratio is above it or below its inverse; sequence_mask leaves out responses whose product of ratios is."
        },
    )

    # The reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each when not given."}
    )
    reward_normalization: Literal["none", "batch", "group", "running"] = field(
        default="none",
        metadata={
            "help": "Scores divided by their standard deviation after subtracting their mean: over this iteration, "
            "over the responses to a prompt, or over all iterations so far."
        },
    )
    normalize_each_reward: bool = field(
        default=False,
        metadata={
            "help": "reward_normalization of each reward function's scores, before they are weighted and summed."
        },
    )
    reward_ensemble: Literal["none", "mean", "min", "mean-std"] = field(
        default="none",
        metadata={
            "help": "All reward models, and all of their heads, as one score: their mean, their least, or their mean "
            "less reward_std_coef standard deviations (Coste et al. 2023). With none, each is a reward of its own."
        },
    )
    reward_std_coef: float = field(
        default=1.0, metadata={"help": "Standard deviations that reward_ensemble=mean-std takes off the mean."}
    )
    calibrated_rewards: bool = field(
        default=False,
        metadata={"help": "Reward models give log-odds, by the temperature fitted on held-out pairs."},
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Holds normalised scores within plus and minus this."}
    )
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Token rewards (score and KL penalty) to variance 1, their mean left where it is."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a response that did not end by itself."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the score of a response, times its share of response_length."}
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a reward function is held to hang; no limit when not given."},
    )
    reward_retries: int = field(
        default=0, metadata={"help": "How many times a reward function that raised or hung is called again."}
    )

    # The KL to the reference
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the per-token KL penalty in the reward."})
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = field(
        default="k1", metadata={"help": "Estimator of the per-token KL in the reward (Schulman 2020)."}
    )
    kl_controller: Literal["fixed", "adaptive", "uncertainty"] = field(
        default="fixed",
        metadata={
            "help": "adaptive moves kl_coef until the KL of a response is kl_target (Ziegler et al. 2019); uncertainty "
            "moves it in proportion to the disagreement of an ensemble of reward models."
        },
    )
    kl_target: float = field(default=6.0, metadata={"help": "KL of a response, in nats, that the controller aims at."})
    kl_horizon: int = field(
        default=10_000,
        metadata={
            "help": "Responses within which the adaptive controller moves kl_coef by a fifth at most, and over which "
            "the uncertainty controller averages."
        },
    )
    kl_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference in the loss."})
    kl_loss_estimator: Literal["k1", "k2", "k3", "abs"] = field(
        default="k3", metadata={"help": "Estimator of the KL in the loss."}
    )

    # Advantages
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = field(
        default="gae",
        metadata={
            "help": "gae has a value function; rloo, grpo and reinforce++ have none: rloo and grpo compare the "
            "num_generations responses to a prompt, reinforce++ whitens the returns over the batch."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    gae_mask_mode: Literal["carry", "zero", "none"] = field(
        default="carry",
        metadata={
            "help": "Tokens in a response that the policy did not sample (tool output): carry skips them, zero gives "
            "them reward and value 0, none takes them like the others. They are never trained on."
        },
    )
    whiten_advantages: bool | None = field(
        default=None,
        metadata={
            "help": "Advantages to mean 0 and variance 1, over all devices; when not given, for gae and reinforce++."
        },
    )

    # The loss
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in each pass over a rollout."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    cliprange_high: float | None = field(
        default=None, metadata={"help": "Its upper part, where that is another (clip-higher, Yu et al. 2025)."}
    )
    dual_clip: float | None = field(
        default=None,
        metadata={"help": "Bounds the loss of a token with a negative advantage A by this times |A| (Ye et al. 2020)."},
    )
    ratio_level: Literal["token", "sequence"] = field(
        default="token", metadata={"help": "sequence takes one ratio for a whole response (GSPO, Zheng et al. 2025)."}
    )
    loss_aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        field(
            default="token-mean",
            metadata={
                "help": "How tokens make a loss: mean over a mini-batch's tokens; mean over responses of their sums "
                "or means; or that of their sums divided by response_length (Liu et al. 2025)."
            },
        )
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Clip range of the value's change; None, in Python, does not clip."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "First iterations, in which the value function alone is trained."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Ends an iteration's updates once the policy's KL to the one that sampled is above this, in "
            "nats a token."
        },
    )

    # Batches and memory
    padding_free: bool = field(
        default=True,
        metadata={"help": "Forward passes on sequences one after the other, without padding; False pads."},
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in one forward and backward, each response counted with its prompt, in place of "
            "per_device_train_batch_size: long and short responses then fill micro-batches evenly."
        },
    )
    num_frozen_layers: int = field(
        default=0,
        metadata={
            "help": "Layers from the bottom, with the embeddings, that are not trained; policy and reference have "
            "them in memory once, and run them once a rollout."
        },
    )
    offload_models: bool = field(
        default=False, metadata={"help": "Reference and reward models stay in the CPU's memory while not at work."}
    )
    lm_head: Literal["fused", "logits"] = field(default="fused", metadata={"help": LM_HEAD_HELP})

    # Guards and reports
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "Iterations in a row that may be skipped because a reward, a loss or a gradient is not finite or a "
            "reward function failed; one more ends the training, with the batch on disk."
        },
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "KL of a response to the reference, in nats, above which training stops."}
    )
    log_completions_steps: int = field(
        default=0, metadata={"help": "Show a table of responses and their rewards every so many iterations; 0: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_rollout_batch_size()
        positive(
            self,
            *("rollout_batch_size", "num_generations", "num_ppo_epochs", "num_mini_batches", "max_prompt_length"),
            *("response_length", "temperature", "kl_target", "kl_horizon"),
        )
        for name in (
            *("total_episodes", "rollout_weight_clip", "reward_clip", "reward_timeout", "target_kl", "max_kl"),
            *("max_tokens_per_micro_batch", "cliprange_value", "cliprange_high"),
        ):
            if getattr(self, name) is not None:
                positive(self, name)
        for name in ("reward_retries", "critic_warmup_steps", "num_frozen_layers", "max_skipped_steps"):
            _at_least_0(self, name)
        for name in ("log_completions_steps", "reward_std_coef"):
            _at_least_0(self, name)
        for name, choices in CHOICES.items():
            one_of(self, name, choices)
        self._check_combinations()
        # Every iteration has rollout_batch_size responses; prompts left over at an epoch's end wait for the next.
        self.dataloader_drop_last = True
        if self.total_episodes is not None:
            self.max_steps = -(-self.total_episodes // (self.rollout_batch_size * self.world_size))

    def _set_rollout_batch_size(self) -> None:
        """gradient_accumulation_steps is understood as TRL's PPO did; the Trainer's own accumulation has no part."""
        accumulated = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.rollout_batch_size is None:
            self.rollout_batch_size = accumulated if self.gradient_accumulation_steps > 1 else 64
        elif self.gradient_accumulation_steps > 1 and self.rollout_batch_size != accumulated:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} contradict each other: the latter makes it "
                f"per_device_train_batch_size x gradient_accumulation_steps = {accumulated}. Give one of "
                "the two"
            )
        self.gradient_accumulation_steps = 1

    def _check_combinations(self) -> None:
        size, mini_batches = self.rollout_batch_size, self.num_mini_batches
        if size % mini_batches:
            raise ValueError(f"rollout_batch_size={size} must be a multiple of num_mini_batches={mini_batches}")
        if self.max_tokens_per_micro_batch is None and self.mini_batch_size % self.micro_batch_size:
            raise ValueError(
                f"rollout_batch_size={size} must be a multiple of num_mini_batches={mini_batches} times "
                f"per_device_train_batch_size={self.per_device_train_batch_size}"
            )
        if size % self.num_generations:
            raise ValueError(f"rollout_batch_size={size} must be a multiple of num_generations={self.num_generations}")
        grouped = {
            "advantage_estimator": self.advantage_estimator in ("rloo", "grpo"),
            "reward_normalization": self.reward_normalization == "group",
        }
        for name, needs_groups in grouped.items():
            if needs_groups and self.num_generations == 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} compares the responses to a prompt: num_generations=1 must be "
                    "at least 2"
                )
        if self.rollout_server is not None and self.rollout_engine != "vllm":
            raise ValueError(f"rollout_server={self.rollout_server!r} needs rollout_engine='vllm'")
        if self.rollout_weight_mode != "truncate" and self.rollout_weight_clip is None:
            raise ValueError(f"rollout_weight_mode={self.rollout_weight_mode!r} needs rollout_weight_clip")
        if self.rollout_weight_mode != "truncate" and self.rollout_weight_clip < 1:
            raise ValueError(f"rollout_weight_clip={self.rollout_weight_clip} must be at least 1 to mask by")
        if self.advantage_estimator != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps}: advantage_estimator={self.advantage_estimator!r} has "
                "no value function"
            )
        if self.whiten_rewards and self.advantage_estimator in ("rloo", "grpo"):
            raise ValueError(
                f"whiten_rewards=True: advantage_estimator={self.advantage_estimator!r} has no token rewards"
            )
        if self.num_frozen_layers and self.fsdp:
            raise ValueError(
                f"num_frozen_layers={self.num_frozen_layers}: fsdp shards layers, which cannot be shared then"
            )
        if self.num_frozen_layers and self.offload_models:
            raise ValueError(
                f"num_frozen_layers={self.num_frozen_layers}: offload_models would take shared layers off the device"
            )
        if self.max_kl is not None and self.save_total_limit == 1:
            raise ValueError(
                "save_total_limit=1 must be at least 2 with max_kl: the last checkpoint may be of weights that diverged"
            )
        if self.kl_controller != "fixed" and self.kl_coef <= 0:
            raise ValueError(
                f"kl_coef={self.kl_coef} must be greater than 0 for kl_controller={self.kl_controller!r}, a factor on "
                "it"
            )
        if self.normalize_each_reward and self.reward_normalization == "none":
            raise ValueError("normalize_each_reward=True needs a reward_normalization other than none")

    @property
    def mini_batch_size(self) -> int:
        """Responses of an optimiser step, on each device."""
        return self.rollout_batch_size // self.num_mini_batches

    @property
    def micro_batch_size(self) -> int:
        """Responses in one forward and backward: per_device_train_batch_size, at most a mini-batch."""
        return min(self.per_device_train_batch_size, self.mini_batch_size)

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is None:
            return self.advantage_estimator in ("gae", "reinforce++")
        return self.whiten_advantages


def _at_least_0(args: PPOConfig, name: str) -> None:
    if getattr(args, name) < 0:
        raise ValueError(f"{name}={getattr(args, name)} must be at least 0")
