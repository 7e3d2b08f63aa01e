"""PPOTrainer: invariants of the first step, what is scored and saved, and what happens when things go wrong."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ppo_runs import PROMPTS, config, count_letters, first_log, trainer
from recorder import Recorder
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from fastrlhf.rollout import Rollout
from fastrlhf.trainers.ppo.experience import micro_batches
from fastrlhf.trainers.ppo.guards import TrainingStopped
from fastrlhf.trainers.ppo.targets import ppo_targets


class TestFirstStep:
    """Known results of a correct implementation: ratio 1, KL 0, nothing clipped, policy loss -mean(whitened A) = 0.

    The sampler and the trainer round differently: gap, the most their log-probs may differ by, is what fp32 makes of
    two small layers.
    """

    def check(self, log, gap=2e-5):
        assert 0 <= log["rollout/logprob_gap"] <= log["rollout/logprob_gap_max"] <= gap
        assert abs(log["val/ratio"] - 1) <= gap
        assert 0 <= log["policy/approxkl_avg"] <= gap**2
        assert log["policy/clipfrac_avg"] == 0.0
        assert log["val/clipfrac_avg"] == 0.0
        assert abs(log["loss/policy_avg"]) < 1e-6 + gap
        assert abs(log["objective/kl"]) <= 6 * gap

    def test_fp32(self, tmp_path):
        self.check(first_log(trainer(tmp_path)))

    def test_bf16(self, tmp_path):
        self.check(first_log(trainer(tmp_path, model_init_kwargs={"dtype": torch.bfloat16})), gap=0.02)

    def test_lora(self, tmp_path):
        self.check(first_log(trainer(tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))))

    def test_autocast(self, tmp_path):
        self.check(first_log(trainer(tmp_path, bf16=True, use_cpu=True)), gap=0.02)

    def test_the_transformers_engine(self, tmp_path):
        self.check(first_log(trainer(tmp_path, rollout_engine="transformers")))

    def test_importance_weights(self, tmp_path):
        """Old log-probs are then the trainer's own, and the update runs on the same shapes: no rounding is left."""
        log = first_log(trainer(tmp_path, rollout_weight_clip=2.0))
        self.check(log)
        assert log["val/ratio"] == 1.0
        assert log["policy/approxkl_avg"] == 0.0

    def test_dropout_outside_of_modules(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        self.check(first_log(trainer(tmp_path, model=model)))

    def test_lora_dropout(self, tmp_path):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False)
        log = first_log(trainer(tmp_path, peft_config=config))
        assert log["rollout/logprob_gap_max"] <= 2e-5
        assert log["policy/approxkl_avg"] <= 2e-5**2

    def test_the_models_own_logits(self, tmp_path):
        self.check(first_log(trainer(tmp_path, lm_head="logits")))

    def test_lora_on_the_head(self, tmp_path):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
        self.check(first_log(trainer(tmp_path, peft_config=config)))

    def test_a_trained_copy_of_the_head(self, tmp_path):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        self.check(first_log(trainer(tmp_path, peft_config=config)))

    def test_a_capped_and_tied_head(self, tmp_path):
        set_seed(0)
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=300,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                final_logit_softcapping=3.0,
                initializer_range=0.5,
            )
        )
        self.check(first_log(trainer(tmp_path, model=model, processing_class=tiny_tokenizer())))

    def test_separate_value_model(self, tmp_path):
        value_model = save_tiny_model(tmp_path / "value", reward=True)
        self.check(first_log(trainer(tmp_path, value_model=value_model)))

    def test_other_temperature(self, tmp_path):
        self.check(first_log(trainer(tmp_path, temperature=0.7)))

    def test_pad_equal_to_eos(self, tmp_path):
        tokenizer = tiny_tokenizer(pad_is_eos=True)
        self.check(first_log(trainer(tmp_path, processing_class=tokenizer)))


