"""RewardTrainer: Bradley-Terry over distinct texts."""

import json
import math
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastrlhf.rewards import RewardModel
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.trainers import RewardConfig, RewardTrainer

PAIRS = {
    "chosen": ["the good film", "good good and good and so on and on", "the good film"],
    "rejected": ["bad", "the bad film was bad", "so so"],
}


def trainer(tmp_path, rows=PAIRS, model=None, eval_rows=None, tokenizer=None, **options):
    defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    args = RewardConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **{**defaults, **options})
    return RewardTrainer(
        model or save_tiny_model(tmp_path / "model", reward=not {"num_heads", "objectives"} & set(options)),
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
    assert batch["count"] == 5  # of 6 texts, one stands twice


def test_a_shared_prompt_is_read_once(tmp_path):
    rows = {"prompt": ["hi hi hi hi"] * 2, "chosen": [" good", " so"], "rejected": [" bad", " so so"]}
    ours = trainer(tmp_path, rows)
    ids = [list(ours.train_dataset[f"{side}_ids"]) for side in ("chosen", "rejected")]
    beginnings = {tuple(text[: end + 1]) for side in ids for text in side for end in range(len(text))}
    (batch,) = ours.data_collator(list(ours.train_dataset))["texts"]
    assert batch.input_ids.numel() == len(beginnings) < sum(len(text) for side in ids for text in side)


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


def separable(count=16):
    words = ["film", "the", "was", "and"]
    rows = [(f"{a} good {b}", f"{a} bad {b}") for a in words for b in words][:count]
    return {"chosen": [row[0] for row in rows], "rejected": [row[1] for row in rows]}


def test_an_exact_world_is_learned_exactly(tmp_path):
    """Texts of utility log 1, log 2 and log 4, compared as often as Bradley-Terry says: the likeliest differences are
    those of the utilities, the accuracy is that of Bayes, and nothing is left to calibrate."""
    wins = {("b", "a"): 10, ("a", "b"): 5, ("c", "a"): 12, ("a", "c"): 3, ("c", "b"): 10, ("b", "c"): 5}
    rows = [pair for pair, times in wins.items() for pair in [pair] * times]
    rows = {"chosen": [chosen for chosen, _ in rows], "rejected": [rejected for _, rejected in rows]}
    options = {"learning_rate": 2e-2, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 45}
    with pytest.warns(UserWarning, match="45 with labels that contradict each other; 45 of 45 pairs kept"):
        ours = trainer(tmp_path, rows, max_steps=150, eval_rows=rows, max_grad_norm=0.0, **options)
    ours.train()
    metrics = ours.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx((10 + 12 + 10) / 45)
    assert metrics["eval_temperature"] == pytest.approx(1, abs=1e-2)
    scores = {text: score.item() for text, score in zip("abc", scores_of(ours, "abc"), strict=True)}
    assert scores["b"] - scores["a"] == pytest.approx(math.log(2), abs=1e-2)
    assert scores["c"] - scores["a"] == pytest.approx(math.log(4), abs=1e-2)


def scores_of(ours, texts):
    tokenizer = ours.processing_class
    ids = [torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]) for text in texts]
    with torch.no_grad():
        return [ours.model(x).logits[0] for x in ids]


def test_every_evaluation_leaves_a_report(tmp_path):
    rows = {**separable(8), "score_chosen": [4.0] * 8, "score_rejected": [1.0, 3.0] * 4}
    ours = trainer(
        tmp_path, rows, max_steps=-1, num_train_epochs=2, eval_rows=rows, eval_strategy="epoch", learning_rate=1e-2
    )
    ours.train()
    reports = sorted((tmp_path / "out" / "reports").iterdir())
    assert [path.name for path in reports] == ["000001.json", "000001.png", "000002.json", "000002.png"]
    report = json.loads(reports[2].read_text())
    assert (report["step"], report["epoch"], report["pairs"]) == (2, 2.0, 8)
    assert [band["pairs"] for band in report["by_gap"]] == [4, 4]
    assert report["data"][0]["rows"] == 8
    assert report["loss"] == pytest.approx(report["log_loss"], rel=1e-5)


def test_several_evaluation_sets_have_reports_of_their_own(tmp_path):
    ours = trainer(tmp_path, separable(4))
    metrics = ours.evaluate({"near": Dataset.from_dict(separable(4)), "far": Dataset.from_dict(PAIRS)})
    assert {"eval_near_accuracy", "eval_far_accuracy"} <= set(metrics)
    names = {path.name for path in (tmp_path / "out" / "reports").glob("*.json")}
    assert names == {"000000_near.json", "000000_far.json"}
    with pytest.raises(ValueError, match="one data set of held-out pairs is wanted"):
        ours.calibrate()


