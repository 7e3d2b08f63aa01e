"""What the runs of judges and of constitutional revision share: rows, settings, models, reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.data import load_data
from fastrlhf.feedback.arguments import WriterArguments
from fastrlhf.loading import load_causal_lm, load_tokenizer
from fastrlhf.rollout import RolloutEngine, SamplingParams, create_engine
from fastrlhf.rollout.architectures import NotDrivenError

# Arguments that the records of a run do not hang on: where they go, how many at a time, and what is kept in the end.
FREE = ("output_dir", "batch_size", "keep_ties")


def load_rows(args: WriterArguments) -> Dataset:
    return load_data(args.dataset, args.dataset_split, args.dataset_config)


def settings(args: WriterArguments, data: Dataset, **more: Any) -> dict[str, Any]:
    """What the records of a run hang on, the rows themselves included."""
    rows = hashlib.sha256()
    for row in data:
        rows.update(json.dumps(row, sort_keys=True, default=str).encode())
    kept = {name: value for name, value in asdict(args).items() if name not in FREE}
    return {**kept, **more, "data": f"{len(data)} rows, SHA-256 {rows.hexdigest()}"}


def batches(count: int, done: Container[int], size: int) -> Iterator[list[int]]:
    """Rows that are not done yet, some at a time."""
    left = [row for row in range(count) if row not in done]
    for start in range(0, len(left), size):
        yield left[start : start + size]


def writer(
    name: str, args: WriterArguments
) -> tuple[nn.Module, PreTrainedTokenizerBase, RolloutEngine, SamplingParams]:
    """A model that writes, by our engine, or by transformers' where that has no decoder for it."""
    model, tokenizer = load_causal_lm(name, dtype=args.dtype).eval(), load_tokenizer(name)
    try:
        engine = create_engine("native", model, tokenizer)
    except NotDrivenError:
        engine = create_engine("transformers", model, tokenizer)
    sampling = SamplingParams(args.response_length, args.temperature, top_p=args.top_p, seed=args.seed)
    return model, tokenizer, engine, sampling


def context_of(model: nn.Module) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def progress(what: str, done: int, count: int) -> None:
    print(f"{what} {done} of {count}", flush=True)


def report(folder: str, numbers: dict[str, Any]) -> None:
    text = json.dumps(numbers, indent=1)
    (Path(folder) / "report.json").write_text(text, encoding="utf-8")
    print(f"{text}\nThe preferences are in {Path(folder) / 'preferences.jsonl'}")
