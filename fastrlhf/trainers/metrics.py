"""Metrics as JSON lines, one record a logging step."""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import TrainerCallback

METRICS_FILE = "metrics.jsonl"


class JsonLines(TrainerCallback):
    """Appends every logged record to `output_dir/metrics.jsonl`.

    A run first drops the records of steps that it is about to make (again), so that each step stands there once, and
    lines that are no record: those that a killed run was writing.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.finished = False  # whether the run that is continued was at its end, and said so
        path = os.path.join(args.output_dir, METRICS_FILE)
        if not state.is_world_process_zero or not os.path.exists(path):
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            records = [record for line in file if (record := _record(line)) and record["step"] <= state.global_step]
        self.finished = any(record["step"] == state.global_step and "train_runtime" in record for record in records)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(f"{path}.new", path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and not ("train_runtime" in (logs or {}) and self.finished):
            with open(os.path.join(args.output_dir, METRICS_FILE), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _record(line: str) -> dict[str, Any] | None:
    """What stands in a line, or None if it is not a whole record."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None
