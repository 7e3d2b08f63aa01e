"""Linear layers of a decoding step, with the norm before them, the activation and the residual after them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.rollout.architectures import NormSpec, Weights

ops = torch.ops.fastrlhf

PANEL = 64  # rows of a weight in a panel of a packed one
NORMS = {None: 0, "rms": 1, "layer": 2}
ACTIVATIONS = {
    None: 0,
    "silu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
}  # the integers of the raw op, as csrc/cpu/kernels.h has them


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Norm:
    """A norm on its own, in fp32."""

    def __init__(self, spec: NormSpec) -> None:
        self.spec = spec

    def update(self) -> None:
        weight, bias = self.spec.weights()
        self.weight, self.bias = weight.float(), None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if self.spec.kind == "rms":
            return torch.nn.functional.rms_norm(x.float(), shape, self.weight, self.spec.eps)
        return torch.nn.functional.layer_norm(x.float(), shape, self.weight, self.bias, self.spec.eps)


class Linear(ABC):
    """activation(norm(x) W^T + bias), W the weights one below the other; gated: activation(gate) up, of the two in W.

    `update` reads the weights anew. A call takes x [N, K] and gives [N, rows], or adds it to `residual` and gives that.
    """

    def __init__(
        self,
        weights: list[Weights],
        dtype: torch.dtype,
        norm: NormSpec | None = None,
        activation: str | None = None,
        gated: bool = False,
    ) -> None:
        self.weights, self.dtype, self.gated, self.activation = weights, dtype, gated, activation
        self.norm = None if norm is None else Norm(norm)

    def update(self) -> None:
        affine = [read() for read in self.weights]
        if self.norm is not None:
            self.norm.update()
        self.bias = None
        if any(a.bias is not None for a in affine):
            parts = [a.weight.new_zeros(len(a.weight)) if a.bias is None else a.bias for a in affine]
            self.bias = torch.cat([part.float() for part in parts])
        self.take([a.weight for a in affine])

    @abstractmethod
    def take(self, weights: list[Tensor]) -> None:
        """Keeps the weights in the layout that a call reads."""

    @abstractmethod
    def release_weights(self) -> None:
        """Keeps them no longer; `update` must come before the next call."""

    @abstractmethod
    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class PackedLinear(Linear):
    """On CPU, over a packed copy of the weights (csrc/cpu/kernels/packed_linear.cpp); in and out in fp32."""

    packed: Tensor | None = None

    def take(self, weights: list[Tensor]) -> None:
        # Panels begin with a weight: where one ends inside of a panel, all are laid together first.
        if not self.gated and any(len(w) % PANEL for w in weights[:-1]):
            weights = [torch.cat(weights)]
        rows, columns = sum(len(w) for w in weights), weights[0].shape[1]
        self.width = rows // 2 if self.gated else rows
        panels = [-(-len(w) // PANEL) for w in weights]
        shape = (sum(panels), PANEL * (columns + columns % 2))
        if self.packed is None or self.packed.shape != shape:
            self.packed = torch.empty(shape, dtype=self.dtype)
        first = 0
        for i, (weight, count) in enumerate(zip(weights, panels, strict=True)):
            weight = weight if weight.stride(1) == 1 else weight.contiguous()
            ops.pack_weight_(self.packed, weight, i if self.gated else first, 2 if self.gated else 1)
            first += count

    def release_weights(self) -> None:
        self.packed = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], self.width) if residual is None else residual
        norm = self.norm
        ops.packed_linear_(
            out,
            x,
            self.packed,
            self.bias,
            NORMS[norm.spec.kind if norm else None],
            norm.weight if norm else None,
            norm.bias if norm else None,
            norm.spec.eps if norm else 0.0,
            ACTIVATIONS[self.activation],
            self.gated,
            residual is not None,
        )
        return out


class PlainLinear(Linear):
    """On any device, over the model's own weights, by torch; in and out in their dtype."""

    def take(self, weights: list[Tensor]) -> None:
        self.own = [w.to(self.dtype) for w in weights]
        self.biases = [None] * len(weights)
        if self.bias is not None:
            self.biases = self.bias.to(self.dtype).split([len(w) for w in weights])

    def release_weights(self) -> None:
        self.own = []

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = (x if self.norm is None else self.norm(x)).to(self.dtype)
        parts = [torch.nn.functional.linear(x, w, b) for w, b in zip(self.own, self.biases, strict=True)]
        if self.gated:
            y = activate(parts[0], self.activation) * parts[1]
        else:
            y = activate(parts[0] if len(parts) == 1 else torch.cat(parts, -1), self.activation)
        return y if residual is None else residual.add_(y)
