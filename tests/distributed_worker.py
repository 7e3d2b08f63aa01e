"""What each of two processes does (gloo, CPU) for test_distributed: all checks in one start, results in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastrlhf import functional as F
from fastrlhf.rollout import SamplingParams, create_engine
from fastrlhf.rollout.vllm_engine import checkpoint_weights
from fastrlhf.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    ProcessRewardConfig,
    ProcessRewardTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastrlhf.trainers.reductions import (
    any_rank,
    gather_varying,
    global_advantage_stats,
    max_over_ranks,
    mean_over_ranks,
)
from fastrlhf.trainers.sharding import whole_weights

RANKS = 2
TEXTS = [
    "the good film",
    "a bad film was bad , bad , bad",
    "hello",
    "Human: hi and so on",
    "hi",
    "the film was",
    "so so good",
    "user: not bad",
] * 2


def rollouts() -> list[tuple[torch.Tensor, ...]]:
    """Of a rank each, scores, log-probs, reference log-probs, values and mask: 3 of up to 7 tokens, 2 of 4."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for lengths, width in (((7, 2, 5), 7), ((1, 4), 4)):
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()
        log_probs, reference, values = (torch.randn(len(lengths), width, generator=generator) for _ in range(3))
        results.append((torch.randn(len(lengths), generator=generator), log_probs, reference, values + 3, mask))
    return results


def reductions(rank: int, folder: Path) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    rollout = rollouts()[rank]
    target = F.rollout_advantages(*rollout, kl_coef=0.1)
    nothing = torch.zeros(0, 2)
    return {
        "rows": gather_varying(torch.arange(6.0).view(3, 2)[: 1 + 2 * rank] + 10 * rank, accelerator),
        "some": gather_varying(torch.ones(2, 2) if rank else nothing, accelerator),
        "none": gather_varying(nothing, accelerator),
        "stats": global_advantage_stats(target.advantage_stats, target.advantages, rollout[-1], accelerator),
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (rank + 1), accelerator),
        "any": [any_rank(flag, accelerator) for flag in (False, rank == 1, True)],
        "max": max_over_ranks(3 - rank, accelerator),
    }


