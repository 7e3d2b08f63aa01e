"""A whole PPO iteration of our trainer beside TRL's last PPO trainer, on equal work.

Equal work: the same models, prompts and hyper-parameters, responses of the full length (EOS ends none), and as many
optimiser steps. TRL's settings of "4 epochs x 4 mini-batches" make 4 steps an iteration, one an epoch (peers/trl_ppo.py
says why; torch's hooks count them), so ours has one mini-batch an epoch. TRL takes it in micro-batches, as these
settings make it; ours in one forward and backward, which reads and writes the gradients less often. An iteration
whose steps or tokens are others than planned is an error.

Every contender runs in a process of its own, one at a time: an iteration that warms up, then one that counts. The
processes come in turns, A B C, C B A, and so on: there is no room in memory for all of them at once.

The floor is the matrix products of trunks and head alone, at exactly the shapes of our micro-batches, as torch.mm makes
them into warm memory, timed in every turn. The rollout is left out on both sides: its own limit is in rollout.py.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from fastrlhf.bench import ppo_worker
from fastrlhf.bench.decoding_models import load
from fastrlhf.bench.measure import Stopwatch, summary
from fastrlhf.bench.peers import trl_ppo
from fastrlhf.bench.ppo_worker import TRL, Plan
from fastrlhf.bench.records import OURS, PEAK_OF_TRL
from fastrlhf.bench.settings import FLOATS, PPO, Setting
from fastrlhf.bench.sources import NotThere

TRL_FP32, TRL_BF16, LOGITS = "TRL fp32", "TRL bf16", "with logits"
SEPARATE, SHARED = "", ", value head on the policy's trunk: another algorithm"
PHASES = ("rollout", "reward", "reference", "update")
PARTS = (*PHASES, "backward", "optimizer")  # the last two are parts of the update
FLOOR = "without its rollout"

# Written down before measuring: at least so many times as fast as TRL, at most such a part of its memory in fp32, and
# at most so many times the matrix products.
TARGETS = {
    ("fp32", SEPARATE): {TRL_FP32: 1.4, PEAK_OF_TRL: 0.6},
    ("bf16", SEPARATE): {TRL_FP32: 2.8, TRL_BF16: 1.7, PEAK_OF_TRL: 0.6},
    ("bf16", SHARED): {TRL_FP32: 5.0, PEAK_OF_TRL: 0.6},
}
OF_FLOOR = {"limit": 1.3}


class Contender(NamedTuple):
    provider: str
    dtype: str
    value: str = SEPARATE


OURS_RUN = [Contender(OURS, dtype, value) for dtype, value in TARGETS]
TRL_RUN = {TRL_FP32: Contender(TRL, "fp32"), TRL_BF16: Contender(TRL, "bf16")}


class Models(NamedTuple):
    name: str
    folder: str
    prompts: list[str]
    config: Any


def roll_call() -> dict[str, dict[str, str]]:
    found = {OURS: {"version": metadata.version("fastrlhf")}}
    try:
        return found | {TRL: {"version": trl_ppo.version()}}
    except NotThere as error:
        return found | {TRL: {"missing": str(error)}}


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """The rows as they go into the JSON file."""
    plan = setting.ppo
    with models(plan) as found:
        missing = roll_call()[TRL].get("missing")
        running = [*OURS_RUN, *([] if missing else TRL_RUN.values())]
        iterations, products = _take_turns(setting, plan, found, running)
        results = {x: _result(plan, iterations[x]) for x in running}
        for ours in OURS_RUN:
            peers = {name: results.get(x, {"cannot": missing}) for name, x in TRL_RUN.items()}
            if ours.dtype == "fp32":
                del peers[TRL_BF16]
            yield _row(plan, found, ours, results[ours], peers)
        for ours in OURS_RUN:
            yield _beside_floor(plan, found, ours, results[ours], products[ours])
        yield _memory(plan, found)


class LanguageModel(NamedTuple):
    name: str
    folder: str
    tokenizer: Any
    texts: list[str]


@contextmanager
def models(plan: PPO) -> Iterator[Models]:
    """A language model, and different texts of exactly `plan.prompt` tokens."""
    from transformers import AutoConfig

    with language_model(plan.model, (plan.stock, plan.prompt)) as found:
        prompts = _beginnings(found.tokenizer, found.texts, plan)
        yield Models(found.name, found.folder, prompts, AutoConfig.from_pretrained(found.folder))


@contextmanager
def language_model(model: str, shape: tuple[int, int]) -> Iterator[LanguageModel]:
    """SmolLM2 and film reviews where the demo's assets can be had; or a random model of the same shape, with a
    tokenizer of made-up words and `shape` = (texts, tokens) of these. Its folder is there until the end."""
    from transformers import AutoTokenizer

    name, loaded = load(model, "bf16", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        if name == model:
            from fastrlhf.demo.assets import cache_folder, rated_snippets

            tokenizer = AutoTokenizer.from_pretrained(loaded.config.name_or_path)
            texts = [snippet.text for snippet in rated_snippets(cache_folder(None), offline=False)]
        else:
            tokenizer = word_tokenizer(loaded.config.vocab_size)
            words = torch.randint(2, loaded.config.vocab_size, shape).tolist()
            texts = [tokenizer.decode(row) for row in words]
        tokenizer.save_pretrained(folder)
        yield LanguageModel(name, folder, tokenizer, texts)


def word_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, size))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _beginnings(tokenizer: Any, texts: list[str], plan: PPO) -> list[str]:
    """Different texts of exactly `plan.prompt` tokens, as many as `plan.stock`."""
    found = {}
    for text in texts:
        tokens = tokenizer(text)["input_ids"][: plan.prompt]
        beginning = tokenizer.decode(tokens)
        if len(tokens) == plan.prompt and tokenizer(beginning)["input_ids"] == tokens:
            found[beginning] = None
        if len(found) == plan.stock:
            return list(found)
    raise ValueError(f"{len(found)} texts have {plan.prompt} tokens, wanted {plan.stock}")


def _take_turns(
    setting: Setting, plan: PPO, found: Models, running: list[Contender]
) -> tuple[dict[Contender, list[dict[str, Any]]], dict[Contender, list[float]]]:
    """({contender: its iterations that count}, {ours: ms of its matrix products in each turn})."""
    iterations: dict[Contender, list[dict[str, Any]]] = {x: [] for x in running}
    products: dict[Contender, list[float]] = {x: [] for x in OURS_RUN}
    for turn in range(plan.turns):
        for contender in running if turn % 2 == 0 else reversed(running):
            made = ppo_worker.run(worker_plan(plan, found, contender))[1:]
            _check(plan, contender, made)
            iterations[contender] += made
        for ours in OURS_RUN:
            products[ours].append(bare_products(plan, found.config, ours))
    return iterations, products


def worker_plan(plan: PPO, found: Models, contender: Contender) -> Plan:
    """Of a process that makes an iteration to warm up and one that counts."""
    made = 2
    arguments = {
        "num_ppo_epochs": plan.epochs,
        "response_length": plan.response,
        "temperature": 1.0,
        "per_device_train_batch_size": plan.micro_batch if contender.provider == TRL else plan.prompts,
        **QUIETLY,
    }
    if contender.provider == TRL:
        parts = plan.prompts // plan.micro_batch
        arguments |= {"gradient_accumulation_steps": parts, "num_mini_batches": parts}
        arguments |= {"total_episodes": made * plan.prompts, "local_rollout_forward_batch_size": plan.prompts}
    else:
        # Without a bound on the gradient's norm, as TRL has none.
        arguments |= {
            "rollout_batch_size": plan.prompts,
            "num_mini_batches": 1,
            "max_steps": made,
            "max_grad_norm": 0.0,
        }
    value_model = None if contender.value == SHARED else found.folder
    dtype = str(FLOATS[contender.dtype]).removeprefix("torch.")
    threads = torch.get_num_threads()
    return Plan(
        *(contender.provider, found.folder, found.folder, value_model, dtype, plan.attention),
        *(found.prompts, arguments, threads),
    )


QUIETLY = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def _check(plan: PPO, contender: Contender, iterations: list[dict[str, Any]]) -> None:
    for iteration in iterations:
        steps, length = iteration["optimizer_steps"], iteration["metrics"].get("rollout/length", plan.response)
        if (steps, length) != (plan.epochs, plan.response):
            raise RuntimeError(
                f"{contender.provider} made {steps} optimiser steps and responses of {length} tokens, wanted "
                f"{plan.epochs} and {plan.response}"
            )


def _result(plan: PPO, iterations: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of the iterations, seconds of each phase in the median, and the highest peak of memory."""
    found = summary([1e3 * x["seconds"] for x in iterations])
    for x in iterations:
        spent = x["phases"]
        spent.setdefault("update", x["seconds"] - sum(spent[name] for name in PHASES[:-1]))
    for name in PARTS:
        found[f"{name}_s"] = statistics.median(x["phases"][name] for x in iterations)
    found["peak_mib"] = max(x["peak_mib"] for x in iterations)
    found["optimizer_steps"] = iterations[0]["optimizer_steps"]
    return found