def test_calibration_is_saved_and_changes_scores_only_by_choice(tmp_path):
    ours = trainer(tmp_path, separable(8), eval_rows=separable(8), max_steps=10, learning_rate=1e-2)
    ours.train()
    metrics = ours.calibrate()
    ours.save_model()
    folder = str(tmp_path / "out")
    settings = RewardSettings.load(folder)
    assert settings.temperatures == [metrics["eval_temperature"]]
    texts = ["", ""], ["good film", "the bad"]
    plain, calibrated = RewardModel(folder)(*texts), RewardModel(folder, calibrated=True)(*texts)
    assert calibrated == pytest.approx([score / metrics["eval_temperature"] for score in plain], rel=1e-6)
    ours.train()
    ours.save_model()
    assert RewardSettings.load(folder).temperatures == []
    with pytest.raises(ValueError, match=r"has no temperatures.*RewardTrainer\.calibrate"):
        RewardModel(folder, calibrated=True)


def test_early_stopping_keeps_the_best(tmp_path):
    """Held-out labels the other way round: the held-out loss only grows, and the first checkpoint stays the best."""
    rows = separable(8)
    turned = {"chosen": rows["rejected"], "rejected": rows["chosen"]}
    options = {"max_steps": -1, "num_train_epochs": 9, "learning_rate": 1e-2, "warmup_steps": 0}
    ours = trainer(tmp_path, rows, eval_rows=turned, early_stopping_patience=2, **options, save_strategy="steps")
    ours.train()
    assert ours.state.global_step == 3
    assert ours.state.best_model_checkpoint.endswith("checkpoint-1")
    first = AutoModelForSequenceClassification.from_pretrained(ours.state.best_model_checkpoint)
    for mine, theirs in zip(ours.model.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_early_stopping_wants_held_out_pairs(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience=1 looks at the held-out loss: give an eval_dataset"):
        trainer(tmp_path, early_stopping_patience=1)


def test_scores_that_are_not_finite_end_the_training(tmp_path):
    ours = trainer(tmp_path)
    with torch.no_grad():
        ours.model.score.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"step 1: the loss is nan, because a score is not finite.*no checkpoint"):
        ours.train()
    with pytest.raises(ValueError, match=r"3 of 3 pairs have a score that is not finite"):
        ours.evaluate(Dataset.from_dict(PAIRS))


class TestEnsemble:
    def test_the_loss_is_that_of_each_heads_own_sample(self, tmp_path):
        ours = trainer(tmp_path, num_heads=3)
        batch = ours.data_collator(list(ours.train_dataset))
        assert batch["draws"].sum(0).tolist() == [3, 3, 3]  # samples of as many pairs as there are
        loss = ours.compute_loss(ours.model, batch)
        scores = [torch.stack(scores_of(ours, PAIRS[name])) for name in ("chosen", "rejected")]
        each = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
        torch.testing.assert_close(loss, (each * batch["draws"]).mean(), rtol=1e-5, atol=1e-6)

    def test_a_batch_that_no_head_drew(self, tmp_path):
        """It has no loss and no gradient, and is no error: other ranks may have drawn some."""
        ours = trainer(tmp_path, num_heads=2)
        batch = ours.data_collator(list(ours.train_dataset))
        batch["draws"].zero_()
        loss = ours.compute_loss(ours.model, batch)
        loss.backward()
        assert loss == 0
        assert not ours.model.score.weight.grad.any()

    def test_evaluation_is_of_the_mean(self, tmp_path):
        ours = trainer(tmp_path, num_heads=3, eval_rows=PAIRS)
        metrics = ours.evaluate()
        scores = [torch.stack(scores_of(ours, PAIRS[name])) for name in ("chosen", "rejected")]
        differences = scores[0] - scores[1]
        wanted = -torch.nn.functional.logsigmoid(differences.mean(1)).mean()
        assert metrics["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)
        assert metrics["eval_disagreement"] == pytest.approx(differences.std(dim=1).mean().item(), rel=1e-4)

    def test_a_head_with_another_number_of_labels(self, tmp_path):
        model = save_tiny_model(tmp_path / "model", reward=True)
        with pytest.raises(ValueError, match="could not be loaded with a score head of 2 labels"):
            trainer(tmp_path, model=model, num_heads=2)

    def test_heads_know_what_they_are_and_disagree_where_nothing_was_learned(self, tmp_path):
        ours = trainer(tmp_path, separable(12), num_heads=4, max_steps=40, learning_rate=1e-2, warmup_steps=0)
        ours.train()
        ours.save_model()
        folder = str(tmp_path / "out")
        assert RewardSettings.load(folder).names == ["head_0", "head_1", "head_2", "head_3"]
        saved = AutoModelForSequenceClassification.from_pretrained(folder)
        assert saved.score.weight.shape[0] == 4
        assert torch.equal(saved.score.weight, ours.model.score.weight)


class TestObjectives:
    ROWS: ClassVar = {**PAIRS, "kind": [1.0, -2.0, 0.0], "brief": [1.0, 1.0, None]}

    def test_each_head_learns_from_its_own_labels(self, tmp_path):
        ours = trainer(tmp_path, self.ROWS, objectives=["kind", "brief"])
        loss = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
        chosen, rejected = (torch.stack(scores_of(ours, PAIRS[name])) for name in ("chosen", "rejected"))
        d = chosen - rejected
        wanted = -torch.nn.functional.logsigmoid(torch.stack([d[0, 0], -d[1, 0], d[0, 1], d[1, 1]])).mean()
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)

    def test_opposed_objectives_are_both_learned(self, tmp_path):
        rows = separable(8)
        rows |= {"kind": [1.0] * 8, "brief": [-1.0] * 8}
        options = {"max_steps": 40, "learning_rate": 1e-2, "warmup_steps": 0, "objectives": ["kind", "brief"]}
        ours = trainer(tmp_path, rows, eval_rows=rows, **options)
        ours.train()
        metrics = ours.calibrate()
        assert metrics["eval_kind_accuracy"] == metrics["eval_brief_accuracy"] == 1.0
        settings = RewardSettings.load(str(tmp_path / "out"))
        assert settings.names == ["kind", "brief"]
        pictures = {path.name for path in (tmp_path / "out" / "reports").glob("*.png")}
        assert pictures == {"000040-kind.png", "000040-brief.png"}
        assert len(settings.means) == len(settings.stds) == len(settings.temperatures) == 2

    def test_bad_choices(self, tmp_path):
        with pytest.raises(ValueError, match="num_heads=2 with objectives"):
            trainer(tmp_path, self.ROWS, objectives=["kind"], num_heads=2)
        with pytest.raises(ValueError, match="each once"):
            trainer(tmp_path, self.ROWS, objectives=["kind", "kind"])


class TestTurns:
    SHARED = "\n\nHuman: hi\n\nAssistant: hello"
    ROWS: ClassVar = {
        "chosen": [SHARED + "\n\nHuman: so\n\nAssistant: good", SHARED],
        "rejected": [SHARED + "\n\nHuman: so\n\nAssistant: bad", "\n\nHuman: hi\n\nAssistant: bad"],
    }

    def test_a_conversation_is_worth_the_sum_of_its_turns(self, tmp_path):
        ours = trainer(tmp_path, self.ROWS, score_turns="all")
        rows = list(ours.train_dataset)
        loss = ours.compute_loss(ours.model, ours.data_collator(rows))

        def turn_scores(row, side):
            ids, ends = row[f"{side}_ids"], row[f"{side}_turns"]
            with torch.no_grad():
                return [ours.model(torch.tensor([ids[: end + 1]])).logits[0, 0] for end in ends]

        (a, b), (c, d) = (turn_scores(rows[0], side) for side in ("chosen", "rejected"))
        torch.testing.assert_close(a, c)  # the turn that both share
        (e,), (f,) = (turn_scores(rows[1], side) for side in ("chosen", "rejected"))
        wanted = -torch.nn.functional.logsigmoid(torch.stack([b - d, e - f])).mean()
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)

    def test_with_adapters(self, tmp_path):
        from peft import LoraConfig

        args = RewardConfig(str(tmp_path / "out"), report_to="none", score_turns="all", max_steps=1, disable_tqdm=True)
        model = save_tiny_model(tmp_path / "model", reward=True)
        lora = LoraConfig(task_type="SEQ_CLS", r=2)
        ours = RewardTrainer(model, args, Dataset.from_dict(self.ROWS), peft_config=lora)
        head = next(p for name, p in ours.model.named_parameters() if "score" in name and p.requires_grad)
        before = head.detach().clone()
        ours.train()
        assert not torch.equal(head, before)
        ours.save_model()
        assert RewardSettings.load(str(tmp_path / "out")).turns == "all"
        RewardModel(str(tmp_path / "out"))(["\n\nHuman: a\n\nAssistant:"], [" b"])

    def test_the_last_turn_alone(self, tmp_path):
        batch = trainer(tmp_path, self.ROWS).data_collator([{"chosen_ids": [5, 1], "rejected_ids": [6, 1]}])
        assert all(texts.at_ends for texts in batch["texts"])
