"""The layers of a transformers model on CPU, with one pass over memory where its own code takes five to ten."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf import functional as F

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROTATION = "apply_rotary_pos_emb"


def fuse_layers(model: nn.Module) -> nn.Module:
    """`model`, whose RMS norms, SwiGLUs and rotary embeddings are from now on those of `fastrlhf.functional` on CPU.

    A module is taken where its forward gives what ours gives, on numbers drawn for the purpose; what is not on CPU, has
    not the form of Llama's, or gives something else stays as it is. Weights, names and classes of the modules do not
    change, and tensors that come on another device, or in another dtype than the weights, go through their own code.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if "forward" in vars(module):
                continue
            forward = _rms_norm(module) or _swiglu(module) or _attention(module)
            if forward is not None:
                module.forward = MethodType(forward, module)
    return model


# The functions that take a module's place are called `forward`, too: a bound method is pickled by its name.
class RMSNorm:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fits(hidden_states, self.weight):
            return type(self).forward(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight, eps=_eps(self))


class SwiGLU:
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.swiglu(gate, up) if _fits(gate, up) else self.act_fn(gate) * up)


def _fits(x: Tensor, other: Tensor) -> bool:
    return x.is_cpu and x.dtype is other.dtype and x.dtype in FLOATS


def _eps(norm: nn.Module) -> Any:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else getattr(norm, "eps", None)


def _plain(weight: Any, dims: int) -> bool:
    """Whether a weight is a whole one on CPU."""
    return type(weight) is nn.Parameter and weight.dim() == dims and weight.numel() > 0 and _fits(weight, weight)


def _rms_norm(module: nn.Module) -> Callable | None:
    named = type(module).__name__.endswith("RMSNorm") and isinstance(_eps(module), float)
    if not (named and _plain(getattr(module, "weight", None), 1)):
        return None
    x = torch.randn(2, 3, len(module.weight)).to(module.weight.dtype)
    return _if_same(RMSNorm.forward, module, x)


def _swiglu(module: nn.Module) -> Callable | None:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not (all(callable(layer) for layer in layers) and _plain(getattr(layers[0], "weight", None), 2)):
        return None
    weight = layers[0].weight
    # So large that the activation shows, however small the weights.
    x = torch.randn(1, 3, weight.shape[1]) / weight.float().std().clamp(min=1e-3)
    return _if_same(SwiGLU.forward, module, x.to(weight.dtype))


def _if_same(forward: Callable, module: nn.Module, x: Tensor) -> Callable | None:
    try:
        return forward if _close(forward(module, x), type(module).forward(module, x)) else None
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes or has something else
        return None


def _attention(module: nn.Module) -> Callable | None:
    """The forward of the module's class, with our rotation under the name by which it calls its own."""
    whole = type(module).forward
    if whole not in _attentions:
        _attentions[whole] = _with_our_rotation(whole)
    return _attentions[whole]


_attentions: dict[Callable, Callable | None] = {}


def _with_our_rotation(whole: Callable) -> Callable | None:
    code = inspect.unwrap(whole)
    theirs = getattr(code, "__globals__", {}).get(ROTATION)
    if theirs is None or ROTATION not in code.__code__.co_names or not _rotates(theirs):
        return None
    names = code.__globals__ | {ROTATION: _rotation(theirs)}
    inner = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    inner.__kwdefaults__ = code.__kwdefaults__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What transformers wrap the function in gives old names of arguments their new ones.
        known = "past_key_values" not in kwargs or whole is code
        return inner(self, *args, **kwargs) if known else whole(self, *args, **kwargs)

    return forward


def _rotates(rotation: Callable) -> bool:
    """Whether it does what `rotary_embedding` does, to q and k of [B, heads, L, d]."""
    q, k, cos, sin = (torch.randn(shape) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        theirs = rotation(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    return all(_close(ours, x) for ours, x in zip(_rotation(rotation)(q, k, cos, sin), theirs, strict=True))


def _rotation(theirs: Callable) -> Callable:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and len(cos) in (1, len(q))
        if not (plain and _fits(q, k)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return F.rotary_embedding(q, cos, sin), F.rotary_embedding(k, cos, sin)

    return rotate


def _close(ours: Any, theirs: Any) -> bool:
    """To a few roundings of the dtype, against the largest number."""
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    limit = 8 * torch.finfo(ours.dtype).eps * theirs.abs().max()
    return bool((ours - theirs).abs().max() <= limit)
