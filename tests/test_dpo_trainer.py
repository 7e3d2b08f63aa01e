"""DPOTrainer: the losses of the papers, over packed pairs, beside reference log-probs that are computed once."""

import json
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from recorder import Recorder
from tiny import CHAT, save_tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, set_seed

from fastrlhf.trainers import DPOConfig, DPOTrainer
from fastrlhf.trainers.reference_log_probs import COLUMNS, ReferenceLogProbs

PAIRS = {
    "prompt": ["the film", "a bad", "so the", "Human: hi and", "was", "good"],
    "chosen": [" was good", " film", " and so and so on and on", " hello", " the good", " film"],
    "rejected": [" was bad , bad", " good film was bad", " hello", " so bad the film was bad", " not", " so"],
}
LOSSES = ("sigmoid", "robust", "hinge", "ipo", "simpo")
LORA = {"r": 2, "target_modules": ["q_proj", "up_proj", "lm_head"], "init_lora_weights": False}


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def other(tmp_path):
    """Another model of the same shape, as reference."""
    folder = save_tiny_model(tmp_path / "other")
    set_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def config(tmp_path, **options):
    defaults = {"max_steps": 1, "per_device_train_batch_size": 6, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "warmup_steps": 0}
    return DPOConfig(str(tmp_path / options.pop("name", "out")), **{**defaults, **options})


def trainer(tmp_path, model, rows=PAIRS, eval_rows=None, ref_model=None, lora=None, tokenizer=None, **options):
    return DPOTrainer(
        model,
        config(tmp_path, **options),
        Dataset.from_dict(rows),
        eval_dataset=eval_rows and Dataset.from_dict(eval_rows),
        processing_class=tokenizer,
        ref_model=ref_model,
        peft_config=lora and LoraConfig(**lora),
    )


def loss_of(ours):
    return ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))


def responses(rows):
    tokenizer = tiny_tokenizer()
    for side in ("chosen", "rejected"):
        for prompt, text in zip(rows["prompt"], rows[side], strict=True):
            before = tokenizer(prompt)["input_ids"]
            yield before, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def log_probs(model, rows=PAIRS):
    """[2 B] and lengths, from the model's own logits, in its dtype, one text at a time."""
    sums, lengths = [], []
    for prompt, response in responses(rows):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        each = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        sums.append(each.sum())
        lengths.append(len(response))
    return torch.stack(sums), torch.tensor(lengths)


