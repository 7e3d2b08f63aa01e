"""What the three trainers add to `transformers.Trainer`."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastrlhf.trainers import zero
from fastrlhf.trainers.checkpoints import (
    ReplaceLaterCheckpoints,
    check_resumable,
    discard,
    discard_partial,
    is_complete,
    last_checkpoint,
)
from fastrlhf.trainers.master_weights import MasterWeights
from fastrlhf.trainers.metrics import JsonLines
from fastrlhf.trainers.reductions import mean_over_ranks
from fastrlhf.trainers.token_scorer import TokenScorer


class BaseTrainer(Trainer):
    """`transformers.Trainer` with metrics of our own, fp32 master weights and checkpoints that are whole or absent."""

    runs_on_deepspeed = False  # a test says so of those that do

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        _refuse_unsupported(args, kwargs["model"])
        args.remove_unused_columns = False  # the collators name the columns they take
        args.dataloader_pin_memory &= args.device.type != "cpu"
        # nn.DataParallel would cut batches apart from the positions that point into them.
        args._n_gpu = min(args.n_gpu, 1)
        if args.ddp_broadcast_buffers is None:
            # A broadcast before each forward would hang ranks whose batches fall into different numbers of groups.
            args.ddp_broadcast_buffers = False
        super().__init__(args=args, **kwargs)
        _prepare_sharding(self)
        self.add_callback(JsonLines)
        self.add_callback(ReplaceLaterCheckpoints)
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record(self, **metrics: torch.Tensor) -> None:
        """Keep scalar tensors, on their device, until the next `log` averages and fetches them.

        The average is over steps and over ranks, each of which records the same names in the same order.
        """
        for name, value in metrics.items():
            self._metrics[name].append(value.detach().to(self.args.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._metrics and ("loss" in logs or "train_loss" in logs):  # not into an evaluation's record
            # One collective and one transfer for all metrics of the step.
            means = torch.stack([torch.stack(values).float().mean() for values in self._metrics.values()])
            means = mean_over_ranks(means, self.accelerator)
            logs.update(zip(self._metrics, means.tolist(), strict=True))
            self._metrics.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        parameters = (self.model if model is None else model).parameters()
        if self.is_deepspeed_enabled:  # which keeps masters itself
            parameters = ()
        if self.optimizer is None and any(p.requires_grad and p.dtype == torch.bfloat16 for p in parameters):
            optimizer_cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            self.optimizer_cls_and_kwargs = (MasterWeights.over(optimizer_cls), options)
        return super().create_optimizer(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train; `resume_from_checkpoint=True` continues from the last complete checkpoint in output_dir."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but output_dir={self.args.output_dir!r} holds no complete checkpoint"
                )
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed, transformers round what is no index to the weights' dtype: margins, labels.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs: Any) -> None:
        # transformers looks at max_steps only after a step: a finished run that is resumed would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # The Trainer does not get at the sampler of an epoch that it resumes in the middle.
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches, "sampler") and hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroups(sampler, seed)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = self._get_output_dir(trial)
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            discard(folder)  # files of a killed or replaced run
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if is_complete(folder):  # the error came after the saving: from rotation, or from a push to the hub
                raise
            raise discard_partial(folder, output_dir, error) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The next and last file is trainer_state.json, which vouches for those of all processes.
        self.accelerator.wait_for_everyone()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Or a run that continues from a checkpoint saved before the evaluation would draw other numbers.
        with same_random_numbers_after(self.args.device):
            return super()._evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        # The Trainer's estimate knows nothing of rollouts or of positions left out of the LM head.
        return 0


class SeededLengthGroups(LengthGroupedSampler):
    """Groups of similar length, drawn from a seed and the epoch: the same ones on all ranks, and after a resume in the
    middle of an epoch. transformers draws them from the numbers that all else in a process draws from."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


@contextmanager
def same_random_numbers_after(device: torch.device) -> Iterator[None]:
    """What runs inside changes no random number drawn later: of Python, numpy, and torch on the CPU and on `device`."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


class ScorerTrainer(BaseTrainer):
    """A trainer whose module is a TokenScorer: saved and loaded as the model inside."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.scorer.save_pretrained(output_dir, state_dict)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # Under FSDP, a checkpoint also holds the state of the whole module, in a file of accelerate's.
        super()._load_from_checkpoint(resume_from_checkpoint, model if self.accelerator.is_fsdp2 else self.scorer.model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @property
    def scorer(self) -> TokenScorer:
        return self.accelerator.unwrap_model(self.model)


def _refuse_unsupported(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Errors for what would train wrongly or not at all."""
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} is not supported, leave it at 0")
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype == torch.float16 for p in trained):
        raise ValueError("model: fp16 weights cannot be trained; load the model with dtype bfloat16 or float32")


def _prepare_sharding(trainer: Trainer) -> None:
    """Errors for ways to shard, asked for in TrainingArguments or by `accelerate launch`, that were never tried with
    these trainers; and log-probs, losses and sums of gradients that are not rounded to the dtype of the products."""
    if trainer.is_deepspeed_enabled:
        zero.prepare(trainer)
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if trainer.args.fsdp:
            device = trainer.args.device.type
            raise ValueError(f"fsdp={trainer.args.fsdp}: accelerate shards over GPUs, not over {device}; leave it out")
        return
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp: version {plugin.fsdp_version} of FSDP is not supported, set fsdp_version to 2")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp: cpu_ram_efficient_loading leaves most ranks without the weights that engines and reference models "
            "are made from, set it to false"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp: with state_dict_type={plugin.state_dict_type} a checkpoint has no model that transformers load, "
            "set it to FULL_STATE_DICT"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
