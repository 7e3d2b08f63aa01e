"""Two answers compared in both orders, so that where an answer stands does not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastrlhf.data.cells import Text
from fastrlhf.feedback.judge import QUESTION, Opinion

# (prompts, firsts, seconds, questions) -> the probability that the first of each two is the better one, or None.
Judge = Callable[..., Sequence["Opinion | float | None"]]
# Probabilities are held within this and 1 less this, so that a judge without any doubt can still be contradicted.
CERTAIN = 1e-6


@dataclass(frozen=True)
class Judgement:
    """Of two answers. verdict: "first", "second", "tie" or "neither".

    probability: that the first is the better one, position bias cancelled. position_bias: the log-odds that the judge
    gives an answer for being shown first. mass: of A and B, the mean of both orders. NaN where there is no opinion.
    consistent: whether both orders have the same winner.
    """

    verdict: str
    probability: float
    position_bias: float
    mass: float
    consistent: bool

    def as_dict(self) -> dict[str, Any]:
        return {name: None if x != x else x for name, x in asdict(self).items()}


class PairJudge:
    """Judgements from any judge, asked twice: (first, second), and (second, first).

    judge: called as judge(prompts, firsts, seconds, questions), each a list; returns for each the probability that the
        answer shown first is the better one, None for neither, or an Opinion. LMJudge is one.
    tie_threshold: a probability within this of 1/2 is a tie.
    With l and m the log-odds of the answer shown first in the two orders, the first answer's are s = (l - m) / 2, and
    the position bias is (l + m) / 2: what a judge adds for the place alone, the same in both orders, is gone (Wang et
    al. 2023, arXiv:2305.17926, average over both orders, too). Without an opinion in one order there is none.
    """

    def __init__(self, judge: Judge, tie_threshold: float = 0.02) -> None:
        if not 0 <= tie_threshold < 0.5:
            raise ValueError(f"tie_threshold={tie_threshold} must be in [0, 0.5)")
        self.judge, self.tie_threshold = judge, tie_threshold

    def __call__(
        self,
        prompts: Sequence[Text],
        firsts: Sequence[str],
        seconds: Sequence[str],
        questions: Sequence[str] | None = None,
    ) -> list[Judgement]:
        """Raises ValueError where the judge returns another number of opinions, or one that is no probability."""
        questions = [QUESTION] * len(prompts) if questions is None else list(questions)
        asked = [*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts], [*questions, *questions]
        opinions = [_checked(opinion, i) for i, opinion in enumerate(self.judge(*asked))]
        if len(opinions) != 2 * len(prompts):
            raise ValueError(f"judge: returned {len(opinions)} opinions on {2 * len(prompts)} questions")
        return [self._judgement(*both) for both in zip(opinions[: len(prompts)], opinions[len(prompts) :], strict=True)]

    def _judgement(self, forward: Opinion, backward: Opinion) -> Judgement:
        mass = (forward.mass + backward.mass) / 2
        if forward.probability is None or backward.probability is None:
            return Judgement("neither", math.nan, math.nan, mass, False)
        ahead, behind = _log_odds(forward.probability), _log_odds(backward.probability)
        probability = 1 / (1 + math.exp(-(ahead - behind) / 2))
        verdict = "first" if probability > 0.5 else "second"
        if abs(probability - 0.5) <= self.tie_threshold:
            verdict = "tie"
        return Judgement(verdict, probability, (ahead + behind) / 2, mass, consistent=ahead * behind < 0)


def _log_odds(probability: float) -> float:
    held = min(max(probability, CERTAIN), 1 - CERTAIN)
    return math.log(held) - math.log1p(-held)


def _checked(opinion: Opinion | float | None, index: int) -> Opinion:
    if not isinstance(opinion, Opinion):
        opinion = Opinion(opinion)
    p = opinion.probability
    if p is not None and (isinstance(p, bool | str) or not 0 <= p <= 1):
        raise ValueError(f"judge: returned {p!r} for question {index}, wanted a probability, or None for neither")
    return opinion


def summary(judgements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the verdicts, and means over those with an opinion: what `Judgement.as_dict` gave, as one report."""
    verdicts = [judgement["verdict"] for judgement in judgements]
    decided = [judgement for judgement in judgements if judgement["verdict"] != "neither"]
    masses = [judgement["mass"] for judgement in judgements if judgement["mass"] is not None]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "pairs": len(verdicts),
        **{name: verdicts.count(name) for name in ("first", "second", "tie", "neither")},
        "position_bias": mean([judgement["position_bias"] for judgement in decided]),
        "consistent": mean([float(judgement["consistent"]) for judgement in decided]),
        "mass": mean(masses),
    }
