"""Best-of-n: estimates against enumerated subsets and known values, and samples that are continued."""

import itertools
import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tiny import CHAT, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf.cli import main
from fastrlhf.data import prepare_prompts
from fastrlhf.rewards import RewardError, Rewards
from fastrlhf.rollout import (
    NativeEngine,
    SamplingParams,
    ScoredSamples,
    TransformersEngine,
    best_of_n_kl,
    best_of_n_scores,
    best_of_n_summary,
    read_samples,
    sample_and_score,
    scored_samples,
    winners,
)


def enumerated(scores, gold):
    """Of every n: the mean over all subsets, and over the best ones in each."""
    count, results = len(scores), []
    for n in range(1, count + 1):
        values = []
        for subset in itertools.combinations(range(count), n):
            most = max(scores[i] for i in subset)
            best = [gold[i] for i in subset if scores[i] == most]
            values.append(sum(best) / len(best))
        results.append(sum(values) / len(values))
    return results


@pytest.mark.parametrize("levels", [2, 4, 10**6], ids=["many ties", "ties", "none"])
def test_the_mean_over_all_subsets(levels):
    scores = torch.randint(levels, (3, 8)).double()
    gold = torch.randn(3, 8).double()
    ours, judged = best_of_n_scores(scores), best_of_n_scores(scores, gold)
    for row in range(3):
        wanted = enumerated(scores[row].tolist(), scores[row].tolist())
        torch.testing.assert_close(ours[row], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
        wanted = enumerated(scores[row].tolist(), gold[row].tolist())
        torch.testing.assert_close(judged[row], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_known_values(count):
    """Ranks from 1 to N: the best of n has n (N + 1) / (n + 1) on average, and the best of all N."""
    ours = best_of_n_scores(torch.randperm(count) + 1.0)
    n = torch.arange(1, count + 1).double()
    torch.testing.assert_close(ours, n * (count + 1) / (n + 1), rtol=1e-10, atol=0)


def test_win_rate_against_one_sample():
    """N / (N + 1): a sample's chance to be beaten is its quantile, whose mean for the best of n is n / (n + 1)."""
    prompts, count = 20_000, 6
    each = best_of_n_scores(torch.rand(prompts, count, dtype=torch.float64))
    n = torch.arange(1, count + 1)
    assert ((each.mean(0) - n / (n + 1)).abs() < 5 * each.std(0) / prompts**0.5).all()


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_kl_is_that_of_many_outcomes_and_bounds_that_of_few(n):
    """K equally likely outcomes of different scores: the best of n is the k-th with chance (k^n - (k - 1)^n) / K^n."""
    for outcomes in (3, 20_000):
        quantile = torch.arange(outcomes + 1, dtype=torch.float64) / outcomes
        best = (quantile**n).diff()
        kl = torch.special.xlogy(best, best * outcomes).sum().item()
        assert kl <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl(n) == pytest.approx(kl, abs=2e-3)
    assert best_of_n_kl(n) == pytest.approx(math.log(n) - 1 + 1 / n, rel=1e-12, abs=1e-15)


def test_wrong_scores():
    for scores, gold in ((torch.zeros(2, 0), None), (torch.tensor(1.0), None), (torch.zeros(2, 3), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"wanted one shape \[..., N\]"):
            best_of_n_scores(scores, gold)
    with pytest.raises(ValueError, match="all must be finite"):
        best_of_n_scores(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        best_of_n_kl(0)


def test_summary():
    scores, gold = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[5.0, 3.0], [1.0, 0.0]])
    summary = best_of_n_summary(scores, gold)
    assert summary["n"] == [1, 2]
    assert summary["kl"] == [0.0, best_of_n_kl(2)]
    assert summary["reward"] == [1.25, 1.5]
    assert summary["gold"] == [2.25, 1.75]
    assert summary["reward_se"] == pytest.approx([0.75, 0.5])
    assert "gold" not in best_of_n_summary(scores)


def samples(prompt="p", **fields):
    return ScoredSamples(
        **{
            "row": 0,
            "prompt": prompt,
            "each": {},
            "gold": None,
            "tokens": [1, 1, 1, 1],
            "finished": [True] * 4,
            **fields,
        }
    )


def test_winners_are_different_and_best_first():
    some = samples(completions=["a", "b", "a", "c"], rewards=[1.0, 3.0, 1.0, 1.0], finished=[True, False, True, True])
    assert winners([some], 3)["completion"] == ["b", "a", "c"]
    assert winners([some], 9, finished_only=True).to_list() == [
        {"prompt": "p", "completion": "a", "reward": 1.0},
        {"prompt": "p", "completion": "c", "reward": 1.0},
    ]
    chat = samples([{"role": "user", "content": "p"}], completions=list("abcd"), rewards=[1.0, 2.0, 0.0, 0.0])
    assert winners([chat])["completion"] == [[{"role": "assistant", "content": "b"}]]
    with pytest.raises(ValueError, match="no response to any prompt ended by itself: raise response_length"):
        winners([samples(completions=list("abcd"), rewards=[0.0] * 4, finished=[False] * 4)], finished_only=True)


class Sampler:
    """A tiny model, prompts, and a reward function that counts, and raises at a call of some number."""

    def __init__(self, folder):
        name = save_tiny_model(folder / "model")
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        rows = {"prompt": ["the film", "a bad", "so", "good", "Human: hi"], "bonus": [1.0, 0.0, 2.0, 0.0, 0.0]}
        self.prompts = prepare_prompts(Dataset.from_dict(rows), self.tokenizer, 20)
        self.path, self.calls = folder / "samples.jsonl", []

    def reward(self, prompts, completions, bonus):
        self.calls.append(prompts)
        if len(self.calls) == self.fatal:
            raise RuntimeError("out of order")
        return [len(text) + more for text, more in zip(completions, bonus, strict=True)]

    def run(self, fatal=0, engine=NativeEngine, **options):
        self.calls, self.fatal = [], fatal
        sampling = SamplingParams(8, n=3)
        made = engine(self.model, self.tokenizer)
        options = {"seed": 7, **options}
        return sample_and_score(
            self.prompts, made, self.tokenizer, sampling, Rewards(self.reward), self.path, **options
        )


@pytest.fixture
def sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(scored_samples, "BLOCK", 6)
    return Sampler(tmp_path)


def test_samples_and_their_scores(sampler):
    gold = Rewards(lambda prompts, completions, bonus: [float(text.count("a")) for text in completions])
    found = sampler.run(gold=gold)
    assert [x.row for x in found] == [0, 1, 2, 3, 4]
    assert [x.prompt for x in found] == sampler.prompts["prompt"]
    for x, bonus in zip(found, sampler.prompts["bonus"], strict=True):
        assert x.rewards == x.each["reward"] == [len(text) + bonus for text in x.completions]
        assert x.gold == [text.count("a") for text in x.completions]
        assert len(x.completions) == len(x.tokens) == len(x.finished) == 3
    header, *lines = map(json.loads, sampler.path.read_text().splitlines())
    assert [ScoredSamples(**line) for line in lines] == found
    assert (header["n"], header["seed"], header["rewards"]) == (3, 7, {"reward": 1.0})


@pytest.mark.parametrize("engine", [NativeEngine, TransformersEngine])
def test_what_was_done_is_not_done_again(sampler, engine):
    whole = sampler.run(engine=engine)
    assert [len(call) for call in sampler.calls] == [6, 6, 3]
    text = sampler.path.read_text()
    sampler.path.unlink()
    with pytest.raises(RewardError, match="out of order"):
        sampler.run(fatal=3, engine=engine)
    with open(sampler.path, "a") as file:
        file.write('{"row": 4, "prom')  # as a killed run leaves it
    assert sampler.run(engine=engine) == whole
    assert len(sampler.calls) == 1
    assert sampler.run(engine=engine) == whole
    assert sampler.calls == []
    assert sampler.path.read_text() == text


def test_a_block_that_is_not_whole_is_made_again(sampler):
    whole = sampler.run()
    lines = sampler.path.read_text().splitlines(keepends=True)
    sampler.path.write_text("".join(lines[:4]))  # three prompts, two a block
    assert sampler.run() == whole
    assert [len(call) for call in sampler.calls] == [6, 3]


def test_responses_may_hold_every_kind_of_line_separator(sampler, monkeypatch):
    texts = scored_samples.Rollout.texts
    monkeypatch.setattr(scored_samples.Rollout, "texts", lambda *_: [f"{x}\x85\u2028\r\n" for x in texts(*_)])
    whole = sampler.run()
    assert "\u2028" in whole[0].completions[0]
    assert sampler.run() == whole == read_samples(sampler.path)
    assert sampler.calls == []


def test_samples_made_otherwise_are_not_mixed(sampler):
    sampler.run(about={"model": "a"})
    for options, message in (
        ({"seed": 8}, "seed=7 there and 8 now"),
        ({"about": {"model": "b"}}, "model='a' there and 'b' now"),
    ):
        with pytest.raises(ValueError, match=rf"samples.jsonl has samples made otherwise: {message}. Take another"):
            sampler.run(**{"about": {"model": "a"}, **options})
    sampler.prompts = sampler.prompts.select([0, 2])
    with pytest.raises(ValueError, match="has samples made otherwise: prompts="):
        sampler.run(about={"model": "a"})


@pytest.fixture
def folder(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"prompt": f"the film {i}"}) + "\n" for i in range(6))
    Path("prompts.jsonl").write_text(lines)
    Path("judges.py").write_text(
        "def length(prompts, completions, **columns): return [float(len(text)) for text in completions]\n"
        "def letters(prompts, completions, **columns): return [float(sum(map(str.isalpha, t))) for t in completions]\n"
    )
    save_tiny_model(tmp_path / "model", chat=CHAT)
    return tmp_path


