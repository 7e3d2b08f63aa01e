"""One tiny model of each kind that the native engine drives, with weights that are all random: norms and biases too."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from oracle import EPS, assert_as_good_as_eager
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOW = 10
HALF_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "resid_pdrop": 0.3,
}
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {**SIZES, "head_dim": 12, "query_pre_attn_scalar": 20}

# name: model type of transformers, options of its configuration
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SIZES),
    "llama tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {**SIZES, "rope_parameters": LLAMA3_ROPE}),
    "llama yarn": ("llama", {**SIZES, "rope_parameters": YARN_ROPE}),
    "llama with wide heads": ("llama", {**SIZES, "head_dim": 32, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "mistral": ("mistral", {**SIZES, "sliding_window": WINDOW}),
    "mistral without window": ("mistral", {**SIZES, "sliding_window": None}),
    "qwen2": ("qwen2", SIZES),
    "qwen2 with windows": (
        "qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "qwen3 with windows": (
        "qwen3",
        {**SIZES, "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": HALF_WINDOWS},
    ),
    "gemma": ("gemma", {**SIZES, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "sliding_window": WINDOW,
            "layer_types": HALF_WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2 with scales by layer": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 100}),
    "gpt2 upcast": (
        "gpt2",
        {
            **GPT2,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "scale_attn_weights": False,
            "attn_implementation": "eager",
        },
    ),
    "gpt_neox": ("gpt_neox", {**NEOX, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gpt_neox in sequence": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
}


def build(name: str, seed: int = 0, **options) -> PreTrainedModel:
    """In fp32, for evaluation. options: of the configuration, over those of MODELS."""
    kind, sizes = MODELS[name]
    config = CONFIG_MAPPING[kind](**{**sizes, **options})
    return randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Matrices that keep the size of what goes through them, and vectors around what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter += 0.3 * noise
        else:
            parameter.copy_(noise / max(parameter.shape) ** 0.5 * 2)
    return model.eval()


class InFp64(TorchFunctionMode):
    """Models ask for fp32 in norms, softmaxes and rotary angles, whatever they are in: here they get fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def in_fp64(model: nn.Module) -> nn.Module:
    """A copy for `logits_of`."""
    model = copy.deepcopy(model).double().eval()
    # The one that upcasts refuses to be anything but fp32 between; in fp64 the two ways are the same.
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    return model


@torch.no_grad()
def logits_of(model: nn.Module, tokens: list[int]) -> Tensor:
    """By the model's own forward [N, V]; all in fp64 if it is in that."""
    with InFp64() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_good_as_own(ours: Tensor, own: Tensor, exact: Tensor) -> None:
    """Against what a model itself makes in its dtype and in fp64: at most twice its errors, taken together.

    The worst one hangs on which row came near a norm of zero and on which side a rounding fell there: for it, ten
    standard deviations of the model's errors more. What is next to no error at all is a few EPS of the numbers.
    """
    error, slack = rms(own - exact), 4 * EPS * exact.abs().max().item()
    assert rms(ours - exact) <= 2 * error + slack
    assert_as_good_as_eager(ours, own, exact, 10 * error + slack)
