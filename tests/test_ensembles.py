"""Ensembles of reward models: how members become one score, and what PPO makes of their disagreement."""

import json

import pytest
import torch
from datasets import Dataset
from ppo_runs import first_log, trainer
from tiny import save_tiny_model
from transformers import AutoModelForSequenceClassification

from fastrlhf.rewards import DetailedScores, RewardEnsemble, RewardError, RewardModel, Rewards, combine
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.trainers import RewardConfig, RewardTrainer

TEXTS = ["the", "a"], [" good film", " bad one"]


def save_heads(folder, settings, seed=0):
    """A random reward model with as many heads as the settings name."""
    torch.manual_seed(seed)
    save_tiny_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(settings.names))
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    settings.save(str(folder))
    return str(folder)


@pytest.fixture
def ensemble(tmp_path):
    return save_heads(tmp_path / "heads", RewardSettings("ensemble", ["a", "b", "c"]))


def raw(folder, heads):
    settings = RewardSettings.load(folder)
    RewardSettings(settings.heads, settings.names).save(folder)
    scores = RewardModel(folder).head_scores(*TEXTS)
    settings.save(folder)
    assert scores.shape == (2, heads)
    return scores


class TestCombine:
    MEMBERS = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])

    @pytest.mark.parametrize(
        ("how", "wanted"), [("mean", [3.0, 2.0]), ("min", [1.0, 2.0]), ("mean-std", [3.0 - 0.5 * 2.0, 2.0])]
    )
    def test_by_hand(self, how, wanted):
        scores, std = combine(self.MEMBERS, how, std_coef=0.5)
        assert scores.tolist() == wanted
        assert std.tolist() == [2.0, 0.0]

    def test_one_member_has_no_disagreement(self):
        scores, std = combine(torch.tensor([[4.0]]), "mean-std", 3.0)
        assert (scores.tolist(), std.tolist()) == ([4.0], [0.0])

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((torch.ones(2),), r"members: got shape \(2,\)"),
            ((MEMBERS, "median"), "reward_ensemble='median' must be one of mean, min, mean-std"),
            ((MEMBERS, "mean-std", -1.0), "reward_std_coef=-1.0 must be at least 0"),
        ],
    )
    def test_bad_arguments(self, arguments, said):
        with pytest.raises(ValueError, match=said):
            combine(*arguments)


class TestRewardModel:
    def test_heads_are_averaged_and_their_spread_is_told(self, ensemble):
        scores = RewardModel(ensemble)(*TEXTS)
        members = raw(ensemble, 3)
        assert scores == pytest.approx(members.mean(1).tolist(), rel=1e-5)
        assert scores.parts["disagreement"] == pytest.approx(members.std(1).tolist(), rel=1e-5)

    def test_members_stand_around_their_own_means(self, ensemble):
        members = raw(ensemble, 3)
        RewardSettings("ensemble", ["a", "b", "c"], means=[1.0, -2.0, 0.5], stds=[1.0] * 3).save(ensemble)
        centred = members - torch.tensor([1.0, -2.0, 0.5])
        assert RewardModel(ensemble, ensemble="min")(*TEXTS) == pytest.approx(centred.min(1).values.tolist(), rel=1e-5)

    def test_objectives_are_normalised_and_weighted(self, tmp_path):
        folder = save_heads(
            tmp_path / "k", RewardSettings("objectives", ["kind", "brief"], means=[0.5, 1.0], stds=[2.0, 4.0])
        )
        normal = (raw(folder, 2) - torch.tensor([0.5, 1.0])) / torch.tensor([2.0, 4.0])
        scores = RewardModel(folder, objective_weights=[1.0, -3.0])(*TEXTS)
        assert scores == pytest.approx((normal @ torch.tensor([1.0, -3.0])).tolist(), rel=1e-4)
        assert scores.parts["kind"] == pytest.approx(normal[:, 0].tolist(), rel=1e-4)

    def test_weights_are_for_objectives(self, ensemble, tmp_path):
        with pytest.raises(ValueError, match=r"2 given, wanted one for each objective of .* which has none"):
            RewardModel(ensemble, objective_weights=[1.0, 2.0])

    def test_every_turn_of_a_completion(self, tmp_path):
        """The sum over the assistant's turns that are the completion's; those of the prompt are no part of it."""
        folder = save_heads(tmp_path / "turns", RewardSettings(turns="all"))
        head = "\n\nHuman: hi\n\nAssistant: so\n\nHuman: a\n\nAssistant:"
        one, two = " good", " good\n\nHuman: b\n\nAssistant: bad"
        model = RewardModel(folder)
        scores = model([head, head], [one, two])
        model.settings = RewardSettings()
        assert scores[0] == pytest.approx(model([head], [one])[0], rel=1e-5)
        tokens = torch.tensor([model.tokenizer(head + " good")["input_ids"]])
        first = model.model(tokens).logits.item()  # without EOS: the turn is not the last
        assert scores[1] == pytest.approx(first + model([head], [two])[0], rel=1e-4)


