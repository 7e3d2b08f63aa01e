"""What the comparison is to show, and whether it does."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastrlhf.compare.outcomes import JUDGES, TITLES
from fastrlhf.compare.overoptimization import BEST_OF_N, RL, Curve

LARGEST_CALIBRATION_ERROR = 0.05
BETTER = ("ppo", "dpo")
JUDGE_TITLES = {"gold": "the gold judge", "vader": "VADER"}


@dataclass(frozen=True)
class Claim:
    """statement: in words. holds: whether the numbers say so. numbers: what they are."""

    statement: str
    holds: bool
    numbers: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(
    table: dict[str, dict[str, Any]], found: list[Curve], reward_models: dict[str, dict[str, float]]
) -> list[Claim]:
    """Every claim. reward_models: by title, with `ece_calibrated`."""
    beaten = [_beats_sft(table, method, judge) for method in BETTER for judge in JUDGES]
    pairs = [_ensemble(found, method, small) for method in (BEST_OF_N, RL) for small in (False, True)]
    calibrated = [_calibrated(title, results["ece_calibrated"]) for title, results in reward_models.items()]
    return [*beaten, *pairs, *calibrated]


def _beats_sft(table: dict[str, dict[str, Any]], method: str, judge: str) -> Claim:
    """Holds when the whole interval is above one half."""
    rate = table[method][f"win_rate_{judge}"]
    low, high = rate["interval"]
    return Claim(
        f"{TITLES[method]} beats SFT by {JUDGE_TITLES[judge]}",
        low > 0.5,
        f"win rate {rate['mean']:.1%} [{low:.1%}, {high:.1%}], wanted all of it above 50 %",
    )


def _ensemble(found: list[Curve], method: str, small: bool) -> Claim:
    """Of the mean gold score over the distances that both reach. Holds when the ensemble's is not the lower one."""
    single, ensemble = (
        next(x for x in found if (x.method, x.variant.small, x.variant.ensemble) == (method, small, kind))
        for kind in (False, True)
    )
    furthest = min(single.distance.max().item(), ensemble.distance.max().item())
    if method == BEST_OF_N:  # the same prompts and samples
        difference, error = _paired(single, ensemble)
    else:
        means = [curve.gold_fit.mean_up_to(furthest) for curve in (ensemble, single)]
        difference, error = means[0][0] - means[1][0], math.hypot(means[0][1], means[1][1])
    who = "best of n" if method == BEST_OF_N else "PPO"
    return Claim(
        f"{who}, {'smaller' if small else 'larger'} set: the ensemble's gold score at equal KL is not below the "
        "single model's",
        difference >= 0,
        f"mean difference {difference:+.3f} ± {error:.3f} (standard error) up to sqrt(KL) = {furthest:.2f}",
    )


def _paired(single: Curve, ensemble: Curve) -> tuple[float, float]:
    """Mean over the distances of the difference in gold score, and its standard error over the prompts."""
    gaps = (ensemble.distance[1:] - ensemble.distance[:-1]).double()
    difference = (ensemble.gold - single.gold).double()
    each = ((difference[:, 1:] + difference[:, :-1]) / 2) @ gaps / gaps.sum()
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


def _calibrated(title: str, error: float) -> Claim:
    return Claim(
        f"reward model, {title}: calibration error at most {LARGEST_CALIBRATION_ERROR} after temperature scaling",
        error <= LARGEST_CALIBRATION_ERROR,
        f"{error:.3f}",
    )
