"""Scores on a scale that the learning rate and the KL coefficient can be chosen for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

# Added to a standard deviation that is divided by. Statistics are in fp64: in fp32, the rounding of a mean of equal
# scores is as large as this.
EPS = 1e-8


def normalize(scores: Tensor, over: Tensor | None = None) -> Tensor:
    """Scores [B] to mean 0 and standard deviation 1 over this batch; scores that are all equal become 0.

    over: [n], the scores of all ranks, whose mean and standard deviation (unbiased) are taken; `scores` when None.
    """
    values = (scores if over is None else over).double()
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    return ((scores - values.mean()) / (std + EPS)).to(scores.dtype)


def normalize_groups(scores: Tensor, size: int) -> Tensor:
    """Scores [B] to mean 0 and standard deviation 1 (unbiased) in each `size` rows that follow each other.

    A group of equal scores becomes 0. Raises ValueError where B is no multiple of `size`.
    """
    groups = in_groups(scores, size)
    std = groups.std(dim=1, keepdim=True) if size > 1 else 0.0
    return ((groups - groups.mean(dim=1, keepdim=True)) / (std + EPS)).flatten().to(scores.dtype)


def in_groups(x: Tensor, size: int) -> Tensor:
    """[B / size, size], fp64, of x [B]: row i of x is in group i // size."""
    if len(x) % size:
        raise ValueError(f"scores: got {len(x)}, wanted a multiple of num_generations={size}, group after group")
    return x.double().view(-1, size)


@dataclass
class RunningNormalizer:
    """Scores to mean 0 and standard deviation 1 over all batches so far (Welford 1962; merged: Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def __call__(self, scores: Tensor, over: Tensor | None = None) -> Tensor:
        """Take a batch into the statistics, then return the scores [B] normalised by these.

        over: [n], the batch on all ranks; `scores` when None. Raises ValueError where it is not finite, the statistics
        as they were.
        """
        values = (scores if over is None else over).double()
        if not values.isfinite().all():
            raise ValueError("scores: one is not finite, and would stay in the running statistics for good")
        batch = values.numel()
        gap = values.mean().item() - self.mean
        total = self.count + batch
        self.squares += ((values - values.mean()) ** 2).sum().item() + gap**2 * self.count * batch / total
        self.mean += gap * batch / total
        self.count = total
        std = (self.squares / (total - 1)) ** 0.5 if total > 1 else 0.0
        return ((scores.double() - self.mean) / (std + EPS)).to(scores.dtype)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
