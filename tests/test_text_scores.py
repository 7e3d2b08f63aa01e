"""Scores of packed texts are those of padded ones, and models that cannot be packed are padded."""

import pytest
import torch
from causal_models import MODELS, SIZES, assert_as_good_as_own, in_fp64, randomised, rms
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_tokenizer
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from fastrlhf.batching import text_batches
from fastrlhf.rewards import RewardModel
from fastrlhf.rewards.text_scores import place_scores, scores_by_place, sequence_scores, takes_packing, text_scores
from fastrlhf.trainers import RewardConfig, RewardTrainer

PACKED = ["llama", "qwen2 with windows", "gemma2", "mistral", "gpt2", "gpt_neox"]
SMALL = {"vocab_size": 300, "hidden_size": 48, "num_attention_heads": 4, "pad_token_id": 2}
PADDED = {
    "bloom": {**SMALL, "n_layer": 2, "n_head": 4},
    "bert": {**SMALL, "num_hidden_layers": 2, "intermediate_size": 64},  # its head is no `score`, and it looks ahead
}


def build(name, heads=1):
    kind, sizes = MODELS[name] if name in MODELS else (name, PADDED[name])
    config = CONFIG_MAPPING[kind](**{**sizes, "num_labels": heads, "pad_token_id": 2})
    return randomised(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).eval()


def texts(seed=0):
    """Some that begin alike, one of which is another's beginning, and one alone; longer than the windows of 10."""
    generator = torch.Generator().manual_seed(seed)
    prompt, *rest = (torch.randint(3, 300, (n,), generator=generator).tolist() for n in (12, 5, 13, 30, 1, 7))
    return [prompt + rest[0], prompt + rest[1], rest[2], prompt, rest[3], prompt[:6] + rest[4]]


