"""What PPOTrainer does with numbers that are none, rewards that fail, and a policy that runs away."""

import json
import math
import threading

import pytest
import torch
from ppo_runs import count_letters, first_log, trainer

from fastrlhf.rewards import RewardError
from fastrlhf.trainers import last_checkpoint
from fastrlhf.trainers.ppo.guards import TrainingStopped, gradient_norm
from fastrlhf.trainers.ppo.losses import Losses


def weights(ours):
    return {name: p.detach().clone() for name, p in ours.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def failing_at(calls, how):
    """A reward function that misbehaves at these calls, counted from 1."""
    count = []

    def judge(prompts, completions, **columns):
        count.append(1)
        return how(completions) if len(count) in calls else count_letters(prompts, completions)

    return judge


def nan(completions):
    return [math.nan] * len(completions)


def crash(completions):
    raise KeyError("the judge's database")


class TestRewards:
    @pytest.mark.parametrize("how", [nan, crash])
    def test_the_iteration_is_skipped_and_counted(self, tmp_path, how):
        ours = trainer(tmp_path, failing_at({2}, how), max_steps=3)
        before = {}
        step = ours.training_step

        def watched(model, inputs, num_items_in_batch=None):
            before[ours.state.global_step] = weights(ours)
            return step(model, inputs, num_items_in_batch)

        ours.training_step = watched
        ours.train()
        assert not same(before[0], before[1])
        assert same(before[1], before[2])  # the second left no trace
        assert not same(before[2], weights(ours))
        logs = ours.state.log_history
        assert logs[1]["guard/skipped_steps"] == 1
        assert "loss/policy_avg" not in logs[1]
        assert "guard/skipped_steps" not in logs[2]

    def test_too_many_in_a_row_stop_the_training(self, tmp_path):
        ours = trainer(tmp_path, failing_at({2, 3}, crash), max_steps=5, max_skipped_steps=1, save_strategy="steps")
        with pytest.raises(
            TrainingStopped, match=r"max_skipped_steps=1: 2 iterations in a row.*judge.*database"
        ) as stop:
            ours.train()
        assert isinstance(stop.value.__cause__, RewardError)
        # What was trained so far is whole, and the batch is there to be looked at.
        assert last_checkpoint(str(tmp_path / "out")).endswith("checkpoint-2")
        dump = json.loads((tmp_path / "out" / "skipped-batch-3.json").read_text())
        assert len(dump["rows"]) == 8
        assert {"prompt", "completion", "rewards"} == dump["rows"][0].keys()

    def test_those_apart_do_not(self, tmp_path):
        ours = trainer(tmp_path, failing_at({1, 3}, nan), max_steps=4, max_skipped_steps=1)
        ours.train()
        assert ours.skipped.total == 2
        assert ours.skipped.in_a_row == 0

    def test_by_choice_they_are_called_again(self, tmp_path):
        ours = trainer(tmp_path, failing_at({1}, crash), max_steps=1, reward_retries=1)
        assert "guard/skipped_steps" not in first_log(ours)

    def test_a_hung_one(self, tmp_path):
        release = threading.Event()

        def hang(completions):
            release.wait()

        ours = trainer(tmp_path, failing_at({1}, hang), max_steps=1, reward_timeout=0.2, max_skipped_steps=0)
        with pytest.raises(TrainingStopped, match=r"judge.*0\.2"):
            ours.train()
        release.set()

    def test_the_count_survives_a_resume(self, tmp_path):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer(tmp_path, failing_at({1, 2}, nan), **options).train()
        resumed = trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert resumed.skipped.total == 2


class TestGradients:
    @pytest.fixture
    def spoil(self, monkeypatch):
        """spoil(calls, value): let the gradient of these micro-batches, counted from 1, not be finite."""

        def spoil(calls, value):
            count, policy = [], Losses.policy

            def spoiled(*args, **kwargs):
                count.append(1)
                loss, *rest = policy(*args, **kwargs)
                return (loss * value if len(count) in calls else loss, *rest)

            monkeypatch.setattr(Losses, "policy", spoiled)

        return spoil

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_the_step_is_skipped(self, tmp_path, spoil, value):
        spoil({1}, value)
        ours = trainer(tmp_path, max_steps=1, num_ppo_epochs=2, num_mini_batches=2)
        before = weights(ours)
        ours.train()
        assert same(before, weights(ours))
        assert ours.skipped.total == 1

    def test_steps_before_it_stay(self, tmp_path, spoil):
        """A mini-batch has two micro-batches: the fifth is in the third of four optimiser steps."""
        spoil({5}, math.nan)
        ours = trainer(tmp_path, max_steps=1, num_ppo_epochs=2, num_mini_batches=2, warmup_steps=0)
        before = weights(ours)
        ours.train()
        after = weights(ours)
        assert not same(before, after)
        assert all(x.isfinite().all() for x in after.values())

    def test_the_run_ends_with_a_dump(self, tmp_path, spoil):
        spoil({1}, math.nan)
        ours = trainer(tmp_path, max_steps=2, max_skipped_steps=0)
        with pytest.raises(TrainingStopped, match="at step 1 the loss is nan, the norm of the gradient nan"):
            ours.train()
        rows = json.loads((tmp_path / "out" / "skipped-batch-1.json").read_text())["rows"]
        assert rows[0]["rewards"]["count_letters"] >= 0

    def test_norm(self):
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert gradient_norm(layer).item() == 5


class TestRunaway:
    def test_training_stops_and_keeps_the_last_good_checkpoint(self, tmp_path):
        ours = trainer(
            tmp_path,
            max_steps=20,
            learning_rate=0.3,
            warmup_steps=0,
            kl_coef=0.0,
            max_kl=1.0,
            save_strategy="steps",
            save_steps=1,
        )
        with pytest.raises(TrainingStopped, match=r"max_kl=1\.0: at step \d+ the KL to the reference is"):
            ours.train()
        out = tmp_path / "out"
        step = ours.state.global_step
        assert step >= 1
        assert (out / f"diverged-{step}").is_dir()
        last = last_checkpoint(str(out))
        assert last is None if step == 1 else last.endswith(f"checkpoint-{step - 1}")
        # The log has the KL that was too much for it.
        assert not (out / f"checkpoint-{step}").exists()

    def test_one_checkpoint_is_too_few_to_have_a_good_one(self, tmp_path):
        with pytest.raises(ValueError, match="save_total_limit=1 must be at least 2"):
            trainer(tmp_path, max_kl=1.0, save_total_limit=1)

    def test_target_kl_ends_an_iterations_updates(self, tmp_path):
        options = {"num_ppo_epochs": 4, "learning_rate": 0.05, "warmup_steps": 0}
        free = first_log(trainer(tmp_path, **options))
        held = first_log(trainer(tmp_path, target_kl=1e-3, **options))
        assert free["policy/optimizer_steps"] == 4
        assert 1 <= held["policy/optimizer_steps"] < 4