def by_the_paper(loss_type, policy, ref, lengths, beta, smoothing, gamma):
    if loss_type in ("ipo", "simpo"):
        policy, ref = policy / lengths, ref / lengths
    chosen, rejected = policy.chunk(2)
    if loss_type == "simpo":
        return -functional.logsigmoid(beta * chosen - beta * rejected - gamma).mean()
    ratio = torch.exp((chosen - ref.chunk(2)[0]) - (rejected - ref.chunk(2)[1]))
    h = ratio.log()
    right, wrong = -functional.logsigmoid(beta * h), -functional.logsigmoid(-beta * h)
    return {
        "sigmoid": (1 - smoothing) * right + smoothing * wrong,
        "robust": ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing),
        "hinge": (1 - beta * h).clamp(min=0),
        "ipo": (h - 1 / (2 * beta)).square(),
    }[loss_type].mean()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    "options",
    [{}, {"share_prompts": False}, {"padding_free": False}, {"lm_head": "logits"}],
    ids=["", "prompts apart", "padded", "logits"],
)
def test_loss_and_gradient_are_those_of_the_papers(tmp_path, model, other, loss_type, options):
    """In fp64, from the logits of transformers."""
    smoothing = 0.2 if loss_type in ("sigmoid", "robust") else 0.0
    ref_model = None if loss_type == "simpo" else other
    options = {"loss_type": loss_type, "label_smoothing": smoothing, "beta": 0.3, "simpo_gamma": 0.7, **options}
    ours = trainer(tmp_path, model, ref_model=ref_model, **options)
    loss = loss_of(ours)
    loss.backward()
    policy, ref = (AutoModelForCausalLM.from_pretrained(name).double() for name in (model, other))
    sums, lengths = log_probs(policy)
    with torch.no_grad():
        ref_sums, _ = log_probs(ref)
    wanted = by_the_paper(loss_type, sums, ref_sums, lengths, 0.3, smoothing, 0.7)
    wanted.backward()
    # Sums of some ten log-probs near -6, each rounded to 6e-7 in fp32.
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=1e-6)
    for (name, mine), theirs in zip(ours.scorer.model.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_one_forward_for_both_sides_and_only_responses_reach_the_vocabulary(tmp_path, model):
    ours = trainer(tmp_path, model)
    called = []
    ours.scorer.model.model.register_forward_hook(lambda *call: called.append(call))
    with Recorder() as recorder:
        loss_of(ours)
    assert len(called) == 1
    fed = [prompt + response[:-1] for prompt, response in responses(PAIRS)]
    beginnings = {tuple(tokens[: end + 1]) for tokens in fed for end in range(len(tokens))}
    assert called[0][2].last_hidden_state.shape[:2] == (1, len(beginnings))  # each prompt once
    assert len(beginnings) < sum(map(len, fed))
    assert recorder.rows == {"linear_token_log_probs": [sum(len(response) for _, response in responses(PAIRS))]}


def test_the_reference_is_the_start(tmp_path, model):
    """At step 0 all rewards are 0, and the loss is log 2."""
    ours = trainer(tmp_path, model)
    wanted = log_probs(AutoModelForCausalLM.from_pretrained(model))[0].detach()
    for name, side in zip(COLUMNS, wanted.chunk(2), strict=True):
        torch.testing.assert_close(torch.tensor(ours.train_dataset[name]), side, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss_of(ours), torch.tensor(2.0).log(), rtol=1e-6, atol=0)


def test_the_reference_with_adapters_is_the_model_without_them(tmp_path, model):
    ours = trainer(tmp_path, model, lora=LORA)  # which are not 0 at the start
    plain = trainer(tmp_path, model, name="plain")
    for name in COLUMNS:
        assert ours.train_dataset[name] == plain.train_dataset[name]
    assert abs(loss_of(ours).item() - torch.tensor(2.0).log().item()) > 1e-4
    loss_of(ours).backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in ours.scorer.model.named_parameters())


def test_adapters_and_a_reference_model(tmp_path, model, other):
    ours = trainer(tmp_path, model, ref_model=other, lora=LORA)
    wanted = log_probs(AutoModelForCausalLM.from_pretrained(other))[0].detach()
    torch.testing.assert_close(torch.tensor(ours.train_dataset[COLUMNS[0]]), wanted.chunk(2)[0], rtol=1e-6, atol=1e-5)


def test_no_reference_stays_in_memory(tmp_path, model, other):
    ours = trainer(tmp_path, model, ref_model=other)
    assert ours.reference.scorer is None
    assert len(list(ours.model.parameters())) == len(list(AutoModelForCausalLM.from_pretrained(model).parameters()))


class Forwards:
    """Counts the blocks that ReferenceLogProbs computes."""

    def __init__(self, monkeypatch, fails_after=None):
        self.starts, compute = [], ReferenceLogProbs._compute

        def counting(reference, pairs, starts, size, path):
            self.starts += starts
            return compute(reference, pairs, starts[:fails_after], size, path)

        monkeypatch.setattr(ReferenceLogProbs, "_compute", counting)


