"""Argument checks: every complaint names the argument, what came and what was wanted."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, x, *, dims: int | None = None, dtypes=FLOATS) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted a torch.Tensor")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {_names([x.dtype])}, wanted {_names(dtypes)}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {dims} dimension{'s' * (dims != 1)}")
    return x


def like(name: str, x, model_name: str, model: Tensor, *, dtypes=FLOATS) -> Tensor:
    """Same shape and device as `model`. Nothing broadcasts: a (B,) where (B, T) is wanted is a mistake, not a wish."""
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
    return x if x.dtype == torch.bool else x != 0


def option(name: str, value, choices: tuple[str, ...]) -> int:
    """The position of `value` among the choices, which is what the raw ops take."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")
    return choices.index(value)


def number(name: str, value, *, above: float | None = None, least: float | None = None, most: float | None = None):
    """A finite float within the bounds."""
    if isinstance(value, (Tensor, bool, str)) or value is None:
        raise ValueError(f"{name}: got {type(value).__name__}, wanted a number")
    wanted = [f"> {above}"] * (above is not None) + [f">= {least}"] * (least is not None)
    wanted += [f"<= {most}"] * (most is not None)
    good = (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    if not (good and -math.inf < value < math.inf):  # not math.isfinite: under torch.compile value may be symbolic
        raise ValueError(f"{name}: got {value}, wanted a finite number {' and '.join(wanted)}".rstrip())
    return value if isinstance(value, float) else float(value)


def limit(name: str, value, *, above: float = 0.0) -> float:
    """A limit that may be absent: None is infinity."""
    return math.inf if value is None else number(name, value, above=above)


def denominator(value, model: Tensor) -> Tensor | None:
    """The global count, as a scalar tensor on the loss's device, so that a new count recompiles nothing."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"denominator: got shape {tuple(value.shape)}, wanted one number")
        return value.detach().to(device=model.device, dtype=torch.float32).reshape(())
    return torch.full((), number("denominator", value, above=0.0), device=model.device)


def sequences(name: str, x: Tensor, because: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted [B, T], because {because}")