def arguments(kind: type[TrainingArguments], folder: Path, **options: Any) -> TrainingArguments:
    """Of four small steps in two epochs, with a checkpoint in the middle of the second."""
    args = kind(
        str(folder),
        learning_rate=0.01,
        warmup_steps=1,
        adam_epsilon=1e-3,  # the first steps are not by the sign of a gradient that is rounding
        max_grad_norm=0.5,
        max_steps=options.pop("max_steps", 4),
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    AcceleratorState._reset_state()
    if dist.is_initialized():
        assert args.device.type == "cpu"
        # accelerate shards over GPUs: it is to think that these are some.
        PartialState._shared_state["distributed_type"] = DistributedType("MULTI_GPU" if args.fsdp else "MULTI_CPU")
    return args


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sft_trainer(models: Path, output: Path, dtype: str = "float32", **options: Any) -> SFTTrainer:
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"]) if "lora" in output.name else None
    return SFTTrainer(
        str(models / ("tied" if "tied" in output.name else "model")),
        arguments(SFTConfig, output, **{"per_device_train_batch_size": 8 // ranks(), **options}),
        Dataset.from_dict({"text": TEXTS}),
        peft_config=lora,
        model_init_kwargs={"dtype": dtype},
    )


def sft(models: Path, output: Path, resume: bool = False, **options: Any) -> SFTTrainer:
    """A trainer that has trained, from the start or from its checkpoint in the middle."""
    trainer = sft_trainer(models, output, **options)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if resume else None)
    if not resume:
        trainer.save_model(str(output / "final"))
    return trainer


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole."""
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in module.named_parameters()}


def steps_of(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged of each."""
    return [record for record in trainer.state.log_history if "loss" in record]


SFT_RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, lora": {},
    "fsdp": {"fsdp": True},
    "fsdp, tied": {"fsdp": True},
    "fsdp, lora": {"fsdp": True},
    "fsdp, accumulated": {"fsdp": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "fsdp, bf16 weights": {"fsdp": True, "dtype": "bfloat16"},
}


def sfts(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, options in SFT_RUNS.items():
        trainer = sft(folder, folder / name, **options)
        results[name] = {
            "weights": weights(trainer.scorer.model),
            "resumed": weights(sft(folder, folder / name, resume=True, **options).scorer.model),
            "log": steps_of(trainer),
            "sharded": {isinstance(p, DTensor) for p in trainer.scorer.parameters()},
            "loss": trainer.evaluate(trainer.train_dataset)["eval_loss"],
        }
    return results


def refusals(rank: int, folder: Path) -> list[str]:
    """What is said of ways to shard that would not do as asked."""
    messages = []
    for kind, config in (("MULTI_GPU", {"state_dict_type": "SHARDED_STATE_DICT"}), ("MULTI_CPU", {})):
        args = arguments(SFTConfig, folder / "refused", fsdp=True, fsdp_config=config)
        PartialState._shared_state["distributed_type"] = DistributedType(kind)
        try:
            SFTTrainer(str(folder / "model"), args, Dataset.from_dict({"text": TEXTS}))
        except ValueError as error:
            messages.append(str(error))
    return messages


def casts(rank: int, folder: Path) -> torch.Tensor:
    """Log-probs by weights in fp32 and products in bf16."""
    trainer = sft(folder, folder / "cast", fsdp=True, bf16=True, max_steps=1, save_strategy="no")
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return trainer.scorer(batch["input_ids"], batch["positions"], batch["labels"])[0]


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
SAMPLING = SamplingParams(12, seed=3)


class Rollouts(TrainerCallback):
    """Before every step, responses to the prompts, more of these on the second rank, and the weights behind them."""

    def __init__(self, trainer: SFTTrainer, rank: int) -> None:
        self.trainer, self.prompts = trainer, PROMPTS[: 1 + 2 * rank]
        model = trainer.scorer.model
        self.engines = [create_engine(kind, model, trainer.processing_class) for kind in ("native", "transformers")]
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        scorer = self.trainer.scorer
        with whole_weights(scorer):
            rollouts = [engine.generate(self.prompts, SAMPLING) for engine in self.engines]
            whole = {type(p) for p in scorer.parameters()}
            exported = {name: x.clone() for name, x in checkpoint_weights(scorer.model).items()}
        sharded = {isinstance(p, DTensor) for p in scorer.parameters()}
        responses = [(rollout.responses, rollout.log_probs) for rollout in rollouts]
        self.steps.append({"responses": responses, "whole": whole, "sharded": sharded, "weights": exported})


def engines(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"prompts": PROMPTS[: 1 + 2 * rank]}
    for name in ("fsdp, tied", "fsdp, lora"):
        trainer = sft_trainer(folder, folder / name, fsdp=True, save_strategy="no")
        rollouts = Rollouts(trainer, rank)
        trainer.add_callback(rollouts)
        trainer.train()
        results[name] = {"steps": rollouts.steps, "weights": weights(trainer.scorer.model)}
        # Outside of whole_weights, tensor by tensor.
        results[name]["exported"] = checkpoint_weights(trainer.scorer.model)
    return results


PPO_RUNS: dict[str, dict[str, Any]] = {
    "value head": {"reward_normalization": "batch"},
    "value model": {"reward_normalization": "running", "kl_controller": "adaptive", "kl_target": 0.01},
    "lora": {"reward_normalization": "running", "max_tokens_per_micro_batch": 40},
    "grpo": {"advantage_estimator": "grpo", "num_generations": 2, "reward_normalization": "group"},
}


def ppo(models: Path, output: Path, resume: bool = False, **options: Any) -> tuple[PPOTrainer, list[list[str]]]:
    """A trainer that has trained, and the responses of each step."""
    name, responses = output.name.removeprefix("ddp, ").removeprefix("fsdp, "), []

    def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        responses.append(completions)
        return [float(sum(map(str.isalpha, completion))) for completion in completions]

    options = {"per_device_train_batch_size": 2, "num_ppo_epochs": 2, **PPO_RUNS[name], **options}
    trainer = PPOTrainer(
        str(models / "model"),
        arguments(PPOConfig, output, rollout_batch_size=8 // ranks(), response_length=6, **options),
        letters,
        Dataset.from_dict({"prompt": TEXTS}),
        value_model=str(models / "value") if name == "value model" else None,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]) if name == "lora" else None,
    )
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if resume else None)
    return trainer, responses


def ppos(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name in PPO_RUNS:
        for way, options in {"ddp": {}, "fsdp": {"fsdp": True}}.items():
            output = folder / f"{way}, {name}"
            trainer, responses = ppo(folder, output, **options)
            again, _ = ppo(folder, output, resume=True, **options)
            results[output.name] = {
                "weights": weights(trainer.scorer),
                "responses": responses,
                "log": steps_of(trainer),
                "state": {kind: part.state_dict() for kind, part in trainer._stateful().items()},
                "sharded": {isinstance(p, DTensor) for p in trainer.scorer.parameters()},
                "resumed": weights(again.scorer),
                "resumed_log": steps_of(again)[-1:],
            }
    return results


DPO_RUNS: dict[str, dict[str, Any]] = {"ddp": {}, "ddp, lora": {}, "fsdp": {"fsdp": True}}


PAIRS = {
    "prompt": TEXTS,
    "chosen": [f" {text}" for text in TEXTS[1:] + TEXTS[:1]],
    "rejected": [" so"] * len(TEXTS),
}
FEW_PAIRS = {name: cells[:5] for name, cells in PAIRS.items()}


def dpo(models: Path, output: Path, resume: bool = False, **options: Any) -> DPOTrainer:
    """A trainer that has trained."""
    options = {"per_device_train_batch_size": 8 // ranks(), "per_device_eval_batch_size": 3, **options}
    trainer = DPOTrainer(
        str(models / "model"),
        arguments(DPOConfig, output, **options),
        Dataset.from_dict(PAIRS),
        eval_dataset=Dataset.from_dict(FEW_PAIRS),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]) if "lora" in output.name else None,
    )
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if resume else None)
    return trainer


