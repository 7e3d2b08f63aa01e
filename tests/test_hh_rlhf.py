"""Anthropic's hh-rlhf format, end to end: gzipped JSON lines of transcripts, scored at every turn."""

import gzip
import json
from pathlib import Path

import pytest
from tiny import CHAT, save_tiny_model

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


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class TestAlternatives:
    """Every way but PPO to learn from the same files."""

    @pytest.fixture
    def model(self, tmp_path):
        return save_tiny_model(tmp_path / "model")

    @pytest.mark.filterwarnings("ignore:.*with an empty completion")
    @pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
    def test_dpo(self, folder, model, loss):
        flags = ("--model", model, "--dataset", folder, "--eval_split", "test", *FLAGS)
        assert main(["dpo", *flags, "--loss_type", loss, "--eval_strategy", "steps", "--output_dir", "dpo"]) == 0
        logged = lines("dpo/metrics.jsonl")
        assert any("eval_rewards/accuracies" in record for record in logged)
        assert main(["sft", "--model", "dpo", "--dataset", folder, *FLAGS, "--output_dir", "sft"]) == 0

    @pytest.mark.filterwarnings("ignore:.*with an empty completion")
    def test_best_of_n_and_rejection_sampling(self, folder, model):
        assert main(["reward", "--model", model, "--dataset", folder, *FLAGS, "--output_dir", "rm"]) == 0
        flags = ("--model", model, "--dataset", folder, "--reward_models", "rm")
        flags += ("--num_generations", "2", "--response_length", "4")
        assert main(["best-of-n", *flags, "--output_dir", "best"]) == 0
        assert len(lines("best/best.jsonl")) == 9  # one to each prompt
        flags += (*FLAGS, "--keep_unfinished", "true")
        assert main(["rejection-sampling", *flags, "--output_dir", "rejection"]) == 0
        assert json.loads(Path("rejection/round-1/round.json").read_text())["prompts"] == 9

    def test_ai_feedback(self, folder, model):
        """A judge's labels of the answers in the files and of a policy's, and a model's own revisions: all of them are
        preferences that a reward model and DPO take."""
        Path("shorter.py").write_text(
            "def judge(prompts, firsts, seconds, questions):\n"
            "    return [0.9 if len(a) < len(b) else 0.1 for a, b in zip(firsts, seconds)]\n"
        )
        judge = ("judge", "--dataset", folder, "--judge_function", "shorter.py:judge")
        assert main([*judge, "--output_dir", "judged"]) == 0
        report = json.loads(Path("judged/report.json").read_text())
        assert (report["pairs"], report["first"], report["agreement"]) == (9, 0, 0)  # "bad" and "" are shorter
        policy = ("--policy", model, "--response_length", "4", "--num_responses", "3")
        assert main([*judge, *policy, "--output_dir", "answered"]) == 0
        assert lines("answered/responses.jsonl")[1]["prompt"] == conversation(1, "").rstrip()
        written = ("constitutional", "--model", model, "--dataset", folder, "--response_length", "4")
        assert main([*written, "--output_dir", "revised"]) == 0
        assert len(lines("revised/revisions.jsonl")) == 9
        for name in ("judged", "answered", "revised"):
            made = lines(f"{name}/preferences.jsonl")
            assert made
            assert all(row["prompt"].endswith("\n\nAssistant:") for row in made)
            data = ("--model", model, "--dataset", f"{name}/preferences.jsonl", *FLAGS)
            keep = ("--pair_empty_completions", "keep")
            assert main(["reward", *data, *keep, "--output_dir", f"{name}-rm"]) == 0
            assert main(["dpo", *data, *keep, "--output_dir", f"{name}-dpo"]) == 0

    def test_a_model_with_a_chat_template_is_shown_the_turns(self, folder, tmp_path):
        model = save_tiny_model(tmp_path / "chat", chat=CHAT)
        written = ("constitutional", "--model", model, "--dataset", folder, "--response_length", "4")
        assert main([*written, "--output_dir", "revised"]) == 0
        turns = lines("revised/revisions.jsonl")[1]["prompt"]
        assert [turn["content"] for turn in turns] == ["hi", "hello", "film 1"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
        for row in lines("revised/preferences.jsonl"):
            assert row["chosen"][0]["role"] == "assistant"
