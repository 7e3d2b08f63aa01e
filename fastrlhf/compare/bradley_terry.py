"""A world whose utilities are known, and what is known to be true in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compare.claims import Claim
from fastrlhf.compare.overoptimization import BEST_OF_N, RL, fit, terms
from fastrlhf.rewards.calibration import expected_calibration_error
from fastrlhf.rollout import best_of_n_kl, best_of_n_scores

SUMMARY = "synthetic.json"
FEATURES = 16
TRAINING_PAIRS = (100, 1_000, 10_000, 100_000)
HELD_OUT_PAIRS = 200_000
BEST_OF = (1, 2, 4, 16, 64)
OUTCOMES = 100_000
CURVES = {BEST_OF_N: (2.0, 0.6), RL: (1.5, 0.9)}


@dataclass
class Pairs:
    """chosen, rejected: [n, k], features of the texts. probability: [n], that the chosen one is preferred, of which it
    was drawn."""

    chosen: Tensor
    rejected: Tensor
    probability: Tensor

    def differences(self, weights: Tensor) -> Tensor:
        """[n], score of chosen less that of rejected."""
        return (self.chosen - self.rejected) @ weights


class World:
    """Texts are features x [k], standard normal; their utility is u = w . x, and people prefer one text to another with
    the probability sigmoid(u - u') (Bradley & Terry 1952)."""

    def __init__(self, seed: int = 0, features: int = FEATURES, spread: float = 1.5) -> None:
        """spread: standard deviation of the utilities."""
        self.generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(features, generator=self.generator)
        self.weights = spread * weights / weights.norm()

    def pairs(self, count: int) -> Pairs:
        a, b = torch.randn(2, count, len(self.weights), generator=self.generator)
        probability = torch.sigmoid((a - b) @ self.weights)
        first = torch.rand(count, generator=self.generator) < probability
        chosen, rejected = torch.where(first[:, None], a, b), torch.where(first[:, None], b, a)
        return Pairs(chosen, rejected, torch.where(first, probability, 1 - probability))


def bayes_accuracy(pairs: Pairs) -> float:
    """What nobody can exceed who sees the texts: the mean probability of the likelier order."""
    return torch.maximum(pairs.probability, 1 - pairs.probability).double().mean().item()


def expected_accuracy(pairs: Pairs, weights: Tensor) -> float:
    """Of scores w . x, over all labels that people might give these pairs."""
    likelier = torch.maximum(pairs.probability, 1 - pairs.probability)
    agrees = (pairs.differences(weights) > 0) == (pairs.probability > 0.5)
    return torch.where(agrees, likelier, 1 - likelier).double().mean().item()


def train(pairs: Pairs) -> Tensor:
    """The weights [k] of the likeliest linear reward model, by the Bradley-Terry loss of the trainers."""
    weights = torch.zeros(pairs.chosen.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = F.pairwise_reward_loss(pairs.chosen @ weights, pairs.rejected @ weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def best_of_n_exactly(probabilities: Tensor, n: int) -> tuple[float, float]:
    """KL from the policy in nats, and win rate against one of its samples, a tie being half a win.

    probabilities: [V], fp64, of the outcomes, the worst first, no two equally good. The best of n is outcome i with the
    probability F(i)^n - F(i - 1)^n, F being the sum of the probabilities up to one.
    """
    upper = probabilities.cumsum(0)
    upper = upper / upper[-1]
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    best = upper**n - lower**n
    kl = torch.special.xlogy(best, best / probabilities).sum()
    return kl.item(), (best * (lower + upper) / 2).sum().item()


def reward_model_rows(seed: int) -> list[dict[str, float]]:
    """A reward model of more and more pairs beside the Bayes optimum."""
    world = World(seed)
    held_out = world.pairs(HELD_OUT_PAIRS)
    rows = []
    for count in TRAINING_PAIRS:
        weights = train(world.pairs(count))
        rows.append(
            {
                "pairs": count,
                "accuracy": expected_accuracy(held_out, weights),
                "bayes_accuracy": bayes_accuracy(held_out),
                "ece": expected_calibration_error(torch.sigmoid(held_out.differences(weights))),
            }
        )
    return rows


def best_of_n_rows() -> list[dict[str, float]]:
    """Of OUTCOMES outcomes of the same probability: exact KL and win rate beside the formulas, and the estimator's."""
    uniform = torch.full((OUTCOMES,), 1 / OUTCOMES, dtype=torch.float64)
    count = BEST_OF[-1]
    # The ranks of samples that stand where the quantiles do: the estimator's mean rank of the best is n/(n+1) exactly.
    quantiles = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
    estimated = best_of_n_scores(quantiles)
    rows = []
    for n in BEST_OF:
        kl, wins = best_of_n_exactly(uniform, n)
        rows.append(
            {
                "n": n,
                "kl": kl,
                "kl_bound": best_of_n_kl(n),
                "win_rate": wins,
                "win_rate_formula": n / (n + 1),
                "win_rate_estimated": estimated[n - 1].item(),
            }
        )
    return rows


def curve_rows(seed: int, noise: float = 0.05, points: int = 60) -> list[dict[str, Any]]:
    """The coefficients that are fitted to points from the formulas with noise, beside those they were made with."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.linspace(0, 3, points, dtype=torch.float64)
    rows = []
    for method, made_with in CURVES.items():
        score = terms(method, distance) @ torch.tensor(made_with, dtype=torch.float64)
        score = score + noise * torch.randn(points, dtype=torch.float64, generator=generator)
        rows.append({"method": method, "true_alpha": made_with[0], "true_beta": made_with[1]})
        rows[-1] |= fit(method, distance, score).as_dict()
    return rows


def check(summary: dict[str, Any]) -> list[Claim]:
    last, best, curves = summary["reward_model"][-1], summary["best_of_n"], summary["curves"]
    kl_gap = max(abs(row["kl"] - row["kl_bound"]) for row in best)
    win_gap = max(
        abs(row[name] - row["win_rate_formula"]) for row in best for name in ("win_rate", "win_rate_estimated")
    )
    away = max(
        abs(row[name] - row[f"true_{name}"]) / row[f"{name}_error"] for row in curves for name in ("alpha", "beta")
    )
    regret = last["bayes_accuracy"] - last["accuracy"]
    return [
        Claim(
            "the reward model's accuracy reaches the Bayes optimum",
            0 <= regret < 1e-3,
            f"{last['accuracy']:.4f} of {last['bayes_accuracy']:.4f} after {last['pairs']} pairs",
        ),
        Claim("its calibration error goes to 0", last["ece"] < 0.01, f"{last['ece']:.4f}"),
        Claim("KL of best-of-n is log n - (n - 1)/n", kl_gap < 1e-2, f"largest difference {kl_gap:.1g} nats"),
        Claim("best-of-n wins n/(n + 1) against one sample", win_gap < 1e-4, f"largest difference {win_gap:.1g}"),
        Claim(
            "the fitted coefficients of overoptimisation are those that the points were made with",
            away < 4,
            f"{away:.1f} standard errors away at most",
        ),
    ]


def report(output_dir: str, results_dir: str | None, seed: int, console: Console) -> dict[str, Any]:
    """Measure all of it, print it, and write synthetic.json, into results_dir too. Returns what is in it."""
    summary: dict[str, Any] = {
        "reward_model": reward_model_rows(seed),
        "best_of_n": best_of_n_rows(),
        "curves": curve_rows(seed),
    }
    summary["claims"] = [claim.as_dict() for claim in check(summary)]
    path = Path(output_dir) / SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if results_dir is not None:
        Path(results_dir).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, results_dir)
    for name in ("reward_model", "best_of_n", "curves"):
        table = Table(title=name.replace("_", " "))
        for column in summary[name][0]:
            table.add_column(column, justify="right")
        for row in summary[name]:
            table.add_row(*(x if isinstance(x, str) else f"{x:.5g}" for x in row.values()))
        console.print(table)
    for claim in summary["claims"]:
        console.print(
            f"{'yes' if claim['holds'] else 'no'}: {claim['statement']} ({claim['numbers']})", highlight=False
        )
    console.print(f"{SUMMARY} is in {output_dir}/", highlight=False)
    return summary
