"""Checkpoints that are whole or absent.

transformers writes trainer_state.json after all other files of a checkpoint, and the Trainer here waits before it for
what other processes write. A process killed at any moment leaves no such file, or the beginning of one, which is not
JSON. (Nothing is flushed to the disk: after a loss of power, files that the system had not yet written may be missing
or empty beside a whole trainer_state.json.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

REPLACED_STATE_NAME = "replaced_trainer_state.json"


def is_complete(folder: str) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        with open(os.path.join(folder, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: str) -> str | None:
    """The latest complete checkpoint in `output_dir`, or None."""
    complete = {step: folder for step, folder in _checkpoints(output_dir).items() if is_complete(folder)}
    return complete[max(complete)] if complete else None


def check_resumable(folder: str) -> None:
    """ValueError if training cannot continue from `folder` as if it had not stopped."""
    if not is_complete(folder):
        raise ValueError(
            f"resume_from_checkpoint={folder!r} is not a complete checkpoint: it has no whole {TRAINER_STATE_NAME}"
        )
    if not any(Path(folder).glob("rng_state*.pth")):
        raise ValueError(
            f"resume_from_checkpoint={folder!r} holds only the model (save_only_model=True), not what training needs "
            "to continue; load the model from there and begin anew"
        )


def discard(folder: str) -> None:
    """Remove a checkpoint; from the first moment on it is not complete."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(folder, TRAINER_STATE_NAME))
    shutil.rmtree(folder, ignore_errors=True)


def discard_partial(folder: str, output_dir: str, error: Exception) -> OSError:
    """Remove a checkpoint that could not be written, and the error that says so."""
    discard(folder)
    free = shutil.disk_usage(output_dir).free / 2**30
    kept = last_checkpoint(output_dir)
    state = f"The last complete checkpoint is {kept}; training continues from it." if kept else "There is none before."
    return OSError(
        f"output_dir: checkpoint {folder} could not be written ({error}); {free:.1f} GiB are free. Make room, or lower "
        f"save_total_limit, or choose another output_dir. {state}"
    )


class ReplaceLaterCheckpoints(TrainerCallback):
    """A run that begins anew, or from an earlier step, takes the place of the one whose later checkpoints lie in
    `output_dir`: stopped before its own first, it must not continue from the other's last.

    Such checkpoints keep everything but the name of trainer_state.json, which becomes replaced_trainer_state.json,
    until the run saves the same step.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.should_save:
            return
        # In the order of steps: stopped in between, the latest is still there.
        for step, folder in sorted(_checkpoints(args.output_dir).items()):
            if step > state.global_step and is_complete(folder):
                os.replace(os.path.join(folder, TRAINER_STATE_NAME), os.path.join(folder, REPLACED_STATE_NAME))


def _checkpoints(output_dir: str) -> dict[int, str]:
    """{step: folder} of the checkpoints in `output_dir`, complete or not."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    matches = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in names)
    return {int(match[1]): os.path.join(output_dir, match[0]) for match in matches if match}
