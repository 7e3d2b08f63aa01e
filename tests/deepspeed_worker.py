"""What each of two processes does (gloo, CPU) for test_deepspeed: all checks in one start, results in a file.

Run as `deepspeed_worker.py RANK PORT FOLDER`, with DeepSpeed on its path.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from distributed_worker import RANKS, TEXTS, ranks, steps_of
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fastrlhf.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastrlhf.trainers.sharding import whole_weights


def configuration(stage: int, **options: Any) -> dict[str, Any]:
    """DeepSpeed's."""
    zero = {"stage": stage}
    if stage == 3:  # or weights as small as these would not be sharded
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {**auto, "zero_optimization": zero, **options}


def arguments(kind: type[TrainingArguments], folder: Path, **options: Any) -> TrainingArguments:
    """Of four small steps, with a checkpoint after the third; under DeepSpeed in the stage of the folder's name."""
    stage = next((stage for stage in (1, 2, 3) if f"zero {stage}" in folder.name), None)
    AcceleratorState._reset_state()
    return kind(
        str(folder),
        learning_rate=0.01,
        warmup_steps=1,
        adam_epsilon=1e-3,  # the first steps are not by the sign of a gradient that is rounding
        max_grad_norm=0.5,
        max_steps=4,
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"deepspeed": configuration(stage) if stage else None, **options},
    )


