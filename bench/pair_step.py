"""A step of our trainers on pairs beside one of TRL's, on the same pairs, model and hyper-parameters.

Equal work: the first step, before any weight has changed, must have the same metric in fp32, and every step one of the
optimiser; else it is an error. Every contender runs in a process of its own, one at a time, in turns A B C, C B A; the
first step of each warms up. Ours packs the pairs; TRL pads them and, on CPU, cannot do otherwise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch

from fastrlhf.bench import pair_worker, ppo_worker
from fastrlhf.bench.measure import summary
from fastrlhf.bench.pair_worker import Plan
from fastrlhf.bench.peers import trl_pairs
from fastrlhf.bench.ppo_step import QUIETLY, language_model
from fastrlhf.bench.ppo_worker import TRL
from fastrlhf.bench.records import OURS, PEAK_OF_TRL
from fastrlhf.bench.settings import FLOATS, Pairs
from fastrlhf.bench.sources import NotThere

TRL_FP32, TRL_BF16, TRL_MIXED, AS_IT_COMES = "TRL fp32", "TRL bf16", "TRL fp32 under bf16 autocast", "TRL as it comes"
PARTS = ("reference", "backward", "optimizer")


class Contender(NamedTuple):
    """heads: of a reward model."""

    provider: str
    dtype: str
    arguments: dict[str, Any]
    heads: int = 1


@dataclass(frozen=True)
class PairStep:
    """What is compared.

    trainer: a name in pair_worker.TRAINERS. metric: what both sides log of the first step that must be the same, by
    provider. ours: by dtype. variants: more of ours, by name. trl: by name. beside: the names, of both, that stand in
    the row of each dtype. targets: of each dtype, written down before measuring: at least so many times as fast as TRL,
    with at most such a part of its memory, in bf16 that of the one which keeps fp32 weights, as ours does.
    """

    op: str
    work: str
    trainer: str
    metric: dict[str, str]
    targets: dict[str, dict[str, float]]
    trl: dict[str, Contender]
    beside: dict[str, tuple[str, ...]]
    variants: dict[str, Contender]

    @property
    def ours(self) -> dict[str, Contender]:
        return {dtype: Contender(OURS, dtype, {}) for dtype in self.targets}


MEMORY_OF = {"fp32": TRL_FP32, "bf16": TRL_MIXED}


def trl_contenders(**equal: Any) -> dict[str, Contender]:
    """TRL on equal terms, and as it comes. equal: arguments that make it do what ours does."""
    equal = {**equal, "gradient_checkpointing": False, "bf16": False}
    return {
        TRL_FP32: Contender(TRL, "fp32", equal),
        TRL_BF16: Contender(TRL, "bf16", equal),
        TRL_MIXED: Contender(TRL, "fp32", equal | {"bf16": True}),
        AS_IT_COMES: Contender(TRL, "fp32", {"bf16": False}),
    }


def roll_call() -> dict[str, dict[str, str]]:
    found = {OURS: {"version": metadata.version("fastrlhf")}}
    try:
        return found | {TRL: {"version": trl_pairs.version()}}
    except NotThere as error:
        return found | {TRL: {"missing": str(error)}}


def measure(step: PairStep, plan: Pairs) -> Iterator[dict[str, Any]]:
    """The rows as they go into the JSON file."""
    missing = roll_call()[TRL].get("missing")
    running = {**step.ours, **step.variants, **({} if missing else step.trl)}
    with language_model(plan.model, (3 * plan.pairs * plan.steps, plan.prompt + plan.most)) as found:
        rows = pairs(found.tokenizer, found.texts, plan)
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for turn in range(plan.turns):
            for name in running if turn % 2 == 0 else reversed(running):
                work = worker_plan(step, plan, found.folder, rows, running[name])
                made = ppo_worker.run(work, pair_worker.__name__)
                check(step, plan, name, made, steps["fp32"])
                steps[name] += made
    counted = {name: result(plan, made) for name, made in steps.items()}
    tokens = _tokens(found.tokenizer, rows, plan)
    for dtype, targets in step.targets.items():
        ours, others = counted[dtype], {name: counted.get(name, {"cannot": missing}) for name in step.beside[dtype]}
        if not missing:
            ours = ours | {PEAK_OF_TRL: ours["peak_mib"] / others[MEMORY_OF[dtype]]["peak_mib"]}
        shape = f"{plan.pairs} pairs of {plan.prompt} + {plan.least} to {plan.most} tokens"
        yield {
            **{"op": step.op, "work": f"{step.work}, {found.name}", "shape": shape, "dtype": dtype},
            **{"targets": targets, "tokens": tokens, "results": {OURS: ours, **others}},
        }


def pairs(tokenizer: Any, texts: list[str], plan: Pairs) -> list[dict[str, str]]:
    """Pairs of pieces of the texts, one after the other. What both trainers make of them are the tokens planned: no
    token spans the border of prompt and completion."""
    rng, rows, at = random.Random(0), [], 0
    stream = tokenizer(" ".join(texts))["input_ids"]

    def piece(count: int) -> tuple[str, list[int]]:
        nonlocal at
        while True:
            tokens, at = stream[at : at + count], at + count
            if len(tokens) < count:
                raise ValueError(f"the texts are too short for {plan.pairs * plan.steps} pairs")
            text = f" {tokenizer.decode(tokens).lstrip()}"
            if tokenizer(text)["input_ids"] == tokens:
                return text, tokens

    while len(rows) < plan.pairs * plan.steps:
        prompt, *sides = (piece(n) for n in (plan.prompt, *(rng.randint(plan.least, plan.most) for _ in range(2))))
        if all(tokenizer(prompt[0] + text)["input_ids"] == prompt[1] + tokens for text, tokens in sides):
            rows.append({"prompt": prompt[0], "chosen": sides[0][0], "rejected": sides[1][0]})
    return rows


def worker_plan(step: PairStep, plan: Pairs, folder: str, rows: list[dict[str, str]], contender: Contender) -> Plan:
    products = "bf16" if contender.arguments.get("bf16") else contender.dtype
    arguments = {
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.pairs,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "logging_steps": 1,
        **QUIETLY,
        **contender.arguments,
    }
    return Plan(
        step.trainer,
        contender.provider,
        folder,
        str(FLOATS[contender.dtype]).removeprefix("torch."),
        plan.attention[products],  # of TRL; ours packs with its own
        rows,
        arguments,
        torch.get_num_threads(),
        contender.heads,
    )


def check(step: PairStep, plan: Pairs, name: str, made: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    counts = [each["optimizer_steps"] for each in made]
    if counts != [1] * plan.steps:
        raise RuntimeError(f"{name} made {counts} steps of the optimiser, wanted {plan.steps} times 1")
    if name not in (TRL_FP32, AS_IT_COMES):
        return
    first, wanted = made[0]["metrics"][step.metric[TRL]], ours[0]["metrics"][step.metric[OURS]]
    if abs(first / wanted - 1) > 1e-4:
        raise RuntimeError(
            f"{name} has {step.metric[TRL]}={first} where ours has {step.metric[OURS]}={wanted}: the work is not the "
            "same"
        )


def result(plan: Pairs, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of the steps that count, seconds of their parts in the median, and the highest peak of memory."""
    counted = [each for i, each in enumerate(steps) if i % plan.steps]
    found = summary([1e3 * each["seconds"] for each in counted])
    for name in PARTS[1:]:
        found[f"{name}_s"] = statistics.median(each["phases"][name] for each in counted)
    before = [each["before"].get("reference") for each in counted]
    if None not in before:  # for all pairs, before the training
        found["reference_s"] = statistics.median(before)
    found["cpu_s"] = statistics.median(each["cpu_seconds"] for each in counted)
    found["peak_mib"] = max(each["peak_mib"] for each in steps)
    return found


def _tokens(tokenizer: Any, rows: list[dict[str, str]], plan: Pairs) -> float:
    """Of an average step that counts, prompts and EOS included, without padding."""
    texts = [row["prompt"] + row[side] for row in rows[plan.pairs :] for side in ("chosen", "rejected")]
    return sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"]) / (plan.steps - 1)