def _row(plan: PPO, found: Models, ours: Contender, result: dict[str, Any], peers: dict[str, Any]) -> dict[str, Any]:
    result = dict(result)
    if "peak_mib" in peers[TRL_FP32]:
        result[PEAK_OF_TRL] = result["peak_mib"] / peers[TRL_FP32]["peak_mib"]
    return _head(plan, f"PPO iteration, {found.name}{ours.value}", ours.dtype, TARGETS[ours.dtype, ours.value]) | {
        "tokens": plan.prompts * plan.response,
        "results": {OURS: result, **peers},
    }


def _beside_floor(
    plan: PPO, found: Models, ours: Contender, result: dict[str, Any], products: list[float]
) -> dict[str, Any]:
    rollout = 1e3 * result["rollout_s"]
    times = {name: result[name] - rollout for name in ("median_ms", "min_ms", "max_ms")}
    work = f"PPO iteration {FLOOR}, {found.name}{ours.value}"
    limit = {"what": "the matrix products of trunks and head", "flops": flops(plan, found.config, ours)}
    return _head(plan, work, ours.dtype, OF_FLOOR) | {
        "limit": limit | summary(products),
        "results": {OURS: times | {"repetitions": result["repetitions"]}},
    }


def _head(plan: PPO, work: str, dtype: str, targets: dict[str, float]) -> dict[str, Any]:
    shape = f"{plan.prompts} × ({plan.prompt} + {plan.response}) tokens, {plan.epochs} epochs and optimiser steps"
    return {"op": "ppo_step", "work": work, "shape": shape, "dtype": dtype, "targets": targets}


