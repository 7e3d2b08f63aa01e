"""Models whose weights are sharded over the ranks: by FSDP2 (`torch.distributed.fsdp.fully_shard`) or by ZeRO 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from fastrlhf.trainers import zero
from fastrlhf.trainers.token_scorer import inside


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator | None = None) -> Iterator[None]:
    """All weights of the model as plain tensors on every rank, to be read or computed with in any number of forwards.

    A collective: every rank enters. In between, ranks may do different things, as forwards gather nothing: rollouts of
    different lengths, say. Costs the memory of the whole model. Nothing may be trained inside. A model that is not
    sharded, or is whole already, stays as it is. accelerator: that of the training, which ZeRO 3 is asked through.

    What turns `requires_grad` off for a while, as peft does with adapters, does so inside: FSDP has one tensor for a
    shard and one for the whole, and might have changed the one for the other before it is turned on again.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        with zero.gathered(model, zero.engine_of(accelerator)):
            yield
        return
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with torch.no_grad():
        for root in _roots(model):
            inside(root, lambda: None)  # FSDP takes the first module that runs for the root of those below
    # There is a setter of this one, but it forgets what was there.
    groups = [group for module in shards if (group := module._get_fsdp_state()._fsdp_param_group) is not None]
    after_forward = {group: group.post_forward_mesh_info for group in groups}
    for group in after_forward:
        group.post_forward_mesh_info = None
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for group, mesh in after_forward.items():
            group.post_forward_mesh_info = mesh
        for module in shards:
            module.reshard()


@torch.no_grad()
def copy_whole(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor into a parameter, or this rank's part of it into a sharded one; every rank has the whole."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The sharded modules that are in no other one."""
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _roots(child)
