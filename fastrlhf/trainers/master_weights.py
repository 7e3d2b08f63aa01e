"""fp32 master weights for parameters kept in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class MasterWeights(Optimizer):
    """A torch optimiser over fp32 copies of bf16 parameters (Micikevicius et al. 2018, section 3.1).

    The model computes with its own bf16 weights, with no cast in any forward. Gradients arrive in the
    weights' dtype; `step` widens them, steps the fp32 masters with `optimizer_cls`, and rounds the masters into the
    weights. An update smaller than half a bf16 ulp is therefore not lost. fp32 parameters are stepped as they are.

    `MasterWeights.over(torch.optim.AdamW)` is the class that steps with AdamW; it takes AdamW's arguments.
    params: parameters or parameter groups, as for any optimiser.
    Costs 4 bytes a bf16 parameter for the master and 4 more while stepping, for the widened gradient.
    `state_dict` holds the masters, so a resumed run continues from them, not from their rounded copies.
    """

    optimizer_cls: type[Optimizer]

    @classmethod
    def over(cls, optimizer_cls: type[Optimizer]) -> type[MasterWeights]:
        return type(f"{cls.__name__}{optimizer_cls.__name__}", (cls,), {"optimizer_cls": optimizer_cls})

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self.optimizer = self.optimizer_cls(
            [{**group, "params": [self._master(p) for p in group["params"]]} for group in groups], **options
        )
        super().__init__(self.optimizer.param_groups, self.optimizer.defaults)
        self._share_groups()

    def _master(self, weight: torch.nn.Parameter) -> torch.nn.Parameter:
        if weight.dtype != torch.bfloat16:
            return weight
        master = torch.nn.Parameter(weight.detach().float())
        self.pairs.append((weight, master))
        return master

    def _share_groups(self) -> None:
        # Schedulers write the learning rate into param_groups: both must be the same dictionaries.
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, master in self.pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
        self.optimizer.step()
        for weight, master in self.pairs:
            weight.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        for weight, _ in self.pairs:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "masters": [master.detach() for _, master in self.pairs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        masters = state_dict.pop("masters", None)
        if masters is None or len(masters) != len(self.pairs):
            found = "none" if masters is None else len(masters)
            raise ValueError(
                f"state_dict holds {found} fp32 master weights where this optimizer has {len(self.pairs)}: it was "
                "saved with weights of another dtype. Load the model in the dtype it was trained in."
            )
        self.optimizer.load_state_dict(state_dict)
        self._share_groups()
        with torch.no_grad():
            for (weight, master), saved in zip(self.pairs, masters, strict=True):
                master.copy_(saved)
                weight.copy_(saved)
