"""What the layers of a transformers model are made of, in one vocabulary for all architectures the decoder drives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# By the names of transformers' ACT2FN; the values are the ones of the decoder's linear layers.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# The angles of these hang on the length of the sequence so far.
MOVING_ROPES = ("dynamic", "longrope")


class Affine(NamedTuple):
    """y = x weight^T + bias. weight: [rows, K]."""

    weight: Tensor
    bias: Tensor | None


# Read when they are needed, the module too: the model is in training, and peft puts its own modules in place of others.
Weights = Callable[[], Affine]


@dataclass
class NormSpec:
    """kind: "rms" or "layer". weights: a Norm's weight [H] and bias [H] or None, as they are now."""

    kind: str
    eps: float
    weights: Weights


@dataclass
class LayerSpec:
    """One block. gate is None where the MLP has no gate. `parallel`: attention and MLP both read the block's input."""

    norm: NormSpec
    qkv: list[Weights]
    output: Weights
    mlp_norm: NormSpec
    gate: Weights | None
    up: Weights
    down: Weights
    activation: str
    scale: float
    window: int = 0
    softcap: float | None = None
    rope: str | None = "all"
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    post_attention_norm: NormSpec | None = None
    post_mlp_norm: NormSpec | None = None
    parallel: bool = False


@dataclass
class ModelSpec:
    """A causal language model.

    embed: tokens [N], positions [N] -> [N, H]. ropes: kinds of layers -> positions [1, L] -> cos, sin [1, L, 2 r], of
    elements i and i + r. logit_softcap: of the head's logits, or None.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    layers: list[LayerSpec]
    final_norm: NormSpec
    head: Weights
    kv_heads: int
    head_dim: int
    hidden_size: int
    context: int | None
    ropes: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    logit_softcap: float | None = None


class NotDrivenError(ValueError):
    """The native engine has no decoder for a model."""

    def __init__(self, model: nn.Module, why: str) -> None:
        super().__init__(
            f"model: the native rollout engine cannot drive {type(model).__name__}: {why}. Use the engine "
            "'transformers' (rollout_engine='transformers' in PPOConfig), which calls the model's own generate"
        )


def linear_weights(model: nn.Module, module: nn.Module) -> Affine:
    """Weight and bias of a linear layer, with its active LoRA adapters added. Raises NotDrivenError for others."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        inner = module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]
        return linear_weights(model, inner)
    if isinstance(module, LoraLinear):
        return _with_lora(model, module)
    if type(module) is Conv1D:
        return _plain(model, module.weight.T, module.bias)
    # A subclass with a forward of its own, a quantised one say, makes something else of its weight.
    if type(module).forward is not nn.Linear.forward or not module.weight.is_floating_point():
        raise NotDrivenError(model, f"it has a {type(module).__module__}.{type(module).__name__} for a linear layer")
    return _plain(model, module.weight, module.bias)


def _plain(model: nn.Module, weight: Tensor, bias: Tensor | None) -> Affine:
    if isinstance(weight, DTensor):
        raise NotDrivenError(model, "its weights are sharded over devices")
    if type(weight) not in (Tensor, nn.Parameter):
        raise NotDrivenError(model, f"it has a {type(weight).__module__}.{type(weight).__name__} for a weight")
    return Affine(weight.detach(), None if bias is None else bias.detach())


def _with_lora(model: nn.Module, layer: LoraLinear) -> Affine:
    """W + s B A in fp32, where an adapter is at work."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    base = linear_weights(model, layer.get_base_layer())
    if layer.disable_adapters or layer.merged:
        return base
    weight, bias = base.weight.float(), base.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            raise NotDrivenError(model, f"it has a {type(layer.lora_variant[name]).__name__} of peft")
        delta = layer.get_delta_weight(name).float()
        weight = weight + (delta.T if layer.fan_in_fan_out else delta)
        more = layer.lora_B[name].bias
        if more is not None:
            more = layer.scaling[name] * more.detach().float()
            bias = more if bias is None else bias + more
    return Affine(weight.detach(), bias)


def specification(model: PreTrainedModel) -> ModelSpec:
    """Of a causal language model of transformers. Raises NotDrivenError for an architecture that is not known."""
    config = model.config
    known = _ARCHITECTURES.get(config.model_type)
    if known is None:
        raise NotDrivenError(model, f"it knows {', '.join(_ARCHITECTURES)}, not {config.model_type!r}")
    return known(model)


def _linear(model: nn.Module, parent: nn.Module, path: str) -> Weights:
    return lambda: linear_weights(model, attrgetter(path)(parent))


def _norm(model: nn.Module, parent: nn.Module, path: str, kind: str = "rms", plus_one: bool = False) -> NormSpec:
    module = attrgetter(path)(parent)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if eps is None:
        raise NotDrivenError(model, f"its {type(module).__name__} has no eps")

    def weights() -> Affine:
        module = attrgetter(path)(parent)
        weight, bias = module.weight, getattr(module, "bias", None)
        return _plain(model, weight.float() + 1 if plus_one else weight, bias)

    return NormSpec(kind, eps, weights)


def _activation(model: nn.Module, name: str) -> str:
    if name not in ACTIVATIONS:
        raise NotDrivenError(model, f"it knows the activations {', '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS[name]


def _head(model: PreTrainedModel) -> dict:
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return {"head": lambda: linear_weights(model, model.get_output_embeddings()), "logit_softcap": softcap}


def _check_rope(model: nn.Module, rope_type: str) -> None:
    if rope_type in MOVING_ROPES:
        raise NotDrivenError(model, f"its rotary angles change with the length of the text (rope_type={rope_type!r})")


def _like(positions: Tensor) -> Tensor:
    """What tells a model's rotary embedding on which device its angles go, and that they are fp32."""
    return torch.empty(0, dtype=torch.float32, device=positions.device)


