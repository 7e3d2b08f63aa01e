"""From what the reward functions said to the scores that a policy is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastrlhf.rewards.normalization import RunningNormalizer, normalize, normalize_groups


class ShapingArguments(Protocol):
    """The fields of PPOConfig that are read here."""

    reward_normalization: str
    normalize_each_reward: bool
    num_generations: int
    reward_clip: float | None
    missing_eos_penalty: float | None
    length_penalty: float
    response_length: int


class ScoreShaper:
    """Normalisation, clip, and the penalties of a missing EOS and of length, in this order.

    args: PPOConfig; each of its fields is off by default.
    gather: [b] -> [n], the values of all ranks, for the normalisations "batch" and "running"; a group lies on one rank.
    weights: with `args.normalize_each_reward`, of each reward function by its name: every function's scores are
        normalised, and their weighted sum is what is shaped further.
    "running" has its statistics in `state_dict`, numbers that JSON keeps exactly.
    """

    def __init__(
        self,
        args: ShapingArguments,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.args = args
        self.gather = gather
        self.weights = weights if args.normalize_each_reward else None
        self.running = {name: RunningNormalizer() for name in self.weights or ("sum",)}

    def __call__(
        self, scores: Tensor, finished: Tensor, lengths: Tensor, each: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Shaped scores [B], in the dtype of `scores`. each: [B] of each function, with `weights` alone, in place of
        scores.

        scores: [B], finite; with "group", the num_generations responses to a prompt follow each other.
        finished: [B], bool, whether a response ended by itself. lengths: [B], its tokens.
        missing_eos_penalty is taken off where it did not, length_penalty x tokens / response_length everywhere; both
        are in units of normalised scores. Raises ValueError on shapes, and with "running" for scores that are not
        finite.
        """
        args = self.args
        for name, x in (("finished", finished), ("lengths", lengths)):
            if x.shape != scores.shape:
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {tuple(scores.shape)}, that of scores")
        if self.weights is None:
            scores = self._normalized(scores, self.running["sum"])
        else:
            parts = [
                w * self._normalized(each[name].to(scores), self.running[name]) for name, w in self.weights.items()
            ]
            scores = torch.stack(parts).sum(0)
        if args.reward_clip is not None:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~finished.bool()
        if args.length_penalty:
            scores = scores - args.length_penalty * (lengths / args.response_length).to(scores.dtype)
        return scores

    def _normalized(self, scores: Tensor, running: RunningNormalizer) -> Tensor:
        match self.args.reward_normalization:
            case "batch":
                return normalize(scores, self.gather(scores))
            case "group":
                return normalize_groups(scores, self.args.num_generations)
            case "running":
                return running(scores, self.gather(scores))
        return scores

    def state_dict(self) -> dict[str, float]:
        if self.weights is None:
            return self.running["sum"].state_dict()
        return {f"{name}/{key}": x for name, each in self.running.items() for key, x in each.state_dict().items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, running in self.running.items():
            prefix = "" if self.weights is None else f"{name}/"
            running.load_state_dict({key: state[f"{prefix}{key}"] for key in running.state_dict()})
