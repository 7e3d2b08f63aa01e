"""Responses and their rewards as a table, so that people see what the policy writes."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console
from rich.table import Table

COMPLETIONS_FILE = "completions.jsonl"
SHOWN = 5
WIDTH = 400  # characters of a text in the table; the file has all of it


def show_completions(step: int, prompts: list[Any], texts: list[str], scores: dict[str, list[float]]) -> None:
    """Print the first responses of an iteration, with each reward function's scores."""
    table = Table(title=f"Iteration {step}", show_lines=True)
    for name in ("prompt", "completion"):
        table.add_column(name, overflow="fold", ratio=1)
    for name in scores:
        table.add_column(name, justify="right", no_wrap=True)
    for row in range(min(SHOWN, len(texts))):
        numbers = [f"{values[row]:.2f}" for values in scores.values()]
        table.add_row(_short(_text(prompts[row])), _short(texts[row]), *numbers)
    Console().print(table, markup=False)


def write_completions(
    output_dir: str, step: int, prompts: list[Any], texts: list[str], scores: dict[str, list[float]]
) -> None:
    """Append an iteration's responses to `completions.jsonl`, one a line."""
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, COMPLETIONS_FILE), "a", encoding="utf-8") as file:
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            rewards = {name: values[row] for name, values in scores.items()}
            line = {"step": step, "prompt": prompt, "completion": text, "rewards": rewards}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
