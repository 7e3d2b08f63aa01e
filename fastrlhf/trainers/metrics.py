"""Metrics as JSON lines, one record a logging step."""

from __future__ import annotations

import json
import os

from transformers import TrainerCallback

METRICS_FILE = "metrics.jsonl"


class JsonLines(TrainerCallback):
    """Appends every logged record to `output_dir/metrics.jsonl`.

    A run first drops the records of steps that it is about to make (again), so that each step stands there once.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        path = os.path.join(args.output_dir, METRICS_FILE)
        if not state.is_world_process_zero or not os.path.exists(path):
            return
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(kept)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with open(os.path.join(args.output_dir, METRICS_FILE), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