def test_reference_log_probs_are_kept_and_completed(tmp_path, model, monkeypatch):
    options = {"per_device_eval_batch_size": 2}
    whole = trainer(tmp_path, model, name="whole", **options)
    with monkeypatch.context() as patch:
        Forwards(patch, fails_after=2)
        with pytest.raises(KeyError):  # block 4 is not there
            trainer(tmp_path, model, **options)
    (file,) = (tmp_path / "out" / "reference_log_probs").iterdir()
    half = file.read_bytes()[:-9]  # in the middle of writing the second block
    file.write_bytes(half)
    forwards = Forwards(monkeypatch)
    ours = trainer(tmp_path, model, **options)
    assert forwards.starts == [2, 4]
    again = trainer(tmp_path, model, **options)
    assert forwards.starts == [2, 4]
    for name in COLUMNS:
        assert ours.train_dataset[name] == again.train_dataset[name] == whole.train_dataset[name]


def test_reference_log_probs_are_those_of_no_other_reference_or_data(tmp_path, model, other, monkeypatch):
    forwards = Forwards(monkeypatch)
    variants = (
        {},
        {"ref_model": other},
        {"rows": {name: cells[::-1] for name, cells in PAIRS.items()}},
        {"per_device_eval_batch_size": 3},
        {"padding_free": False},
        {"share_prompts": False},
    )
    for count, options in enumerate(variants, 1):
        ours = trainer(tmp_path, model, **options)
        assert len(list((tmp_path / "out" / "reference_log_probs").iterdir())) == count
        reference = AutoModelForCausalLM.from_pretrained(options.get("ref_model", model))
        wanted = log_probs(reference, options.get("rows", PAIRS))[0].detach().chunk(2)[1]
        torch.testing.assert_close(torch.tensor(ours.train_dataset[COLUMNS[1]]), wanted, rtol=1e-6, atol=1e-5)
    assert forwards.starts == [0, 0, 0, 0, 3, 0, 0]


def test_it_learns_evaluates_and_saves(tmp_path, model):
    options = {"max_steps": 30, "learning_rate": 2e-2, "per_device_train_batch_size": 3, "eval_rows": PAIRS}
    options |= {"train_sampling_strategy": "group_by_length"}
    ours = trainer(tmp_path, model, **options)
    before = ours.evaluate()
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    ours.train()
    after = ours.evaluate()
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_loss"] < 0.1
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.load_state_dict(ours.scorer.model.state_dict())
    with torch.no_grad():
        sums, _ = log_probs(policy)
        start, _ = log_probs(AutoModelForCausalLM.from_pretrained(model))
    chosen, rejected = (0.1 * (sums - start)).chunk(2)
    wanted = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": sums.chunk(2)[0].mean(),
        "logps/rejected": sums.chunk(2)[1].mean(),
    }
    for name, value in wanted.items():
        assert after[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), name
    ours.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for mine, theirs in zip(ours.scorer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    names = {"loss", "entropy", "rewards/accuracies", *wanted}
    assert all(names <= record.keys() for record in records if "loss" in record)


@pytest.mark.parametrize("loss_type", ["ipo", "simpo"])
def test_evaluation_has_the_rewards_of_training(tmp_path, model, other, loss_type):
    ref_model = None if loss_type == "simpo" else other
    ours = trainer(tmp_path, model, ref_model=ref_model, eval_rows=PAIRS, loss_type=loss_type, learning_rate=0.0)
    ours.train()
    record, metrics = ours.state.log_history[0], ours.evaluate()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(record[name], rel=1e-4), name


def test_accumulated_gradients_are_those_of_one_batch(tmp_path, model):
    weights = []
    for size, steps in ((6, 1), (2, 3)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        run = trainer(tmp_path, model, optim="sgd", learning_rate=0.5, **options)
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.scorer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["", "lora"])
def test_resumed_it_ends_bit_for_bit_where_the_uninterrupted_run_did(tmp_path, model, lora):
    options = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "lora": lora}
    options |= {"per_device_train_batch_size": 2}
    straight = trainer(tmp_path, model, **options)
    straight.train()
    resumed = trainer(tmp_path, model, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for mine, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_does_not_continue_beside_another_reference(tmp_path, model, other):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, model, **options).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    for start, ref_model in ((model, other), (checkpoint, None)):
        with pytest.raises(ValueError, match=r"checkpoint-1.* beside another reference. Give the `model` that its"):
            trainer(tmp_path, start, ref_model=ref_model, **options).train(resume_from_checkpoint=checkpoint)


