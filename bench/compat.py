"""The frameworks' own functions beside ours in their place (fastrlhf.compat), and TRL's trainers with both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from fastrlhf.bench import compat_training
from fastrlhf.bench.advantages import response_mask
from fastrlhf.bench.contests import timed_forward, timed_forward_backward
from fastrlhf.bench.measure import Contender, Row, measure
from fastrlhf.bench.peers import openrlhf, verl
from fastrlhf.bench.peers.base import CLIP, GAMMA, LAM, VALUE_CLIP, Run
from fastrlhf.bench.records import OURS
from fastrlhf.bench.settings import Setting, generator, sizes
from fastrlhf.bench.sources import NotThere
from fastrlhf.compat import original

THEIRS = compat_training.THEIRS
FRAMEWORKS = {"TRL": "trl", "Liger": "liger", "verl": "verl", "OpenRLHF": "openrlhf", "torchrl": "torchrl"}
LOGITS, HEAD, TOKENS = "logits", "head", "tokens"  # what a row's inputs are


@dataclass
class Swap:
    """One of our functions and the framework's own that it replaces.

    inputs: LOGITS, HEAD or TOKENS, from which `call` makes the arguments: call(function, **inputs). target: at least
    so many times as fast, written down before measuring. leaves: names of the inputs that get a gradient; without any,
    the call is timed without autograd. grads: how many gradients come in; a loss needs none.
    """

    framework: str
    name: str
    inputs: str
    call: Callable[..., Any]
    target: float
    leaves: tuple[str, ...] = ()
    grads: int = 0


def _logits_call(function, logits, tokens, **_):
    return function(logits, tokens)


def _fused_head(function, hidden, weight, tokens, **_):
    asked = ("log_probs", "entropy")
    found = function.apply(hidden.flatten(0, 1), weight, None, tokens.flatten(), 1.0, 32_768, None, 1.0, asked)
    return found[0].view(tokens.shape)


def _grpo(loss, hidden, weight, tokens, mask, scores, old, **_):
    made = loss(beta=0.0, use_ref_model=False, compiled=False)
    return made(hidden, weight, tokens, mask, scores, old_per_token_logps=old)[0]


def _dpo(loss, hidden, weight, tokens, **_):
    return loss(use_ref_model=False, compiled=False)(weight, hidden, tokens)[0]


def _verl_gae(function, rewards, values, mask, **_):
    return function(rewards, values, mask, GAMMA, LAM)


def _verl_policy(function, log_probs, old, advantages, mask, **_):
    return function(old, log_probs, advantages, mask, "token-mean", verl.CONFIG)[0]


def _verl_value(function, new_values, values, rewards, mask, **_):
    return function(new_values, rewards, values, mask, VALUE_CLIP)[0]


def _openrlhf_gae(function, rewards, values, mask, **_):
    return function(None, values, rewards, mask, GAMMA, LAM)


def _openrlhf_policy(loss, log_probs, old, advantages, mask, **_):
    return loss(CLIP, CLIP)(log_probs, old, advantages, mask)[0]


def _torchrl_gae(function, rewards, values, **_):
    """[B, T, 1], the values that come next, and the flags of the last token."""
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)[..., None]
    done = torch.zeros_like(following, dtype=torch.bool)
    done[:, -1] = True
    return function(GAMMA, LAM, values[..., None], following, rewards[..., None], done, done)


_HEAD = ("hidden", "weight")
# Those of the issue that asked for them; of the others, what was expected.
SWAPS = [
    Swap("TRL", "selective_log_softmax", LOGITS, _logits_call, 5),
    Swap("TRL", "selective_log_softmax_and_entropy", LOGITS, _logits_call, 20),
    Swap("TRL", "selective_log_softmax_and_entropy", LOGITS, _logits_call, 20, ("logits",), 2),
    Swap("TRL", "ChunkedLogProbFunction", HEAD, _fused_head, 1.3, _HEAD, 1),
    Swap("Liger", "LigerFusedLinearGRPOLoss", HEAD, _grpo, 1.8, _HEAD),
    Swap("Liger", "LigerFusedLinearDPOLoss", HEAD, _dpo, 1.3, _HEAD),
    Swap("verl", "compute_gae_advantage_return", TOKENS, _verl_gae, 100),
    Swap("verl", "compute_policy_loss_vanilla", TOKENS, _verl_policy, 30, ("log_probs",)),
    Swap("verl", "compute_value_loss", TOKENS, _verl_value, 30, ("new_values",)),
    Swap("verl", "logprobs_from_logits", LOGITS, _logits_call, 5),
    Swap("OpenRLHF", "get_advantages_and_returns", TOKENS, _openrlhf_gae, 50),
    Swap("OpenRLHF", "PolicyLoss", TOKENS, _openrlhf_policy, 30, ("log_probs",)),
    Swap("OpenRLHF", "log_probs_from_logits", LOGITS, _logits_call, 10),
    Swap("torchrl", "generalized_advantage_estimate", TOKENS, _torchrl_gae, 40),
    Swap("torchrl", "vec_generalized_advantage_estimate", TOKENS, _torchrl_gae, 40),
]


def ours(swap: Swap) -> Any:
    return getattr(_module(swap.framework), swap.name)


def theirs(swap: Swap) -> Any:
    """verl and OpenRLHF cannot be imported here; their functions are taken out of their files."""
    if swap.framework == "OpenRLHF":
        return getattr(openrlhf.functions(), swap.name)
    if swap.framework == "verl":
        return getattr(verl.algorithms(), swap.name, None) or getattr(verl.functional(), swap.name)
    places = _module(swap.framework).REPLACEMENTS
    return original(next(place for place in places if place.endswith(f".{swap.name}")))


def _module(framework: str) -> ModuleType:
    return importlib.import_module(f"fastrlhf.compat.{FRAMEWORKS[framework]}")


def roll_call() -> dict[str, dict[str, str]]:
    found = {OURS: {"version": metadata.version("fastrlhf")}}
    for framework in FRAMEWORKS:
        try:
            module = _module(framework)
            found[framework] = {"version": metadata.version(getattr(module, "DISTRIBUTION", module.PACKAGE))}
        except metadata.PackageNotFoundError:
            found[framework] = {"missing": "not installed"}
    return found


def measured(setting: Setting, stopwatch: Any, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """The rows as they go into the JSON file; TRL's trainers only on CPU, where they are tried."""
    there = roll_call()
    for row in rows(setting):
        yield measure(row, stopwatch, setting.seconds, bandwidth)
    if setting.on_cpu and "version" in there["TRL"]:
        yield from compat_training.measure(setting.training)


