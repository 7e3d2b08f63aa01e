"""Small PPO runs for the tests of the trainer."""

from __future__ import annotations

from datasets import Dataset
from tiny import save_tiny_model

from fastrlhf.trainers import PPOConfig, PPOTrainer

PROMPTS = Dataset.from_dict({"prompt": ["the good", "a bad film", "so", "Human: hi"] * 4, "weight": [1.0, 2.0] * 8})


def count_letters(prompts, completions, **columns):
    return [float(sum(c.isalpha() for c in completion)) for completion in completions]


def config(tmp_path, **options):
    defaults = {
        "max_steps": 1,
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 2,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "reward_normalization": "batch",
    }
    return PPOConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **{**defaults, **options})


def trainer(tmp_path, reward_funcs=count_letters, model=None, train_dataset=PROMPTS, **options):
    names = (
        "ref_model",
        "value_model",
        "peft_config",
        "model_init_kwargs",
        "eval_dataset",
        "processing_class",
        "engine",
    )
    arguments = {name: options.pop(name) for name in names if name in options}
    model = model or save_tiny_model(tmp_path / "model")
    return PPOTrainer(model, config(tmp_path, **options), reward_funcs, train_dataset, **arguments)


def first_log(ours):
    ours.train()
    return ours.state.log_history[0]