PLACES = [[3, 16], [24], [0, 29, 5], [11], [0], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_is_padded(name, dtype):
    model = build(name, heads=2).to(dtype)
    assert takes_packing(model)
    for places in (None, PLACES):
        packed, padded = (text_batches(texts(), 2, places, packed=packed) for packed in (True, False))
        with torch.no_grad():
            exact = alone(in_fp64(model), places)
            ours, own = (text_scores(model, batches, len(texts())) for batches in (packed, padded))
        assert ours.shape == (6, 2)
        assert_as_good_as_own(ours, own, exact)


def alone(model, places):
    """[6, 2], each text by itself."""
    places = [[len(text) - 1] for text in texts()] if places is None else places
    scores = [
        place_scores(model, *text_batches([x], 2, [at], packed=False)) for x, at in zip(texts(), places, strict=True)
    ]
    return torch.stack([of_text.sum(0) for of_text in scores])


def test_scores_by_place_are_text_by_text():
    """And in a text in the order of its places."""
    model = build("llama")
    wanted = [
        place_scores(model, *text_batches([x], 2, [at], packed=False)) for x, at in zip(texts(), PLACES, strict=True)
    ]
    for packed in (True, False):
        ours = scores_by_place(model, text_batches(texts(), 2, PLACES, packed=packed))
        torch.testing.assert_close(ours, torch.cat(wanted))


def gradients(model, packed):
    scores = text_scores(model, text_batches(texts(), 2, packed=packed), len(texts()))
    (scores.square().sum() + scores.sum()).backward()
    found = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", PACKED)
def test_gradients_of_what_is_shared_are_those_of_all_who_share_it(name):
    model = build(name)
    ours, padded = gradients(model, True), gradients(model, False)
    assert padded.norm() > 0.1
    assert (ours - padded).norm() <= 50 * torch.finfo(torch.float32).eps * padded.norm()
    half = build(name).bfloat16()
    assert rms(gradients(half, True) - padded) <= 1.5 * rms(gradients(half, False) - padded)


def test_with_adapters():
    model = get_peft_model(
        build("llama"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    )
    assert takes_packing(model)
    ours, padded = (sequence_scores(model, texts(), 2, packed=packed) for packed in (True, False))
    torch.testing.assert_close(ours, padded)


@pytest.mark.parametrize("name", PADDED)
def test_models_that_packed_texts_would_disturb_are_padded(name, tmp_path):
    model = build(name)
    assert not takes_packing(model)
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    reward = RewardModel(model, tokenizer)
    scores = reward(["hi", "hi"], [" the film", " so"])
    for text, score in zip(("hi the film", "hi so"), scores, strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), rel=1e-4, abs=1e-5)
    args = RewardConfig(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    rows = Dataset.from_dict({"prompt": ["hi"], "chosen": [" good"], "rejected": [" bad"]})
    trainer = RewardTrainer(build(name), args, rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    assert not trainer.data_collator.packed


def test_a_model_whose_score_is_more_than_its_heads_is_padded():
    """Then the scores are the model's own."""

    class Scaled(type(build("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 3 * output.logits
            return output

    config = CONFIG_MAPPING["llama"](**SIZES, num_labels=1)
    model = randomised(Scaled(config)).eval()
    assert not takes_packing(model)
    assert takes_packing(build("llama"))


def test_logits_without_a_column_for_the_label(tmp_path):
    """As classifiers come that keep their code beside their weights."""

    class Flat(type(build("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[:, 0]
            return output

    model = randomised(Flat(CONFIG_MAPPING["llama"](**SIZES, num_labels=1))).eval()
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    scores = RewardModel(model, tokenizer)(["hi", "the film"], [" good", " was bad"])
    for text, score in zip(("hi good", "the film was bad"), scores, strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), rel=1e-4, abs=1e-5)


def test_prompt_tuning_is_padded(tmp_path):
    """Its virtual tokens would be packed beside the texts'."""
    lora, prompt = LoraConfig(task_type="SEQ_CLS"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    rows = Dataset.from_dict({"prompt": ["hi"], "chosen": [" good"], "rejected": [" bad"]})
    args = RewardConfig(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    for adapter, packed in ((lora, True), (prompt, False)):
        model, tokenizer = build("llama"), tiny_tokenizer(pad_is_eos=False)
        trainer = RewardTrainer(model, args, rows, processing_class=tokenizer, peft_config=adapter)
        assert trainer.data_collator.packed == packed
        assert trainer.train().training_loss > 0


def test_what_tells_sequences_by_position_zero_does_not_know_branches():
    """It mixes each token with the one before, unless that is another sequence's by its position."""

    class Shifted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, *args, position_ids=None, **kwargs):
            before = hidden_states.roll(1, 1)
            first = torch.arange(hidden_states.shape[1]) == 0 if position_ids is None else position_ids[0] == 0
            return self.layer(
                hidden_states + before.masked_fill(first[:, None], 0), *args, position_ids=position_ids, **kwargs
            )

    model = build("llama")
    model.model.layers[1] = Shifted(model.model.layers[1])
    unshared = text_batches([[5, 6, 7], [8, 9]], 2, packed=True)
    alone = torch.cat([text_scores(model, text_batches([x], 2, packed=False), 1) for x in ([5, 6, 7], [8, 9])])
    torch.testing.assert_close(text_scores(model, unshared, 2), alone)
    assert not takes_packing(model)


def test_one_large_feature_hides_nothing():
    model = build("bloom").bfloat16()
    model.transformer.ln_f.bias.data[0] += 100
    assert not takes_packing(model)


def test_nothing_is_known_on_the_meta_device():
    with torch.device("meta"):
        model = build("llama")
    assert not takes_packing(model)


def test_a_head_of_zeros_hides_nothing():
    """It gives all texts the same score, packed or not."""
    model = build("bloom")
    nn.init.zeros_(model.score.weight)
    assert not takes_packing(model)


def test_the_model_is_left_in_the_mode_it_was_in():
    for name in ("llama", "bloom"):
        model = build(name).train()
        model.score.eval()
        takes_packing(model)
        assert model.training
        assert not model.score.training
