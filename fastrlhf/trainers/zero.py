"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) through accelerate, in stages 1, 2 and 3: several optimizer steps in an
iteration, gradients that are looked at before a step, or thrown away, and whole weights to sample from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def engine_of(accelerator: Accelerator) -> Any | None:
    """The DeepSpeedEngine that trains, or None without DeepSpeed, and before the training has begun."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine


def prepare(trainer: Trainer) -> None:
    """Complete DeepSpeed's configuration by what these trainers need; errors for what would train wrongly, or was never
    tried with them."""
    if not trainer.runs_on_deepspeed:
        raise ValueError(
            f"deepspeed: {type(trainer).__name__} was never run on DeepSpeed; FSDP2 shards the same as ZeRO 3: "
            "fsdp=True, or fsdp_version: 2 in accelerate's configuration"
        )
    args, config = trainer.args, trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    zero = config.get("zero_optimization", {})
    _refuse(args, config, zero)
    unset_hf_deepspeed_config()  # or transformers would shard whatever else is loaded
    bf16 = config.get("bf16", {}).get("enabled") is True
    other = sorted({str(p.dtype) for p in trainer.model.parameters()} - {"torch.float32"})
    if other and not bf16:
        raise ValueError(
            f"model: weights in {', '.join(other)} are DeepSpeed's with bf16=True only (it keeps fp32 masters of "
            "them); set that, or load the model in float32"
        )
    # It has its own number for this, and clips nothing without one.
    config.setdefault("gradient_clipping", args.max_grad_norm)
    zero["stage3_gather_16bit_weights_on_model_save"] = zero["stage"] == 3
    if bf16:
        config.setdefault("communication_data_type", "fp32")
        for module in trainer.model.modules():
            if isinstance(module, nn.Linear) and _gives_scores(module):
                # DeepSpeed will round its weights, too, but not what comes of them.
                module.forward = partial(_linear_in_fp32, module)


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """`accelerator.backward`, but no optimiser step with it under DeepSpeed. last: of those before the next step."""
    engine = engine_of(accelerator)
    if engine is None:
        accelerator.backward(loss)
        return
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def gradient_norm(engine: Any) -> Tensor:
    """The 2-norm of the gradients that the next step would be made with, of all ranks; not finite where they aren't.

    A collective, after the last `backward` before a step.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    else:
        norm = optimizer.scaled_global_norm()
    return torch.where(norm < 0, torch.inf, norm)  # which is how DeepSpeed says so


def drop_gradients(engine: Any) -> None:
    """Make no step with the gradients that there are.

    A collective. As DeepSpeed does with gradients that overflow in fp16: their norm is said to be infinite.
    """
    optimizer, overflow = engine.optimizer, torch.tensor(-1.0, device=engine.device)
    instead = {
        "check_grad_overflow": True,
        "scaled_global_norm": lambda *args: overflow,  # in ZeRO 1 and 2
        "_get_norm_groups": lambda: [overflow],  # in ZeRO 3
    }
    before = {name: vars(optimizer)[name] for name in instead if name in vars(optimizer)}
    vars(optimizer).update(instead)
    try:
        engine.step()
    finally:
        for name in instead:
            del vars(optimizer)[name]
        vars(optimizer).update(before)
    optimizer.overflow = False  # or the Trainer would hold the learning rate's schedule back
    engine._global_grad_norm = 0.0


@contextmanager
def gathered(model: nn.Module, engine: Any) -> Iterator[None]:
    """All weights of a model that is sharded by ZeRO 3, whole on every rank, and forwards that gather nothing."""
    from deepspeed.runtime.zero import GatheredParameters

    hooks = ("_forward_hooks", "_forward_pre_hooks")
    kept = {module: [getattr(module, name) for name in hooks] for module in model.modules()}
    engine.optimizer.empty_partition_cache()  # of what was fetched ahead for a forward that does not come
    with GatheredParameters(model.parameters()):
        for module, each in kept.items():
            for name, all_hooks in zip(hooks, each, strict=True):
                others = {key: hook for key, hook in all_hooks.items() if not _is_of_deepspeed(hook)}
                setattr(module, name, OrderedDict(others))
        try:
            yield
        finally:
            for module, each in kept.items():
                for name, all_hooks in zip(hooks, each, strict=True):
                    setattr(module, name, all_hooks)


def _is_of_deepspeed(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("deepspeed.")


def _gives_scores(module: nn.Linear) -> bool:
    """Whether it is the head of a value function or of a reward model."""
    return module.out_features == 1


def _linear_in_fp32(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), module.weight.float(), bias)


def _refuse(args: Any, config: dict[str, Any], zero: dict[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"deepspeed: zero_optimization.stage={stage} shards nothing, set it to 1, 2 or 3; without deepspeed, "
            "training is data-parallel (DDP)"
        )
    for name, instead in (
        ("optimizer", "optim and learning_rate"),
        ("scheduler", "lr_scheduler_type and warmup_steps"),
    ):
        if name in config:
            raise ValueError(
                f"deepspeed: leave {name} out of its configuration, {instead} of the arguments say it. An iteration of "
                "PPO has several optimizer steps and one of the schedule, and DeepSpeed would count one for each"
            )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device", "none") != "none":
            raise ValueError(f"deepspeed: zero_optimization.{name} was never tried with these trainers, leave it out")
    if args.fp16 or config.get("fp16", {}).get("enabled") is True:
        raise ValueError("deepspeed: fp16 was never tried with these trainers, set bf16=True or compute in fp32")
    if "grad_accum_dtype" in config.get("data_types", {}) and stage == 1:
        raise ValueError(
            "deepspeed: data_types.grad_accum_dtype gives ZeRO 1 another optimizer, never tried with these trainers: "
            "take stage 2 with it"
        )
    if getattr(args, "critic_warmup_steps", 0):
        raise ValueError(
            f"critic_warmup_steps={args.critic_warmup_steps}: DeepSpeed steps all weights as one flat tensor, of which "
            "the policy's cannot be left out. Set it to 0, or shard with fsdp=True"
        )
    if getattr(args, "num_frozen_layers", 0) and stage == 3:
        raise ValueError(
            f"num_frozen_layers={args.num_frozen_layers}: ZeRO 3 shards layers, which cannot be shared then; take "
            "stage 2"
        )
