"""PPO runs that are killed, each in a process forked from this one, which has imported everything already.

Reads one run a line from standard input, as JSON: the arguments of `run`, or {"command": those of `fastrlhf`}. Answers
with the exit status of its process, negative for a signal.
"""

import gc
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """The files of a checkpoint, as they are written; in the middle or at the end of one of them it kills."""

    def __init__(self):
        self.folder, self.fatal, self.half, self.seen = None, None, False, []

    def watched(self, write, position):
        def watching(*arguments, **options):
            write(*arguments, **options)
            target = arguments[position]
            if hasattr(target, "flush"):  # an open file
                target.flush()
                target = target.name
            path = Path(target)
            if path.parent.name == self.folder:
                self.seen.append(path.name)
                if path.name == self.fatal:
                    if self.half:
                        os.truncate(path, path.stat().st_size // 2)
                    kill()

        return watching


# Before others import these functions by name.
WRITES = Writes()
safetensors.torch.save_file = WRITES.watched(safetensors.torch.save_file, 1)
torch.save = WRITES.watched(torch.save, 1)
json.dump = WRITES.watched(json.dump, 1)

import transformers.trainer_utils  # noqa: E402
from transformers import TrainerCallback, TrainerState  # noqa: E402

from fastrlhf.cli import main as fastrlhf  # noqa: E402
from fastrlhf.trainers import PPOConfig, PPOTrainer, last_checkpoint  # noqa: E402

TrainerState.save_to_json = WRITES.watched(TrainerState.save_to_json, 1)

# Three steps an epoch: the checkpoints of steps 2 and 4 are of the middle of epochs, that of step 6 of an end.
TEXTS = ["the good", "a bad film", "so", "Human: hi", "film", "was", "the user", "a", "good", "system", "the", "and so"]
PROMPTS = Dataset.from_dict({"prompt": TEXTS})
OPTIONS = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "rollout_batch_size": 4,
    "per_device_train_batch_size": 2,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "response_length": 4,
    "learning_rate": 1e-3,
    "reward_normalization": "running",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def noisy_letters(prompts, completions, **columns):
    """Draws from Python's and numpy's random numbers, as reward functions may."""
    noise = np.random.rand(len(completions))  # noqa: NPY002
    return [sum(map(str.isalpha, text)) + random.random() + x for text, x in zip(completions, noise, strict=True)]


def killing(function, number):
    """`function`, but its call of that number (from 1) kills the process instead."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            kill()
        return function(*arguments, **options)

    return counted


class KilledWhileLogging(TrainerCallback):
    """Between two steps, in the middle of a line of metrics."""

    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with open(Path(args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(f'{{"step": {self.step}, "los')
            kill()


def killed_while_deleting(folder, **options):
    """In place of shutil.rmtree: some of the files go, not the one that makes a checkpoint complete."""
    if os.path.isdir(folder):
        for path in sorted(Path(folder).glob("*"))[:3]:
            path.unlink()
        kill()


def run(folder, killed=None, at=0, half=False, resume=True, value_model=None, **options):
    """A run in `folder`, killed as `killed` says: in the reward function's or the optimiser's call number `at`, after
    step `at`, while an old checkpoint is deleted, or at the end or (`half`) in the middle of the file `at` of the
    checkpoint of step 4. If it comes to its end, it leaves result.pt: everything that training changes."""
    folder = Path(folder)
    rewards, callbacks = noisy_letters, []
    WRITES.folder = "checkpoint-4"
    if killed == "reward":
        rewards = killing(rewards, at)
    elif killed == "optimizer":
        torch.optim.AdamW.step = killing(torch.optim.AdamW.step, at)
    elif killed == "log":
        callbacks = [KilledWhileLogging(at)]
    elif killed == "deletion":
        transformers.trainer_utils.shutil.rmtree = killed_while_deleting
    elif killed == "save":
        WRITES.fatal, WRITES.half = at, half
    args = PPOConfig(str(folder / "out"), **OPTIONS | options)
    trainer = PPOTrainer(
        str(folder.parent / "model"),
        args,
        rewards,
        PROMPTS,
        PROMPTS.select(range(2)),
        value_model=value_model,
        callbacks=callbacks,
    )
    checkpoint = last_checkpoint(args.output_dir) if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    result = {
        "begun": int(checkpoint.rpartition("-")[2]) if checkpoint else 0,
        "files": WRITES.seen,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    }
    torch.save(result, folder / "result.pt")


def main():
    gc.freeze()  # or each run begins with half a second of garbage collection
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(2, 1)  # what it prints is no answer
            try:
                order = json.loads(line)
                status = fastrlhf(order["command"]) if "command" in order else run(**order)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stderr.flush()
            os._exit(status or 0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
