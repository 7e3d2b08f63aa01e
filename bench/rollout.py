"""Rollouts: decoding beside `transformers.generate` and the roofline, lengths that vary widely, and drawing tokens.

Every contender makes as many tokens as it is told: EOS does not end a response. Only the native engine and vLLM give
log-probs with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.bench import gpu, limits
from fastrlhf.bench.decoding_models import load
from fastrlhf.bench.measure import Contender, Limit, Roofline, Row
from fastrlhf.bench.records import OURS, REPACKING
from fastrlhf.bench.settings import FLOATS, LongTail, Rollouts, Setting, generator, sizes
from fastrlhf.bench.sources import NotThere

TRANSFORMERS, SORTED, VLLM, STEP = "transformers", "transformers, sorted", "vLLM", "step alone"
FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.05}

# Written down before measuring: at least so many times as fast as transformers.generate, at most so many times the
# roofline of a step, and repacking the weights in less than a step.
ON_CPU = {
    ("bf16", 1): {TRANSFORMERS: 4.5, "limit": 1.6, REPACKING: 1.0},
    ("bf16", 8): {TRANSFORMERS: 4.5, "limit": 1.8, REPACKING: 1.0},
    ("bf16", 32): {TRANSFORMERS: 4.0, "limit": 1.6, REPACKING: 1.0},
    ("fp32", 1): {TRANSFORMERS: 3.5, REPACKING: 1.0},
    ("fp32", 8): {TRANSFORMERS: 3.0, REPACKING: 1.0},
    ("fp32", 32): {TRANSFORMERS: 2.7, REPACKING: 1.0},
}
LONG_TAIL = {TRANSFORMERS: 4.0}


class Work(NamedTuple):
    """Prompts, how many tokens each of them gets, and how many are decoded at a time."""

    prompts: list[list[int]]
    lengths: list[int]
    batch: int


def roll_call() -> dict[str, dict[str, str]]:
    from fastrlhf.bench.peers import vllm

    found = {OURS: {"version": metadata.version("fastrlhf")}}
    found[TRANSFORMERS] = {"version": metadata.version("transformers")}
    try:
        return found | {VLLM: {"version": vllm.version()}}
    except NotThere as error:
        return found | {VLLM: {"missing": str(error)}}


def rows(setting: Setting) -> Iterator[Row]:
    plan = setting.rollouts
    for dtype in setting.dtypes:
        yield from _decoding(setting, plan, dtype)
    for shape in plan.samples:
        yield from _sampling(setting, shape)


def _decoding(setting: Setting, plan: Rollouts, dtype: str) -> Iterator[Row]:
    from fastrlhf.bench.peers import vllm

    name, model = load(plan.model, dtype, setting.device)
    engine, random, tail = _engine(model), torch.Generator().manual_seed(0), plan.long_tail
    most = max([plan.new_tokens, *([tail.most] if tail else [])])
    peaks = _peaks(setting, plan, FLOATS[dtype])
    with vllm.worker(model, plan.prompt + most, max([*plan.batches, *([tail.batch] if tail else [])])) as worker:
        for batch in plan.batches:
            work = Work(_prompts(model, batch, plan.prompt, random), [plan.new_tokens] * batch, batch)
            yield Row(
                "generate",
                f"a step of decoding {name}",
                f"{batch} × ({plan.prompt} + {plan.new_tokens}) tokens",
                dtype,
                _everyone(engine, work, worker) | _parts(engine, work),
                _roofline(setting, engine.decoder, work, peaks),
                ON_CPU.get((dtype, batch), {}) if setting.on_cpu else {},
                calls=plan.new_tokens,
                tokens=batch,
                seconds=plan.seconds,
            )
        if tail and dtype == "bf16":
            yield _long_tail(plan, tail, name, engine, worker, random)


def _long_tail(plan: Rollouts, tail: LongTail, name: str, engine: Any, worker: Any, random: torch.Generator) -> Row:
    lengths = long_tailed(tail, random)
    work = Work(_prompts(engine.model, tail.prompts, plan.prompt, random), lengths, tail.batch)
    by_length = sorted(zip(lengths, work.prompts, strict=True))
    in_order = Work([prompt for _, prompt in by_length], sorted(lengths), tail.batch)
    note = "as if it were known beforehand which responses get long"
    made = f"{tail.least} to {tail.most}, mean {sum(lengths) / len(lengths):.0f}"
    return Row(
        "generate",
        f"long-tailed lengths, {name}",
        f"{tail.prompts} × ({plan.prompt} + {made}) tokens, {tail.batch} at a time",
        "bf16",
        _everyone(engine, work, worker) | {SORTED: _transformers(engine.model, in_order, note)},
        targets=LONG_TAIL,
        tokens=sum(lengths),
        seconds=plan.seconds,
    )


def _engine(model: torch.nn.Module):
    """The native engine, but it gives a prompt no more tokens than its `lengths` say."""
    from fastrlhf.rollout import NativeEngine

    class Engine(NativeEngine):
        def _limit(self, prompt: list[int], sampling: Any) -> int:
            return min(self.lengths[tuple(prompt)], sampling.max_new_tokens)

    engine = Engine(model, SimpleNamespace(eos_token_id=None))
    engine.lengths = {}
    return engine


def _everyone(engine: Any, work: Work, worker: Any) -> dict[str, Contender | str]:
    everyone = {OURS: _ours(engine, work), TRANSFORMERS: _transformers(engine.model, work)}
    if isinstance(worker, str):
        return everyone | {VLLM: worker}

    def generate(_: Any) -> None:
        _check(work, worker.generate(work.prompts, work.lengths))

    return everyone | {VLLM: Contender(generate, here=False, note="in a process of its own")}


def _ours(engine: Any, work: Work) -> Contender:
    from fastrlhf.rollout import SamplingParams

    sampling = SamplingParams(max(work.lengths), batch_size=work.batch)
    decoder = engine.decoder
    engine.lengths |= dict(zip(map(tuple, work.prompts), work.lengths, strict=True))

    def generate(_: Any) -> None:
        _check(work, engine.generate(work.prompts, sampling).lengths.tolist())

    def facts() -> dict[str, float]:
        found = {"kv_mib": engine.kv_bytes(work.prompts, sampling) / 2**20}
        if decoder.packed:
            found["packed_mib"] = _bytes(_weights(decoder)) / 2**20
        if decoder.device.type != "cpu":
            found |= gpu.launches_a_step(
                lambda new_tokens: engine.generate(work.prompts, SamplingParams(new_tokens, batch_size=work.batch))
            )
        return found

    return Contender(generate, holds=_bytes(_weights(decoder)) if decoder.packed else 0, facts=facts)


def _transformers(model: torch.nn.Module, work: Work, note: str = "") -> Contender:
    """Batches in the order of the prompts, each of which runs to its longest response."""
    from fastrlhf.bench.peers.transformers import generate

    starts = range(0, len(work.prompts), work.batch)
    batches = [(work.prompts[i : i + work.batch], work.lengths[i : i + work.batch]) for i in starts]

    def decode(_: Any) -> None:
        for prompts, lengths in batches:
            made = generate(model, prompts, max(lengths))
            _check(
                Work(prompts, [max(lengths)] * len(prompts), work.batch), [made.shape[1] - len(prompts[0])] * len(made)
            )

    def facts() -> dict[str, float]:
        if next(model.parameters()).device.type == "cpu":
            return {}
        return gpu.launches_a_step(lambda new_tokens: generate(model, work.prompts, new_tokens))

    return Contender(decode, note=note, facts=facts)


def _parts(engine: Any, work: Work) -> dict[str, Contender]:
    """As often as there are tokens: a step alone, at the mean length, without the prompts; and reading the weights."""
    from fastrlhf import functional as F
    from fastrlhf.functional.decoding import PAGE
    from fastrlhf.rollout.kv_cache import pages_for

    decoder, steps = engine.decoder, max(work.lengths)
    at = _mean_length(work)
    rows = torch.arange(work.batch, device=decoder.device)
    position, tokens = torch.full_like(rows, at - 1), torch.tensor([x[-1] for x in work.prompts], device=decoder.device)
    table = torch.arange(work.batch * pages_for(at), dtype=torch.int32, device=decoder.device).view(work.batch, -1)

    def prepare() -> None:
        decoder.allocate(table.numel(), table.shape[1] * PAGE)
        for pair in decoder.cache:
            for x in pair:
                x.zero_()

    def step(_: Any) -> None:
        for _ in range(steps):
            logits = decoder.logits(decoder(tokens, rows, position, table))
            F.sample_tokens(logits, seed=0, sequence=rows, position=position)[0].tolist()
        decoder.free()

    def update(_: Any) -> None:
        for _ in range(steps):
            decoder.update()

    return {STEP: Contender(step, prepare), **({REPACKING: Contender(update)} if decoder.packed else {})}


def _roofline(setting: Setting, decoder: Any, work: Work, peaks: dict[str, Limit]) -> Roofline:
    """Of a step at the mean length: the weights and the cache read once, the products with them."""
    from fastrlhf.functional.decoding import PAGE

    weights, places = _weights(decoder), work.batch * _mean_length(work)
    size = _bytes(weights) + places * decoder.page_bytes() // PAGE
    attention = decoder.model.config.num_attention_heads * decoder.spec.head_dim * len(decoder.layers)
    flops = 2 * work.batch * sum(x.numel() for x in weights) + 4 * places * attention
    reading = None
    if setting.on_cpu:
        reading = Limit("read once", size, limits.read_once(torch.ones(size // 4)))
    return Roofline(size, flops, reading, peaks)


def _peaks(setting: Setting, plan: Rollouts, dtype: torch.dtype) -> dict[str, Limit]:
    """Square products by torch, and by the kernel of decoding, which may be the faster one."""
    from fastrlhf.rollout.architectures import Affine
    from fastrlhf.rollout.linears import PackedLinear

    peaks = {"torch.mm": limits.product(plan.product, dtype, setting.device)}
    if setting.on_cpu:
        weight = torch.ones(plan.product, plan.product, dtype=dtype)
        packed, x = PackedLinear([lambda: Affine(weight, None)], dtype), weight.float()
        packed.update()
        peaks["packed_linear"] = Limit("a square product", run=lambda: packed(x), flops=2 * plan.product**3)
    return peaks


def _sampling(setting: Setting, shape: tuple[int, int]) -> Iterator[Row]:
    from fastrlhf import functional as F
    from fastrlhf.bench.peers.transformers import sampler

    logits = 3 * torch.randn(shape, generator=generator(setting), device=setting.device)
    key = torch.arange(shape[0], device=setting.device)
    size = logits.numel() * logits.element_size()
    for options, title in (({}, ""), (FILTERS, ", top_k=50, top_p=0.9, min_p=0.05")):
        theirs = sampler(**options)

        def ours(_: Any, options=options) -> tuple[Tensor, Tensor]:
            return F.sample_tokens(logits, seed=0, sequence=key, position=key, **options)

        note = f"{'its filters, ' if options else ''}softmax, torch.multinomial"
        yield Row(
            "sample_tokens",
            f"drawing tokens{title}",
            sizes(*shape),
            "fp32",
            {
                OURS: Contender(ours, note="with log-probs"),
                TRANSFORMERS: Contender(lambda _, theirs=theirs: theirs(logits), note=note),
            },
            Limit("logits read once", size, limits.read_once(logits) if setting.on_cpu else None),
        )


def long_tailed(tail: LongTail, random: torch.Generator) -> list[int]:
    """Log-normal, most of it within the bounds, and cut there."""
    normal = torch.randn(tail.prompts, generator=random)
    return (normal.exp() * math.sqrt(tail.least * tail.most)).long().clamp(tail.least, tail.most).tolist()


def _prompts(model: torch.nn.Module, count: int, length: int, random: torch.Generator) -> list[list[int]]:
    return torch.randint(model.config.vocab_size, (count, length), generator=random).tolist()


def _check(work: Work, made: list[int]) -> None:
    if made != work.lengths:
        raise RuntimeError(f"made responses of {made} tokens, wanted {work.lengths}")


def _mean_length(work: Work) -> int:
    """Of a sequence while it is decoded."""
    return len(work.prompts[0]) + max(work.lengths) // 2


def _weights(decoder: Any) -> list[Tensor]:
    """Of all linear layers, as a step reads them."""
    parts = [x for layer in decoder.layers for x in (layer.qkv, layer.output, layer.up, layer.down)]
    return [x for part in (*parts, decoder.head) for x in ([part.packed] if decoder.packed else part.own)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
