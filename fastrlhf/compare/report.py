"""What the comparison leaves behind: a summary, the table, the figure, and what of the claims holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from fastrlhf.compare import claims, outcomes, overoptimization, table
from fastrlhf.compare.methods import GOLD
from fastrlhf.compare.recipe import Recipe
from fastrlhf.compare.rewards import VARIANTS
from fastrlhf.demo.report import machine
from fastrlhf.demo.workspace import Workspace

SUMMARY, FIGURE = "compare.json", "overoptimization.png"


def write(workspace: Workspace, seeds: int, recipe: Recipe, results_dir: str | None) -> dict[str, Any]:
    """Write compare.json and overoptimization.png, into results_dir too; print everything; return the summary."""
    compared = table.summarize([outcomes.of_seed(workspace, number) for number in range(seeds)])
    curves = overoptimization.curves(workspace, seeds, recipe)
    reward_models = {variant.title: workspace.results(variant.stage) for variant in VARIANTS}
    checked = claims.check(compared, curves, reward_models)
    summary = {
        "table": compared,
        "overoptimization": [curve.as_dict() for curve in curves],
        "claims": [claim.as_dict() for claim in checked],
        "reward_models": reward_models,
        "gold_model": workspace.results(GOLD),
        "seconds": {name: workspace.seconds(name) for name in workspace.stages},
        "peak_rss_gib": workspace.state["peak_rss_gib"],
        "seeds": seeds,
        "machine": machine(),
        "settings": workspace.state["settings"],
    }
    written = [workspace.folder / name for name in (SUMMARY, FIGURE)]
    written[0].write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    overoptimization.draw(curves, written[1])
    if results_dir is not None:
        Path(results_dir).mkdir(parents=True, exist_ok=True)
        for path in written:
            shutil.copy(path, results_dir)
    show(workspace, summary)
    return summary


def show(workspace: Workspace, summary: dict[str, Any]) -> None:
    console = workspace.console
    for title, (head, lines) in {
        f"Held-out prompts, {summary['seeds']} seeds": table.rows(summary["table"]),
        "Overoptimisation": fitted_rows(summary),
    }.items():
        shown = Table(title=title)
        for column in head:
            shown.add_column(column, justify="right" if column else "left")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
    for line in claim_lines(summary):
        console.print(line, highlight=False, markup=False)
    console.print(f"{closing(summary)}\n{SUMMARY} and {FIGURE} are in {workspace.folder}/", highlight=False)


def fitted_rows(summary: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and lines of the fitted coefficients."""
    titles = {variant.name: variant.title for variant in VARIANTS}
    methods = {
        overoptimization.BEST_OF_N: "best of n, d (alpha - beta d)",
        overoptimization.RL: "PPO, d (alpha - beta log d)",
    }
    lines = []
    for curve in summary["overoptimization"]:
        fits = (curve["gold_fit"], curve["proxy_fit"])
        cells = [_with_error(found, name) for found in fits for name in ("alpha", "beta")]
        left = [_number(found["rms"]) for found in fits]
        name = f"{methods[curve['method']]}, {titles[curve['reward_model']]}"
        lines.append((name, *cells, " / ".join(left)))
    return ["", "alpha gold", "beta gold", "alpha proxy", "beta proxy", "rms error"], lines


def _with_error(found: dict[str, float | None], name: str) -> str:
    return f"{_number(found[name])} ± {_number(found[f'{name}_error'])}"


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.2f}"


def claim_lines(summary: dict[str, Any]) -> list[str]:
    return [f"{'yes' if x['holds'] else 'no'}: {x['statement']} ({x['numbers']})" for x in summary["claims"]]


def closing(summary: dict[str, Any]) -> str:
    """Time and memory in one sentence."""
    total = sum(summary["seconds"].values())
    return f"{total / 60:.0f} minutes, peak memory {summary['peak_rss_gib']:.1f} GiB."
