"""The table: every method's measures over the seeds."""

from __future__ import annotations

from typing import Any

import torch

from fastrlhf.compare.outcomes import BEST_OF, JUDGES, SFT, TITLES, Outcome
from fastrlhf.demo.judgement import win_rate

COLUMNS = {
    "gold_mean": ("gold", ".2f"),
    "vader_mean": ("VADER", ".2f"),
    "proxy_mean": ("reward model", ".2f"),
    "win_rate_gold": ("wins, gold [95 %]", ".1%"),
    "win_rate_vader": ("wins, VADER [95 %]", ".1%"),
    "kl": ("KL, nats", ".2f"),
    "length": ("tokens", ".1f"),
    "distinct_2": ("distinct-2", ".2f"),
    "reward_calls": ("reward-model calls", ".0f"),
    "seconds": ("seconds", ".0f"),
}


def summarize(seeds: list[dict[str, Outcome]]) -> dict[str, dict[str, Any]]:
    """By method, of each measure its mean over the seeds, their standard deviation (None for one seed) and each.

    Win rates are of all comparisons of all seeds, with Wilson's 95 % interval of their number. A prompt comes back in
    every seed with other responses.
    """
    summary = {}
    for method in TITLES:
        rows = [outcomes[method].measures(None if method == SFT else outcomes[SFT]) for outcomes in seeds]
        summary[method] = {name: _spread([row[name] for row in rows]) for name in rows[0]}
        if method != SFT:
            for judge in JUDGES:
                ours, theirs = (torch.cat([outcomes[who].scores[judge] for outcomes in seeds]) for who in (method, SFT))
                _, low, high = win_rate(ours, theirs)
                summary[method][f"win_rate_{judge}"]["interval"] = [low, high]
    return summary


def _spread(values: list[float]) -> dict[str, Any]:
    each = torch.tensor(values, dtype=torch.float64)
    return {
        "mean": each.mean().item(),
        "std": each.std().item() if len(values) > 1 else None,
        "seeds": values,
    }


def rows(summary: dict[str, dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and lines of the table, as texts."""
    lines = []
    for method, title in TITLES.items():
        cells = [_cell(method, name, summary[method].get(name), form) for name, (_, form) in COLUMNS.items()]
        lines.append((title, *cells))
    return ["", *(title for title, _ in COLUMNS.values())], lines


def _cell(method: str, name: str, found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return ""
    if name == "reward_calls" and method in (f"best-of-{n}" for n in BEST_OF):
        return f"{method.removeprefix('best-of-')} a response"
    text = format(found["mean"], form)
    if "interval" in found:
        low, high = found["interval"]
        return f"{text} [{low:{form}}, {high:{form}}]"
    spread = found["std"]
    return text if not spread or name in ("reward_calls", "seconds") else f"{text} ± {spread:{form}}"
