"""Process rewards: labels at the ends of steps, the model that gives them, and their places in PPO, by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from ppo_runs import first_log
from ppo_runs import trainer as ppo_trainer
from tiny import CHAT, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, EvalPrediction

from fastrlhf.cli import main
from fastrlhf.data.steps import prepare_steps, split_steps
from fastrlhf.rewards import DetailedScores, ProcessRewardModel, RewardError, Rewards
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.rollout import Rollout
from fastrlhf.trainers import PPOConfig, ProcessRewardConfig, ProcessRewardTrainer
from fastrlhf.trainers.ppo.step_rewards import step_rewards
from fastrlhf.trainers.ppo.targets import ppo_targets
from fastrlhf.trainers.process_reward import step_metrics

ROWS = [
    {"prompt": "the\n", "steps": ["good", "was good", "film"], "labels": [True, True, False]},
    {"prompt": "a\n", "steps": ["bad"], "labels": [0.25]},
    {"prompt": "so\n", "steps": ["the film", "bad"], "labels": [None, 0.0]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHAT, pad_is_eos=False)


def trainer(tmp_path, rows=ROWS, eval_rows=None, model=None, **options):
    defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    args = ProcessRewardConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **{**defaults, **options})
    model = model or save_tiny_model(tmp_path / "model", reward=True)
    return ProcessRewardTrainer(
        model, args, Dataset.from_list(rows), eval_dataset=eval_rows and Dataset.from_list(eval_rows)
    )


class TestSteps:
    def test_split(self):
        assert split_steps("one\n\ntwo \nthree", "\n") == [3, 8, 15]
        assert split_steps("", "\n") == []
        with pytest.raises(ValueError, match="step_separator: empty"):
            split_steps("a", "")

    @pytest.mark.parametrize("chat", [False, True])
    def test_places_are_the_last_tokens_of_labelled_steps(self, tokenizer, chat):
        rows = [{**row, "prompt": [{"role": "user", "content": "hi"}]} if chat else row for row in ROWS]
        data = prepare_steps(Dataset.from_list(rows), tokenizer, 99, "\n")
        assert data["labels"][:] == [[1.0, 1.0, 0.0], [0.25], [0.0]]
        before = [tokenizer.decode(data[0]["input_ids"][: place + 1]) for place in data[0]["places"]]
        start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" if chat else "the\n"
        assert before == [f"{start}{said}" for said in ("good", "good\nwas good", "good\nwas good\nfilm")]
        assert tokenizer.decode(data[2]["input_ids"][: data[2]["places"][0] + 1]).endswith("the film\nbad")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"steps": []}, "row 0, column 'steps'"),
            ({"steps": ["a", " "], "labels": [1, 1]}, "none of them blank"),
            ({"steps": ["a"], "labels": [1, 0]}, "column 'labels'.*a list of 1 labels"),
            ({"steps": ["a"], "labels": [2.0]}, "column 'labels'.*a number from 0 to 1"),
            ({"steps": ["a\nb"], "labels": [1.0]}, r"row 0: the step 'a\\nb' has step_separator='\\n' in it"),
            ({"steps": ["a"], "labels": [None]}, "no step has a label"),
            ({"steps": ["bad " * 99], "labels": [1.0]}, "1 of 1 rows are longer than max_length=64"),
        ],
    )
    def test_errors(self, tokenizer, row, said):
        with pytest.raises(ValueError, match=said):
            prepare_steps(Dataset.from_list([{**ROWS[0], **row}]), tokenizer, 64, "\n")

    def test_columns(self, tokenizer):
        with pytest.raises(ValueError, match="wanted `prompt`, `steps`"):
            prepare_steps(Dataset.from_list([{"prompt": "a", "steps": ["b"]}]), tokenizer, 64, "\n")

    def test_rows_without_labels_are_dropped(self, tokenizer):
        rows = [{**ROWS[0], "labels": [1.0, 1.0, 1.0]}, {"prompt": "a", "steps": ["b"], "labels": [None]}]
        with pytest.warns(UserWarning, match="1 of 2 rows without a label"):
            assert len(prepare_steps(Dataset.from_list(rows), tokenizer, 64, "\n")) == 1


class TestTrainer:
    def test_loss_is_the_mean_over_steps(self, tmp_path):
        ours = trainer(tmp_path)
        rows = list(ours.train_dataset)
        loss = ours.compute_loss(ours.model, ours.data_collator(rows))
        terms = []
        for row in rows:
            for place, label in zip(row["places"], row["labels"], strict=True):
                score = ours.model(torch.tensor([row["input_ids"][: place + 1]])).logits[0, 0]
                terms.append(-label * torch.sigmoid(score).log() - (1 - label) * torch.sigmoid(-score).log())
        torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)

    def test_accumulated_batches_are_one_batch(self, tmp_path):
        """Rows with one, two and three labelled steps, one at a time and all together."""
        weights = []
        for name, options in (("whole", {}), ("parts", {"gradient_accumulation_steps": 3})):
            size = {"per_device_train_batch_size": 1 if options else 3, "learning_rate": 1e-2, "weight_decay": 0.0}
            rows = [*ROWS[:2], {**ROWS[2], "labels": [1.0, 0.0]}]
            ours = trainer(tmp_path / name, rows, optim="sgd", max_grad_norm=0.0, **size, **options)
            before = ours.model.score.weight.detach().clone()
            ours.train()
            weights.append(ours.model.score.weight.detach())
            assert not torch.allclose(weights[-1], before, rtol=1e-3)
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)

    def test_it_learns_and_is_a_reward_function(self, tmp_path):
        rows = [
            {"prompt": f"{a}\n", "steps": [f"{b} good", f"{a} bad"], "labels": [True, False]}
            for a in ("the", "film", "so")
            for b in ("was", "and", "user")
        ]
        ours = trainer(tmp_path, rows, rows, max_steps=60, learning_rate=2e-2, warmup_steps=0)
        ours.train()
        metrics = ours.evaluate()
        assert metrics["eval_accuracy"] == metrics["eval_first_error_accuracy"] == 1.0
        ours.save_model()
        folder = str(tmp_path / "out")
        assert RewardSettings.load(folder).heads == "process"
        AutoModelForSequenceClassification.from_pretrained(folder)
        scores = ProcessRewardModel(folder, batch_size=2)(["the\n", "so\n", "film\n"], ["was good\nthe bad", "", "x"])
        assert scores == [0.0, 0.0, 0.0]
        assert [end for end, _ in scores.steps[0]] == [8, 16]
        assert scores.steps[0][0][1] > 0.9 > 0.1 > scores.steps[0][1][1]
        assert scores.steps[1] == []
        assert Rewards(folder).names == ["process_reward_model"]

    def test_metrics_by_hand(self):
        scores = torch.tensor([[2.0, -1.0, -100.0], [1.0, 1.0, 1.0], [-1.0, 3.0, -1.0]])
        labels = torch.tensor([[1.0, 0.0, -100.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
        metrics = step_metrics(EvalPrediction(scores.numpy(), labels.numpy()))
        assert metrics["accuracy"] == pytest.approx(7 / 8)
        # found at step 1; found that there is none; seen at step 0 where it is at step 2
        assert metrics["first_error_accuracy"] == pytest.approx(2 / 3)

    def test_other_models_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is no process reward model, its head is 'single'"):
            ProcessRewardModel(save_tiny_model(tmp_path, reward=True))


def rollout_of(tokenizer, prompts, texts, sampled=None):
    responses = [tokenizer(text)["input_ids"] for text in texts]
    options = {} if sampled is None else {"sampled": sampled}
    return Rollout(
        prompts=[tokenizer(text)["input_ids"] for text in prompts],
        responses=responses,
        log_probs=None,
        finish_reasons=["stop"] * len(texts),
        **options,
    )


class TestPlaces:
    def test_at_the_token_that_ends_the_step(self, tokenizer):
        text = "good\nbad film"
        rollout = rollout_of(tokenizer, ["the\n"], [text])
        tokens = rollout.responses[0]
        reached = [len(tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]
        rewards = step_rewards(rollout, [[(4, 0.5), (13, -2.0)]], tokenizer)
        wanted = torch.zeros(1, len(tokens))
        wanted[0, reached.index(4)], wanted[0, reached.index(13)] = 0.5, -2.0
        assert torch.equal(rewards, wanted)

    def test_within_a_token_at_its_end_and_behind_the_text_at_the_last(self, tokenizer):
        rollout = rollout_of(tokenizer, ["a", "a"], ["good", "x"])
        rewards = step_rewards(rollout, [[(2, 1.0), (9, 1.0)], []], tokenizer)
        assert rewards.sum() == 2.0
        assert rewards[0, -1] >= 1.0
        assert not rewards[1].any()

    def test_tool_output_earns_nothing(self, tokenizer):
        tokens = tokenizer("good\nbad\nfilm")["input_ids"]
        mask = torch.ones(1, len(tokens), dtype=torch.long)
        mask[0, 2:] = 0
        ours = SimpleNamespace(prompts=[[5]], responses=[tokens], mask=torch.ones_like(mask), trained=mask)
        rewards = step_rewards(ours, [[(13, 1.0)]], tokenizer)
        assert rewards[0].tolist() == [0.0, 1.0] + [0.0] * (len(tokens) - 2)

    def test_advantages_by_hand(self, tmp_path):
        """Three tokens, steps end at the first and the third: r = (0.5, 0, 1 + 2), gamma 1, lambda 1, values 0.1."""
        args = PPOConfig(str(tmp_path), report_to="none", lam=1.0, whiten_advantages=False, rollout_batch_size=8)
        zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
        rewards = torch.tensor([[0.5, 0.0, 1.0]])
        made = ppo_targets(
            torch.tensor([2.0]), zeros, zeros, 0.1 * ones, ones, args, kl_coef=0.0, token_rewards=rewards
        )
        torch.testing.assert_close(made.advantages, torch.tensor([[3.4, 2.9, 2.9]]))
        whitened = PPOConfig(
            str(tmp_path), report_to="none", whiten_rewards=True, whiten_advantages=False, lam=1.0, rollout_batch_size=8
        )
        made = ppo_targets(torch.tensor([2.0]), zeros, zeros, zeros, ones, whitened, kl_coef=0.0, token_rewards=rewards)
        r = torch.tensor([0.5, 0.0, 3.0])
        r = (r - r.mean()) / r.std() + r.mean()
        torch.testing.assert_close(made.advantages[0], r.flip(0).cumsum(0).flip(0), rtol=1e-4, atol=1e-4)

    def test_critic_free_estimators_count_the_steps(self, tmp_path):
        options = {"advantage_estimator": "rloo", "num_generations": 2, "rollout_batch_size": 2}
        args = PPOConfig(str(tmp_path), report_to="none", per_device_train_batch_size=2, **options)
        zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
        rewards = torch.tensor([[0.5, 1.0], [0.0, 0.0]])
        made = ppo_targets(torch.zeros(2), zeros, zeros, None, ones, args, kl_coef=0.0, token_rewards=rewards)
        torch.testing.assert_close(made.advantages, torch.tensor([[1.5, 1.5], [-1.5, -1.5]]))


class TestPPO:
    def test_step_rewards_reach_the_advantages(self, tmp_path):
        """Two functions: one for the outcome, one for a step after the first letter, weighed 2: it stands on a token of
        its own."""

        def outcome(prompts, completions, **columns):
            return [1.0] * len(completions)

        def first_letter(prompts, completions, **columns):
            return DetailedScores([0.0] * len(completions), steps=[[(1, 0.25)] if c else [] for c in completions])

        ours = ppo_trainer(
            tmp_path, [outcome, first_letter], reward_weights=[1.0, 2.0], reward_normalization="none", lam=1.0
        )
        inputs = list(ours.train_dataset)[:8]
        rollout = ours.rollout(inputs)
        result, _ = ours.scores(inputs, rollout)
        assert result.total.tolist() == [1.5] * 8
        assert result.outcome.tolist() == [1.0] * 8
        made = ours.experience(ours.model, rollout, result.total, result.each, result.outcome, result.steps)
        returns = made.targets.returns
        torch.testing.assert_close(returns[:, 0], torch.full((8,), 1.5))
        torch.testing.assert_close(returns[made.targets.mask.bool()].min(), torch.tensor(1.0))
        assert first_log(ours)["rewards/first_letter"] == pytest.approx(0.25)

    def test_no_outcome_is_exactly_none(self):
        """Where a normalisation would make a difference of the last digit as large as any."""

        def steps(prompts, completions, **columns):
            return DetailedScores([0.0] * 9, steps=[[(1, 0.1 * i), (2, 0.7), (3, 1 / 3)] for i in range(9)])

        result = Rewards([steps, steps], [1.0, 0.3]).score(["a"] * 9, ["bcd"] * 9, {})
        assert not result.outcome.any()
        assert result.total[3].item() == pytest.approx(1.3 * (0.3 + 0.7 + 1 / 3))

    @pytest.mark.parametrize("step", [(0, 1.0), (1, math.nan), (1.5, 1.0)])
    def test_unusable_steps(self, step):
        def judge(prompts, completions, **columns):
            return DetailedScores([0.0], steps=[[step]])

        with pytest.raises(RewardError, match="judge returned the step"):
            Rewards(judge)(["a"], ["b"], {})

    def test_from_flags(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = save_tiny_model(tmp_path / "model")
        (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2] * 4))
        (tmp_path / "prompts.jsonl").write_text((json.dumps({"prompt": "the\n"}) + "\n") * 8)
        flags = ("--model", model, "--report_to", "none", "--max_steps", "1", "--logging_steps", "1")
        assert main(["process-reward", *flags, "--dataset", "steps.jsonl", "--output_dir", "prm"]) == 0
        flags += ("--dataset", "prompts.jsonl", "--rollout_batch_size", "4", "--response_length", "6")
        assert main(["ppo", *flags, "--reward_models", "prm", "--output_dir", "ppo"]) == 0
        record = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
        assert 0 < record["objective/scores"] < 6
