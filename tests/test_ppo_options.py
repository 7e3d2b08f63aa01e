"""Each option of PPOTrainer does what it says, in a whole training step."""

import json
import math

import pytest
import torch
from datasets import Dataset
from ppo_runs import PROMPTS, count_letters, first_log, trainer
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from fastrlhf import functional as F
from fastrlhf.cli import main
from fastrlhf.rollout import NativeEngine
from fastrlhf.trainers.ppo import experience as batches_of_ppo
from fastrlhf.trainers.ppo.experience import micro_batches, mini_batches

ESTIMATORS = {
    "gae": {},
    "rloo": {"num_generations": 4},
    "grpo": {"num_generations": 4},
    "reinforce++": {},
}


def experience(ours, rows=8):
    """An iteration's, with the policy a little off the one that sampled, so that ratios are not 1."""
    inputs = list(ours.train_dataset)[: rows // ours.args.num_generations]
    rollout = ours.rollout(inputs, ours.args.num_generations)
    scores = torch.linspace(-1, 1, len(rollout))
    made = ours.experience(ours.model, rollout, scores, {})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.scorer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return made


def gradient(ours, made, batches):
    ours.model.zero_grad()
    loss, _ = ours.update(ours.model, batches, made.targets)
    return loss, torch.cat([p.grad.flatten() for p in ours.scorer.model.parameters() if p.grad is not None])


def all_rows(ours, made):
    return micro_batches(made.rollout, range(len(made.rollout)), ours.args, ours.accelerator)


def own_log_probs(ours, made):
    """[B, T] of the policy as it is, with gradient, by a forward for each response."""
    rows = []
    for prompt, response in zip(made.rollout.prompts, made.rollout.responses, strict=True):
        logits = ours.scorer.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class TestLoss:
    """The trainer's policy loss, from packed tokens and over micro-batches, against F.ppo_loss on [B, T]."""

    @pytest.mark.parametrize("size", [8, 2])
    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            ({}, {}),
            ({"cliprange": 0.05, "cliprange_high": 0.4}, {"clip_low": 0.05, "clip_high": 0.4}),
            ({"cliprange": 0.05, "dual_clip": 1.5}, {"clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.5}),
            ({"ratio_level": "sequence"}, {"ratio_level": "sequence"}),
            ({"loss_aggregation": "seq-mean-token-sum"}, {"aggregation": "seq-mean-token-sum"}),
            ({"loss_aggregation": "seq-mean-token-mean"}, {"aggregation": "seq-mean-token-mean"}),
            (
                {"loss_aggregation": "seq-mean-token-sum-norm"},
                {"aggregation": "seq-mean-token-sum", "denominator": 8.0 * 6},
            ),
            (
                {"ratio_level": "sequence", "loss_aggregation": "seq-mean-token-mean"},
                {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean"},
            ),
            ({"kl_loss_coef": 0.3, "kl_loss_estimator": "k2"}, {"kl_coef": 0.3, "kl_estimator": "k2"}),
        ],
    )
    def test_it_is_the_ops(self, tmp_path, options, wanted, size):
        ours = trainer(tmp_path, per_device_train_batch_size=size, vf_coef=0.0, **options)
        made = experience(ours)
        targets = made.targets
        loss, ours_gradient = gradient(ours, made, all_rows(ours, made))
        reference = {"ref_log_probs": targets.ref_log_probs} if "kl_coef" in wanted else {}
        theirs, _ = F.ppo_loss(
            own_log_probs(ours, made),
            targets.log_probs,
            targets.advantages,
            targets.mask,
            advantage_stats=targets.advantage_stats,
            **reference,
            **wanted,
        )
        ours.model.zero_grad()
        theirs.backward()
        their_gradient = torch.cat([p.grad.flatten() for p in ours.scorer.model.parameters()])
        torch.testing.assert_close(loss, theirs.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours_gradient, their_gradient, rtol=1e-3, atol=2e-5 * their_gradient.abs().max())

    def test_entropy_bonus(self, tmp_path):
        log = first_log(trainer(tmp_path, entropy_coef=0.1))
        assert log["policy/entropy_avg"] > 0
        plain = trainer(tmp_path, vf_coef=0.0)
        bonus = trainer(tmp_path, vf_coef=0.0, entropy_coef=0.1)
        made = experience(plain)
        losses = [gradient(ours, made, all_rows(ours, made))[0] for ours in (plain, bonus)]
        assert losses[1] < losses[0]

    def test_without_value_clip(self, tmp_path):
        assert math.isfinite(first_log(trainer(tmp_path, cliprange_value=None))["loss/value_avg"])


class TestBatches:
    @pytest.mark.parametrize("padding_free", [True, False])
    @pytest.mark.parametrize("options", [{"max_tokens_per_micro_batch": 20}, {"per_device_train_batch_size": 8}])
    def test_how_they_are_cut_changes_no_gradient(self, tmp_path, padding_free, options):
        one = trainer(tmp_path, per_device_train_batch_size=4)
        made = experience(one)
        wanted = gradient(one, made, all_rows(one, made))[1]
        other = trainer(tmp_path, padding_free=padding_free, **options)
        other.model.load_state_dict(one.model.state_dict())
        got = gradient(other, made, all_rows(other, made))[1]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5 * wanted.abs().max())

    def test_token_budget(self, tmp_path):
        ours = trainer(tmp_path, max_tokens_per_micro_batch=20)
        made = experience(ours)
        batches = all_rows(ours, made)
        assert all(batch.input_ids.numel() <= 20 for batch in batches)
        assert sum(batch.tokens.numel() for batch in batches) == made.rollout.lengths.sum()

    @pytest.mark.parametrize("options", [{"max_tokens_per_micro_batch": 40}, {"per_device_train_batch_size": 4}])
    def test_a_prompt_is_read_once_for_its_responses(self, tmp_path, options):
        ours = trainer(tmp_path, advantage_estimator="grpo", num_generations=4, **options)
        made = experience(ours)
        batches = all_rows(ours, made)
        rollout, limit = made.rollout, options.get("max_tokens_per_micro_batch", math.inf)
        for batch in batches:
            assert sum(len(rollout.prompts[row] + rollout.responses[row]) for row in batch.sequence_rows) <= limit
            fed = [rollout.prompts[row] + rollout.responses[row][:-1] for row in batch.sequence_rows]
            beginnings = {tuple(tokens[: end + 1]) for tokens in fed for end in range(len(tokens))}
            assert batch.input_ids.numel() == len(beginnings) < sum(map(len, fed))
            assert len({tuple(rollout.prompts[row]) for row in batch.sequence_rows}) == 1
        padded = trainer(tmp_path, advantage_estimator="grpo", num_generations=4, padding_free=False)
        padded.model.load_state_dict(ours.model.state_dict())
        wanted = gradient(padded, made, all_rows(padded, made))[1]
        torch.testing.assert_close(gradient(ours, made, batches)[1], wanted, rtol=1e-3, atol=2e-5 * wanted.abs().max())

    def test_responses_to_one_prompt_in_more_batches_than_there_are_prompts(self, tmp_path, monkeypatch):
        """As a rank has to that has fewer tokens than another."""
        ours = trainer(tmp_path, advantage_estimator="grpo", num_generations=4, max_tokens_per_micro_batch=1000)
        rollout = experience(ours).rollout
        for count in (1, 2, 5):
            monkeypatch.setattr(batches_of_ppo, "max_over_ranks", lambda *_, count=count: count)
            batches = micro_batches(rollout, range(8), ours.args, ours.accelerator)
            assert sorted(row for batch in batches for row in batch.sequence_rows) == list(range(8))
            assert len(batches) == count

    def test_every_epoch_takes_all_responses_in_another_order(self, tmp_path):
        ours = trainer(tmp_path, num_ppo_epochs=2, num_mini_batches=4)
        rollout = experience(ours).rollout
        parts = mini_batches(rollout, ours.args, ours.accelerator)
        taken = [{row for batch in part for row in batch.rows.tolist()} for part in parts]
        assert len(taken) == 8
        assert set().union(*taken[:4]) == set().union(*taken[4:]) == set(range(8))
        assert taken[:4] != taken[4:]

    def test_a_model_that_mixes_packed_sequences_is_refused(self, tmp_path):
        model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
        options = {"model": model, "processing_class": tiny_tokenizer(), "rollout_engine": "transformers"}
        with pytest.raises(ValueError, match="padding_free=False"):
            trainer(tmp_path, **options)
        first_log(trainer(tmp_path, padding_free=False, **options))


class TestEstimators:
    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_a_run(self, tmp_path, name):
        ours = trainer(tmp_path, advantage_estimator=name, max_steps=2, **ESTIMATORS[name])
        before = [p.detach().clone() for p in ours.scorer.model.parameters()]
        log = first_log(ours)
        assert ("loss/value_avg" in log) == (name == "gae")
        assert (ours.scorer.value_head is None) == (name != "gae")
        assert log["rollout/logprob_gap_max"] <= 2e-5
        assert any(not torch.equal(a, b) for a, b in zip(before, ours.scorer.model.parameters(), strict=True))

    def test_without_a_critic_resumes_bit_for_bit(self, tmp_path):
        options = {"advantage_estimator": "rloo", "num_generations": 2, "max_steps": 4, "save_strategy": "steps"}
        options |= {"save_steps": 2, "kl_controller": "adaptive", "reward_normalization": "group"}
        straight = trainer(tmp_path, **options)
        straight.train()
        resumed = trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert straight.kl_controller.coef == resumed.kl_controller.coef != 0.05

    def test_prompts_of_a_group_stand_together(self, tmp_path):
        seen = []

        def judge(prompts, completions, weight, **columns):
            seen.extend(zip(prompts, weight, strict=True))
            return [float(i) for i in range(len(prompts))]

        trainer(tmp_path, judge, num_generations=4, advantage_estimator="grpo").train()
        assert seen[0] == seen[1] == seen[2] == seen[3]
        assert len(seen) == 8

    def test_a_value_model_has_no_place_there(self, tmp_path):
        with pytest.raises(ValueError, match="advantage_estimator='rloo' has no value function"):
            trainer(tmp_path, value_model="anything", advantage_estimator="rloo", num_generations=2)


class TestKL:
    def test_the_adaptive_controller_follows_the_kl(self, tmp_path):
        options = {"kl_controller": "adaptive", "kl_horizon": 16, "learning_rate": 0.02, "warmup_steps": 0}
        far = trainer(tmp_path, kl_target=1e-6, max_steps=4, **options)
        far.train()
        coefs = [log["objective/kl_coef"] for log in far.state.log_history[:4]]
        # Half a horizon an iteration: at the start the KL is below its target of next to nothing, later far above it.
        assert coefs[-1] == pytest.approx(coefs[-2] * 1.1)

    def test_kl_in_the_loss_leaves_the_reward_alone(self, tmp_path):
        log = first_log(trainer(tmp_path, kl_coef=0.0, kl_loss_coef=0.5))
        assert log["objective/rlhf_reward"] == pytest.approx(log["objective/scores"])
        assert "rollout/logprob_gap" not in log
        assert "rollout/logprob_gap_max" in log


class TestCriticWarmup:
    @pytest.mark.parametrize("separate", [False, True])
    def test_the_policy_stays(self, tmp_path, separate):
        value = {"value_model": save_tiny_model(tmp_path / "value", reward=True)} if separate else {}
        ours = trainer(tmp_path, max_steps=2, critic_warmup_steps=2, weight_decay=0.1, warmup_steps=0, **value)
        before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
        ours.train()
        moved = {name for name, p in ours.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert all(name.startswith(("value_head", "value_model")) for name in moved)

    def test_then_it_moves(self, tmp_path):
        ours = trainer(tmp_path, max_steps=3, critic_warmup_steps=2, warmup_steps=0)
        before = [p.detach().clone() for p in ours.scorer.model.parameters()]
        ours.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, ours.scorer.model.parameters(), strict=True))


