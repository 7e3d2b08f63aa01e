"""A step of our DPOTrainer beside one of TRL's, on the same pairs, model and hyper-parameters.

Ours computes the reference's log-probs before the training, always. TRL is told to (`precompute_ref_log_probs`), and to
keep activations; one contender more is TRL as it comes, which runs the reference in every step and recomputes
activations. What the reference takes before the training stands beside the steps.

Equal work: the first step, before any weight has changed, must have the same log-probs of the chosen responses in fp32,
and every step one of the optimiser; else it is an error. Every contender runs in a process of its own, one at a time,
in turns A B C, C B A; the first step of each warms up. Ours packs the pairs; TRL pads them and, on CPU, cannot do
otherwise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch

from fastrlhf.bench import dpo_worker, ppo_worker
from fastrlhf.bench.dpo_worker import Plan
from fastrlhf.bench.measure import summary
from fastrlhf.bench.peers import trl_dpo
from fastrlhf.bench.ppo_step import QUIETLY, language_model
from fastrlhf.bench.ppo_worker import TRL
from fastrlhf.bench.records import OURS, PEAK_OF_TRL
from fastrlhf.bench.settings import DPO, FLOATS, Setting
from fastrlhf.bench.sources import NotThere

TRL_FP32, TRL_BF16, TRL_MIXED, AS_IT_COMES = "TRL fp32", "TRL bf16", "TRL fp32 under bf16 autocast", "TRL as it comes"
PARTS = ("reference", "backward", "optimizer")
LOG_PROBS = "logps/chosen"

# Written down before measuring: at least so many times as fast as TRL, with at most such a part of its memory: in bf16
# that of the one which keeps fp32 weights, as ours does.
TARGETS = {
    "fp32": {TRL_FP32: 1.5, PEAK_OF_TRL: 1.0},
    "bf16": {TRL_BF16: 1.5, TRL_MIXED: 1.5, PEAK_OF_TRL: 1.0},
}
MEMORY_OF = {"fp32": TRL_FP32, "bf16": TRL_MIXED}


class Contender(NamedTuple):
    provider: str
    dtype: str
    arguments: dict[str, Any]


EQUAL = {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "bf16": False}
OURS_RUN = {dtype: Contender(OURS, dtype, {}) for dtype in TARGETS}
TRL_RUN = {
    TRL_FP32: Contender(TRL, "fp32", EQUAL),
    TRL_BF16: Contender(TRL, "bf16", EQUAL),
    TRL_MIXED: Contender(TRL, "fp32", EQUAL | {"bf16": True}),
    AS_IT_COMES: Contender(TRL, "fp32", {"bf16": False}),
}
BESIDE = {"fp32": (TRL_FP32, AS_IT_COMES), "bf16": (TRL_FP32, TRL_BF16, TRL_MIXED)}


def roll_call() -> dict[str, dict[str, str]]:
    found = {OURS: {"version": metadata.version("fastrlhf")}}
    try:
        return found | {TRL: {"version": trl_dpo.version()}}
    except NotThere as error:
        return found | {TRL: {"missing": str(error)}}


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """The rows as they go into the JSON file."""
    plan = setting.dpo
    missing = roll_call()[TRL].get("missing")
    running = {**OURS_RUN, **({} if missing else TRL_RUN)}
    with language_model(plan.model, (3 * plan.pairs * plan.steps, plan.prompt + plan.most)) as found:
        rows = pairs(found.tokenizer, found.texts, plan)
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for turn in range(plan.turns):
            for name in running if turn % 2 == 0 else reversed(running):
                made = ppo_worker.run(worker_plan(plan, found.folder, rows, running[name]), dpo_worker.__name__)
                _check(plan, name, made, steps["fp32"])
                steps[name] += made
    counted = {name: _result(plan, made) for name, made in steps.items()}
    tokens = _tokens(found.tokenizer, rows, plan)
    for dtype, targets in TARGETS.items():
        ours, peers = counted[dtype], {name: counted.get(name, {"cannot": missing}) for name in BESIDE[dtype]}
        if not missing:
            ours = ours | {PEAK_OF_TRL: ours["peak_mib"] / peers[MEMORY_OF[dtype]]["peak_mib"]}
        shape = f"{plan.pairs} pairs of {plan.prompt} + {plan.least} to {plan.most} tokens"
        yield {
            **{"op": "dpo_step", "work": f"DPO step, {found.name}", "shape": shape, "dtype": dtype},
            **{"targets": targets, "tokens": tokens, "results": {OURS: ours, **peers}},
        }


def pairs(tokenizer: Any, texts: list[str], plan: DPO) -> list[dict[str, str]]:
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


def worker_plan(plan: DPO, folder: str, rows: list[dict[str, str]], contender: Contender) -> Plan:
    dtype = contender.dtype
    arguments = {
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.pairs,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "logging_steps": 1,
        **QUIETLY,
        **contender.arguments,
    }
    # In fp32, and under autocast, torch's fused attention is the faster one for TRL here; on weights of bf16 the plain
    # one. Ours packs with its own.
    attention = plan.attention[dtype]
    return Plan(
        contender.provider,
        folder,
        str(FLOATS[dtype]).removeprefix("torch."),
        attention,
        rows,
        arguments,
        torch.get_num_threads(),
    )


def _check(plan: DPO, name: str, made: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    counts = [step["optimizer_steps"] for step in made]
    if counts != [1] * plan.steps:
        raise RuntimeError(f"{name} made {counts} steps of the optimiser, wanted {plan.steps} times 1")
    first, wanted = (steps[0]["metrics"][LOG_PROBS] if steps else None for steps in (made, ours))
    if TRL_RUN.get(name) in (TRL_RUN[TRL_FP32], TRL_RUN[AS_IT_COMES]) and abs(first / wanted - 1) > 1e-4:
        raise RuntimeError(f"{name} has log-probs of {first} where ours are {wanted}: the work is not the same")


def _result(plan: DPO, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of the steps that count, seconds of their parts in the median, and the highest peak of memory."""
    counted = [step for i, step in enumerate(steps) if i % plan.steps]
    found = summary([1e3 * step["seconds"] for step in counted])
    for name in PARTS[1:]:
        found[f"{name}_s"] = statistics.median(step["phases"][name] for step in counted)
    before = [step["before"].get("reference") for step in counted]
    if None not in before:  # for all pairs, before the training
        found["reference_s"] = statistics.median(before)
    found["cpu_s"] = statistics.median(step["cpu_seconds"] for step in counted)
    found["peak_mib"] = max(step["peak_mib"] for step in steps)
    return found


def _tokens(tokenizer: Any, rows: list[dict[str, str]], plan: DPO) -> float:
    """Of an average step that counts, prompts and EOS included, without padding."""
    texts = [row["prompt"] + row[side] for row in rows[plan.pairs :] for side in ("chosen", "rejected")]
    return sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"]) / (plan.steps - 1)
