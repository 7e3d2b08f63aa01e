"""How a model's logits come from its last hidden state, for ops that do the LM head's product themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


class LMHead(NamedTuple):
    """logits = softcap tanh(scale (hidden weight^T + bias) / softcap), or scale (hidden weight^T + bias) without a cap.

    hidden: [n, H], and weight: [V, H], with their graphs: gradient flows to whatever they were made of.
    bias: [V] or None. scale: a positive number. softcap: a positive number or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def options(self, temperature: float) -> dict[str, Any]:
        """bias, temperature and softcap for the linear ops, which know no scale."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "temperature": temperature / self.scale, "softcap": softcap}

    def logits(self) -> Tensor:
        """[n, V]."""
        return self.from_product(nn.functional.linear(self.hidden, self.weight, self.bias))

    def from_product(self, z: Tensor) -> Tensor:
        """Logits of z = hidden weight^T + bias."""
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


LMHeadFunction = Callable[[PreTrainedModel, Tensor], LMHead]

# Names in a configuration that scale the logits, and whether they divide.
SCALES = {"logit_scale": False, "lm_head_multiplier": False, "logits_scaling": True}
SOFTCAP = "final_logit_softcapping"

_registered: dict[type[nn.Module] | str, LMHeadFunction] = {}


def register_lm_head(model: type[nn.Module] | str, function: LMHeadFunction) -> None:
    """Say how the logits of a kind of model come from its last hidden state.

    model: the model's class (its subclasses are meant too), or the `model_type` of its configuration.
    function: called as function(model, hidden) in every forward, with the transformers model and its last hidden states
        [n, H] at the positions that are scored; returns an LMHead. `linear_lm_head` is a start for most.

    Every scorer compares the result once with the model's own logits and raises ValueError when they differ. A later
    registration replaces an earlier one. For a model that multiplies its logits by a number of
    its configuration:

        def boosted(model, hidden):
            return linear_lm_head(model, hidden)._replace(scale=model.config.boost)

        register_lm_head("my_model_type", boosted)
    """
    _registered[model] = function


def registered_lm_head(model: PreTrainedModel) -> LMHeadFunction | None:
    """What was registered for the model's class, the nearest of its bases, or its model_type."""
    for name in (*type(model).__mro__, model.config.get_text_config().model_type):
        if name in _registered:
            return _registered[name]
    return None


def lm_head(model: PreTrainedModel, hidden: Tensor) -> LMHead:
    """The model's head over last hidden states [n, H]. Raises ValueError for a head that the ops cannot take."""
    head = (registered_lm_head(model) or configured_lm_head)(model, hidden)
    for x in (head.weight, head.bias):
        if x is not None and (type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point()):
            raise unsupported(
                model, f"its head's weight is a {type(x).__name__} of {x.dtype}, not a plain float tensor"
            )
    if head.weight.shape[-1] != head.hidden.shape[-1]:
        sizes = f"{head.weight.shape[-1]} numbers, its last hidden state has {head.hidden.shape[-1]}"
        raise unsupported(model, f"its head takes {sizes}")
    if not head.scale > 0 or not (head.softcap is None or head.softcap > 0):
        raise unsupported(model, f"scale={head.scale} and softcap={head.softcap} must be greater than 0")
    return head


def configured_lm_head(model: PreTrainedModel, hidden: Tensor) -> LMHead:
    """A linear head with the scale and the softcap that the model's configuration names."""
    config = model.config.get_text_config()
    scale = 1.0
    for name, divides in SCALES.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            scale = scale / value if divides else scale * value
    return linear_lm_head(model, hidden)._replace(scale=scale, softcap=getattr(config, SOFTCAP, None))


def linear_lm_head(model: PreTrainedModel, hidden: Tensor) -> LMHead:
    """The product of the model's output embeddings alone, with or without adapters of peft on them."""
    return _product(model, model.get_output_embeddings(), hidden)


def _product(model: PreTrainedModel, layer: nn.Module | None, hidden: Tensor) -> LMHead:
    if layer is None:
        raise unsupported(model, "it has no LM head")
    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        inner = layer.original_module if layer.disable_adapters or not active else layer.modules_to_save[active[0]]
        return _product(model, inner, hidden)
    if isinstance(layer, LoraLinear):
        return _with_lora(model, layer, _product(model, layer.get_base_layer(), hidden))
    if not isinstance(layer, nn.Linear):
        raise unsupported(
            model, f"its head is a {type(layer).__module__}.{type(layer).__name__}, not a torch.nn.Linear"
        )
    return LMHead(hidden.to(layer.weight.dtype), layer.weight, layer.bias)  # Mamba's is fp32 over a bf16 head


def _with_lora(model: PreTrainedModel, layer: LoraLinear, head: LMHead) -> LMHead:
    """x W^T + s (x A^T) B^T as one product, [x, x A^T] [W, s B]^T: W + s B A would round small adapters away in bf16.

    Costs a copy of W, and the gradient of all of [W, s B].
    """
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as peft's forward does
    if layer.disable_adapters or layer.merged:
        return head
    hidden, weight, bias = [head.hidden], [head.weight], head.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            raise unsupported(model, f"its head has a {type(layer.lora_variant[name]).__name__} of peft")
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        low = a(layer.lora_dropout[name](head.hidden.to(a.weight.dtype)))
        hidden.append(low.to(head.hidden.dtype))
        weight.append((scaling * b.weight).to(head.weight.dtype))
        if b.bias is not None:
            more = (scaling * b.bias).to(head.weight.dtype)
            bias = more if bias is None else bias + more
    return head._replace(hidden=torch.cat(hidden, -1), weight=torch.cat(weight, -1), bias=bias)


def unsupported(model: nn.Module, why: str) -> ValueError:
    name = type(model).__name__
    return ValueError(
        f"model: how the logits of {name} come from its last hidden state is not known: {why}. Say how with "
        f"fastrlhf.trainers.register_lm_head({name}, function), or set lm_head='logits' to let the model compute its "
        "logits itself, at every position and with all of them in memory."
    )


def _multiplied(model: PreTrainedModel, hidden: Tensor) -> LMHead:
    return linear_lm_head(model, hidden)._replace(scale=model.config.get_text_config().logits_scaling)


register_lm_head("hyperclovax", _multiplied)  # by what divides in Granite
