"""The arguments of the commands that load models and data, from flags and from a YAML file."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


@dataclass
class LoadArguments:
    """The model to load."""

    model: str = field(metadata={"help": "Hub id or folder of the model to start from."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Type of the weights; auto takes the type they were saved in."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: sdpa, eager, flash_attention_2, ..."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the Python code that comes with the model."})

    _argument_group_name = "model"

    def init_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` is called with."""
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.trust_remote_code:
            kwargs["trust_remote_code"] = True
        return kwargs


@dataclass
class ModelArguments(LoadArguments):
    """The model to train."""

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers with adapters, or all-linear; peft's choice for the architecture when not given."},
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r} must be 0 (all weights) or greater")

    def peft_config(self, task_type: str) -> Any:
        """A peft.LoraConfig, or None with lora_r=0. task_type: CAUSAL_LM or SEQ_CLS."""
        if self.lora_r == 0:
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            task_type=task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        )


@dataclass
class DatasetArguments:
    """The data set."""

    dataset: str = field(metadata={"help": "Hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz)."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration, for data sets on the hub that have several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to take; train[:1000] takes a part."})

    _argument_group_name = "data"

    def load_one(self) -> Any:
        """The data set that `dataset` names."""
        from fastrlhf.data import load_data

        return load_data(self.dataset, self.dataset_split, self.dataset_config)


@dataclass
class DataArguments(DatasetArguments):
    """The data sets for training and evaluation."""

    eval_dataset: str | None = field(
        default=None, metadata={"help": "Data set to evaluate on; `dataset` when only eval_split is given."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; `test` when only eval_dataset is given."}
    )

    def __post_init__(self) -> None:
        same_file = self.eval_dataset in (None, self.dataset) and Path(self.dataset).expanduser().is_file()
        if same_file and self.evaluates and ("[" not in self.dataset_split or "[" not in (self.eval_split or "")):
            raise ValueError(
                f"dataset={self.dataset!r} is a single file: it would be trained on and evaluated on. Give another "
                "eval_dataset, or parts: dataset_split=train[:90%] and eval_split=train[90%:]."
            )

    @property
    def evaluates(self) -> bool:
        return self.eval_dataset is not None or self.eval_split is not None

    def load(self) -> tuple[Any, Any]:
        """The data sets for training and for evaluation (None without eval_dataset and eval_split)."""
        from fastrlhf.data import load_data

        train = self.load_one()
        if not self.evaluates:
            return train, None
        config = self.dataset_config if self.eval_dataset in (None, self.dataset) else None
        return train, load_data(self.eval_dataset or self.dataset, self.eval_split or "test", config)


@dataclass
class RewardSources:
    """Where rewards come from; reward_weights follow this order, models first."""

    reward_models: list[str] | None = field(default=None, metadata={"help": "Hub ids or folders of reward models."})
    reward_functions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Python functions f(prompts, completions, **columns) -> list of floats, as package.module:function "
            "or file.py:function."
        },
    )

    _argument_group_name = "reward"

    def __post_init__(self) -> None:
        if not self.reward_models and not self.reward_functions:
            raise ValueError(
                "no reward: give reward_models (hub ids or folders) or reward_functions (file.py:function)"
            )


@dataclass
class RewardArguments(RewardSources):
    """Where PPO's reward comes from, and its other models."""

    ref_model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the model that the KL is measured to; `model` when not given."},
    )
    value_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a value model; a head on the policy when not given."}
    )


@dataclass
class ReferenceArguments:
    """What DPO's reference is."""

    ref_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the reference model; `model` when not given."}
    )

    _argument_group_name = "reference"


class Parser(HfArgumentParser):
    """An HfArgumentParser whose complaints are a ValueError of one line instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (--help lists the flags)")


def parse(command: str, argv: list[str], *types: type) -> tuple[Any, ...]:
    """The dataclasses `types` from `[config.yaml] [--flag value ...]`; flags override the file.

    Raises ValueError naming an unknown or missing name or a wrong value, FileNotFoundError without the file.
    """
    parser = Parser(
        types, prog=f"fastrlhf {command}", usage="%(prog)s [config.yaml] [--flag value ...]", allow_abbrev=False
    )
    parser.set_defaults(output_dir=f"runs/{command}")
    if argv and not argv[0].startswith("-"):
        argv = [*_flags(Path(argv[0]), parser), *argv[1:]]
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{_closest(unknown[0], parser)} (--help lists the flags)")
    return tuple(parsed)


def _flags(path: Path, parser: Parser) -> list[str]:
    """A YAML file as the flags that say the same, so that both go through one parser."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{str(path)!r} is neither a flag nor a .yaml file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r} (looked for {path.absolute()})")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: {type(config).__name__} given, wanted lines of `name: value`")
    flags = []
    for name, value in config.items():
        flag = f"--{name}"
        if flag not in parser._option_string_actions:
            raise ValueError(f"{path}: unknown name {name!r}{_closest(flag, parser)}")
        if isinstance(value, list) and value:
            flags += [flag, *(str(item) for item in value)]
        elif isinstance(value, dict):
            flags.append(f"{flag}={json.dumps(value)}")
        elif value is not None and value != []:
            flags.append(f"{flag}={value}")
        elif parser.get_default(str(name).replace("-", "_")) is not None:
            raise ValueError(f"{path}: {name} has no value; leave the line out for the default")
    return flags


def _closest(flag: str, parser: Parser) -> str:
    near = difflib.get_close_matches(flag.split("=")[0], parser._option_string_actions, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
