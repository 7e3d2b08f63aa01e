"""Judges: a language model's opinion against its logits, position bias cancelled, and runs from the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from tiny import CHAT, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastrlhf.cli import main
from fastrlhf.data import prepare_preferences
from fastrlhf.feedback import LMJudge, Opinion, PairJudge
from fastrlhf.feedback.judge import LEAD, TEMPLATE
from fastrlhf.feedback.pair_judge import summary
from fastrlhf.feedback.preferences import all_pairs, judged_preferences, labelled_pairs

QUESTION = "Which answer is better?"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def biased(utility, bias):
    """A judge by utilities, who adds `bias` to the log-odds of the answer shown first."""

    def judge(prompts, firsts, seconds, questions):
        return [sigmoid(utility[a] - utility[b] + bias) for a, b in zip(firsts, seconds, strict=True)]

    return judge


class TestPairJudge:
    @pytest.mark.parametrize("bias", [0.0, 0.7, -3.0])
    def test_position_bias_is_cancelled_exactly(self, bias):
        utility = {"a": 1.2, "b": 0.0, "c": 0.9}
        made = PairJudge(biased(utility, bias))(["p"] * 3, ["a", "b", "c"], ["b", "c", "a"])
        for judgement, difference in zip(made, (1.2, -0.9, -0.3), strict=True):
            assert judgement.probability == pytest.approx(sigmoid(difference), rel=1e-9)
            assert judgement.position_bias == pytest.approx(bias, abs=1e-9)
            assert judgement.verdict == ("first" if difference > 0 else "second")
            assert judgement.consistent == (abs(bias) < abs(difference))

    def test_a_judge_that_always_says_a_has_no_opinion(self):
        """Without any doubt at all, and in both orders."""
        (made,) = PairJudge(lambda p, a, b, q: [1.0] * len(p))(["p"], ["x"], ["y"])
        assert (made.verdict, made.probability, made.consistent) == ("tie", 0.5, False)

    def test_neither_and_ties_are_counted(self):
        said = {"x": None, "y": 0.505, "z": 0.9}

        def judge(prompts, firsts, seconds, questions):
            return [said[a] if a in said else said[b] and 1 - said[b] for a, b in zip(firsts, seconds, strict=True)]

        made = PairJudge(judge)(["p"] * 3, ["x", "y", "z"], ["o"] * 3)
        assert [judgement.verdict for judgement in made] == ["neither", "tie", "first"]
        report = summary([judgement.as_dict() for judgement in made])
        assert (report["pairs"], report["first"], report["second"], report["tie"], report["neither"]) == (3, 1, 0, 1, 1)
        assert report["mass"] is None
        assert json.loads(json.dumps(made[0].as_dict()))["probability"] is None

    def test_questions_reach_the_judge(self):
        seen = []

        def judge(prompts, firsts, seconds, questions):
            seen.extend(questions)
            return [Opinion(0.8, mass=0.5)] * len(prompts)

        (made,) = PairJudge(judge)(["p"], ["x"], ["y"], ["Which is kinder?"])
        assert seen == ["Which is kinder?"] * 2
        assert made.mass == 0.5

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ([0.5], "judge: returned 1 opinions on 2 questions"),
            ([1.5, 0.5], "judge: returned 1.5 for question 0"),
            ([0.5, math.nan], "judge: returned nan for question 1"),
            (["A", 0.5], "judge: returned 'A'"),
        ],
    )
    def test_unusable_judges(self, said, message):
        with pytest.raises(ValueError, match=message):
            PairJudge(lambda p, a, b, q: said)(["p"], ["x"], ["y"])
        with pytest.raises(ValueError, match=r"tie_threshold=0.5 must be in \[0, 0.5\)"):
            PairJudge(biased({}, 0), 0.5)


class TestLMJudge:
    @pytest.mark.parametrize("chat", [None, CHAT])
    def test_the_probability_is_the_models_own(self, tmp_path, chat):
        folder = save_tiny_model(tmp_path, chat=chat)
        judge = LMJudge(folder, min_mass=0.0, batch_size=2)
        prompts, firsts, seconds = ["hi", "the film", "so"], [" good", "bad film", "a"], ["bad ", "good", "b" * 30]
        opinions = judge(prompts, firsts, seconds, [QUESTION] * 3)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer(chat, pad_is_eos=False)
        ids = {word: tokenizer(word)["input_ids"] for word in ("A", " A", "B", " B")}
        for opinion, prompt, a, b in zip(opinions, prompts, firsts, seconds, strict=True):
            text = TEMPLATE.format(prompt=prompt, a=a.strip(), b=b.strip(), question=QUESTION)
            if chat:
                turns = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            else:
                text += "\n\n"
            text += LEAD
            with torch.no_grad():
                p = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double().softmax(0)
            masses = [
                sum(p[ids[word][0]].item() for word in words if len(ids[word]) == 1)
                for words in (("A", " A"), ("B", " B"))
            ]
            assert opinion.mass == pytest.approx(sum(masses), rel=1e-4)
            assert opinion.probability == pytest.approx(masses[0] / sum(masses), rel=1e-4)

    def test_a_judge_that_says_neither(self, tmp_path):
        """A model of random weights gives A and B 2 of 300 tokens' probability."""
        (opinion,) = LMJudge(save_tiny_model(tmp_path))(["hi"], ["a"], ["b"], [QUESTION])
        assert opinion.probability is None
        assert 0 < opinion.mass < 0.1

    def test_too_long_to_read(self, tmp_path):
        judge = LMJudge(save_tiny_model(tmp_path), min_mass=0.0)
        long, short = judge(["hi", "hi"], ["x" * 999, "x"], ["b", "b"], [QUESTION] * 2)
        assert long.probability is None
        assert math.isnan(long.mass)
        assert short.probability is not None

    def test_conversations_are_shown_with_their_roles(self, tmp_path):
        judge = LMJudge(save_tiny_model(tmp_path))
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        assert "[Request]\nuser: hi\nassistant: hello\n" in judge._question(turns, "a", "b", QUESTION)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match=r"min_mass=1.0 must be"):
            LMJudge(save_tiny_model(tmp_path), min_mass=1.0)
        with pytest.raises(OSError, match="judge='nowhere/at-all' could not be loaded"):
            LMJudge("nowhere/at-all")


