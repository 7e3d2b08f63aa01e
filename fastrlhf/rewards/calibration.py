"""Whether a reward model's probabilities can be believed, and the one number that makes them more so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10
# A temperature is looked for between these, times the root mean square of the differences. On pairs that are all in the
# right order the best one would be 0.
TEMPERATURES = (1e-2, 1e2)


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of which the model is about equally sure. confidence, accuracy: their means, NaN where there is no pair."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def reliability(probabilities: Tensor, bins: int = BINS) -> list[ReliabilityBin]:
    """How often pairs were judged right, by how sure the model was (Guo et al. 2017, arXiv:1706.04599, section 2).

    probabilities: [n], the model's probability that the human's choice of a pair is the better one.
    The confidence of a pair is that of the likelier order, in [0.5, 1], cut into `bins` of equal width; a pair is
    right when its likelier order is the human's, and half right when both are as likely. Raises ValueError for an empty
    tensor, and where a probability is not a number.
    """
    if probabilities.numel() == 0:
        raise ValueError("probabilities: empty, at least one pair is wanted")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        bad = int((~((probabilities >= 0) & (probabilities <= 1))).sum())
        raise ValueError(f"probabilities: {bad} of {probabilities.numel()} are not in [0, 1]")
    probabilities = probabilities.double().flatten()
    confidence = torch.maximum(probabilities, 1 - probabilities)
    right = (probabilities > 0.5).double() + 0.5 * (probabilities == 0.5).double()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)

    def sums(x: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add(0, which.cpu(), x.cpu())

    counts = sums(torch.ones_like(confidence))
    means = [(sums(x) / counts).tolist() for x in (confidence, right)]
    edges = [0.5 + 0.5 * i / bins for i in range(bins + 1)]
    return [
        ReliabilityBin(low, high, int(count), *mean)
        for low, high, count, *mean in zip(edges, edges[1:], counts.tolist(), *means, strict=False)
    ]


def expected_calibration_error(probabilities: Tensor, bins: int = BINS) -> float:
    """Mean over the pairs of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3); see `reliability`."""
    filled = [each for each in reliability(probabilities, bins) if each.pairs]
    return sum(each.pairs * abs(each.accuracy - each.confidence) for each in filled) / probabilities.numel()


def log_loss(differences: Tensor) -> float:
    """Mean of -log sigmoid(difference) over the pairs, in nats; differences: [n], score of chosen - of rejected."""
    return torch.nn.functional.softplus(-differences.double()).mean().item()


def fit_temperature(differences: Tensor) -> float:
    """The temperature T > 0 that makes sigmoid(difference / T) the likeliest (Guo et al. 2017, section 4.2).

    differences: [n], score of chosen - score of rejected, of pairs that the model was not trained on.
    The log-loss is convex in 1/T: its derivative is bisected, T held within TEMPERATURES. Dividing all scores by T
    changes no order. Differences of 0 alone give 1. Raises ValueError for an empty tensor or one that is not finite.
    """
    if differences.numel() == 0 or not differences.isfinite().all():
        raise ValueError(f"differences: {differences.numel()} given, wanted at least one, and all finite")
    differences = differences.double()
    scale = differences.square().mean().sqrt().item()
    if scale == 0:
        return 1.0
    differences = differences / scale
    low, high = math.log(1 / TEMPERATURES[1]), math.log(1 / TEMPERATURES[0])
    for _ in range(60):  # to the last digit of log(1/T)
        middle = (low + high) / 2
        slope = -(differences * torch.sigmoid(-differences * math.exp(middle))).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return scale * math.exp(-(low + high) / 2)


def cross_fitted(differences: Tensor) -> Tensor:
    """[n], differences over a temperature that was fitted without them: on the other half, every second pair.

    What comes out is as good an estimate of how calibrated the scores will be on new pairs as n pairs allow, where one
    temperature fitted and measured on the same pairs would flatter itself. A single pair stays as it is.
    """
    scaled = differences.double().clone()
    if len(scaled) > 1:
        for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            scaled[own] /= fit_temperature(differences[other])
    return scaled
