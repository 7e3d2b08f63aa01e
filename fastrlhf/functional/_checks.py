"""Argument checks: every complaint names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP32 = torch.finfo(torch.float32)


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, x, *, dims: int | None = None, dtypes=FLOATS) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted a torch.Tensor")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {_names([x.dtype])}, wanted {_names(dtypes)}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {dims} dimension{'s' * (dims != 1)}")
    dual = forward_ad._current_level >= 0 and not torch.compiler.is_compiling()
    if dual and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: got a tangent, wanted none: forward-mode AD is not implemented")
    return x


def like(name: str, x, model_name: str, model: Tensor, *, dtypes=FLOATS) -> Tensor:
    """Same shape and device as `model`. Nothing broadcasts: a (B,) where (B, T) is wanted is a mistake, not a wish."""
    if (
        isinstance(x, Tensor)
        and x.dtype in dtypes
        and x.shape == model.shape
        and x.device == model.device
        and forward_ad._current_level < 0
    ):
        return x  # as nearly always
    tensor(name, x, dtypes=dtypes)
    if x.shape != model.shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {tuple(model.shape)}, the shape of {model_name}")
    same_device(name, x, model_name, model)
    return x


def same_device(name: str, x: Tensor, model_name: str, model: Tensor) -> None:
    if x.device != model.device:
        raise ValueError(f"{name}: got device {x.device}, wanted {model.device}, the device of {model_name}")


def mask(name: str, x, model_name: str, model: Tensor) -> Tensor:
    """A mask as bool: any dtype will do, nonzero counts."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted a torch.Tensor (1 marks the positions that count)")
    like(name, x, model_name, model, dtypes=(x.dtype,))
    return x.to(torch.bool)  # on CPU a third of the time of x != 0


def fp32(x: Tensor | None) -> Tensor | None:
    """As the token-wise kernels take it."""
    return x if x is None or x.dtype is torch.float32 else x.float()


def option(name: str, value, choices: tuple[str, ...]) -> int:
    """The position of `value` among the choices, which is what the raw ops take."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")
    return choices.index(value)


def number(
    name: str, value, *, above: float | None = None, least: float | None = None, most: float | None = None, below=None
):
    """A finite float within the bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise ValueError(f"{name}: got {type(value).__name__}, wanted a number")
    good = (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    good = good and (below is None or value < below)
    if not (good and -math.inf < value < math.inf):  # not math.isfinite: under torch.compile value may be symbolic
        wanted = [
            f"{sign} {bound}"
            for sign, bound in ((">", above), (">=", least), ("<=", most), ("<", below))
            if bound is not None
        ]
        raise ValueError(f"{name}: got {value}, wanted a finite number {' and '.join(wanted)}".rstrip())
    return value if isinstance(value, float) else float(value)


def limit(name: str, value, *, above: float = 0.0) -> float:
    """A limit that may be absent: None is infinity."""
    return math.inf if value is None else number(name, value, above=above)


def temperature(value) -> float:
    """As fp32, in which the kernels take it, neither 0 nor infinite nor denormal."""
    return number("temperature", value, least=FP32.tiny, most=FP32.max)


def scalars(*values: float) -> Tensor:
    """Numbers as the raw ops take them: fp32 in CPU memory, where a kernel of any device reads them without a stall.

    As floats they would be constants of torch.compile, and every new value would compile anew. It keeps a float
    variable in sums of tensors, but not in torch.tensor or torch.full.
    """
    if torch.compiler.is_compiling():
        return torch.stack([torch.zeros((), dtype=torch.float32, device="cpu") + value for value in values])
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def denominator(value, model: Tensor) -> Tensor | None:
    """The global count, as a scalar tensor on the loss's device, so that a new count recompiles nothing."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"denominator: got shape {tuple(value.shape)}, wanted one number")
        return value.detach().to(device=model.device, dtype=torch.float32).reshape(())
    value = number("denominator", value, above=0.0)
    if torch.compiler.is_compiling():  # see scalars
        return torch.zeros((), dtype=torch.float32, device=model.device) + value
    return torch.full((), value, dtype=torch.float32, device=model.device)


def sequences(name: str, x: Tensor, because: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted [B, T], because {because}")


def vocabulary(name: str, x: Tensor) -> None:
    """Rows [..., V] that a kernel can walk along."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted at least one entry in the vocabulary")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {x.stride()}, wanted a last stride of 1; call .contiguous()")


def writable_rows(name: str, x: Tensor, because: str) -> None:
    """Rows [..., V] that a gradient may be written over: no two share memory, and nobody keeps them as parameters."""
    extent = x.shape[-1]
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)} with strides {x.stride()}, wanted rows that do not overlap, "
                    f"because {because}"
                )
            extent += (size - 1) * stride
    owner = x if x._base is None else x._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{name}: got a leaf that requires grad (or a view of one), wanted the result of an operation, because "
            f"{because}: its .grad would be its own memory"
        )