class ToolEngine:
    """Responses of which the policy did not sample the second and third token."""

    def __init__(self, engine):
        self.engine = engine

    def update_weights(self):
        self.engine.update_weights()

    def generate(self, prompts, sampling, *, seeds=None):
        rollout = self.engine.generate(prompts, sampling, seeds=seeds)
        for response in rollout.responses:
            response[1:3] = [7] * len(response[1:3])
        places = torch.cat([torch.arange(n) for n in rollout.lengths.tolist()])
        rollout.sampled = (places < 1) | (places > 2)
        return rollout


@pytest.mark.parametrize("mode", ["carry", "zero", "none"])
def test_what_a_tool_wrote_is_not_trained_on(tmp_path, mode):
    ours = trainer(tmp_path, gae_mask_mode=mode)
    ours.engine = ToolEngine(NativeEngine(ours.scorer.model, ours.processing_class))
    made = experience(ours)
    mask = made.rollout.trained.bool()
    assert (mask.sum(1) < made.rollout.lengths).any()
    assert not made.targets.advantages[~mask & made.rollout.mask.bool()].any() or mode == "none"
    with_gap = gradient(ours, made, all_rows(ours, made))[1]
    made.targets.advantages[~mask] = 1e6  # of nobody's interest
    made.targets.returns[~mask] = 1e6
    assert torch.equal(gradient(ours, made, all_rows(ours, made))[1], with_gap)


