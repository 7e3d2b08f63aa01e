"""Best-of-n sampling: what it is worth at every n, from one set of N samples a prompt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: the KL of best-of-n from the policy that samples (Stiennon et al. 2020,
    arXiv:2009.01325, appendix G.3).

    Exact where no two samples have the same score, and an upper bound always (Beirami et al. 2024, arXiv:2401.01879).
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_scores(scores: Tensor, gold: Tensor | None = None) -> Tensor:
    """For every n from 1 to N, the expected score of the best of n samples, without bias, from N samples.

    scores: [..., N], of N independent samples to each of some prompts. gold: [..., N], another score of the same
        samples; when given, its expectation for the sample that is best by `scores`.
    Returns [..., N], fp64; entry n - 1 is the mean over all C(N, n) subsets, among equally good samples any one with
    the same chance. Raises ValueError for other shapes, no samples, or a score that is not finite.

    Sorted by score, the i-th of N samples is the best of C(i - 1, n - 1) of the subsets (Nakano et al. 2021,
    arXiv:2112.09332, appendix I; with a gold score: Gao et al. 2022, arXiv:2210.10760, appendix A).
    """
    gold = scores if gold is None else gold
    if scores.dim() == 0 or scores.shape[-1] == 0 or gold.shape != scores.shape:
        raise ValueError(f"scores: got {tuple(scores.shape)} and gold {tuple(gold.shape)}, wanted one shape [..., N]")
    if not scores.isfinite().all() or not gold.isfinite().all():
        raise ValueError("scores: all must be finite")
    ordered, order = scores.sort(-1)
    return _mean_of_ties(ordered, gold.double().gather(-1, order)) @ _chances(scores.shape[-1]).to(scores.device).T


def _chances(count: int) -> Tensor:
    """[N, N], fp64: row n - 1 has the chance of each rank, from the worst on, to be the best of n."""
    n = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    rank = torch.arange(count - 1, 0, -1, dtype=torch.float64)
    # C(i - 1, n - 1) = C(i, n - 1) (i - n + 1) / i, from C(N - 1, n - 1) / C(N, n) = n / N on.
    steps = ((rank - n + 1) / rank).clamp(min=0)
    return torch.cat([n / count, steps], dim=1).cumprod(1).flip(1)


def _mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """`values` [..., N], averaged over the places with the same number in `ordered`."""
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    group = begins.cumsum(-1) - 1
    totals, counts = (torch.zeros_like(values).scatter_add(-1, group, x) for x in (values, torch.ones_like(values)))
    return (totals / counts.clamp(min=1)).gather(-1, group)


def best_indices(scores: Sequence[float], texts: Sequence[Hashable], count: int) -> list[int]:
    """Places of the `count` best samples, best first; of equal texts the first one only, of equal scores the earlier.

    Fewer when there are not as many different texts.
    """
    first: dict[Hashable, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text, place)
    return sorted(first.values(), key=lambda place: (-scores[place], place))[:count]


def best_of_n_summary(scores: Tensor, gold: Tensor | None = None) -> dict[str, list[float]]:
    """What best-of-n is worth over P prompts, for every n from 1 to N: lists by the names n, kl (nats), reward and
    reward_se (mean of `best_of_n_scores` over the prompts and its standard error, nan for one prompt), and with a gold
    score gold and gold_se.

    scores, gold: [P, N].
    """
    count, samples = scores.shape
    numbers = range(1, samples + 1)
    summary = {"n": list(numbers), "kl": [best_of_n_kl(n) for n in numbers]}
    judges = {"reward": scores} | ({} if gold is None else {"gold": gold})
    for name, judged in judges.items():
        each = best_of_n_scores(scores, judged)
        summary[name] = each.mean(0).tolist()
        summary[f"{name}_se"] = (each.std(0) / count**0.5).tolist()
    return summary