def rows(setting: Setting) -> Iterator[Row]:
    made: dict[str, dict[str, torch.Tensor]] = {}
    for swap in SWAPS:
        if swap.inputs not in made:
            made = {swap.inputs: INPUTS[swap.inputs](setting)}  # of the large ones, one kind at a time
        contenders = {OURS: contender(swap, ours(swap), made[swap.inputs])}
        try:
            contenders[THEIRS] = contender(swap, theirs(swap), made[swap.inputs])
        except (NotThere, ImportError, AttributeError) as error:
            contenders[THEIRS] = " ".join(str(error).split())
        work = f"{swap.framework} `{swap.name}`{', forward + backward' if swap.leaves else ''}"
        yield Row(swap.name, work, SHAPES[swap.inputs](setting), "fp32", contenders, None, {THEIRS: swap.target})


def contender(swap: Swap, function: Any, inputs: dict[str, torch.Tensor]) -> Contender:
    """The framework's call of `function`."""

    def call(*tensors):
        return swap.call(function, **dict(zip(inputs, tensors, strict=True)))

    tensors = tuple(inputs.values())
    if not swap.leaves:
        return timed_forward(Run(call), call, tensors)
    leaves = [list(inputs).index(name) for name in swap.leaves]
    return timed_forward_backward(Run(call), call, tensors, leaves, [inputs["grad"]] * swap.grads if swap.grads else [])


def _logits(setting: Setting) -> dict[str, torch.Tensor]:
    """Of a few sequences, as trainers have them."""
    random, vocabulary = generator(setting), setting.vocabularies[0]
    on_device = {"generator": random, "device": setting.device}
    shape = (min(4, setting.rows), max(1, setting.rows // 4))
    return {
        "logits": torch.randn(*shape, vocabulary, **on_device).mul_(2),
        "tokens": torch.randint(vocabulary, shape, **on_device),
        "grad": torch.randn(shape, **on_device),
    }


def _head(setting: Setting) -> dict[str, torch.Tensor]:
    random = generator(setting)
    on_device = {"generator": random, "device": setting.device}
    n, size, vocabulary = _head_sizes(setting)
    shape = (4, max(1, n // 4))
    hidden = torch.randn(*shape, size, **on_device)
    weight = torch.randn(vocabulary, size, **on_device).div_(size**0.5)
    tokens = torch.randint(vocabulary, shape, **on_device)
    logits = (hidden @ weight.T).log_softmax(-1)
    old = logits.gather(-1, tokens[..., None])[..., 0] + 0.1 * torch.randn(shape, **on_device)
    mask, scores, grad = (
        torch.ones(shape, device=setting.device),
        torch.randn(4, **on_device),
        torch.randn(shape, **on_device),
    )
    return {
        "hidden": hidden,
        "weight": weight,
        "tokens": tokens,
        "old": old,
        "mask": mask,
        "scores": scores,
        "grad": grad,
    }


def _tokens(setting: Setting) -> dict[str, torch.Tensor]:
    random, shape = generator(setting), setting.batches[0]
    on_device = {"generator": random, "device": setting.device}
    old = -torch.rand(shape, **on_device)
    rewards, values, advantages = (torch.randn(shape, **on_device) for _ in range(3))
    return {
        "log_probs": old + 0.1 * torch.randn(shape, **on_device),
        "old": old,
        "advantages": advantages,
        "rewards": rewards,
        "values": values,
        "new_values": values + 0.3 * torch.randn(shape, **on_device),
        "mask": response_mask(*shape, random).float(),
    }


def _head_sizes(setting: Setting) -> tuple[int, int, int]:
    """The setting's LM head, for as many tokens as it has rows of logits."""
    n, size, vocabulary = setting.lm_heads[0]
    return min(n, setting.rows) // 4 * 4 or 4, size, vocabulary


INPUTS = {LOGITS: _logits, HEAD: _head, TOKENS: _tokens}
SHAPES = {
    LOGITS: lambda setting: sizes(setting.rows, setting.vocabularies[0]),
    HEAD: lambda setting: sizes(*_head_sizes(setting)),
    TOKENS: lambda setting: sizes(*setting.batches[0]),
}