class TestFrozenLayers:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_policy_and_reference_share_them(self, tmp_path, architecture):
        options = {"num_frozen_layers": 1, "max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0}
        if architecture == "gpt2":
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
            options |= {"model": GPT2LMHeadModel(config), "processing_class": tiny_tokenizer()}
        ours = trainer(tmp_path, **options)
        before = {name: p.detach().clone() for name, p in ours.scorer.model.named_parameters()}
        policy = {id(p) for p in ours.scorer.model.parameters()}
        reference = {id(p) for p in ours.reference.scorer.model.parameters()}
        assert policy & reference
        ours.train()
        moved = {name for name, p in ours.scorer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert not any(".0." in name or "embed" in name or "wte" in name or "wpe" in name for name in moved)
        assert any(".1." in name for name in moved)
        assert ours.state.log_history[1]["objective/kl"] != 0  # the reference's upper part is where it was

    def test_they_run_once_a_rollout(self, tmp_path):
        ours = trainer(tmp_path, num_frozen_layers=1, num_ppo_epochs=3, max_steps=2)
        lower, upper = (layer.self_attn for layer in ours.scorer.model.model.layers)
        calls = {lower: 0, upper: 0}

        def count(module, inputs, output):
            calls[module] += 1

        for module in calls:
            module.register_forward_hook(count)
        ours.train()
        # Four micro-batches: of the reference, whose upper layer is its own, and of three epochs.
        assert calls == {lower: 2 * 4, upper: 2 * 3 * 4}

    @pytest.mark.parametrize("padding_free", [True, False])
    @pytest.mark.parametrize("own_reference", [True, False])
    @pytest.mark.parametrize("group", [{}, {"advantage_estimator": "grpo", "num_generations": 4}], ids=["ppo", "grpo"])
    def test_leaving_them_out_changes_nothing(self, tmp_path, padding_free, own_reference, group):
        options = {"ref_model": save_tiny_model(tmp_path / "ref")} if own_reference else {}
        options |= group  # whose prompts several responses share
        ours = trainer(tmp_path, num_frozen_layers=1, padding_free=padding_free, rollout_weight_clip=2.0, **options)
        made = experience(ours)
        ours.rollout(list(ours.train_dataset)[:1], ours.args.num_generations)  # forgets
        batches = all_rows(ours, made)
        loss, whole = gradient(ours, made, batches)
        assert ours.lower_states.states.keys() == set(range(8))
        # Other batches than those they were computed in.
        ours.args.per_device_train_batch_size = 8
        replayed_loss, replayed = gradient(ours, made, all_rows(ours, made))
        torch.testing.assert_close(replayed_loss, loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(replayed, whole, rtol=1e-3, atol=2e-5 * whole.abs().max())

    def test_all_layers_are_too_many(self, tmp_path):
        with pytest.raises(ValueError, match="num_frozen_layers=2 must be less than the model's 2 layers"):
            trainer(tmp_path, num_frozen_layers=2)


class TestMemory:
    def test_activation_checkpointing_changes_nothing(self, tmp_path):
        weights = []
        for on in (False, True):
            ours = trainer(tmp_path, gradient_checkpointing=on, max_steps=2)
            ours.train()
            weights.append([p.detach().clone() for p in ours.model.parameters()])
        for a, b in zip(*weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_offloaded_models_are_moved_in_and_out(self, tmp_path, monkeypatch):
        ours = trainer(tmp_path, save_tiny_model(tmp_path / "reward", reward=True), offload_models=True)
        moves = []
        monkeypatch.setattr(ours.reference.scorer, "to", lambda device: moves.append(("reference", str(device))))
        monkeypatch.setattr(ours.rewards, "to", lambda device: moves.append(("rewards", str(device))))
        ours.train()
        # On this machine both are the CPU: what counts is that each is fetched, and then put away.
        assert [name for name, _ in moves] == ["rewards", "rewards", "reference", "reference"]

    def test_an_optimiser_by_name(self, tmp_path):
        ours = trainer(tmp_path, optim="adafactor")
        ours.train()
        assert "Adafactor" in type(ours.optimizer.optimizer).__name__


class TestReports:
    def test_responses_are_shown_and_kept(self, tmp_path, capsys):
        trainer(tmp_path, max_steps=4, log_completions_steps=2).train()
        lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines} == {2, 4}
        assert len(lines) == 16
        assert {"prompt", "completion", "rewards"} <= lines[0].keys()
        assert "Iteration 2" in capsys.readouterr().out

    def test_phases_and_rates(self, tmp_path):
        log = first_log(trainer(tmp_path))
        assert all(log[f"time/{phase}"] > 0 for phase in ("rollout", "reward", "reference", "update"))
        assert log["rollout/tokens_per_second"] > 0
        assert log["policy/tokens_per_second"] > 0
        assert 0 < log["rollout/distinct_1"] <= 1
        assert 0 < log["rollout/distinct_2"] <= 1

    def test_the_bar_shows_the_phases(self, tmp_path, capsys):
        ours = trainer(tmp_path)
        ours.phases.bar = True
        ours.train()
        shown = capsys.readouterr().err
        assert "rollout" in shown
        assert "update" in shown


def test_total_episodes(tmp_path):
    ours = trainer(tmp_path, total_episodes=20)
    ours.train()
    assert ours.state.global_step == 3


def test_prompts_that_are_tokens(tmp_path):
    ids = [[5, 6, 7], [8, 9], [10], [11, 12]] * 4
    data = Dataset.from_dict({"input_ids": ids, "lengths": [len(x) for x in ids]})
    ours = trainer(tmp_path, train_dataset=data)
    assert list(ours.train_dataset["prompt_ids"]) == ids
    first_log(ours)


def test_prompts_that_are_padded_tokens(tmp_path):
    data = Dataset.from_dict({"input_ids": [[2, 2, 5, 6]] * 8, "attention_mask": [[0, 0, 1, 1]] * 8})
    assert list(trainer(tmp_path, train_dataset=data).train_dataset["prompt_ids"]) == [[5, 6]] * 8


def test_shaped_scores_reach_the_advantages(tmp_path):
    """The penalty of responses without EOS, in a whole iteration; what is logged stays as the functions gave it."""
    options = {"reward_normalization": "none", "kl_coef": 0.0, "lam": 1.0}
    plain, fined = (trainer(tmp_path, missing_eos_penalty=p, **options) for p in (None, 5.0))
    inputs = list(plain.train_dataset)[:8]
    rollout = plain.rollout(inputs)
    rollout.finish_reasons[0] = "length"
    rollout.finish_reasons[1] = "stop"
    made = [ours.experience(ours.model, rollout, torch.ones(8), {}) for ours in (plain, fined)]
    torch.testing.assert_close(made[1].targets.returns[0, 0], made[0].targets.returns[0, 0] - 5)
    torch.testing.assert_close(made[1].targets.returns[1, 0], made[0].targets.returns[1, 0])
    assert torch.equal(made[0].scores, made[1].scores)


def test_the_reward_of_a_run_is_the_functions(tmp_path):
    log = first_log(trainer(tmp_path, count_letters, reward_clip=0.1))
    assert log["objective/scores"] > 0.1


def test_the_policy_is_left_as_transformers_load_it(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    ours.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[5, 6, 7]])
    ours.scorer.model.eval()
    torch.testing.assert_close(saved(tokens).logits, ours.scorer.model(tokens).logits)


GROUPS = {
    "advantage_estimator": "grpo",
    "num_generations": "2",
    "reward_normalization": "group",
    "reward_clip": "5",
    "length_penalty": "0.1",
    "missing_eos_penalty": "1",
    "reward_timeout": "60",
    "reward_retries": "1",
    "kl_coef": "0.1",
    "kl_estimator": "k3",
    "kl_controller": "adaptive",
    "kl_target": "3",
    "kl_horizon": "100",
    "kl_loss_coef": "0.1",
    "kl_loss_estimator": "k2",
    "target_kl": "1",
    "max_kl": "1000",
    "cliprange": "0.1",
    "cliprange_high": "0.3",
    "dual_clip": "3",
    "ratio_level": "sequence",
    "loss_aggregation": "seq-mean-token-mean",
    "entropy_coef": "0.01",
    "rollout_weight_clip": "2",
    "rollout_weight_mode": "mask",
    "max_tokens_per_micro_batch": "64",
    "offload_models": "true",
    "max_skipped_steps": "1",
    "log_completions_steps": "1",
    "total_episodes": "8",
    "gradient_checkpointing": "true",
    "optim": "adamw_torch",
}
CRITIC = {
    "gae_mask_mode": "zero",
    "critic_warmup_steps": "1",
    "whiten_rewards": "true",
    "whiten_advantages": "false",
    "cliprange_value": "0.3",
    "num_frozen_layers": "1",
    "padding_free": "false",
    "gamma": "0.99",
    "lam": "0.9",
    "vf_coef": "0.5",
    "rollout_engine": "transformers",
    "num_mini_batches": "2",
    "num_ppo_epochs": "1",
    "temperature": "0.9",
    "max_steps": "1",
}


@pytest.mark.parametrize("flags", [GROUPS, CRITIC])
def test_every_feature_from_flags(tmp_path, flags, capfd):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS["prompt"]))
    (tmp_path / "judge.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    common = [
        "ppo",
        "--model",
        model,
        "--dataset",
        str(tmp_path / "prompts.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    common += ["--reward_functions", f"{tmp_path / 'judge.py'}:short", "--response_length", "5", "--report_to", "none"]
    common += ["--rollout_batch_size", "4", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    own = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert main([*common, *own]) == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["objective/scores"] < 0
