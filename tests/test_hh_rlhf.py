"""Anthropic's hh-rlhf format, end to end: gzipped JSON lines of transcripts, scored at every turn."""

import gzip
import json
from pathlib import Path

import pytest
from tiny import save_tiny_model

from fastrlhf.cli import main
from fastrlhf.rewards import RewardModel
from fastrlhf.rewards.settings import RewardSettings

FLAGS = ("--report_to", "none", "--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1")


def conversation(i, last):
    first = "\n\nHuman: hi\n\nAssistant: hello"
    return f"{first}\n\nHuman: film {i}\n\nAssistant: {last}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hh").mkdir()
    rows = [{"chosen": conversation(i, "good film"), "rejected": conversation(i, "bad")} for i in range(8)]
    rows.append({"chosen": conversation(9, "good"), "rejected": conversation(9, "")})  # hh-rlhf has such
    for split, part in (("train", rows), ("test", rows[:4])):
        with gzip.open(tmp_path / "hh" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return "hh"


@pytest.mark.parametrize("turns", ["last", "all"])
def test_reward_model_then_ppo(folder, tmp_path, turns):
    model = save_tiny_model(tmp_path / "model")
    flags = ("--model", model, "--dataset", folder, *FLAGS)
    with pytest.warns(UserWarning, match="1 with an empty completion; 8 of 9 pairs kept"):
        assert main(["reward", *flags, "--eval_split", "test", "--score_turns", turns, "--output_dir", "rm"]) == 0
    settings = RewardSettings.load("rm")
    assert (settings.turns, len(settings.temperatures)) == (turns, 1)
    report = json.loads(Path("rm/reports/000002.json").read_text())
    assert report["pairs"] == 4
    assert [found["rows"] for found in report["data"]] == [9, 4]
    prompt = conversation(1, "").rstrip()
    assert len(RewardModel("rm")([prompt, prompt], [" good", " bad\n\nHuman: so\n\nAssistant: good"])) == 2
    flags += ("--rollout_batch_size", "4", "--response_length", "4", "--max_steps", "1")
    assert main(["ppo", *flags, "--reward_models", "rm", "--output_dir", "ppo"]) == 0
    assert "objective/scores" in json.loads(Path("ppo/metrics.jsonl").read_text().splitlines()[0])
