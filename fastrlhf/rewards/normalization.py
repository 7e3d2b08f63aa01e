"""Scores on a scale that the learning rate and the KL coefficient can be chosen for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

EPS = 1e-8


def normalize(scores: Tensor) -> Tensor:
    """Scores [B] to mean 0 and standard deviation 1 over this batch; scores that are all equal become 0."""
    std = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / (std + EPS)


@dataclass
class RunningNormalizer:
    """Scores to mean 0 and standard deviation 1 over all batches so far (Welford 1962; merged: Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def __call__(self, scores: Tensor) -> Tensor:
        """Take the scores [B] into the statistics, then return them normalised by these."""
        batch, values = scores.numel(), scores.double()
        gap = values.mean().item() - self.mean
        total = self.count + batch
        self.squares += ((values - values.mean()) ** 2).sum().item() + gap**2 * self.count * batch / total
        self.mean += gap * batch / total
        self.count = total
        std = (self.squares / (total - 1)) ** 0.5 if total > 1 else 0.0
        return (scores - self.mean) / (std + EPS)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)
