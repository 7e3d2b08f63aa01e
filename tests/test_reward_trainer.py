"""RewardTrainer: Bradley-Terry over distinct texts."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, EvalPrediction

from fastrlhf.trainers import RewardConfig, RewardTrainer
from fastrlhf.trainers.reward import preference_metrics

PAIRS = {
    "chosen": ["the good film", "good good and good and so on and on", "the good film"],
    "rejected": ["bad", "the bad film was bad", "so so"],
}


def trainer(tmp_path, rows=PAIRS, model=None, eval_rows=None, tokenizer=None, **options):
    defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    args = RewardConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **{**defaults, **options})
    return RewardTrainer(
        model or save_tiny_model(tmp_path / "model", reward=True),
        args,
        Dataset.from_dict(rows),
        eval_dataset=eval_rows and Dataset.from_dict(eval_rows),
        processing_class=tokenizer,
    )


def scores_one_by_one(folder, texts):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()
    ids = [torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]) for text in texts]
    return torch.stack([model(x).logits.squeeze() for x in ids])


def test_loss_is_bradley_terry_of_single_scores(tmp_path):
    ours = trainer(tmp_path)
    loss = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
    chosen, rejected = (scores_one_by_one(tmp_path / "model", PAIRS[name]) for name in ("chosen", "rejected"))
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected).mean(), rtol=1e-5, atol=1e-6)


def test_margin_and_centering(tmp_path):
    ours = trainer(tmp_path, {**PAIRS, "margin": [1.0, 2.0, 0.5]}, center_rewards_coefficient=0.1)
    loss = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
    chosen, rejected = (scores_one_by_one(tmp_path / "model", PAIRS[name]) for name in ("chosen", "rejected"))
    margin = torch.tensor([1.0, 2.0, 0.5])
    wanted = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
    wanted = wanted + 0.1 * (chosen + rejected).square().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_a_text_in_several_pairs_is_read_once(tmp_path):
    ours = trainer(tmp_path)
    batch = ours.data_collator(list(ours.train_dataset))
    assert sum(len(group["input_ids"]) for group in batch["groups"]) == 5  # of 6 texts, one stands twice


def test_it_learns_saves_and_evaluates(tmp_path):
    words = ["film", "the", "was", "and"]
    rows = {
        "chosen": [f"{a} good {b}" for a in words for b in words],
        "rejected": [f"{a} bad {b}" for a in words for b in words],
    }
    ours = trainer(tmp_path, rows, max_steps=30, learning_rate=2e-2, eval_rows=rows, warmup_steps=0)
    before = ours.evaluate()
    ours.train()
    after = ours.evaluate()
    assert after["eval_accuracy"] == 1.0 > before["eval_accuracy"]
    assert after["eval_loss"] < 0.1 < before["eval_loss"]
    ours.save_model()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for mine, theirs in zip(ours.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "rewards/margins"} <= records[1].keys()


def test_pad_equal_to_eos_has_a_remedy(tmp_path):
    """pad == eos corrupts masks (TRL #5303): transformers' classifiers would score the token before the EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_model(tmp_path / "model", reward=True))
    with pytest.raises(ValueError, match=r"no pad token apart from its eos_token.*add_special_tokens"):
        trainer(tmp_path, model=model, tokenizer=tiny_tokenizer(pad_is_eos=True))


def test_the_models_own_tokenizer_gets_a_pad_token(tmp_path):
    folder = save_tiny_model(tmp_path / "model", reward=True)
    tiny_tokenizer(pad_is_eos=True).save_pretrained(folder)
    ours = trainer(tmp_path, model=folder)
    tokenizer = ours.processing_class
    assert tokenizer.pad_token_id == ours.model.config.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < ours.model.get_input_embeddings().num_embeddings
    ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))


def test_a_model_with_several_labels_is_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        save_tiny_model(tmp_path / "model", reward=True), num_labels=3, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="num_labels=3"):
        trainer(tmp_path, model=model)


def test_metrics_by_hand():
    scores = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    metrics = preference_metrics(EvalPrediction(scores, np.zeros(3)))
    assert metrics["accuracy"] == pytest.approx(0.5)
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    # a tie is in the bin of confidence 0.5 and counts as not right
    assert metrics["ece"] == pytest.approx(((1 - first) + second + 0.5) / 3, abs=1e-6)