class TestPairs:
    def test_labelled(self):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}]
        bad = {"role": "assistant", "content": "bad"}
        rows = [
            {"prompt": "a", "chosen": " b", "rejected": " c"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {"chosen": turns, "rejected": [turns[0], bad]},
            {"prompt": turns[:1], "chosen": turns[1:], "rejected": [bad]},
        ]
        assert [labelled_pairs([row])[0] for row in rows] == [
            {"prompt": "a", "first": " b", "second": " c"},
            {"prompt": "\n\nHuman: a\n\nAssistant:", "first": " b", "second": " c"},
            {"prompt": turns[:1], "first": "good", "second": "bad"},
            {"prompt": turns[:1], "first": "good", "second": "bad"},
        ]

    def test_all_twos_of_responses(self):
        pairs = all_pairs(["p", "q"], [["a", "b", "c"], ["d", "d"]])
        assert [(pair["first"], pair["second"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
        with pytest.raises(ValueError, match=r"row 1, column 'responses'.*at least two strings"):
            all_pairs(["p", "q"], [["a", "b"], ["c"]])
        with pytest.raises(ValueError, match="no prompt has two that differ"):
            all_pairs(["p"], [["a", "a"]])

    def test_preferences(self):
        records = [
            {"prompt": "p", "first": "a", "second": "b", "verdict": verdict, "probability": probability}
            for verdict, probability in (("second", 0.25), ("tie", 0.51), ("neither", None))
        ]
        (row,) = judged_preferences(records, keep_ties=False)
        assert row == {"prompt": "p", "chosen": "b", "rejected": "a", "probability": 0.75}
        assert [row["tie"] for row in judged_preferences(records, keep_ties=True)] == [False, True]
        chat = [{**records[0], "prompt": [{"role": "user", "content": "p"}]}]
        assert judged_preferences(chat, False)[0]["chosen"] == [{"role": "assistant", "content": "b"}]


JUDGE = """
calls = []

def longer(prompts, firsts, seconds, questions):
    calls.append(len(prompts))
    return [None if "odd" in a + b else 0.9 if len(a) > len(b) else 0.2 for a, b in zip(firsts, seconds)]
"""


class TestRuns:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "judges.py").write_text(JUDGE)
        rows = [{"prompt": "p", "chosen": " good" * (i + 2), "rejected": " bad"} for i in range(5)]
        rows.append({"prompt": "p", "chosen": " odd", "rejected": " x"})
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    FLAGS = ("judge", "--dataset", "pairs.jsonl", "--output_dir", "out", "--batch_size", "2")

    def test_a_function(self):
        assert main([*self.FLAGS, "--judge_function", "judges.py:longer"]) == 0
        report = json.loads(Path("out/report.json").read_text())
        assert (report["first"], report["neither"], report["preferences"], report["agreement"]) == (5, 1, 5, 1.0)
        rows = load_dataset("json", data_files="out/preferences.jsonl", split="train")
        assert len(prepare_preferences(rows, tiny_tokenizer(pad_is_eos=False), 99)) == 5

    def test_a_killed_run_goes_on(self, capsys):
        flags = [*self.FLAGS, "--judge_function", "judges.py:longer"]
        assert main(flags) == 0
        whole = Path("out/judgements.jsonl").read_text()
        preferences = Path("out/preferences.jsonl").read_text()
        lines = whole.splitlines(keepends=True)
        Path("out/judgements.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while writing the fourth
        capsys.readouterr()
        assert main(flags) == 0
        assert capsys.readouterr().out.splitlines()[0] == "judged 5 of 6"
        assert Path("out/judgements.jsonl").read_text() == whole
        assert Path("out/preferences.jsonl").read_text() == preferences

    def test_a_folder_of_other_settings_is_not_mixed(self, capsys):
        flags = [*self.FLAGS, "--judge_function", "judges.py:longer"]
        assert main(flags) == 0
        assert main([*flags, "--tie_threshold", "0.1"]) == 2
        assert "made with tie_threshold=0.02, not 0.1; take another output_dir" in capsys.readouterr().err
        assert main([*flags, "--keep_ties", "true"]) == 0  # changes what is made of the records, not them

    def test_a_model_and_the_answers_of_a_policy(self, tmp_path):
        model = save_tiny_model(tmp_path / "model")
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the {i}"}) + "\n" for i in range(3)))
        flags = ["judge", "--model", model, "--policy", model, "--dataset", "prompts.jsonl", "--output_dir", "out2"]
        flags += ["--response_length", "5", "--min_mass", "0", "--principles", "default", "--num_responses", "3"]
        assert main(flags) == 0
        judgements = [json.loads(line) for line in Path("out2/judgements.jsonl").read_text().splitlines()]
        assert len(judgements) == 9
        assert len({record["question"] for record in judgements}) > 1
        before = Path("out2/judgements.jsonl").read_text()
        for name in ("judgements", "responses"):
            Path(f"out2/{name}.jsonl").write_text(Path(f"out2/{name}.jsonl").read_text().split("\n")[0] + "\n")
        assert main([*flags, "--batch_size", "1"]) == 0
        assert Path("out2/judgements.jsonl").read_text() == before

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ([], "give one judge: model"),
            (["--model", "m", "--judge_function", "f.py:f"], "give one judge: model"),
            (["--judge_function", "judges.py:gone"], "judge_function: 'judges.py' has no function 'gone'"),
            (["--judge_function", "judges.py:longer", "--principles", "no.yaml"], "principles: no such file 'no.yaml'"),
        ],
    )
    def test_errors(self, flags, said, capsys):
        assert main([*self.FLAGS, *flags]) == 2
        assert said in capsys.readouterr().err

    def test_columns(self, tmp_path, capsys):
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "p"}\n')
        assert main([*self.FLAGS, "--judge_function", "judges.py:longer"]) == 2
        assert "or prompts for a --policy to answer, are wanted; there are prompt" in capsys.readouterr().err