def test_conversations_and_hh_transcripts(tmp_path):
    chat = tiny_tokenizer(CHAT, pad_is_eos=False)
    turn = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "good"), ("rejected", "bad"))}
    asked = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": asked, **turn},
        {"prompt": asked, "chosen": asked + turn["chosen"], "rejected": turn["rejected"]},
    ]
    model = save_tiny_model(tmp_path / "model", chat=CHAT)
    ours = DPOTrainer(model, config(tmp_path), Dataset.from_list(rows))
    first, second = ours.train_dataset
    assert first == second
    completion = chat.decode(first["chosen_ids"][first["chosen_start"] :])
    assert completion == "good<|im_end|>"
    ask = "\n\nHuman: hi\n\nAssistant:"
    hh = trainer(tmp_path, model, {"chosen": [f"{ask} good"], "rejected": [f"{ask} so bad"]}, name="hh")
    (row,) = hh.train_dataset
    assert chat.decode(row["rejected_ids"][: row["rejected_start"]]) == ask
    assert loss_of(hh).item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kto"}, "loss_type='kto' must be one of sigmoid, robust, hinge, ipo, simpo"),
        ({"beta": 0.0}, "beta=0.0 must be greater than 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing=0.1: loss_type='ipo' has none"),
        ({"simpo_gamma": -1.0}, "simpo_gamma=-1.0 must be at least 0"),
        ({"max_length": 0}, "max_length=0 must be greater than 0"),
        ({"pair_too_long": "keep"}, "pair_too_long='keep' must be one of error, drop"),
    ],
)
def test_wrong_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_pairs_that_are_wrong(tmp_path, model):
    row = {"prompt": ["the film"], "chosen": [" good"], "rejected": [" bad"]}

    def with_row(**cells):
        return {name: [*PAIRS[name], cells.get(name, row[name][0])] for name in PAIRS}

    for bad, found in (
        (with_row(rejected=" good"), "1 with the same tokens in chosen and rejected"),
        (with_row(chosen=" "), "1 with an empty completion"),
    ):
        with pytest.warns(UserWarning, match=f"{found}; 6 of 7 pairs kept"):
            assert len(trainer(tmp_path, model, bad).train_dataset) == 6
    long = with_row(chosen=" good" * 100)
    with pytest.raises(ValueError, match=r"1 of 7 pairs have a text longer than max_length=50 .*pair_too_long='drop'"):
        trainer(tmp_path, model, long, max_length=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(trainer(tmp_path, model, long, max_length=50, pair_too_long="drop").train_dataset) == 6
    with pytest.raises(
        ValueError, match=r"longest text has \d+ tokens, more than the model's max_position_embeddings=512"
    ):
        trainer(tmp_path, model, with_row(chosen=" good" * 600), max_length=5000)
    with pytest.raises(ValueError, match="chosen: pair 6 has an empty prompt, and the tokenizer puts no BOS token"):
        trainer(tmp_path, model, with_row(prompt=""))
    with pytest.raises(ValueError, match="ref_model: loss_type='simpo' has no reference"):
        trainer(tmp_path, model, loss_type="simpo", ref_model=model)
    ours = trainer(tmp_path, model)
    with pytest.raises(ValueError, match="eval_dataset: evaluation pairs are made ready while the reference is there"):
        ours.evaluate(Dataset.from_dict(PAIRS))


def test_a_reference_that_gives_no_number(tmp_path, model, other):
    broken = AutoModelForCausalLM.from_pretrained(other)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"ref_model: the log-prob of pair 0 is \[nan, nan\]"):
        trainer(tmp_path, model, ref_model=broken, lm_head="logits", padding_free=False)