def test_both_ways_to_the_log_probs_train_alike(tmp_path):
    weights = []
    for lm_head in ("fused", "logits"):
        ours = trainer(
            tmp_path, lm_head=lm_head, entropy_coef=0.1, temperature=0.7, optim="sgd", learning_rate=0.1, warmup_steps=0
        )
        ours.train()
        weights.append(torch.cat([p.detach().flatten() for p in ours.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_the_models_generation_config_does_not_leak_into_sampling(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    ours = trainer(tmp_path, model=model, rollout_engine="transformers")
    prompts = [row["prompt_ids"] for row in list(ours.train_dataset)[:8]]
    torch.manual_seed(0)
    plain = ours.engine.generate(prompts, ours.sampling)
    model.generation_config.repetition_penalty = 1000.0
    model.generation_config.min_new_tokens = 6
    torch.manual_seed(0)
    assert ours.engine.generate(prompts, ours.sampling).responses == plain.responses
    assert model.generation_config.repetition_penalty == 1000.0


def test_text_keeps_the_space_between_prompt_and_response():
    """Decoders of the SentencePiece kind drop the space before a text's first word."""
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁film": 1, "▁was": 2, "▁good": 3}, unk_token="▁the"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert Rollout([[0, 1]], [[2, 3]], ["length"]).texts(tokenizer) == [" was good"]


def batches_of(ours, rollout):
    return micro_batches(rollout, range(len(rollout)), ours.args, ours.accelerator)


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
def test_an_iteration_never_holds_logits(tmp_path, lm_head):
    """Nor prompts in any op over the vocabulary; `logits` shows that the measurement would see them."""
    vocab_size, tokens = 5000, 8 * 6
    set_seed(0)
    ours = trainer(
        tmp_path,
        model=LlamaForCausalLM(tiny_config(vocab_size)),
        processing_class=tiny_tokenizer(),
        per_device_train_batch_size=8,
        lm_head=lm_head,
    )
    called = []
    ours.scorer.model.lm_head.register_forward_hook(lambda *call: called.append(call))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocab_size, (3 + i,), generator=generator).tolist() for i in range(8)]
    responses = torch.randint(3, vocab_size, (8, 6), generator=generator).tolist()
    rollout = Rollout(prompts, responses, ["length"] * 8, torch.zeros(48))
    batches = batches_of(ours, rollout)
    with Recorder() as recorder:
        log_probs, values, _ = ours.score_rollout(ours.model, rollout, batches)
        ref_log_probs = ours.reference.log_probs(rollout, batches, ours.accelerator)
        targets = ppo_targets(torch.randn(8), log_probs, ref_log_probs, values, rollout.mask, ours.args, kl_coef=0.1)
        ours.update(ours.model, batches, targets)
    if lm_head == "logits":
        assert called
        assert recorder.largest >= tokens * vocab_size
        return
    assert not called
    assert recorder.rows == {"linear_token_log_probs": [tokens, tokens], "linear_ppo_loss": [tokens]}
    assert 16 * vocab_size <= recorder.largest < tokens * vocab_size  # the weight's gradient, and no logits


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("weight_clip", [None, 2.0])
@pytest.mark.parametrize("separate", [False, True])
def test_log_probs_and_values_are_the_models_own(tmp_path, engine, weight_clip, separate):
    value_model = save_tiny_model(tmp_path / "value", reward=True) if separate else None
    options = {"rollout_engine": engine, "rollout_weight_clip": weight_clip, "value_model": value_model}
    ours = trainer(tmp_path, temperature=0.5, **options)
    if not separate:
        torch.nn.init.normal_(ours.scorer.value_head.weight)
    rollout = ours.rollout(list(ours.train_dataset)[:8])
    log_probs, values, weights = ours.score_rollout(ours.model, rollout, batches_of(ours, rollout))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        input_ids = torch.tensor([[*prompt, *response]])
        output = model(input_ids, output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        wanted = (output.logits[0, at] / 0.5).log_softmax(-1)
        n = len(response)
        torch.testing.assert_close(
            log_probs[i, :n], wanted.gather(1, torch.tensor(response)[:, None])[:, 0], rtol=1e-4, atol=1e-5
        )
        if separate:
            states = ours.scorer.value_model.base_model(input_ids).last_hidden_state
            wanted_values = ours.scorer.value_model.score(states)[0, at, 0]
        else:
            wanted_values = ours.scorer.value_head(output.hidden_states[-1][0, at])[:, 0]
        torch.testing.assert_close(values[i, :n], wanted_values, rtol=1e-4, atol=1e-5)
        assert not log_probs[i, n:].any()
        assert not values[i, n:].any()
    if weight_clip is None:
        assert weights is None
    else:
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-4)


def test_importance_weights_are_truncated_ratios(tmp_path):
    ours = trainer(tmp_path, rollout_weight_clip=1.5)
    rollout = ours.rollout(list(ours.train_dataset)[:8])
    batches = batches_of(ours, rollout)
    exact = rollout.log_probs.clone()
    rollout.log_probs = exact + torch.linspace(-1, 1, len(exact))  # an engine of other numerics
    log_probs, values, weights = ours.score_rollout(ours.model, rollout, batches)
    mask = rollout.mask.bool()
    wanted = torch.linspace(1, -1, len(exact)).exp().clamp(max=1.5)
    torch.testing.assert_close(weights[mask], wanted, rtol=1e-4, atol=1e-4)
    gradients = []
    for scale in (weights, None):
        scores = torch.arange(8.0)
        targets = ppo_targets(scores, log_probs, log_probs, values, rollout.mask, ours.args, kl_coef=0.1, weights=scale)
        ours.model.zero_grad()
        ours.update(ours.model, batches, targets)
        gradients.append(torch.cat([p.grad.flatten() for p in ours.model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[1].norm()


def test_an_engine_that_cannot_drive_the_model_offers_another(tmp_path):
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=300,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        )
    )
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*rollout_engine='transformers'"):
        trainer(tmp_path, model=copy.deepcopy(model), processing_class=tiny_tokenizer())
    first_log(trainer(tmp_path, model=model, processing_class=tiny_tokenizer(), rollout_engine="transformers"))


def test_micro_batches_change_nothing(tmp_path):
    weights = []
    for size in (8, 2):
        ours = trainer(tmp_path, per_device_train_batch_size=size, optim="sgd", learning_rate=0.1, warmup_steps=0)
        ours.train()
        weights.append(torch.cat([p.detach().flatten() for p in ours.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_reward_models_columns_and_weights(tmp_path):
    def weight(prompts, completions, weight, **columns):
        return weight

    ours = trainer(
        tmp_path,
        reward_funcs=[save_tiny_model(tmp_path / "reward", reward=True), weight],
        reward_weights=[0.0, 3.0],
        rollout_batch_size=16,
        reward_normalization="none",
    )
    log = first_log(ours)
    assert log["objective/scores"] == pytest.approx(4.5)
    assert log["rewards/weight"] == pytest.approx(1.5)
    assert "rewards/reward_model" in log


def test_conversations(tmp_path):
    chat = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    model = save_tiny_model(tmp_path / "model", chat=chat)
    seen = []

    def judge(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    prompts = [[{"role": "user", "content": "hi"}]] * 8
    trainer(tmp_path, judge, model, Dataset.from_dict({"prompt": prompts})).train()
    assert seen[0][0] == prompts[0]
    assert seen[0][1][0]["role"] == "assistant"


@pytest.mark.parametrize("value", ["head", "model"])
def test_resumes_bit_for_bit(tmp_path, value):
    """Value model not saved, resume impossible (TRL #1650, #2444)."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "reward_normalization": "running",
    }
    if value == "model":
        options["value_model"] = save_tiny_model(tmp_path / "value", reward=True)
    straight = trainer(tmp_path, **options)
    straight.train()
    records = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, mine), theirs in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert straight.shape_scores.state_dict() == resumed.shape_scores.state_dict() != {}
    again = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in again[:4]] == [1, 2, 3, 4]
    assert len(again) == len(records)


def test_saved_models_load_with_transformers(tmp_path):
    ours = trainer(tmp_path, value_model=save_tiny_model(tmp_path / "value", reward=True))
    ours.train()
    ours.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for mine, theirs in zip(ours.scorer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "value_model")


def test_lora_trains_the_adapters_only(tmp_path):
    ours = trainer(tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"), max_steps=3, learning_rate=1e-2)
    ours.train()
    assert ours.reference.scorer is None
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained = dict(ours.scorer.model.named_parameters())
    moved = [name for name, p in trained.items() if p.requires_grad]
    assert moved
    assert all("lora" in name for name in moved)
    for name, weight in base.named_parameters():
        name = name if f"base_model.model.{name}" in trained else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(trained[f"base_model.model.{name}"], weight), name
    assert ours.state.log_history[-2]["objective/kl"] != 0


def test_evaluate(tmp_path):
    ours = trainer(tmp_path, eval_dataset=PROMPTS.select(range(4)))
    metrics = ours.evaluate()
    assert abs(metrics["eval_objective/kl"]) <= 1e-4
    assert math.isfinite(metrics["eval_objective/scores"])


def test_evaluation_by_steps_and_the_best_model(tmp_path):
    scores = iter([0.0, 5.0, 1.0])  # of the evaluations

    def judge(prompts, completions, part, **columns):
        return [next(scores)] * len(prompts) if part[0] == "eval" else count_letters(prompts, completions)

    parts = {name: Dataset.from_dict({"prompt": PROMPTS["prompt"], "part": [name] * 16}) for name in ("train", "eval")}
    ours = trainer(
        tmp_path,
        judge,
        train_dataset=parts["train"],
        eval_dataset=parts["eval"],
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=2,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model="objective/scores",
        greater_is_better=True,
    )
    ours.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    for mine, theirs in zip(ours.scorer.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    evaluations = [record for record in ours.state.log_history if "eval_objective/scores" in record]
    assert [record["eval_objective/scores"] for record in evaluations] == [0, 5, 1]
    assert not any(name.startswith(("loss", "policy", "objective")) for name in evaluations[0])


def test_evaluation_of_several_sets_and_of_raw_prompts(tmp_path):
    ours = trainer(tmp_path, eval_dataset={"a": PROMPTS.select(range(4)), "b": PROMPTS.select(range(2))})
    assert {"eval_a_objective/kl", "eval_b_objective/kl"} <= ours.evaluate().keys()
    assert "test_objective/kl" in ours.evaluate(PROMPTS.select(range(4)), metric_key_prefix="test")


def test_lora_folders_are_merged_and_trained_on(tmp_path):
    first = trainer(tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    first.save_model()
    second = trainer(tmp_path, model=str(tmp_path / "out"), max_steps=2, learning_rate=1e-2)
    assert all(p.requires_grad for p in second.scorer.model.parameters())
    tokens = torch.tensor([[5, 6, 7]])
    first.scorer.model.eval()
    torch.testing.assert_close(second.scorer.model(tokens).logits, first.scorer.model(tokens).logits)


def test_the_seed_decides_on_what_is_new(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    adapters = []
    for noise in range(2):
        torch.manual_seed(noise)
        ours = trainer(tmp_path, model=folder, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
        adapters.append([p.detach().clone() for n, p in ours.model.named_parameters() if "lora_A" in n])
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))


class TestWhenThingsGoWrong:
    def test_a_nan_reward_keeps_what_was_trained(self, tmp_path):
        calls = []

        def judge(prompts, completions, **columns):
            calls.append(1)
            return [math.nan if len(calls) == 3 else 1.0] * len(prompts)

        options = {"max_skipped_steps": 0, "save_strategy": "steps", "save_steps": 100}
        ours = trainer(tmp_path, judge, max_steps=5, **options)
        with pytest.raises(TrainingStopped, match="judge returned nan for completion 0"):
            ours.train()
        assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()
        resumed = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=100)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3

    def test_a_full_disk_keeps_the_last_checkpoint(self, tmp_path, monkeypatch):
        ours = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        save, calls = torch.save, []

        def full(obj, file, *args, **kwargs):
            calls.append(str(file))
            if "checkpoint-4" in str(file):
                raise OSError(28, "No space left on device")
            return save(obj, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"output_dir: checkpoint .*checkpoint-4 could not be written .*No space left"
        ):
            ours.train()
        assert not (tmp_path / "out" / "checkpoint-4").exists()
        assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()

    def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(self, tmp_path):
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        trainer(tmp_path, **options).train()
        (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
        ours = trainer(tmp_path, **options)
        ours.train(resume_from_checkpoint=True)
        assert ours.state.global_step == 2

    def test_a_finished_run_is_not_trained_further(self, tmp_path):
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer(tmp_path, **options).train()
        again = trainer(tmp_path, **options)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 1
        assert not (tmp_path / "out" / "checkpoint-2").exists()

    def test_an_error_after_saving_does_not_cost_the_checkpoint(self, tmp_path, monkeypatch):
        def denied(*args, **kwargs):
            raise PermissionError("rotation")

        monkeypatch.setattr("transformers.trainer.rotate_checkpoints", denied)
        with pytest.raises(PermissionError):
            trainer(tmp_path, save_strategy="steps", save_steps=1).train()
        assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").exists()

    def test_one_model_in_two_roles(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
        with pytest.raises(ValueError, match="ref_model is the same object as model"):
            trainer(tmp_path, model=model, ref_model=model)
        value = AutoModelForSequenceClassification.from_pretrained(save_tiny_model(tmp_path / "value", reward=True))
        with pytest.raises(ValueError, match="reward_funcs holds the same object as value_model"):
            trainer(tmp_path, [value], model=model, value_model=value)

    def test_responses_beyond_the_context(self, tmp_path):
        with pytest.raises(ValueError, match="max_position_embeddings=512"):
            trainer(tmp_path, response_length=510)

    def test_fp16_weights(self, tmp_path):
        with pytest.raises(ValueError, match="fp16 weights cannot be trained"):
            trainer(tmp_path, model_init_kwargs={"dtype": torch.float16})

    def test_no_evaluation_set(self, tmp_path):
        with pytest.raises(ValueError, match="eval_dataset: none was given"):
            trainer(tmp_path).evaluate()

    def test_no_checkpoint_to_resume_from(self, tmp_path):
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            trainer(tmp_path).train(resume_from_checkpoint=True)

    def test_too_few_prompts(self, tmp_path):
        with pytest.raises(ValueError, match="train_dataset has 16 prompts, fewer than rollout_batch_size=32"):
            trainer(tmp_path, rollout_batch_size=32)

    def test_a_long_prompt(self, tmp_path):
        with pytest.raises(ValueError, match="max_prompt_length"):
            trainer(tmp_path, max_prompt_length=2)

    def test_a_model_that_does_not_exist(self, tmp_path):
        with pytest.raises(OSError, match="model='nowhere/at-all' could not be loaded with AutoModelForCausalLM"):
            trainer(tmp_path, model="nowhere/at-all")

    def test_a_tokenizer_without_pad_token(self, tmp_path):
        tokenizer = tiny_tokenizer(pad_is_eos=False)
        tokenizer.pad_token = None
        log = first_log(trainer(tmp_path, processing_class=tokenizer))
        assert log["val/ratio"] == 1.0

    def test_a_tokenizer_without_eos(self, tmp_path):
        tokenizer = tiny_tokenizer(pad_is_eos=False)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no eos_token"):
            trainer(tmp_path, processing_class=tokenizer)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"gradient_accumulation_steps": 2}, "rollout_batch_size=8 and gradient_accumulation_steps=2 contradict"),
            ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch=0 must be greater than 0"),
            ({"num_generations": 3}, "rollout_batch_size=8 must be a multiple of num_generations=3"),
            ({"advantage_estimator": "grpo"}, "advantage_estimator='grpo' compares the responses to a prompt"),
            ({"reward_normalization": "group"}, "reward_normalization='group' compares the responses to a prompt"),
            ({"advantage_estimator": "ppo"}, "advantage_estimator='ppo' must be one of gae, rloo, grpo, "),
            ({"rollout_weight_mode": "mask"}, "rollout_weight_mode='mask' needs rollout_weight_clip"),
            ({"rollout_weight_mode": "mask", "rollout_weight_clip": 0.5}, "rollout_weight_clip=0.5 must be at least 1"),
            ({"critic_warmup_steps": -1}, "critic_warmup_steps=-1 must be at least 0"),
            ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_coef=0.0 must be greater than 0"),
            ({"num_mini_batches": 3}, "rollout_batch_size=8 must be a multiple of num_mini_batches=3"),
            ({"per_device_train_batch_size": 3}, "per_device_train_batch_size=3"),
            ({"kl_estimator": "k9"}, "kl_estimator='k9' must be one of k1, k2, k3, abs"),
            ({"lm_head": "none"}, "lm_head='none' must be one of fused, logits"),
            ({"response_length": 0}, "response_length=0 must be greater than 0"),
        ],
    )
    def test_bad_arguments(self, tmp_path, options, said):
        with pytest.raises(ValueError, match=said):
            config(tmp_path, **options)
