"""Gold and proxy score against the distance from SFT, and the curves that Gao et al. 2022 fitted to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.compare import rewards, samples
from fastrlhf.compare.recipe import Recipe
from fastrlhf.compare.rewards import TABLE, VARIANTS, RewardVariant
from fastrlhf.demo import stages
from fastrlhf.demo.report import iterations
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rollout import best_of_n_kl, best_of_n_scores
from fastrlhf.trainers.metrics import METRICS_FILE

BEST_OF_N, RL = "best-of-n", "ppo"


def terms(method: str, distance: Tensor) -> Tensor:
    """[k, 2], what alpha and beta are multiplied by in R(d), for distances d = sqrt(KL) [k] (Gao et al. 2022,
    arXiv:2210.10760, section 3): R_bon(d) = d (alpha - beta d), R_RL(d) = d (alpha - beta log d), which is 0 at 0."""
    d = distance.double()
    second = d * d if method == BEST_OF_N else torch.special.xlogy(d, d)
    return torch.stack([d, -second], dim=1)


@dataclass
class Fit:
    """coefficients: alpha and beta. covariance: [2, 2], of their errors. rms: of what the curve leaves, in the score's
    units."""

    method: str
    coefficients: Tensor
    covariance: Tensor
    rms: float

    def mean_up_to(self, distance: float) -> tuple[float, float]:
        """The curve's mean over distances from 0 to this one, and its standard error."""
        grid = torch.linspace(0, distance, 1001, dtype=torch.float64)
        weights = torch.trapezoid(terms(self.method, grid), grid, dim=0) / distance
        return (weights @ self.coefficients).item(), (weights @ self.covariance @ weights).sqrt().item()

    def as_dict(self) -> dict[str, float | None]:
        """alpha, beta, their errors and rms; None for what is not known."""
        errors = self.covariance.diagonal().sqrt()
        names = ("alpha", "beta", "alpha_error", "beta_error", "rms")
        values = [*self.coefficients.tolist(), *errors.tolist(), self.rms]
        return {name: x if math.isfinite(x) else None for name, x in zip(names, values, strict=True)}


def fit(method: str, distance: Tensor, score: Tensor) -> Fit:
    """Least squares of R(d) at distances [k] to scores [k], or to scores [p, k] of p prompts.

    The errors are those of least squares with independent points; where there are prompts, they come from the spread of
    the prompts' own coefficients, whose mean the fit of the mean is: best-of-n of different n is of the same samples.
    All is NaN with fewer than 3 points at which d is not 0: a policy that hardly moved has no curve.
    """
    design = terms(method, distance)
    if int((distance > 0).sum()) < 3:
        unknown = torch.full((2, 2), math.nan, dtype=torch.float64)
        return Fit(method, unknown[0], unknown, math.nan)
    inverse = torch.linalg.pinv(design)
    each = score.double().reshape(-1, len(distance)) @ inverse.T
    coefficients = each.mean(0)
    left = score.double().reshape(-1, len(distance)).mean(0) - design @ coefficients
    if len(each) > 1:
        covariance = torch.cov(each.T) / len(each)
    else:
        covariance = left.square().sum() / (len(distance) - 2) * (inverse @ inverse.T)
    return Fit(method, coefficients, covariance, left.square().mean().sqrt().item())


@dataclass
class Curve:
    """One method with one reward model. distance: [k], sqrt(KL) in nats. gold, proxy: [k], gains over SFT, or
    [p, k] of p prompts; proxy is the reward model's own score. gold_fit, proxy_fit: R(d) of these."""

    method: str
    variant: RewardVariant
    distance: Tensor
    gold: Tensor
    proxy: Tensor

    def __post_init__(self) -> None:
        self.gold_fit = fit(self.method, self.distance, self.gold)
        self.proxy_fit = fit(self.method, self.distance, self.proxy)

    def as_dict(self) -> dict[str, Any]:
        points = {"gold": self.gold, "proxy": self.proxy}
        return {
            "method": self.method,
            "reward_model": self.variant.name,
            "distance": self.distance.tolist(),
            **{name: each.reshape(-1, len(self.distance)).mean(0).tolist() for name, each in points.items()},
            "gold_fit": self.gold_fit.as_dict(),
            "proxy_fit": self.proxy_fit.as_dict(),
        }


