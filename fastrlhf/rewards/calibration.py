"""Whether a reward model's probabilities can be believed."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, bins: int = 10) -> float:
    """Expected calibration error of pairwise preferences (Guo et al. 2017, arXiv:1706.04599, equation 3).

    probabilities: [n], the model's probability that the human's choice of a pair is the better one.
    The confidence of a pair is that of the likelier order, in [0.5, 1], cut into `bins` of equal width; a pair is
    right when its likelier order is the human's. Returns the mean over the pairs of |accuracy - confidence| of their
    bin. Raises ValueError for an empty tensor.
    """
    if probabilities.numel() == 0:
        raise ValueError("probabilities: empty, at least one pair is wanted")
    confidence = torch.maximum(probabilities, 1 - probabilities).double()
    right = (probabilities > 0.5).double()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, which, right - confidence)
    return (gap.abs().sum() / probabilities.numel()).item()