def sft(models: Path, output: Path, **options: Any) -> SFTTrainer:
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"]) if "lora" in output.name else None
    return SFTTrainer(
        str(models / ("tied" if "tied" in output.name else "model")),
        arguments(SFTConfig, output, **{"per_device_train_batch_size": 8 // ranks(), **options}),
        Dataset.from_dict({"text": TEXTS}),
        peft_config=lora,
    )


PAIRS = {
    "chosen": [" ".join([text] * (1 + i)) for i, text in enumerate(TEXTS)],
    "rejected": [text[::-1] for text in TEXTS],
    "margin": [0.1 * i for i in range(len(TEXTS))],
}


def reward(models: Path, output: Path, **options: Any) -> RewardTrainer:
    return RewardTrainer(
        str(models / "value"),
        arguments(RewardConfig, output, **{"per_device_train_batch_size": 8 // ranks(), **options}),
        Dataset.from_dict(PAIRS),
    )


class Faulty(PPOTrainer):
    """The loss of the second iteration's last mini-batch is not a number."""

    def update(self, *args: Any) -> tuple[Tensor, list[Any]]:
        loss, stats = super().update(*args)
        self.updates = getattr(self, "updates", 0) + 1
        return loss * torch.nan if self.updates == 4 else loss, stats


def letters(responses: list[list[str]], prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    responses.append(completions)
    return [float(sum(map(str.isalpha, completion))) for completion in completions]


PPO_OPTIONS: dict[str, dict[str, Any]] = {
    "value head": {"reward_normalization": "batch"},
    "value model": {"reward_normalization": "running", "kl_controller": "adaptive", "kl_target": 0.01},
    "lora": {"reward_normalization": "running", "max_tokens_per_micro_batch": 40},
    "target_kl": {"target_kl": 1e-6, "save_strategy": "no"},
    "faulty": {"save_strategy": "no"},
    "transformers engine": {"rollout_engine": "transformers", "save_strategy": "no"},
}


def ppo(models: Path, output: Path, **options: Any) -> PPOTrainer:
    name = next(name for name in PPO_OPTIONS if name in output.name)
    options = {"per_device_train_batch_size": 2, "num_ppo_epochs": 2, **PPO_OPTIONS[name], **options}
    responses: list[list[str]] = []
    trainer = (Faulty if name == "faulty" else PPOTrainer)(
        str(models / "model"),
        arguments(PPOConfig, output, rollout_batch_size=8 // ranks(), response_length=6, **options),
        partial(letters, responses),
        Dataset.from_dict({"prompt": TEXTS}),
        value_model=str(models / "value") if name == "value model" else None,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]) if name == "lora" else None,
    )
    trainer.responses = responses
    return trainer


BF16 = {"bf16": True}
RUNS: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
    "sft, zero 1": (sft, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "sft, zero 2, bf16": (sft, BF16),
    "sft, zero 3, tied": (sft, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "sft, zero 3, bf16": (sft, BF16),
    "reward, zero 3": (reward, {}),
    "ppo, zero 1, value head": (ppo, {}),
    "ppo, zero 2, lora": (ppo, {}),
    "ppo, zero 2, bf16, value head": (ppo, BF16),
    "ppo, zero 2, faulty": (ppo, {}),
    "ppo, zero 2, target_kl": (ppo, {}),
    "ppo, zero 3, value head": (ppo, {}),
    "ppo, zero 3, value model": (ppo, {}),
    "ppo, zero 3, lora": (ppo, {}),
    "ppo, zero 3, faulty": (ppo, {}),
    "ppo, zero 3, target_kl": (ppo, {}),
    "ppo, zero 3, transformers engine": (ppo, {}),
}
RESUMED = [name for name in RUNS if not any(part in name for part in ("faulty", "target_kl", "engine"))]


def alone(name: str) -> str:
    """The run of one process that it is to be as good as."""
    kind, _, *parts = name.split(", ")
    return ", ".join([kind, "alone", *(part for part in parts if part != "bf16")])


def run(models: Path, name: str, resume: bool = False) -> Trainer:
    """A trainer that has trained, from the start or from its checkpoint."""
    build, options = RUNS.get(name, (globals()[name.split(", ")[0]], {}))
    trainer = build(models, models / name, **options)
    trainer.train(resume_from_checkpoint=str(models / name / "checkpoint-3") if resume else None)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    module = trainer.accelerator.unwrap_model(trainer.model)
    with whole_weights(module, trainer.accelerator):
        return {name: p.detach().float().clone() for name, p in module.named_parameters()}


def results(models: Path, name: str) -> dict[str, Any]:
    trainer = run(models, name)
    found = {
        "weights": weights(trainer),
        "log": steps_of(trainer),
        "numel": sum(p.numel() for p in trainer.model.parameters()),  # of this rank, between forwards
        "responses": getattr(trainer, "responses", None),
    }
    trainer.save_model(str(models / name / "final"))
    if not name.startswith("ppo"):
        found["eval_loss"] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    if dist.is_initialized() and name in RESUMED:
        again = run(models, name, resume=True)
        found |= {"resumed": weights(again), "resumed_log": steps_of(again)[-1:]}
    if hasattr(trainer, "_stateful"):
        found["state"] = {kind: part.state_dict() for kind, part in trainer._stateful().items()}
    return found


def dpo(models: Path, output: Path, **options: Any) -> DPOTrainer:
    pairs = {"prompt": ["the"] * len(TEXTS), "chosen": TEXTS, "rejected": PAIRS["rejected"]}
    return DPOTrainer(str(models / "model"), arguments(DPOConfig, output, **options), Dataset.from_dict(pairs))


REFUSED: dict[str, tuple[Callable[..., Trainer], dict[str, Any], dict[str, Any]]] = {
    "DPOTrainer was never run on DeepSpeed": (dpo, {}, {}),
    "stage=0 shards nothing": (sft, {}, {"zero_optimization": {"stage": 0}}),
    "leave optimizer out": (sft, {}, {"optimizer": {"type": "AdamW"}}),
    "leave scheduler out": (sft, {}, {"scheduler": {"type": "WarmupLR"}}),
    "offload_optimizer": (sft, {}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "grad_accum_dtype": (sft, {}, {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "fp16 was never tried": (sft, {}, {"fp16": {"enabled": True}}),
    "critic_warmup_steps=1": (ppo, {"critic_warmup_steps": 1}, {}),
    "num_frozen_layers=1": (ppo, {"num_frozen_layers": 1}, {}),
}


def refusals(models: Path) -> dict[str, str]:
    """What is said of configurations with which training would not be as asked."""
    messages = {}
    for name, (build, options, config) in REFUSED.items():
        try:
            build(models, models / "refused, value head", deepspeed=configuration(3) | config, **options)
        except ValueError as error:
            messages[name] = str(error)
    args = arguments(SFTConfig, models / "zero 3")
    model = AutoModelForCausalLM.from_pretrained(models / "model")
    try:
        SFTTrainer(model, args, Dataset.from_dict({"text": TEXTS}))
    except ValueError as error:
        messages["sharded by ZeRO 3 while it was loaded"] = str(error)
    return messages


def main(rank: int, port: int, models: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles something to go past gloo
    gc.freeze()  # it collects garbage often, and what was imported is none
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {name: results(models, name) for name in RUNS}
    torch.save({**found, "refusals": refusals(models)}, models / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
