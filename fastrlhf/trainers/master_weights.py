"""fp32 master weights for parameters kept in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Bytes of widened gradients at a time.
PART = 2**24


class MasterWeights(Optimizer):
    """A torch optimiser over fp32 copies of bf16 parameters (Micikevicius et al. 2018, section 3.1).

    The model computes with its own bf16 weights, with no cast in any forward. Gradients arrive in the
    weights' dtype; `step` widens them, steps the fp32 masters with `optimizer_cls`, and rounds the masters into the
    weights. An update smaller than half a bf16 ulp is therefore not lost. fp32 parameters are stepped as they are.

    `MasterWeights.over(torch.optim.AdamW)` is the class that steps with AdamW; it takes AdamW's arguments.
    params: parameters or parameter groups, as for any optimiser.
    Costs 4 bytes a bf16 parameter for the master and while stepping, for the widened gradients, another 4 for each of
    PART / 4 parameters; of all with optimisers that are not torch's own, which might need to see all at once.
    `state_dict` is that of `optimizer_cls` over the weights, each with its "master" beside the moments, so a resumed
    run continues from the masters, not from their rounded copies. Sharded weights (DTensor) have sharded masters.
    """

    optimizer_cls: type[Optimizer]

    @classmethod
    def over(cls, optimizer_cls: type[Optimizer]) -> type[MasterWeights]:
        return type(f"{cls.__name__}{optimizer_cls.__name__}", (cls,), {"optimizer_cls": optimizer_cls})

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        self.options = options
        self.optimizer: Optimizer | None = None
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        super().__init__(params, self.optimizer_cls([torch.nn.Parameter(torch.zeros(1))], **options).defaults)

    def _make_masters(self) -> Optimizer:
        """The optimiser inside, made when it is needed first: FSDP puts shards in place of the weights before that."""
        if self.optimizer is None:
            groups = [{**group, "params": [self._master(p) for p in group["params"]]} for group in self.param_groups]
            self.optimizer = self.optimizer_cls(groups, **self.options)
        return self.optimizer

    def _master(self, weight: torch.nn.Parameter) -> torch.nn.Parameter:
        if weight.dtype != torch.bfloat16:
            return weight
        master = torch.nn.Parameter(weight.detach().float())
        self.pairs.append((weight, master))
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        optimizer = self._make_masters()
        for mine, inner in zip(self.param_groups, optimizer.param_groups, strict=True):
            inner.update(_options(mine))  # the learning rate, as the scheduler has set it
        weights = {master: weight for weight, master in self.pairs}
        whole = optimizer.param_groups
        scratch = Scratch()
        for part in self._parts(whole):
            masters = [p for group in part for p in group["params"] if p in weights]
            for master, grad in zip(masters, scratch.widened([weights[m].grad for m in masters]), strict=True):
                master.grad = grad
            optimizer.param_groups = part
            optimizer.step()
            for master in masters:
                weights[master].copy_(master)
                master.grad = None
        optimizer.param_groups = whole
        self._show(optimizer)
        return loss

    def _parts(self, groups: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The groups, cut into parts that are stepped one after the other: torch's optimisers, all but L-BFGS, treat
        each parameter by itself."""
        if not self.optimizer_cls.__module__.startswith("torch.optim.") or self.optimizer_cls is torch.optim.LBFGS:
            yield groups
            return
        for group in groups:
            part, size = [], 0
            for parameter in group["params"]:
                part.append(parameter)
                size += parameter.numel() * parameter.element_size()
                if size >= PART:
                    yield [{**group, "params": part}]
                    part, size = [], 0
            if part:
                yield [{**group, "params": part}]

    def _show(self, optimizer: Optimizer) -> None:
        """State and options of the optimiser inside as this one's own, by the weights instead of their masters."""
        for mine, inner in zip(self.param_groups, optimizer.param_groups, strict=True):
            mine.update(_options(inner))
        masters = {master: weight for weight, master in self.pairs}
        self.state.clear()
        for weight, master in self.pairs:
            self.state[weight]["master"] = master.detach()
        for parameter, state in optimizer.state.items():
            self.state[masters.get(parameter, parameter)].update(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["state"]
        if not states:  # of an optimiser that made no step
            super().load_state_dict(state_dict)
            return
        optimizer = self._make_masters()
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        names = {weight: name for name, weight in zip(names, weights, strict=False)}
        masters = [states.get(names.get(weight), {}).get("master") for weight, _ in self.pairs]
        found = sum(master is not None for master in masters)
        if found != len(self.pairs):
            raise ValueError(
                f"state_dict holds {found or 'none'} fp32 master weights where this optimizer has {len(self.pairs)}: "
                "it was saved with weights of another dtype. Load the model in the dtype it was trained in."
            )
        inner = {name: {k: v for k, v in state.items() if k != "master"} for name, state in states.items()}
        optimizer.load_state_dict({**state_dict, "state": {name: state for name, state in inner.items() if state}})
        with torch.no_grad():
            for (weight, master), saved in zip(self.pairs, masters, strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        self._show(optimizer)


class Scratch:
    """Memory for fp32 copies of some tensors at a time. Memory that is taken anew is faulted in page by page, which
    costs several times the copying."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def widened(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """fp32 copies, overwritten by those of the next call; sharded tensors have copies of their own."""
        plain = [x for x in tensors if x is not None and not isinstance(x, DTensor)]
        size = sum(x.numel() for x in plain)
        if plain and (self.memory.numel() < size or self.memory.device != plain[0].device):
            self.memory = torch.empty(size, device=plain[0].device)
        copies, begin = [], 0
        for x in tensors:
            if x is None or isinstance(x, DTensor):
                copies.append(None if x is None else x.float())
                continue
            copies.append(self.memory[begin : begin + x.numel()].view(x.shape).copy_(x))
            begin += x.numel()
        return copies


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
