"""fuse_layers: the same model in fewer passes, and no more than that."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from causal_models import MODELS, InFp64, build, in_fp64
from oracle import EPS, assert_as_good_as_eager
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastrlhf.fused_layers import fuse_layers

LENGTH = 19
# Of the three layers: norms (with the last one), MLPs, attentions that are fused.
LLAMA = {"RMSNorm": 7, "MLP": 3, "Attention": 3}
NORMS_OF_HEADS = {"RMSNorm": 13, "MLP": 3, "Attention": 3}
ROTATION_ALONE = {"Attention": 3}
NOTHING = {}
FUSED = {
    **dict.fromkeys(MODELS, LLAMA),
    **{name: NORMS_OF_HEADS for name in MODELS if name.startswith("qwen3")},
    **{name: ROTATION_ALONE for name in MODELS if name.startswith("gemma")},
    **{name: NOTHING for name in MODELS if name.startswith("gpt2")},
    **{name: ROTATION_ALONE for name in MODELS if name.startswith("gpt_neox")},
    "llama with wide heads": {"RMSNorm": 7, "Attention": 3},  # its activation is gelu
}


def fused_kinds(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        if "forward" in vars(module):
            kind = next(name for name in LLAMA if type(module).__name__.endswith(name))
            found[kind] = found.get(kind, 0) + 1
    return found


def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A sum over the logits, and the gradients of it."""
    logits = model(input_ids=tokens(), use_cache=False).logits
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused_and_what_it_gives(name):
    own = build(name)
    fused = fuse_layers(copy.deepcopy(own))
    assert fused_kinds(fused) == FUSED[name]
    assert fused_kinds(own) == {}
    with InFp64():
        exact_logits, exact = loss_and_gradients(in_fp64(own))
    logits, gradients = loss_and_gradients(fused)
    own_logits, own_gradients = loss_and_gradients(own)
    assert_as_good_as_eager(logits, own_logits, exact_logits, 64 * EPS * exact_logits.abs().max().item())
    assert gradients.keys() == own_gradients.keys()
    for key, grad in gradients.items():
        slack = 64 * EPS * exact[key].abs().max().item()
        assert_as_good_as_eager(grad, own_gradients[key], exact[key], slack, key)


def test_its_ops_are_at_work():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastrlhf":
                called.append(func._opname)
            return func(*args, **(kwargs or {}))

    model, called = fuse_layers(build("llama")), []  # it tries them, too
    with Calls():
        loss_and_gradients(model)
    wanted = {"rms_norm": 7, "swiglu": 3, "rotate": 12, "rms_norm_backward": 7, "swiglu_backward": 3}
    assert {name: called.count(name) for name in called} == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse(dtype):
    """On average, too: what is rounded once is nearer than what is rounded five times."""
    own = build("llama").to(dtype)
    fused = fuse_layers(copy.deepcopy(own))
    assert fused_kinds(fused) == LLAMA
    with InFp64():
        exact, _ = loss_and_gradients(in_fp64(own))

    def error(model: nn.Module) -> float:
        return (loss_and_gradients(model)[0].double() - exact).square().mean().sqrt().item()

    assert error(fused) <= error(own)


def test_autocast_goes_the_models_own_way_where_dtypes_differ():
    own = build("llama")
    fused = fuse_layers(copy.deepcopy(own))
    exact, _ = loss_and_gradients(own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = loss_and_gradients(fused)
        own_logits, own_gradients = loss_and_gradients(own)
    assert logits.dtype == own_logits.dtype
    assert gradients.keys() == own_gradients.keys()
    slack = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    assert_as_good_as_eager(logits, own_logits, exact, slack)


def test_another_dtype_than_the_weights_had():
    own = build("llama")
    fused = fuse_layers(copy.deepcopy(own)).double()
    torch.testing.assert_close(fused(tokens()).logits, own.double()(tokens()).logits, rtol=0, atol=0)


def test_generating_with_a_cache():
    own = build("qwen3")
    fused = fuse_layers(copy.deepcopy(own))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(fused.generate(tokens(), **options), own.generate(tokens(), **options))


def test_old_names_of_arguments_reach_the_models_own_forward():
    """transformers rename what they once were called, in a wrapper that the fused forward has not."""
    model = fuse_layers(build("llama"))
    hidden, cache = torch.randn(1, 5, 48), DynamicCache(config=model.config)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None])
    model.model.layers[0].self_attn(hidden_states=hidden, position_embeddings=angles, past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_copies_and_pickles_stand_alone():
    model = fuse_layers(build("llama"))
    twin = copy.deepcopy(model)
    assert fused_kinds(twin) == LLAMA
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in vars(m))
    file = io.BytesIO()
    own = build("llama")
    torch.save(fuse_layers(own), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(tokens()).logits, own(tokens()).logits)


def test_fusing_twice_or_in_training_changes_nothing_more():
    model = build("llama").train()
    before = torch.get_rng_state()
    fuse_layers(model)
    forwards = [id(vars(m).get("forward")) for m in model.modules()]
    assert [id(vars(m).get("forward")) for m in fuse_layers(model).modules()] == forwards
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert "fastrlhf" not in modeling_llama.apply_rotary_pos_emb.__module__  # transformers' own is as it was


def test_activation_checkpointing_and_adapters():
    own = build("llama")
    fused = fuse_layers(copy.deepcopy(own)).train()
    expected = loss_and_gradients(own.train())
    fused.activation_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradients(fused)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-3, atol=1e-3)

    adapted = fuse_layers(get_peft_model(build("llama"), LoraConfig(r=2, target_modules="all-linear")))
    assert fused_kinds(adapted) == LLAMA
    _, gradients = loss_and_gradients(adapted)
    assert gradients
    assert all("lora" in name for name in gradients)


def test_what_only_looks_like_it_is_left_alone():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 0.5 * super().forward(hidden_states)

    class TwoArgumentMLP(LlamaMLP):
        def forward(self, x, scale):
            return scale * super().forward(x)

    class OtherMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = nn.Linear(4, 4)
            self.act_fn = nn.Tanh()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    config = build("llama").config
    for module in (
        HalfRMSNorm(8),
        GemmaRMSNorm(8),
        TwoArgumentMLP(config),
        OtherMLP(),
        nn.RMSNorm(8, 1e-6),
        nn.Linear(2, 2),
    ):
        fuse_layers(module)
        assert ("forward" in vars(module)) == isinstance(module, nn.RMSNorm), type(module).__name__
    with torch.device("meta"):
        assert "forward" not in vars(fuse_layers(LlamaRMSNorm(8)))
