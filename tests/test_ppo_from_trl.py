"""Scripts for TRL's PPOTrainer (trl.experimental.ppo of 1.10 to 1.12) run here with their import and at most three
lines changed, the changes that fastrlhf/trainers/PPO_FROM_TRL.md names."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
from tiny import save_tiny_model
from transformers import TrainingArguments

from fastrlhf.trainers import PPOConfig, PPOTrainer

PAGE = (Path(__file__).parents[1] / "fastrlhf/trainers/PPO_FROM_TRL.md").read_text(encoding="utf-8")
TRL_IMPORT = "from trl.experimental.ppo import PPOConfig, PPOTrainer"
OUR_IMPORT = "from fastrlhf.trainers import PPOConfig, PPOTrainer"

FULL_MODELS = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

training_args = PPOConfig(
    output_dir="out",
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_mini_batches=2,
    num_ppo_epochs=2,
    total_episodes=24,
    response_length=6,
    stop_token="eos",
    missing_eos_penalty=1.0,
    whiten_rewards=False,
    temperature=0.7,
    kl_coef=0.05,
    kl_estimator="k3",
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    gamma=1.0,
    lam=0.95,
    num_sample_generations=0,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
tokenizer = AutoTokenizer.from_pretrained("sft", padding_side="left")
tokenizer.add_special_tokens({"pad_token": "[PAD]"})
value_model = AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1)
ref_policy = AutoModelForCausalLM.from_pretrained("sft")
policy = AutoModelForCausalLM.from_pretrained("sft")


def tokenize(element):
    outputs = tokenizer(element["text"], padding=False)
    return {"input_ids": outputs["input_ids"]}


dataset = Dataset.from_dict({"text": ["the film was", "a bad film was a", "good", "hello user the film"] * 10})
dataset = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
train_dataset, eval_dataset = dataset.select(range(36)), dataset.select(range(36, 40))

trainer = PPOTrainer(
    args=training_args,
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
)
trainer.train()
trainer.save_model("saved")
"""

LORA = """
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained("sft", padding_side="left")
texts = ["the film was", "a bad film was a", "good", "hello user"] * 5
dataset = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
training_args = PPOConfig(
    "out",
    per_device_train_batch_size=4,
    total_episodes=8,
    response_length=5,
    local_rollout_forward_batch_size=4,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
trainer = PPOTrainer(
    args=training_args,
    model=AutoModelForCausalLM.from_pretrained("sft"),
    processing_class=tokenizer,
    ref_model=None,
    reward_model=AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1),
    value_model=AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1),
    train_dataset=dataset,
    eval_dataset=dataset.select(range(8)),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model("saved")
"""
SCRIPTS = {"full models": FULL_MODELS, "lora": LORA}

# What becomes of a line; None: it is taken out.
CHANGES = {
    "full models": {
        '    stop_token="eos",': None,
        "    num_sample_generations=0,": None,
        "    reward_model=reward_model,": "    reward_funcs=reward_model,",
    },
    "lora": {
        "    per_device_train_batch_size=4,": "    per_device_train_batch_size=4, rollout_batch_size=4,",
        "    local_rollout_forward_batch_size=4,": None,
        '    reward_model=AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1),': (
            '    reward_funcs=AutoModelForSequenceClassification.from_pretrained("reward", num_labels=1),'
        ),
    },
}
ITERATIONS = {
    "full models": 3,
    "lora": 2,
}  # total_episodes / (per_device_train_batch_size x gradient_accumulation_steps)
STEPS = {"full models": 4, "lora": 4}  # num_ppo_epochs x num_mini_batches


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "sft")
    save_tiny_model(tmp_path / "reward", reward=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ported(name: str) -> str:
    """The script with its import and the lines of CHANGES changed, and nothing else."""
    script = SCRIPTS[name].replace(TRL_IMPORT, OUR_IMPORT)
    for line, becomes in CHANGES[name].items():
        assert script.count(f"{line}\n") == 1
        script = script.replace(f"{line}\n", "" if becomes is None else f"{becomes}\n")
    return script


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_its_import_and_at_most_three_lines_changed(name, folder):
    assert len(CHANGES[name]) <= 3
    before = {file: (folder / file / "model.safetensors").read_bytes() for file in ("sft", "reward")}
    variables: dict[str, object] = {}
    exec(ported(name), variables)
    trainer = variables["trainer"]
    assert trainer.state.global_step == ITERATIONS[name]
    records = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "objective/scores" in record]
    assert len(records) == ITERATIONS[name]
    assert all(record["policy/optimizer_steps"] == STEPS[name] for record in records)
    assert {file: (folder / file / "model.safetensors").read_bytes() for file in before} == before
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (folder / "saved" / weights).stat().st_size


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_scripts_are_ones_that_trl_runs(name, folder):
    pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer")
    variables: dict[str, object] = {}
    exec(SCRIPTS[name], variables)
    assert variables["trainer"].state.global_step == ITERATIONS[name]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_page_names_every_argument_and_field_of_trl():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer")

    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(ppo.PPOConfig)} - common
    arguments = set(inspect.signature(ppo.PPOTrainer.__init__).parameters) - {"self"}
    assert [name for name in sorted(fields | arguments) if f"`{name}`" not in PAGE] == []


def test_what_the_page_maps_to_exists():

    known = {field.name for field in dataclasses.fields(PPOConfig)}
    known |= {*inspect.signature(PPOTrainer.__init__).parameters, *dir(PPOTrainer), *dir(PPOConfig)}
    rows = [line.split("|") for line in PAGE.split("## Metrics")[0].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", row[2])}
    assert len(named) > 20
    assert sorted(named - known) == []
