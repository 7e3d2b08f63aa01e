"""SFTTrainer: the loss of the model itself, on the trained tokens only."""

import pytest
import torch
from datasets import Dataset
from recorder import Recorder
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastrlhf.trainers import SFTConfig, SFTTrainer

TEXTS = Dataset.from_dict({"text": ["the good film", "a bad film was bad , bad , bad", "hello", "Human: hi and so on"]})


def config(tmp_path, **options):
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    return SFTConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **{**defaults, **options})


def trainer(tmp_path, dataset=TEXTS, model=None, processing_class=None, **options):
    model = model or save_tiny_model(tmp_path / "model")
    return SFTTrainer(model, config(tmp_path, **options), dataset, processing_class=processing_class)


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
def test_loss_and_gradient_are_the_models_own(tmp_path, lm_head):
    ours = trainer(tmp_path, lm_head=lm_head)
    batch = ours.data_collator(list(ours.train_dataset))
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = [row["input_ids"] for row in ours.train_dataset]
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    wanted = model(input_ids=input_ids, labels=labels).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for (name, mine), theirs in zip(ours.scorer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_prompts_and_padding_never_reach_the_vocabulary(tmp_path):
    rows = {"prompt": ["the film was", "so"], "completion": [" good", " bad and bad and bad"]}
    ours = trainer(tmp_path, Dataset.from_dict(rows))
    called = []
    ours.scorer.model.lm_head.register_forward_hook(lambda *call: called.append(call))
    with Recorder() as recorder:
        loss = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
        loss.backward()
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    wanted = sum(len(tokenizer(text)["input_ids"]) + 1 for text in rows["completion"])
    assert recorder.rows == {"linear_cross_entropy": [wanted]}
    assert not called


def test_the_entropy_is_logged_and_the_evaluation_has_the_same_loss(tmp_path):
    ours = trainer(tmp_path, learning_rate=0.0)
    ours.train()
    batch = ours.data_collator(list(ours.train_dataset))
    log_probs, entropy = ours.scorer(batch["input_ids"], batch["positions"], batch["labels"])
    assert ours.state.log_history[0]["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    metrics = ours.evaluate(ours.train_dataset)
    assert metrics["eval_loss"] == pytest.approx(-log_probs.mean().item(), rel=1e-5)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """A wrong normaliser under gradient accumulation (Liger #1082; TRL #3021)."""
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.5,
            warmup_steps=0,
        )
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.scorer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_pad_equal_to_eos_is_harmless(tmp_path):
    losses = []
    for pad_is_eos in (True, False):
        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
        tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
        ours = SFTTrainer(model, config(tmp_path), TEXTS, processing_class=tokenizer)
        losses.append(ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset))).item())
    assert losses[0] == losses[1]


def test_it_learns_and_resumes(tmp_path):
    options = {"max_steps": 20, "learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 10, "warmup_steps": 0}
    straight = trainer(tmp_path, **options)
    straight.train()
    losses = [record["loss"] for record in straight.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    for mine, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_bf16_weights_get_fp32_masters(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"), dtype=torch.bfloat16)
    ours = trainer(tmp_path, model=model, max_steps=3)
    ours.train()
    assert len(ours.optimizer.optimizer.pairs) == len(list(model.parameters()))


def test_a_head_that_is_not_known(tmp_path):
    class Squared(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    with pytest.raises(ValueError, match=r"Squared .*register_lm_head\(Squared, function\), or set lm_head='logits'"):
        trainer(tmp_path, model=Squared(tiny_config()), processing_class=tiny_tokenizer())
    ours = trainer(tmp_path, model=Squared(tiny_config()), processing_class=tiny_tokenizer(), lm_head="logits")
    ours.train()
    assert ours.state.log_history[0]["loss"] > 0
    with pytest.raises(ValueError, match="lm_head='none' must be one of fused, logits"):
        config(tmp_path, lm_head="none")