def _memory(plan: PPO, found: Models) -> dict[str, Any]:
    """How much the update of long responses takes with the fused LM head, and with logits; value head on the trunk."""
    count, length = plan.long
    results = {}
    for name, lm_head in ((OURS, "fused"), (LOGITS, "logits")):
        work = worker_plan(plan, found, Contender(OURS, "bf16", SHARED))
        work.arguments |= {"rollout_batch_size": count, "per_device_train_batch_size": count, "num_ppo_epochs": 1}
        work.arguments |= {"response_length": length, "lm_head": lm_head, "max_steps": 1}
        work.watch_update = True
        last = ppo_worker.run(work)[-1]
        results[name] = summary([1e3 * last["phases"]["update"]]) | {"extra_mib": last["update_mib"]}
    shape = f"{count} × ({plan.prompt} + {length}) tokens at once"
    logits = count * length * found.config.vocab_size * 4 / 2**20
    return {
        **{"op": "ppo_step", "work": f"an update's memory, {found.name}", "shape": shape, "dtype": "bf16"},
        **{"targets": {}, "logits_mib": logits, "results": results},
    }


class Product(NamedTuple):
    """A linear layer's: tokens x inputs -> tokens x outputs, so often forward, and so often backward."""

    tokens: int
    inputs: int
    outputs: int
    forward: int
    backward: int


def matrix_products(plan: PPO, config: Any, ours: Contender) -> list[Product]:
    """Of an iteration without its rollout, all of its sequences at a time.

    Forward: reference, reward model and, if it is a model of its own, the value function; the values of a head on the
    trunk come with the rollout. Forward and backward: policy and value model, once an epoch. The LM head works on the
    positions that predict a response's tokens, of policy and reference alone.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = [x for x in model.modules() if isinstance(x, nn.Linear) and x is not head]
    trained = 1 if ours.value == SHARED else 2
    tokens, predicted = plan.prompts * (plan.prompt + plan.response), plan.prompts * plan.response
    trunk_forward = 1 + trained + plan.epochs * trained
    counts: dict[tuple[int, int], int] = {}
    for x in layers:
        shape = (x.in_features, x.out_features)
        counts[shape] = counts.get(shape, 0) + 1
    found = [Product(tokens, *shape, n * trunk_forward, n * plan.epochs * trained) for shape, n in counts.items()]
    return [*found, Product(predicted, head.in_features, head.out_features, 1 + plan.epochs, plan.epochs)]


def flops(plan: PPO, config: Any, ours: Contender) -> int:
    products = matrix_products(plan, config, ours)
    return sum(2 * x.tokens * x.inputs * x.outputs * (x.forward + 2 * x.backward) for x in products)


def bare_products(plan: PPO, config: Any, ours: Contender) -> float:
    """Milliseconds of the matrix products, each timed some times and counted as often as it is made."""
    total, dtype = 0.0, FLOATS[ours.dtype]
    for x in matrix_products(plan, config, ours):
        hidden, weight = torch.ones(x.tokens, x.inputs, dtype=dtype), torch.ones(x.outputs, x.inputs, dtype=dtype)
        grad, grad_hidden = torch.ones(x.tokens, x.outputs, dtype=dtype), torch.zeros_like(hidden)
        grad_weight, out = torch.zeros_like(weight), torch.zeros_like(grad)
        forward = _median(lambda a=hidden, b=weight, out=out: torch.mm(a, b.T, out=out))
        to_hidden = _median(lambda a=grad, b=weight, out=grad_hidden: torch.mm(a, b, out=out))
        to_weight = _median(lambda a=grad, b=hidden, out=grad_weight: torch.mm(a.T, b, out=out))
        total += x.forward * forward + x.backward * (to_hidden + to_weight)
    return total


def _median(work: Callable[[], Any], repetitions: int = 11) -> float:
    stopwatch = Stopwatch()
    work()
    return statistics.median(stopwatch(lambda _: work(), None) for _ in range(repetitions))
