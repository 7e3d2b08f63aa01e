"""Principles from YAML with errors in their place, and critique and revision by them."""

import json
import re
from pathlib import Path

import pytest
from datasets import load_dataset
from tiny import CHAT, save_tiny_model, tiny_tokenizer

from fastrlhf.cli import main
from fastrlhf.data import prepare_preferences
from fastrlhf.feedback import Constitutional, Principle, load_principles
from fastrlhf.rollout import Rollout, SamplingParams

PRINCIPLES = [Principle("kind", "Is it kind?", "Make it kind."), Principle("brief", "Is it brief?", "Make it brief.")]


class TestPrinciples:
    def test_those_that_come_with_fastrlhf(self):
        principles = load_principles()
        assert len({principle.name for principle in principles}) == len(principles) >= 5
        assert all(principle.question for principle in principles)

    def test_a_file(self, tmp_path):
        path = tmp_path / "p.yaml"
        path.write_text("principles:\n- name: kind\n  critique: |\n    Is it\n    kind?\n  revision: Make it kind.\n")
        assert load_principles(path) == [Principle("kind", "Is it\nkind?", "Make it kind.")]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "1:1: the file is empty"),
            ("- a\n", "1:1: the file: a list given"),
            ("rules: []\n", "1:1: the file has no key 'rules'; wanted principles"),
            ("principles: kind\n", "1:13: principles: a single value given, wanted a list"),
            ("principles: []\n", "1:13: principles: a list given, wanted a list of at least one"),
            ("principles:\n- kind\n", "2:3: a principle: a single value given, wanted lines of"),
            ("principles:\n- name: a\n  critique: b\n", "2:3: a principle lacks revision"),
            ("principles:\n- name: a\n  critique: b\n  revison: c\n", "4:3: a principle has no key 'revison'"),
            ("principles:\n- name: a\n  name: b\n", "3:3: a principle has the key 'name' twice"),
            ("principles:\n- name: 3\n  critique: b\n  revision: c\n", "2:9: name: '3' given, wanted a text"),
            ("principles:\n- name: a\n  critique: yes\n  revision: c\n", "3:13: critique: 'yes' given"),
            ("principles:\n- name: a\n  critique: ''\n  revision: c\n", "3:13: critique: '' given"),
            ("principles:\n- name: a\n  critique: [b]\n  revision: c\n", "3:13: critique: a list given"),
            (
                "principles:\n" + "- name: a\n  critique: b\n  revision: c\n" * 2,
                "5:9: name: 'a' is the name of an earlier principle",
            ),
            ("principles:\n- name: a\n critique: b\n", "3:2: not valid YAML"),
            ("principles: [a\n", "2:1: not valid YAML"),
            ("principles: \x07\n", "not valid YAML: special characters are not allowed at character 13"),
        ],
    )
    def test_errors_say_line_and_column(self, tmp_path, text, said):
        path = tmp_path / "p.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{path}:") + ".*" + re.escape(said)):
            load_principles(path)

    def test_no_file(self):
        with pytest.raises(FileNotFoundError, match=r"principles: no such file 'gone\.yaml'"):
            load_principles("gone.yaml")


