"""TRL's PPO trainer, the last there was: 1.12 has it in `trl.experimental.ppo`, 1.13 has none.

It takes an optimiser step where accelerate's counter of micro-batches says so, not at the end of each mini-batch: with
`gradient_accumulation_steps` equal to `num_mini_batches`, as a rollout of several mini-batches is usually written, that
is one step an epoch, over the mean of the mini-batches' losses. Only on the last rollout of an epoch of the data is it
a step a micro-batch, because accelerate ends an accumulation there. It clips no gradients. `bf16=True` does nothing to
it beside transformers 5, which does not tell accelerate through the environment: bf16 is had by loading bf16 weights.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fastrlhf.bench.sources import NotThere, folder


def version() -> str:
    """Raises NotThere where TRL is missing, or is one without PPO."""
    if not (folder("trl") / "experimental" / "ppo" / "ppo_trainer.py").is_file():
        raise NotThere(f"TRL {metadata.version('trl')} has no PPO trainer; 1.12 is the last")
    return metadata.version("trl")


def trainer(plan: Any, phases: Any, memory: Any) -> Any:
    """A PPOTrainer that books the time of its own functions. All forwards without gradients of value and reward model
    are `reward`, that of the reference is `reference`, and `update` is the rest, losses and statistics included."""
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from fastrlhf.bench.ppo_worker import load

    def which() -> str:
        return "update_forward" if torch.is_grad_enabled() else "reference"

    ppo_trainer.batch_generation = phases.of("rollout", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = phases.of("reward", ppo_trainer.get_reward)
    ppo_trainer.forward = phases.of(which, ppo_trainer.forward)
    models = load(plan)
    tokenizer = models["tokenizer"]
    return PPOTrainer(
        args=PPOConfig(bf16=False, num_sample_generations=0, **plan.arguments),
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=None,
        reward_model=models["reward_model"],
        value_model=models["value_model"],
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(plan.prompts)["input_ids"]}),
        eval_dataset=Dataset.from_dict({"input_ids": tokenizer(plan.prompts[:1])["input_ids"]}),
    )
