"""What a reward model makes of held-out pairs: how often it is right, how sure, and about what it is wrong."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastrlhf.rewards.calibration import (
    ReliabilityBin,
    cross_fitted,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    reliability,
)

BANDS = 5


def preference_report(
    chosen: Tensor, rejected: Tensor, *, gaps: Tensor | None = None, length_differences: Tensor | None = None
) -> dict[str, Any]:
    """Numbers about a reward model's scores of held-out pairs, fit for JSON.

    chosen, rejected: [n], scores. gaps: [n], how much better the chosen text was rated, NaN where nobody said.
    length_differences: [n], tokens of the chosen text less those of the rejected.

    pairs; accuracy (a tie is half); log_loss, in nats; ece; temperature, the best on these pairs; log_loss_calibrated
    and ece_calibrated, with temperatures fitted on the other half of the pairs each; score_mean, score_std of all
    texts; reliability, bin by bin, before and after; by_gap and by_length: accuracy in up to five bands of as many
    pairs each; length_bias: longer_chosen, the share of pairs (of those whose lengths differ) in which people chose the
    longer text, longer_preferred, in which the model does, and the correlation of score and length differences.
    Raises ValueError for no pairs, or scores that are not finite, saying how many.
    """
    chosen, rejected = chosen.double().cpu(), rejected.double().cpu()
    finite = chosen.isfinite() & rejected.isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"scores: {int((~finite).sum())} of {len(finite)} pairs have a score that is not finite; the first is "
            f"pair {first}, with {chosen[first].item()} and {rejected[first].item()}"
        )
    differences = chosen - rejected
    calibrated = cross_fitted(differences)
    scores = torch.cat([chosen, rejected])
    report: dict[str, Any] = {
        "pairs": len(differences),
        "accuracy": _accuracy(differences),
        "log_loss": log_loss(differences),
        "ece": expected_calibration_error(torch.sigmoid(differences)),
        "temperature": fit_temperature(differences),
        "log_loss_calibrated": log_loss(calibrated),
        "ece_calibrated": expected_calibration_error(torch.sigmoid(calibrated)),
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
        "reliability": _filled(reliability(torch.sigmoid(differences))),
        "reliability_calibrated": _filled(reliability(torch.sigmoid(calibrated))),
    }
    if gaps is not None and gaps.isfinite().any():
        rated = gaps.isfinite()
        report["by_gap"] = accuracy_by(gaps[rated], differences[rated])
    if length_differences is not None:
        report["by_length"] = accuracy_by(length_differences, differences)
        report["length_bias"] = length_bias(length_differences, differences)
    return report


def accuracy_by(values: Tensor, differences: Tensor, bands: int = BANDS) -> list[dict[str, float]]:
    """Accuracy in bands of the values [n], cut at their quantiles, equal values together; low and high included."""
    values, differences = values.double().cpu(), differences.double().cpu()
    cuts = torch.quantile(values, torch.linspace(0, 1, bands + 1, dtype=torch.float64)[1:-1]).unique()
    which = torch.bucketize(values, cuts)
    table = []
    for band in which.unique():
        inside = which == band
        table.append(
            {
                "low": values[inside].min().item(),
                "high": values[inside].max().item(),
                "pairs": int(inside.sum()),
                "accuracy": _accuracy(differences[inside]),
            }
        )
    return table


def length_bias(length_differences: Tensor, differences: Tensor) -> dict[str, float | None]:
    """How much the model goes by length (Singhal et al. 2023, arXiv:2310.03716); see `preference_report`."""
    longer = length_differences.double().cpu()
    unequal = longer != 0
    if not unequal.any():
        return {"longer_chosen": None, "longer_preferred": None, "correlation": None}
    prefers = _accuracy(differences[unequal] * longer[unequal].sign())
    both = torch.stack([longer, differences.double().cpu()])
    varied = len(longer) > 1 and bool((both.std(dim=1) > 0).all())
    return {
        "longer_chosen": (longer[unequal] > 0).double().mean().item(),
        "longer_preferred": prefers,
        "correlation": torch.corrcoef(both)[0, 1].item() if varied else None,
    }


def write_report(folder: str, name: str, report: dict[str, Any]) -> str:
    """`name`.json in the folder, and `name`.png with its reliability diagrams; returns the path of the JSON.

    A report with objectives has diagrams of each, `name`-`objective`.png. Without matplotlib there are none, with a
    warning.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    os.replace(f"{path}.new", path)
    parts = {f"{name}-{part}".replace(os.sep, "_"): x for part, x in report.get("objectives", {}).items()}
    try:
        for part, numbers in (parts or {name: report}).items():
            draw_reliability(os.path.join(folder, f"{part}.png"), numbers)
    except ImportError:
        warnings.warn("no reliability diagrams: pip install matplotlib draws them", stacklevel=2)
    return path


def draw_reliability(path: str, report: dict[str, Any]) -> None:
    """Accuracy against confidence, as the scores are and with temperatures fitted on other pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"as trained": ("reliability", "ece"), "temperature fitted": ("reliability_calibrated", "ece_calibrated")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for axis, (title, (bins, error)) in zip(axes, panels.items(), strict=True):
        filled = report[bins]
        axis.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1)
        axis.bar(
            [b["low"] for b in filled],
            [b["accuracy"] for b in filled],
            width=[b["high"] - b["low"] for b in filled],
            align="edge",
            alpha=0.35,
            edgecolor="tab:blue",
        )
        axis.plot([b["confidence"] for b in filled], [b["accuracy"] for b in filled], "o-", color="tab:blue")
        for b in filled:
            axis.annotate(str(b["pairs"]), (b["confidence"], b["accuracy"]), fontsize=7, ha="center", va="bottom")
        axis.set(xlim=(0.5, 1), ylim=(0, 1.05), xlabel="confidence", title=f"{title}: ECE {report[error]:.3f}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of pairs in the right order")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _accuracy(differences: Tensor) -> float:
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).mean().item()


def _filled(bins: list[ReliabilityBin]) -> list[dict[str, float]]:
    return [asdict(each) for each in bins if each.pairs and not math.isnan(each.confidence)]