def _llama_like(model: PreTrainedModel, plus_one: bool = False, post_norms: bool = False) -> ModelSpec:
    """Llama and the architectures that differ from it by norms, biases, windows and caps."""
    config, trunk = model.config, model.model

    def norm(parent: nn.Module, path: str) -> NormSpec:
        return _norm(model, parent, path, plus_one=plus_one)

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    by_kind = isinstance(getattr(trunk.rotary_emb, "rope_type", None), dict)  # Gemma 3 has other angles in its windows
    layers = []
    for layer, kind in zip(trunk.layers, kinds, strict=True):
        attention = layer.self_attn
        window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        layers.append(
            LayerSpec(
                norm=norm(layer, "input_layernorm"),
                qkv=[_linear(model, layer, f"self_attn.{name}_proj") for name in "qkv"],
                output=_linear(model, layer, "self_attn.o_proj"),
                mlp_norm=norm(layer, "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"),
                gate=_linear(model, layer, "mlp.gate_proj"),
                up=_linear(model, layer, "mlp.up_proj"),
                down=_linear(model, layer, "mlp.down_proj"),
                activation=_activation(model, activation),
                scale=attention.scaling,
                window=window or 0,
                softcap=getattr(attention, "attn_logit_softcapping", None),
                rope=kind if by_kind else "all",
                q_norm=norm(layer, "self_attn.q_norm") if hasattr(attention, "q_norm") else None,
                k_norm=norm(layer, "self_attn.k_norm") if hasattr(attention, "k_norm") else None,
                post_attention_norm=norm(layer, "post_attention_layernorm") if post_norms else None,
                post_mlp_norm=norm(layer, "post_feedforward_layernorm") if post_norms else None,
            )
        )
    if by_kind:
        for rope_type in trunk.rotary_emb.rope_type.values():
            _check_rope(model, rope_type)
        ropes = {kind: lambda at, kind=kind: trunk.rotary_emb(_like(at), at, kind) for kind in set(kinds)}
    else:
        _check_rope(model, trunk.rotary_emb.rope_type)
        ropes = {"all": lambda at: trunk.rotary_emb(_like(at), at)}
    return ModelSpec(
        embed=lambda tokens, positions: model.get_input_embeddings()(tokens),
        layers=layers,
        final_norm=norm(trunk, "norm"),
        kv_heads=config.num_key_value_heads,
        head_dim=trunk.layers[0].self_attn.head_dim,
        hidden_size=config.hidden_size,
        context=config.max_position_embeddings,
        ropes=ropes,
        **_head(model),
    )


def _gpt2(model: PreTrainedModel) -> ModelSpec:
    config, trunk = model.config, model.transformer
    if config.add_cross_attention:
        raise NotDrivenError(model, "it has cross attention")

    layers = [
        LayerSpec(
            norm=_norm(model, block, "ln_1", "layer"),
            qkv=[_linear(model, block, "attn.c_attn")],
            output=_linear(model, block, "attn.c_proj"),
            mlp_norm=_norm(model, block, "ln_2", "layer"),
            gate=None,
            up=_linear(model, block, "mlp.c_fc"),
            down=_linear(model, block, "mlp.c_proj"),
            activation=_activation(model, config.activation_function),
            scale=block.attn.scaling,
            rope=None,
        )
        for block in trunk.h
    ]
    return ModelSpec(
        embed=lambda tokens, positions: trunk.wte(tokens) + trunk.wpe(positions),
        layers=layers,
        final_norm=_norm(model, trunk, "ln_f", "layer"),
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        hidden_size=config.n_embd,
        context=config.n_positions,
        **_head(model),
    )


def _gpt_neox(model: PreTrainedModel) -> ModelSpec:
    config, trunk = model.config, model.gpt_neox
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def qkv(layer: nn.Module) -> Weights:
        """Its rows lie as [heads][q, k, v][head_dim]."""

        def reordered(x: Tensor) -> Tensor:
            return x.unflatten(0, (heads, 3, head_dim)).transpose(0, 1).flatten(0, 2)

        def read() -> Affine:
            weight, bias = linear_weights(model, layer.attention.query_key_value)
            return Affine(reordered(weight), None if bias is None else reordered(bias))

        return read

    layers = [
        LayerSpec(
            norm=_norm(model, layer, "input_layernorm", "layer"),
            qkv=[qkv(layer)],
            output=_linear(model, layer, "attention.dense"),
            mlp_norm=_norm(model, layer, "post_attention_layernorm", "layer"),
            gate=None,
            up=_linear(model, layer, "mlp.dense_h_to_4h"),
            down=_linear(model, layer, "mlp.dense_4h_to_h"),
            activation=_activation(model, config.hidden_act),
            scale=layer.attention.scaling,
            parallel=config.use_parallel_residual,
        )
        for layer in trunk.layers
    ]
    _check_rope(model, trunk.rotary_emb.rope_type)
    return ModelSpec(
        embed=lambda tokens, positions: model.get_input_embeddings()(tokens),
        layers=layers,
        final_norm=_norm(model, trunk, "final_layer_norm", "layer"),
        kv_heads=heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        context=config.max_position_embeddings,
        ropes={"all": lambda at: trunk.rotary_emb(_like(at), at)},
        **_head(model),
    )


_ARCHITECTURES: dict[str, Callable[[PreTrainedModel], ModelSpec]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma": lambda model: _llama_like(model, plus_one=True),
    "gemma2": lambda model: _llama_like(model, plus_one=True, post_norms=True),
    "gemma3_text": lambda model: _llama_like(model, plus_one=True, post_norms=True),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