class TestRewards:
    def test_all_models_become_one_function(self, tmp_path, ensemble):
        single = save_tiny_model(tmp_path / "single", reward=True)

        def length(prompts, completions, **columns):
            return [float(len(c)) for c in completions]

        rewards = Rewards([length, ensemble, single], [0.5, 2.0], ensemble="mean-std", std_coef=0.5)
        assert rewards.names == ["length", "reward_ensemble"]
        members = torch.cat([raw(ensemble, 3), RewardModel(single).head_scores(*TEXTS)], dim=1)
        result = rewards.score(*TEXTS, {})
        wanted = members.mean(1) - 0.5 * members.std(1)
        torch.testing.assert_close(result.each["reward_ensemble"], wanted)
        torch.testing.assert_close(result.total, 0.5 * torch.tensor([10.0, 8.0]) + 2 * wanted)
        torch.testing.assert_close(result.disagreement, 2 * members.std(1))
        torch.testing.assert_close(result.each["reward_ensemble/disagreement"], members.std(1))

    def test_members_must_answer_one_question(self, tmp_path):
        folder = save_heads(tmp_path / "k", RewardSettings("objectives", ["kind", "brief"]))
        with pytest.raises(ValueError, match="a reward model with objectives heads cannot be a member"):
            Rewards(folder, ensemble="mean")

    def test_without_a_model(self):
        with pytest.raises(ValueError, match="reward_ensemble='min': there is no reward model"):
            Rewards(lambda prompts, completions: [1.0], ensemble="min")

    def test_parts_are_checked_like_scores(self):
        def judge(prompts, completions, **columns):
            return DetailedScores([1.0, 2.0], parts={"tone": [0.0, float("nan")]})

        with pytest.raises(RewardError, match="judge/tone returned nan for completion 1"):
            Rewards(judge)(*TEXTS, {})

    def test_calibrated_ensembles(self, tmp_path):
        folder = save_heads(tmp_path / "t", RewardSettings("ensemble", ["a", "b"], temperatures=[2.0]))
        plain, calibrated = (Rewards(folder, calibrated=by)(*TEXTS, {})[0] for by in (False, True))
        torch.testing.assert_close(calibrated, plain / 2)
        assert isinstance(Rewards(folder, ensemble="min").funcs[0], RewardEnsemble)


class TestPPO:
    def test_flags(self, tmp_path, ensemble):
        log = first_log(trainer(tmp_path, ensemble, reward_ensemble="mean-std", reward_std_coef=2.0))
        mean, std = log["rewards/reward_ensemble"], log["rewards/reward_ensemble/disagreement"]
        plain = first_log(trainer(tmp_path, ensemble))
        assert plain["rewards/reward_model/disagreement"] == pytest.approx(std, rel=1e-5)
        assert mean == pytest.approx(plain["rewards/reward_model"] - 2 * std, rel=1e-4)

    def test_uncertainty_moves_the_coefficient_and_survives_a_resume(self, tmp_path, ensemble):
        options = {
            **{"kl_controller": "uncertainty", "kl_coef": 0.1, "kl_horizon": 16, "learning_rate": 1e-2},
            **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        }
        straight = trainer(tmp_path, ensemble, **options)
        straight.train()
        log = straight.state.log_history
        assert log[0]["objective/kl_coef"] == pytest.approx(0.1)
        first, second = (log[i]["rewards/reward_model/disagreement"] for i in (0, 1))
        kept = torch.exp(torch.tensor(-8 / 16)).item()
        wanted = 0.1 * (kept * first + (1 - kept) * second) / first
        assert log[1]["objective/kl_coef"] == pytest.approx(wanted, rel=1e-4)
        assert wanted != pytest.approx(0.1, rel=1e-4)
        state = json.loads((tmp_path / "out" / "checkpoint-2" / "ppo_state.json").read_text())
        assert state["kl_controller"]["first"] == pytest.approx(first, rel=1e-5)
        resumed = trainer(tmp_path, ensemble, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert resumed.kl_controller.state_dict() == straight.kl_controller.state_dict()

    def test_uncertainty_wants_an_ensemble(self, tmp_path):
        with pytest.raises(ValueError, match="no reward function has one: give a reward model with num_heads"):
            trainer(tmp_path, kl_controller="uncertainty").train()


def test_heads_agree_on_what_they_saw_and_not_elsewhere(tmp_path):
    """Bootstrap samples are what keeps linear heads on one trunk apart: with one sample for all, the loss is convex in
    the heads and has one minimum."""
    words = ["film", "the", "was", "and"]
    rows = [{"chosen": f"{a} good {b}", "rejected": f"{a} bad {b}"} for a in words for b in words] * 2
    args = RewardConfig(
        str(tmp_path / "out"),
        **{"report_to": "none", "disable_tqdm": True, "max_steps": 40, "per_device_train_batch_size": 32},
        **{"learning_rate": 1e-2, "save_strategy": "no", "num_heads": 5, "warmup_steps": 0},
    )
    ours = RewardTrainer(save_tiny_model(tmp_path / "lm"), args, Dataset.from_list(rows))
    ours.train()
    ours.save_model()
    model = RewardModel(str(tmp_path / "out"))

    def relative(chosen, rejected):
        a, b = (model.head_scores([""] * len(x), x) for x in (chosen, rejected))
        return ((a - b).std(dim=1) / (a - b).mean(1).abs()).mean().item()

    seen = relative([row["chosen"] for row in rows], [row["rejected"] for row in rows])
    unseen = relative(["user hello", "system bad"], ["Human: hi", "hello good so"])
    assert seen < 0.3
    assert unseen > seen
