"""PPO killed by SIGKILL, at any moment, continues to what a run that nobody stopped ends with, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import save_tiny_model

from fastrlhf.trainers import PPOConfig, PPOTrainer, last_checkpoint
from fastrlhf.trainers.checkpoints import check_resumable, discard, is_complete
from fastrlhf.trainers.metrics import JsonLines

FILES = (
    "model.safetensors",
    "value_head.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


class Server:
    """tests/resume_worker.py, and the results of runs that nobody stopped."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, {}
        save_tiny_model(folder / "model")
        with (folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(Path(__file__).with_name("resume_worker.py"))],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, name: str, **arguments) -> int:
        (self.folder / name).mkdir(exist_ok=True)
        return self.ask({"folder": str(self.folder / name), **arguments})

    def finish(self, name: str, **arguments) -> dict:
        assert self.run(name, **arguments) == 0, self.errors()
        result = torch.load(self.folder / name / "result.pt", weights_only=False)
        out = self.folder / name / "out"
        left = sorted(path.name for path in Path(last_checkpoint(str(out))).iterdir())
        return result | {"metrics": metrics(out), "left": left}

    def uninterrupted(self, **options) -> dict:
        key = json.dumps(options)
        if key not in self.whole:
            self.whole[key] = self.finish(f"whole{len(self.whole)}", **options)
        return self.whole[key]

    def errors(self) -> str:
        return (self.folder / "errors").read_text()[-3000:]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("resume"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture
def name(request):
    return "".join(c if c.isalnum() else "_" for c in request.node.name)


def metrics(folder):
    """What metrics.jsonl says, but for times and for the record that sums up what one process did."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": record["step"], "end": True}
        if "train_runtime" in record
        else {key: value for key, value in record.items() if "time" not in key and "per_second" not in key}
        for record in records
    ]


def assert_same(mine, theirs, where="result"):
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), where
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            assert_same(mine[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs), where
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        same = mine == theirs
        assert same if isinstance(same, bool) else same.all(), where


def check(server, name, begun, options=None, lost=0, **kill):
    """Killed so, a run has the checkpoint of step `begun` to continue from, and ends as one that nobody stopped.

    lost: the record of that number is the only thing that is missing, from metrics.jsonl.
    """
    options = options or {}
    assert server.run(name, **options, **kill) == -signal.SIGKILL, server.errors()
    resumed, whole = server.finish(name, **options), server.uninterrupted(**options)
    assert resumed["begun"] == begun
    for part in ("model", "optimizer", "scheduler", "random", "left"):
        assert_same(resumed[part], whole[part], part)
    expected = [record for i, record in enumerate(whole["metrics"], 1) if i != lost]
    assert_same(resumed["metrics"], expected, "metrics")


@pytest.mark.parametrize(("call", "begun"), [(1, 0), (3, 2), (4, 2), (5, 4), (7, 6)])
def test_within_a_step(server, name, call, begun):
    check(server, name, begun, killed="reward", at=call)


def test_between_two_steps_of_the_optimizer(server, name):
    check(server, name, 2, killed="optimizer", at=3 * 4 + 3)


@pytest.mark.parametrize(("step", "begun"), [(4, 2), (5, 4)])
def test_between_two_steps_while_metrics_are_written(server, name, step, begun):
    check(server, name, begun, killed="log", at=step)


@pytest.mark.parametrize("file", FILES)
def test_during_a_save(server, name, file):
    assert server.uninterrupted()["files"][-1] == FILES[-1]
    check(server, name, 2, killed="save", at=file, half=True)


def test_after_the_last_file_of_a_checkpoint(server, name):
    check(server, name, 4, killed="save", at=FILES[-1])


def test_while_an_old_checkpoint_is_deleted(server, name):
    check(server, name, 4, killed="deletion", options={"save_total_limit": 1})


def test_twice(server, name):
    assert server.run(name, killed="reward", at=6) == -signal.SIGKILL
    check(server, name, 4, killed="reward", at=2)


def test_a_separate_value_model(server, name):
    value = save_tiny_model(server.folder / "value", reward=True)
    check(server, name, 4, killed="reward", at=6, options={"value_model": value})


@pytest.mark.parametrize(("call", "lost"), [(4, 4), (5, 0)])
def test_evaluation_after_the_checkpoint_of_an_epochs_last_step(server, name, call, lost):
    """Killed in the evaluation, which is not made again, or after it."""
    check(server, name, 3, killed="reward", at=call, lost=lost, options={"eval_strategy": "epoch", "save_steps": 3})


@pytest.mark.parametrize(("call", "begun"), [(2, 0), (4, 2)])
def test_a_run_begun_anew_does_not_continue_as_the_one_before(server, name, call, begun):
    server.finish(name)
    check(server, name, begun, killed="reward", at=call, resume=False)


JUDGE = """
import os, signal
from pathlib import Path

calls = []

def judge(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 4 and Path(__file__).with_name("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


def test_the_command_line(server, tmp_path):
    """The same command again."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "the film {i}"}}\n' for i in range(12)))
    (tmp_path / "judge.py").write_text(JUDGE)
    flags = f"--max_steps 5 --save_steps 2 --logging_steps 1 --report_to none --model {server.folder}/model"
    flags += f" --dataset {tmp_path}/prompts.jsonl --reward_functions {tmp_path}/judge.py:judge --use_cpu true"
    flags += " --rollout_batch_size 4 --per_device_train_batch_size 2 --response_length 4 --learning_rate 1e-3"
    command = ["ppo", *flags.split(), "--output_dir"]
    (tmp_path / "kill").touch()
    assert server.ask({"command": [*command, str(tmp_path / "killed")]}) == -signal.SIGKILL, server.errors()
    (tmp_path / "kill").unlink()
    assert last_checkpoint(str(tmp_path / "killed")) == str(tmp_path / "killed" / "checkpoint-2")
    for out in ("killed", "whole"):
        assert server.ask({"command": [*command, str(tmp_path / out)]}) == 0, server.errors()
    for file in ("model.safetensors", "value_head.safetensors"):
        assert_same(load_file(tmp_path / "killed" / file), load_file(tmp_path / "whole" / file), file)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- the parts of it


@pytest.fixture
def checkpoint(tmp_path):
    """A complete one, as far as its files' names go."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "rng_state.pth").touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": [{"loss": float("nan")}]}))
    return folder


def test_no_beginning_of_the_last_file_makes_a_checkpoint_complete(checkpoint):
    file = checkpoint / "trainer_state.json"
    whole = file.read_bytes()
    assert is_complete(checkpoint)
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert not is_complete(checkpoint)
    file.write_bytes(b"\0" * len(whole))  # as after a loss of power
    assert not is_complete(checkpoint)


def test_a_checkpoint_that_is_discarded_is_first_of_all_incomplete(checkpoint, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: None)
    discard(checkpoint)
    assert not is_complete(checkpoint)
    discard(checkpoint)  # without an error


def test_the_last_file_waits_for_those_of_other_processes(tmp_path, monkeypatch):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "rollout_batch_size": 2, "response_length": 2}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    prompts = Dataset.from_dict({"prompt": ["the good", "a bad film"]})
    model, args = save_tiny_model(tmp_path / "model"), PPOConfig(str(tmp_path / "out"), **options)
    trainer = PPOTrainer(model, args, lambda prompts, completions: [float(len(text)) for text in completions], prompts)
    seen = []
    monkeypatch.setattr(
        trainer.accelerator,
        "wait_for_everyone",
        lambda: seen.append({path.name for path in (tmp_path / "out").glob("checkpoint-1/*")}),
    )
    trainer.train()
    assert "rng_state.pth" in seen[-1]
    assert "trainer_state.json" not in seen[-1]
    assert is_complete(tmp_path / "out" / "checkpoint-1")


def test_what_training_cannot_continue_from(checkpoint):
    check_resumable(checkpoint)
    (checkpoint / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-7.* holds only the model \(save_only_model=True\)"):
        check_resumable(checkpoint)
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-7.* is not a complete checkpoint: it has no whole trainer_state"):
        check_resumable(checkpoint)


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', '{"step": 3}', "\0\0\0\n", '{"st{"step": 2}\n', "[2]\n"])
def test_lines_that_are_no_records_do_not_stay(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n{"step": 3}\n' + tail)
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=2, is_world_process_zero=True)
    JsonLines().on_train_begin(args, state, None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": NaN}\n{"step": 2}\n'
