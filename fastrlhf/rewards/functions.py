"""Several reward functions as one score a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.loading import load_tokenizer
from fastrlhf.rewards.calls import GuardedFunction, RewardError
from fastrlhf.rewards.combine import DISAGREEMENT
from fastrlhf.rewards.ensembles import RewardEnsemble
from fastrlhf.rewards.process_reward_model import ProcessRewardModel
from fastrlhf.rewards.reward_model import RewardModel
from fastrlhf.rewards.settings import RewardSettings

FP32_MAX = torch.finfo(torch.float32).max
RewardFunction = Callable[..., list[float]]
MODELS = (RewardModel, RewardEnsemble, ProcessRewardModel)
# Characters up to the end of a step, and its reward.
Steps = list[tuple[int, float]]


@dataclass
class RewardResult:
    """What all functions say of B completions.

    total: [B], fp32, the weighted sum, rewards of steps included. outcome: [B], without them.
    each: [B] by the name of each function, unweighted, and under `function/part` what came beside its scores.
    disagreement: [B], the weighted sum over ensembles of how far their members are apart, or None without any.
    steps: of each completion, weighted, or None where no function rewards steps.
    """

    total: Tensor
    outcome: Tensor
    each: dict[str, Tensor]
    disagreement: Tensor | None = None
    steps: list[Steps] | None = None


class Rewards:
    """The weighted sum of reward functions and reward models.

    reward_funcs: one or a list of callables `f(prompts, completions, **columns) -> list[float]`, sequence
        classification models with one label, or hub ids or folders of such models.
    weights: one a function; 1 each when None.
    processing_class: tokenizer of reward models given as objects that do not know where they came from.
    timeout, retries: seconds that one call of a function may take, and how many times one that raised or hung is
        called again; see GuardedFunction.
    ensemble: "mean", "min" or "mean-std" makes all reward models among the functions one function, in the place of the
        first of them: a RewardEnsemble with std_coef. None leaves each to itself, the heads of an ensemble averaged.
    calibrated: reward models give log-odds; see RewardModel.
    """

    def __init__(
        self,
        reward_funcs: Any | Sequence[Any],
        weights: Sequence[float] | None = None,
        processing_class: Any | None = None,
        timeout: float | None = None,
        retries: int = 0,
        *,
        ensemble: str | None = None,
        std_coef: float = 1.0,
        calibrated: bool = False,
    ) -> None:
        funcs = (
            list(reward_funcs)
            if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            else [reward_funcs]
        )
        if not funcs:
            raise ValueError("reward_funcs: empty, at least one reward model or function is wanted")
        funcs = [_as_function(func, processing_class, calibrated) for func in funcs]
        if ensemble is not None:
            funcs = _with_ensemble(funcs, ensemble, std_coef)
        if weights is None:
            weights = [1.0] * len(funcs)
        if len(weights) != len(funcs):
            raise ValueError(f"reward_weights has {len(weights)} weights for {len(funcs)} reward_funcs")
        self.funcs = funcs
        self.weights = list(weights)
        self.names = _distinct([_name(func) for func in self.funcs])
        self.calls = [
            GuardedFunction(name, func, timeout, retries) for name, func in zip(self.names, self.funcs, strict=True)
        ]

    def __call__(
        self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`total` and `each` of `score`."""
        result = self.score(prompts, completions, columns)
        return result.total, result.each

    def score(self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> RewardResult:
        """What the functions say of the completions, all of it finite.

        Raises RewardError for whatever goes wrong in a reward function: it raised (the cause is what it raised), hung,
        or returned something other than a finite number for each completion.
        """
        each, disagreement, steps = {}, None, None
        total, outcome = torch.zeros(len(completions)), torch.zeros(len(completions))
        for call, weight in zip(self.calls, self.weights, strict=True):
            said = call(prompts, completions, **columns)
            scores = _checked(call.name, said, completions)
            outcome = outcome + weight * scores
            if getattr(said, "steps", None) is not None:
                own = _checked_steps(call.name, said.steps, completions)
                scores = scores + torch.tensor([sum(reward for _, reward in each_step) for each_step in own])
                weighted = [[(end, weight * reward) for end, reward in each_step] for each_step in own]
                steps = weighted if steps is None else [a + b for a, b in zip(steps, weighted, strict=True)]
            each[call.name] = scores
            total = total + weight * scores
            for part, values in getattr(said, "parts", {}).items():
                each[f"{call.name}/{part}"] = values = _checked(f"{call.name}/{part}", values, completions)
                if part == DISAGREEMENT:
                    disagreement = abs(weight) * values + (0.0 if disagreement is None else disagreement)
        if not total.isfinite().all():
            index = int(total.isfinite().logical_not().nonzero()[0])
            parts = ", ".join(
                f"{weight} x {each[name][index]}" for name, weight in zip(self.names, self.weights, strict=True)
            )
            raise RewardError(f"reward_funcs: the weighted sum for completion {index} is not finite: {parts}")
        return RewardResult(total, outcome, each, disagreement, steps)

    def to(self, device: torch.device) -> Rewards:
        for func in self.funcs:
            if isinstance(func, MODELS):
                func.to(device)
        return self


def _as_function(func: Any, processing_class: Any | None, calibrated: bool) -> RewardFunction:
    if isinstance(func, str | nn.Module):
        name = func if isinstance(func, str) else func.config.name_or_path
        tokenizer = load_tokenizer(name, "reward_funcs") if name else processing_class
        if name and RewardSettings.load(name).heads == "process":
            return ProcessRewardModel(func, tokenizer)
        return RewardModel(func, tokenizer, calibrated=calibrated)
    if callable(func):
        return func
    raise ValueError(f"reward_funcs: {type(func).__name__} is neither a callable, a model, nor the path of one")


def _with_ensemble(funcs: list[RewardFunction], how: str, std_coef: float) -> list[RewardFunction]:
    models = [func for func in funcs if isinstance(func, RewardModel)]
    if not models:
        raise ValueError(f"reward_ensemble={how!r}: there is no reward model among the reward_funcs")
    ensemble = RewardEnsemble(models, how, std_coef)
    first = funcs.index(models[0])
    return [ensemble if i == first else func for i, func in enumerate(funcs) if i == first or func not in models]


def _name(func: RewardFunction) -> str:
    func = func.func if isinstance(func, partial) else func
    return getattr(func, "__name__", type(func).__name__)


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _checked_steps(name: str, steps: Any, completions: list[Any]) -> list[Steps]:
    """Each step's end within its completion, and its reward finite."""
    if len(steps) != len(completions):
        raise RewardError(f"reward_funcs: {name} returned steps of {len(steps)} completions for {len(completions)}")
    for index, of_one in enumerate(steps):
        for end, reward in of_one:
            if not (isinstance(end, int) and end >= 1 and abs(reward) <= FP32_MAX):
                raise RewardError(
                    f"reward_funcs: {name} returned the step {(end, reward)!r} for completion {index}; a number of "
                    "characters, at least 1, and a finite reward are wanted"
                )
    return [list(of_one) for of_one in steps]


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
