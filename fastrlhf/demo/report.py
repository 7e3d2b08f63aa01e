"""What the demo leaves behind for people: summary.json, a table, curves and samples."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastrlhf.demo.judgement import TEXTS_FILE
from fastrlhf.demo.workspace import STAGES, Workspace
from fastrlhf.trainers.metrics import METRICS_FILE

CURVES = {
    "rewards/reward_model": "reward model's score",
    "objective/kl": "KL to SFT, nats a response",
    "objective/entropy": "entropy, nats a token",
    "policy/clipfrac_avg": "clip fraction",
}
SAMPLES = 20


def write(workspace: Workspace) -> dict[str, Any]:
    """Write summary.json, metrics.jsonl, curves.png and samples.md, print the table, return the summary."""
    summary = summarize(workspace)
    folder = workspace.folder
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.copy(folder / "ppo" / METRICS_FILE, folder / METRICS_FILE)
    draw_curves(folder / METRICS_FILE, folder / "curves.png")
    write_samples(folder / TEXTS_FILE, folder / "samples.md")
    workspace.console.print(table(summary))
    workspace.console.print(closing_lines(summary, folder), highlight=False)
    return summary


def summarize(workspace: Workspace) -> dict[str, Any]:
    judged = workspace.results("eval")
    seconds = {
        "sft": workspace.seconds("sft"),
        "reward_model": workspace.seconds("reward_model"),
        "gold_model": workspace.seconds("gold"),
        "ppo": workspace.seconds("ppo"),
        "eval": workspace.seconds("eval"),
        "total": sum(workspace.seconds(name) for name in STAGES),
    }
    return {
        "reward_model": workspace.results("reward_model"),
        "gold_model": workspace.results("gold"),
        "sft": judged["sft"],
        "ppo": judged["ppo"],
        "seconds": seconds,
        "peak_rss_gib": workspace.state["peak_rss_gib"],
        "machine": machine(),
        "settings": workspace.state["settings"],
    }


def machine() -> str:
    """Processor, cores and accelerator, such as `AMD EPYC, 2 cores`."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """SFT against PPO: label, SFT, PPO."""
    sft, ppo = summary["sft"], summary["ppo"]

    def rate(judge: str) -> str:
        low, high = ppo[f"win_rate_{judge}_interval"]
        return f"{ppo[f'win_rate_{judge}']:.1%} [{low:.1%}, {high:.1%}]"

    both = (
        ("gold score", "gold_mean", ".2f"),
        ("VADER score", "vader_mean", ".2f"),
        ("share positive (VADER)", "positive_share", ".1%"),
        ("tokens a response", "length", ".1f"),
        ("distinct-2", "distinct_2", ".2f"),
    )
    return [
        *((label, format(sft[name], form), format(ppo[name], form)) for label, name, form in both),
        ("win rate against SFT, gold judge [95 %]", "", rate("gold")),
        ("win rate against SFT, VADER [95 %]", "", rate("vader")),
        ("KL to SFT, nats a response", "0", f"{ppo['kl']:.1f} ± {ppo['kl_standard_error']:.1f}"),
    ]


def table(summary: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    result = Table(title="Held-out prompts: SFT against PPO")
    for column in ("", "SFT", "PPO"):
        result.add_column(column, justify="left" if not column else "right")
    for row in rows(summary):
        result.add_row(*row)
    return result


def closing_lines(summary: dict[str, Any], folder: Path) -> str:
    parts = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items() if name != "total")
    return f"{measures(summary)}\nSeconds: {parts}.\nModels, summary.json, curves.png and samples.md are in {folder}/"


def measures(summary: dict[str, Any]) -> str:
    """Reward model, time and memory in one sentence each."""
    reward = summary["reward_model"]
    return (
        f"Reward model: accuracy {reward['accuracy']:.3f}, calibration error {reward['ece']:.3f} on held-out pairs. "
        f"{summary['seconds']['total'] / 60:.1f} minutes, peak memory {summary['peak_rss_gib']:.1f} GiB."
    )


def iterations(metrics: Path) -> list[dict[str, float]]:
    """The records of PPO's iterations in its metrics.jsonl."""
    with open(metrics, encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if "objective/kl" in record]


def draw_curves(metrics: Path, picture: Path) -> None:
    """Reward, KL, entropy and clip fraction over PPO's steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = iterations(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (name, label) in zip(axes.flat, CURVES.items(), strict=True):
        axis.plot([r["step"] for r in records], [r[name] for r in records], marker=".", color="tab:blue")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("PPO step")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def write_samples(texts: Path, path: Path) -> None:
    """The same prompts before and after, drawn at random."""
    with open(texts, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = random.Random(0).sample(rows, min(SAMPLES, len(rows)))

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ").strip()

    lines = [
        "# Samples",
        "",
        "The same prompts before and after PPO, with the gold judge's score; drawn at random, not chosen.",
        "",
        "| prompt | SFT | gold | PPO | gold |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = row["sft"], row["ppo"]
        lines.append(
            f"| {cell(row['prompt'])} | {cell(before['text'])} | {before['gold']:.1f} "
            f"| {cell(after['text'])} | {after['gold']:.1f} |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