FLAGS = ["--model", "model", "--dataset", "prompts.jsonl", "--reward_functions", "judges.py:length"]
FLAGS += ["--num_generations", "4", "--response_length", "6"]


def test_the_command_line(folder, capsys):
    command = ["best-of-n", *FLAGS, "--num_best", "2", "--gold_functions", "judges.py:letters", "--output_dir", "out"]
    assert main(command) == 0
    assert "Best of n, estimated from all samples" in capsys.readouterr().out
    _, *lines = map(json.loads, Path("out/samples.jsonl").read_text().splitlines())
    best = [json.loads(line) for line in Path("out/best.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in best[::2]] == [max(line["rewards"]) for line in lines]
    summary = json.loads(Path("out/summary.json").read_text())
    rewards, gold = (torch.tensor([line[name] for line in lines]) for name in ("rewards", "gold"))
    assert summary["reward"] == best_of_n_scores(rewards).mean(0).tolist()
    assert summary["gold"] == best_of_n_scores(rewards, gold).mean(0).tolist()
    assert (summary["prompts"], summary["n"]) == (6, [1, 2, 3, 4])
    assert main([*command, "--seed", "3"]) == 2
    assert "seed=42 there and 3 now" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_best", "5"], "num_best=5 must be from 1 to num_generations=4"),
        (["--temperature", "0"], "temperature=0.0 must be greater than 0: all responses would be the same"),
        (["--response_length", "-1"], "max_new_tokens=-1 must be at least 0"),
        (["--reward_weights", "1", "2"], "reward_weights has 2 weights for 1 reward_funcs"),
        (
            ["--gold_functions", "judges.py:none"],
            "gold_functions: 'judges.py' has no function 'none'; it has length, letters",
        ),
        (["--max_prompt_length", "1"], "more than max_prompt_length=1"),
    ],
)
def test_wrong_flags(folder, capsys, flags, message):
    assert main(["best-of-n", *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
