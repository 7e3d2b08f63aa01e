"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
import re
import shutil

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_complete(folder: str) -> bool:
    """Whether a checkpoint was written to its end: transformers writes trainer_state.json last."""
    return os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME))


def last_checkpoint(output_dir: str) -> str | None:
    """The latest complete checkpoint in `output_dir`, or None."""
    if not os.path.isdir(output_dir):
        return None
    steps = {}
    for name in os.listdir(output_dir):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name)
        if match and is_complete(os.path.join(output_dir, name)):
            steps[int(match[1])] = os.path.join(output_dir, name)
    return steps[max(steps)] if steps else None


def discard_partial(folder: str, output_dir: str, error: Exception) -> OSError:
    """Remove a checkpoint that could not be written, and the error that says so."""
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(output_dir).free / 2**30
    kept = last_checkpoint(output_dir)
    state = f"The last complete checkpoint is {kept}; training continues from it." if kept else "There is none before."
    return OSError(
        f"output_dir: checkpoint {folder} could not be written ({error}); {free:.1f} GiB are free. Make room, or lower "
        f"save_total_limit, or choose another output_dir. {state}"
    )