class Scribe:
    """An engine that writes what `answer` makes of the text it is shown."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.seen = tokenizer, answer, []

    def generate(self, prompts, sampling, *, seeds=None):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.seen += texts
        written = [self.tokenizer(self.answer(text))["input_ids"] for text in texts]
        return Rollout(prompts, written, ["stop"] * len(prompts))


def answer(text):
    if text.endswith("Critique:"):
        return " too long" if "Is it brief?" in text else " too rude"
    return (
        " shorter" if text.endswith("Make it brief.\nNew answer:") else " nicer" if "New answer" in text else " well."
    )


def constitution(answer=answer, chat=None, **options):
    tokenizer = tiny_tokenizer(chat, pad_is_eos=False)
    engine = Scribe(tokenizer, answer)
    return Constitutional(engine, tokenizer, PRINCIPLES, SamplingParams(20, seed=0), **options), engine


class TestRevision:
    def test_plain_texts(self):
        revise, engine = constitution(rounds=2)
        (made,) = revise([3], ["the film was"])
        assert made.response == " well."
        assert {each.principle for each in made.rounds} == {"kind", "brief"}, "no principle twice before all had a turn"
        words = {"kind": ("too rude", " nicer"), "brief": ("too long", " shorter")}
        for each in made.rounds:
            assert (each.critique, each.revision) == words[each.principle]
        assert made.revision == made.rounds[-1].revision
        # the second round is about the first one's revision
        assert engine.seen[3].startswith(f"the film was{made.rounds[0].revision}\n\nWhat is wrong")

    def test_conversations(self):
        def chat_answer(text):
            turns = text.split("<|im_start|>")[1:]
            return {2: "rude words", 4: "It is rude.", 6: "kind words"}[len(turns)]

        revise, engine = constitution(chat_answer, CHAT)
        (made,) = revise([0], [[{"role": "user", "content": "hi"}]])
        assert (made.response, made.rounds[0].critique, made.revision) == ("rude words", "It is rude.", "kind words")
        assert engine.seen[2].count("<|im_end|>") == 5
        assert revise([0], ["hi"])[0] == made, "a string is a user's turn"

    def test_answers_that_are_there_already(self):
        revise, engine = constitution()
        first, second = revise([0, 1], ["a", "b"], [" given \n", None])
        assert (first.response, second.response) == (" given", " well.")
        assert [text for text in engine.seen if text == "a"] == []

    def test_what_there_is_nothing_to_learn_from(self):
        def lazy(text):
            return {"empty": " ", "same": " x"}.get(text.split("|")[0], " x") if "New answer" not in text else ""

        revise, _ = constitution(lazy, context=120)
        made = revise([0, 1, 2], ["empty|", "same|", "long" * 99])
        assert [each.skipped for each in made] == ["empty response", "empty revision", "prompt too long"]
        unchanged, _ = constitution(lambda text: " x")
        assert unchanged([0], ["p"])[0].skipped == "unchanged"

    def test_rows_do_not_hang_on_each_other(self):
        revise, _ = constitution()
        together = revise([4, 5, 6], ["a", "b", "c"])
        assert revise([5], ["b"]) == [together[1]]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
            constitution(rounds=0)
        with pytest.raises(ValueError, match="row 7: the prompt is a conversation, but the tokenizer has no chat"):
            constitution()[0]([7], [[{"role": "user", "content": "hi"}]])


class TestRun:
    def flags(self, tmp_path, monkeypatch, chat=None):
        monkeypatch.chdir(tmp_path)
        model = save_tiny_model(tmp_path / "model", chat=chat)
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the {i}"}) + "\n" for i in range(5)))
        flags = ["constitutional", "--model", model, "--dataset", "prompts.jsonl", "--output_dir", "out"]
        return [*flags, "--response_length", "6", "--batch_size", "2"]

    def test_pairs_for_a_reward_model(self, tmp_path, monkeypatch):
        flags = self.flags(tmp_path, monkeypatch)
        assert main(flags) == 0
        report = json.loads(Path("out/report.json").read_text())
        assert report["rows"] == 5
        assert report["preferences"] + sum(report["skipped"].values()) == 5
        assert report["preferences"] > 0
        rows = load_dataset("json", data_files="out/preferences.jsonl", split="train")
        assert len(prepare_preferences(rows, tiny_tokenizer(pad_is_eos=False), 99)) == report["preferences"]

        whole = Path("out/revisions.jsonl").read_text()
        Path("out/revisions.jsonl").write_text(whole[: len(whole) // 2])
        assert main([*flags, "--batch_size", "3"]) == 0
        assert Path("out/revisions.jsonl").read_text() == whole, "a killed run goes on to the same texts"

    def test_revisions_are_judged_by_choice(self, tmp_path, monkeypatch):
        assert main([*self.flags(tmp_path, monkeypatch), "--judge_revisions", "true"]) == 0
        report = json.loads(Path("out/report.json").read_text())
        assert report["judgements"]["neither"] == report["judgements"]["pairs"] > 0  # of a model of random weights
        assert report["preferences"] == 0

    def test_errors(self, tmp_path, monkeypatch, capsys):
        flags = self.flags(tmp_path, monkeypatch)
        Path("p.yaml").write_text("principles:\n- name: a\n")
        assert main([*flags, "--principles", "p.yaml"]) == 2
        assert "p.yaml:2:3: a principle lacks critique, revision" in capsys.readouterr().err
        Path("prompts.jsonl").write_text('{"text": "a"}\n')
        assert main(flags) == 2
        assert "the data set has the columns text; wanted `prompt`, or `messages`, or" in capsys.readouterr().err