def curves(workspace: Workspace, seeds: int, recipe: Recipe) -> list[Curve]:
    """Of both methods with every reward model."""
    found = []
    for variant in VARIANTS:
        gold, proxy, reward = _sample_scores(workspace, variant, seeds, recipe)
        found.append(best_of_n_curve(variant, gold, proxy, reward))
        found.append(ppo_curve(workspace, variant, gold, proxy))
    return found


def _sample_scores(
    workspace: Workspace, variant: RewardVariant, seeds: int, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Of SFT's samples in all seeds, [p, k] each: gold and proxy score, and the reward."""
    gold, proxy, brevity = [], [], []
    for number in range(seeds):
        stage = f"samples-{number}"
        found = samples.read(workspace, stage)[: recipe.curve_prompts]
        gold.append(samples.read_scores(workspace, f"gold-{stage}")[: len(found)])
        if variant == TABLE:
            proxy.append(torch.tensor([x.each[rewards.NAME] for x in found]))
        else:
            proxy.append(samples.read_scores(workspace, f"{variant.name}-{stage}"))
        brief = [stages.brevity(recipe.full_length_words, [], x.completions) for x in found]
        brevity.append(torch.tensor(brief))
    gold, proxy = torch.cat(gold, dim=1), torch.cat(proxy, dim=1)
    return gold, proxy, proxy + recipe.brevity_weight * torch.cat(brevity, dim=1)


def best_of_n_curve(variant: RewardVariant, gold: Tensor, proxy: Tensor, reward: Tensor) -> Curve:
    """For every n up to the number of samples, by the unbiased estimator; the best is that by the reward.

    gold, proxy, reward: [p, k], of k samples to each of p prompts.
    """
    distance = torch.tensor([math.sqrt(best_of_n_kl(n)) for n in range(1, reward.shape[1] + 1)])
    gains = (best_of_n_scores(reward, each) - each.double().mean(1, keepdim=True) for each in (gold, proxy))
    return Curve(BEST_OF_N, variant, distance, *gains)


def ppo_curve(workspace: Workspace, variant: RewardVariant, gold: Tensor, proxy: Tensor) -> Curve:
    """Along the training, an iteration a point: the KL and the scores of its responses.

    gold, proxy: scores of SFT's samples, whose means are the start.
    """
    records = iterations(workspace.folder / curve_stage(variant) / METRICS_FILE)
    kl = torch.tensor([record["objective/kl"] for record in records])  # an estimate, which may be below 0
    gains = (
        torch.tensor([record[f"rewards/{name}"] for record in records]) - each.mean()
        for name, each in (("gold", gold), (rewards.NAME, proxy))
    )
    return Curve(RL, variant, kl.clamp(min=0).sqrt(), *gains)


def curve_stage(variant: RewardVariant) -> str:
    return f"curve-ppo-{variant.name}"


def draw(found: list[Curve], picture: Path) -> None:
    """Gold and proxy against sqrt(KL): a row for each preference set, a column for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for curve in found:
        axis = axes[int(not curve.variant.small), int(curve.method == RL)]
        colour = "tab:orange" if curve.variant.ensemble else "tab:blue"
        kind = "ensemble" if curve.variant.ensemble else "single model"
        grid = torch.linspace(0, curve.distance.max().item(), 200)
        shown = terms(curve.method, grid)
        for name, points, fitted, style, marker in (
            ("gold", curve.gold, curve.gold_fit, "-", "."),
            ("proxy", curve.proxy, curve.proxy_fit, "--", "x"),
        ):
            mean = points.reshape(-1, len(curve.distance)).mean(0)
            axis.plot(curve.distance, mean, marker, color=colour, alpha=0.4, markersize=4)
            axis.plot(grid, shown @ fitted.coefficients, style, color=colour, label=f"{name}, {kind}")
        axis.set_title(
            f"{'PPO' if curve.method == RL else 'best of n'}, {'smaller' if curve.variant.small else 'larger'} set",
            fontsize=10,
        )
        axis.set_xlabel("sqrt(KL to SFT in nats)")
        axis.set_ylabel("gain over SFT")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
