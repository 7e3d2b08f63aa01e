"""`fastrlhf sft|reward|process-reward|ppo|dpo`: arguments to trainer, training, and the final model on disk."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fastrlhf import trainers
from fastrlhf.cli_arguments import (
    DataArguments,
    ModelArguments,
    ReferenceArguments,
    RewardArguments,
    RewardSources,
    parse,
)

CONFIGS = {
    "sft": trainers.SFTConfig,
    "reward": trainers.RewardConfig,
    "process-reward": trainers.ProcessRewardConfig,
    "ppo": trainers.PPOConfig,
    "dpo": trainers.DPOConfig,
}
EXTRA = {"ppo": (RewardArguments,), "dpo": (ReferenceArguments,)}


def train(command: str, argv: list[str]) -> None:
    """Trains by `command` (a key of CONFIGS) and leaves model and tokenizer in output_dir."""
    types = (ModelArguments, DataArguments, CONFIGS[command], *EXTRA.get(command, ()))
    model, data, args, *extra = parse(command, argv, *types)
    functions = reward_functions(extra[0]) if command == "ppo" else []
    checkpoint = resume_from(args)
    train_dataset, eval_dataset = data.load()
    options: dict[str, Any] = {
        "model": model.model,
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "peft_config": model.peft_config("SEQ_CLS" if "reward" in command else "CAUSAL_LM"),
        "model_init_kwargs": model.init_kwargs(),
    }
    if command == "sft":
        trainer = trainers.SFTTrainer(**options)
    elif command == "reward":
        trainer = trainers.RewardTrainer(**options)
    elif command == "process-reward":
        trainer = trainers.ProcessRewardTrainer(**options)
    elif command == "dpo":
        trainer = trainers.DPOTrainer(ref_model=extra[0].ref_model, **options)
    else:
        trainer = trainers.PPOTrainer(
            reward_funcs=functions, ref_model=extra[0].ref_model, value_model=extra[0].value_model, **options
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if eval_dataset is not None:
        trainer.save_metrics("eval", trainer.calibrate() if command == "reward" else trainer.evaluate())
    if trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}")


def resume_from(args: TrainingArguments) -> str | None:
    """The checkpoint to continue from: what resume_from_checkpoint names, else the last complete one in output_dir.

    resume_from_checkpoint=none begins anew, true insists on a checkpoint, anything else is a checkpoint's folder.
    """
    wanted = args.resume_from_checkpoint
    last = trainers.last_checkpoint(args.output_dir)
    if wanted is not None and wanted.lower() in ("none", "false", "no"):
        return None
    if wanted is not None and wanted.lower() != "true":
        if not os.path.isdir(wanted):
            raise FileNotFoundError(f"resume_from_checkpoint={wanted!r}: no such folder")
        return wanted
    if wanted is not None and last is None:
        raise FileNotFoundError(f"resume_from_checkpoint=true, but {args.output_dir!r} holds no complete checkpoint")
    if last is not None:
        print(f"Continuing from {last}. To begin anew, take another --output_dir or --resume_from_checkpoint none.")
    return last


def reward_functions(sources: RewardSources) -> list[Any]:
    """Reward models by name, then the functions."""
    functions = [load_function(name) for name in sources.reward_functions or []]
    return [*(sources.reward_models or []), *functions]


def load_function(name: str, argument: str = "reward_functions") -> Callable[..., Any]:
    """The function that "package.module:function" or "file.py:function" names. The working directory is importable."""
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(f"{argument}: {name!r} given, wanted package.module:function or file.py:function")
    if source.endswith(".py"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: no such file {source!r} (looked for {path.absolute()})")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ImportError(f"{argument}: cannot import {source!r} for {name!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{argument}: {source!r} has no function {attribute!r}; it has {', '.join(there) or 'none'}")
    return function
