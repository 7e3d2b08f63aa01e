"""`fastrlhf rejection-sampling`: SFT on the best of a model's own responses, in rounds that are continued."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf import cli_best_of_n, trainers
from fastrlhf.cli import main

COMMAND = [
    "rejection-sampling",
    "--model",
    "model",
    "--dataset",
    "prompts.jsonl",
    "--reward_functions",
    "judge.py:judge",
]
COMMAND += ["--num_generations", "8", "--num_best", "2", "--response_length", "6", "--output_dir", "out"]
COMMAND += ["--max_steps", "12", "--save_steps", "4", "--learning_rate", "2e-2", "--warmup_steps", "0"]
COMMAND += ["--logging_steps", "4", "--use_cpu", "true", "--report_to", "none", "--keep_unfinished", "true"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"film {i}"}) + "\n" for i in range(8)))
    Path("judge.py").write_text(
        "def judge(prompts, completions, **columns): return [float(sum(map(str.isalpha, c))) for c in completions]\n"
    )
    save_tiny_model(tmp_path / "model")
    return tmp_path


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    return all(torch.equal(x, other[name]) for name, x in one.items())


def test_rounds_raise_the_reward_and_are_not_made_again(capsys):
    command = [*COMMAND, "--num_rounds", "2"]
    assert main(command) == 0
    rounds = [json.loads(Path(f"out/round-{i}/round.json").read_text()) for i in (1, 2)]
    assert all((x["prompts"], x["taken"]) == (8, 16) for x in rounds)
    assert rounds[0]["reward"] < rounds[0]["taken_reward"]
    assert rounds[0]["reward"] < rounds[1]["reward"] < rounds[1]["taken_reward"]
    assert same(weights("out"), weights("out/round-2"))
    assert not same(weights("out"), weights("out/round-1"))
    AutoTokenizer.from_pretrained("out")
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    assert main(command) == 0
    assert times == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}


def test_it_is_continued_where_it_stopped(monkeypatch):
    assert main(COMMAND) == 0
    whole = weights("out")
    command = [*COMMAND[:-2], "--keep_unfinished", "true", "--output_dir", "again"]

    class Stopped(trainers.SFTTrainer):
        def _save_checkpoint(self, *args):
            super()._save_checkpoint(*args)
            raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "SFTTrainer", Stopped)
        assert main(command) == 2
    assert trainers.last_checkpoint("again/round-1").endswith("checkpoint-4")
    sampled = Path("again/round-1/samples.jsonl").read_text()
    assert main(command) == 0
    assert Path("again/round-1/samples.jsonl").read_text() == sampled
    assert same(weights("again"), whole)


def test_only_responses_that_ended_are_taken(monkeypatch, capsys):
    seen, sampled = [], cli_best_of_n.sample_and_score

    def some_ended(*args, **options):
        samples = sampled(*args, **options)
        for x in samples:
            x.finished = [x.row == 3, *[False] * 7]
        return samples

    class Trainer(trainers.SFTTrainer):
        def __init__(self, model, args, dataset, **options):
            seen.append(dataset.to_list())
            super().__init__(model, args, dataset, **options)

    monkeypatch.setattr(trainers, "SFTTrainer", Trainer)
    monkeypatch.setattr(cli_best_of_n, "sample_and_score", some_ended)
    assert main([*COMMAND, "--keep_unfinished", "false"]) == 0
    _, *lines = map(json.loads, Path("out/round-1/samples.jsonl").read_text().splitlines())
    assert seen == [[{"prompt": "film 3", "completion": lines[3]["completions"][0]}]]


def test_wrong_flags(capsys):
    for flags, message in (
        (["--num_rounds", "0"], "num_rounds=0 must be at least 1"),
        (["--num_rounds", "2", "--lora_r", "2"], "lora_r=2: every one of num_rounds=2 would have its adapters"),
        (["--num_best", "9"], "num_best=9 must be from 1 to num_generations=8"),
    ):
        assert main([*COMMAND, *flags]) == 2
        assert message in capsys.readouterr().err