def dpos(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, options in DPO_RUNS.items():
        output = folder / f"dpo, {name}"
        trainer = dpo(folder, output, **options)
        files = sorted((output / "reference_log_probs").iterdir())
        results[name] = {
            "weights": weights(trainer.scorer.model),
            "log": steps_of(trainer),
            "eval": trainer.evaluate(),
            "reference": list(trainer.train_dataset["ref_chosen_logps"]),
            "blocks": sum(len(file.read_text().splitlines()) for file in files),
            "resumed": weights(dpo(folder, output, resume=True, **options).scorer.model),
        }
        assert sum(len(file.read_text().splitlines()) for file in files) == results[name]["blocks"]
    return results


REWARD_RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, lora": {},
    "ddp, heads": {"num_heads": 3},
    "ddp, padded": {},
    "ddp, steps": {},
    "fsdp": {"fsdp": True},
    "fsdp, padded": {"fsdp": True},
    "fsdp, steps": {"fsdp": True},
}


def reward(models: Path, output: Path, resume: bool = False, **options: Any) -> RewardTrainer | ProcessRewardTrainer:
    """A trainer that has trained: on pairs, or on steps."""
    options = {"per_device_train_batch_size": 8 // ranks(), "per_device_eval_batch_size": 3, **options}
    if "steps" in output.name:
        rows = {
            "prompt": TEXTS,
            "steps": [text.split() for text in TEXTS],
            "labels": [[float(word != "bad") for word in text.split()] for text in TEXTS],
        }
        # One rank has more steps than the other: the loss is the mean over those of both.
        args = arguments(ProcessRewardConfig, output, step_separator=" ", **options)
        few = Dataset.from_dict({name: cells[:5] for name, cells in rows.items()})
        trainer = ProcessRewardTrainer(str(models / "value"), args, Dataset.from_dict(rows), few)
    else:
        trainer = RewardTrainer(
            str(models / ("model" if "heads" in output.name else "value")),
            arguments(RewardConfig, output, **options),
            Dataset.from_dict(PAIRS),
            eval_dataset=Dataset.from_dict(FEW_PAIRS),
            peft_config=LoraConfig(r=2, task_type="SEQ_CLS") if "lora" in output.name else None,
        )
    if "padded" in output.name:
        trainer.data_collator.packed = False
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if resume else None)
    return trainer


def rewards(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, options in REWARD_RUNS.items():
        output = folder / f"reward, {name}"
        trainer = reward(folder, output, **options)
        results[name] = {
            "weights": weights(trainer.model),
            "log": steps_of(trainer),
            "packed": trainer.data_collator.packed,
            "sharded": {isinstance(p, DTensor) for p in trainer.model.parameters()},
            "eval": trainer.evaluate(),
            "resumed": weights(reward(folder, output, resume=True, **options).model),
        }
    return results


CHECKS: tuple[Callable[[int, Path], Any], ...] = (reductions, sfts, refusals, casts, engines, ppos, dpos, rewards)


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {check.__name__: check(rank, folder) for check in CHECKS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
