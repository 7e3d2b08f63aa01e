"""Several reward functions as one score a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.loading import load_tokenizer
from fastrlhf.rewards.calls import GuardedFunction, RewardError
from fastrlhf.rewards.reward_model import RewardModel

FP32_MAX = torch.finfo(torch.float32).max
RewardFunction = Callable[..., list[float]]


class Rewards:
    """The weighted sum of reward functions and reward models.

    reward_funcs: one or a list of callables `f(prompts, completions, **columns) -> list[float]`, sequence
        classification models with one label, or hub ids or folders of such models.
    weights: one a function; 1 each when None.
    processing_class: tokenizer of reward models given as objects that do not know where they came from.
    timeout, retries: seconds that one call of a function may take, and how many times one that raised or hung is
        called again; see GuardedFunction.
    """

    def __init__(
        self,
        reward_funcs: Any | Sequence[Any],
        weights: Sequence[float] | None = None,
        processing_class: Any | None = None,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        funcs = (
            list(reward_funcs)
            if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            else [reward_funcs]
        )
        if not funcs:
            raise ValueError("reward_funcs: empty, at least one reward model or function is wanted")
        if weights is None:
            weights = [1.0] * len(funcs)
        if len(weights) != len(funcs):
            raise ValueError(f"reward_weights has {len(weights)} weights for {len(funcs)} reward_funcs")
        self.funcs = [_as_function(func, processing_class) for func in funcs]
        self.weights = list(weights)
        self.names = _distinct([_name(func) for func in self.funcs])
        self.calls = [
            GuardedFunction(name, func, timeout, retries) for name, func in zip(self.names, self.funcs, strict=True)
        ]

    def __call__(
        self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B], fp32, and the unweighted scores of each function by its name, all finite.

        Raises RewardError for whatever goes wrong in a reward function: it raised (the cause is what it raised), hung,
        or returned something other than a finite number for each completion.
        """
        each = {
            call.name: _checked(call.name, call(prompts, completions, **columns), completions) for call in self.calls
        }
        total = sum(weight * scores for weight, scores in zip(self.weights, each.values(), strict=True))
        if not total.isfinite().all():
            index = int(total.isfinite().logical_not().nonzero()[0])
            parts = ", ".join(
                f"{weight} x {each[name][index]}" for name, weight in zip(each, self.weights, strict=True)
            )
            raise RewardError(f"reward_funcs: the weighted sum for completion {index} is not finite: {parts}")
        return total, each

    def to(self, device: torch.device) -> Rewards:
        for func in self.funcs:
            if isinstance(func, RewardModel):
                func.to(device)
        return self


def _as_function(func: Any, processing_class: Any | None) -> RewardFunction:
    if isinstance(func, str):
        return RewardModel(func)
    if isinstance(func, nn.Module):
        name = func.config.name_or_path
        return RewardModel(func, load_tokenizer(name, "reward_funcs") if name else processing_class)
    if callable(func):
        return func
    raise ValueError(f"reward_funcs: {type(func).__name__} is neither a callable, a model, nor the path of one")


def _name(func: RewardFunction) -> str:
    func = func.func if isinstance(func, partial) else func
    return getattr(func, "__name__", type(func).__name__)


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _checked(name: str, values: Any, completions: list[Any]) -> Tensor:
    """A function's rewards as a tensor [B] in fp32, where each is finite."""
    if hasattr(values, "tolist"):  # tensors and numpy arrays
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RewardError(
            f"reward_funcs: {name} returned {type(values).__name__}, a list of {len(completions)} numbers is wanted"
        )
    if len(values) != len(completions):
        raise RewardError(f"reward_funcs: {name} returned {len(values)} rewards for {len(completions)} completions")
    for index, value in enumerate(values):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise RewardError(
                f"reward_funcs: {name} returned {value!r} ({type(value).__name__}) for completion {index}, a number is "
                "wanted"
            )
        if not abs(value) <= FP32_MAX:
            raise RewardError(
                f"reward_funcs: {name} returned {value} for completion {index}: {str(completions[index])[:200]!r}. "
                "Return a finite number for every completion"
            )
    return torch.tensor([float(value) for value in values])
