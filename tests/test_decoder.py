"""The decoder: every architecture against its own model in fp64, LoRA, what is refused, packed linear layers."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from causal_models import (
    MODELS,
    VOCABULARY,
    WINDOW,
    assert_as_good_as_own,
    build,
    in_fp64,
    logits_of,
    randomised,
    rms,
)
from oracle import EPS, assert_as_good_as_eager, same_bits
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from fastrlhf import backends
from fastrlhf.functional.decoding import PAGE
from fastrlhf.rollout import NotDrivenError
from fastrlhf.rollout.architectures import specification
from fastrlhf.rollout.decoder import Decoder
from fastrlhf.rollout.linears import ACTIVATIONS, NORMS, PANEL

ops = torch.ops.fastrlhf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (37, 1, 16, 33)  # all but one longer than the windows
SERVED_BY = backends.backend_table()["paged_attention"]["cpu"]
kernel_only = pytest.mark.skipif(SERVED_BY == "reference", reason="only the kernels run over packed weights")


def sequences(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def own_logits(model: nn.Module) -> Tensor:
    """All logits of the model itself, of one sequence at a time [N, V]."""
    return torch.cat([logits_of(model, row) for row in sequences()])


def exact_logits(model: nn.Module) -> Tensor:
    model = in_fp64(model)
    return torch.cat([logits_of(model, row) for row in sequences()])


def prepared(model: nn.Module, dtype: torch.dtype, rows) -> tuple[Decoder, Tensor]:
    """With a cache whose pages lie in any order, and the table of them."""
    decoder = Decoder(model, dtype)
    decoder.update()
    most = -(-max(map(len, rows)) // PAGE)
    decoder.allocate(len(rows) * most, max(map(len, rows)))
    for keys, values in decoder.cache:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    return decoder, torch.randperm(len(rows) * most).int().view(len(rows), most)


def decoded_logits(model: nn.Module, dtype: torch.dtype, rows=None, pieces=((0, 1000),)) -> Tensor:
    """All logits of the decoder [N, V], sequence after sequence, positions [begin, end) of all of them in a call."""
    rows = rows or sequences()
    decoder, pages = prepared(model, dtype, rows)
    results = [[] for _ in rows]
    for begin, end in pieces:
        parts = [row[begin:end] for row in rows]
        where = [(token, s, begin + i) for s, part in enumerate(parts) for i, token in enumerate(part)]
        logits = decoder.logits(decoder(*torch.tensor(where).T.contiguous(), pages))
        for result, part in zip(results, logits.split([len(part) for part in parts]), strict=True):
            result.append(part)
    return torch.cat([torch.cat(result) for result in results])


# --------------------------------------------------------------------------------------------------- architectures


@functools.cache
def measured(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    model = build(name).to(dtype)
    return model, exact_logits(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_model(name, dtype):
    """Several sequences in one call, and single tokens after them."""
    model, exact = measured(name, dtype)
    assert_as_good_as_own(decoded_logits(model, dtype), own_logits(model), exact)


SINGLE = ((0, 3), (3, 17), *((i, i + 1) for i in range(17, 37)))


@kernel_only
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_one_by_one_and_alone_have_the_same_bits(name, dtype):
    model = measured(name, torch.float32)[0]
    whole = decoded_logits(model, dtype)
    assert whole.isfinite().all()
    assert same_bits(decoded_logits(model, dtype, pieces=SINGLE), whole)
    alone = [decoded_logits(model, dtype, [row]) for row in sequences()]
    assert same_bits(torch.cat(alone), whole)


def test_a_model_in_fp32_may_be_decoded_in_16_bits():
    """With errors of the size that the model itself has there."""
    model, exact = measured("llama", torch.float32)
    for dtype in DTYPES[1:]:
        ours, own = decoded_logits(model, dtype), own_logits(copy.deepcopy(model).to(dtype))
        assert EPS < rms(ours - exact) <= 2 * rms(own - exact)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama 3 rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("qwen2 with windows", {"max_window_layers": 2}),
        ("gemma2", {"attn_logit_softcapping": 2.5}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gpt2 with scales by layer", {"scale_attn_by_inverse_layer_idx": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ],
)
def test_the_bound_sees_the_features_of_an_architecture(name, change):
    """The decoder of a model that differs by one of them is outside of it."""
    model, exact = measured(name, torch.float32)
    other = build(name, **change)
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        assert_as_good_as_own(decoded_logits(other, torch.float32), own_logits(model), exact)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_angles_are_made_in_fp32_on_the_device_of_the_model(name):
    model = build(name).bfloat16().to("meta")
    for rope in specification(model).ropes.values():
        for angles in rope(torch.arange(7, device="meta")[None]):
            assert (angles.device.type, angles.dtype, angles.shape[:2]) == ("meta", torch.float32, (1, 7))


# ------------------------------------------------------------------------------------------------------- refused


def test_an_architecture_that_is_not_known_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(NotDrivenError, match=r"BloomForCausalLM.*not 'bloom'.*rollout_engine='transformers'"):
        Decoder(model, torch.float32)


ROPE = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "rope_type='dynamic'"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "rope_type='dynamic'"),
        ("llama", {"hidden_act": "relu"}, "it knows the activations .*gelu.*, not 'relu'"),
        ("gpt2", {"activation_function": "quick_gelu"}, "not 'quick_gelu'"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
    ],
)
def test_what_an_architecture_may_have_and_the_decoder_has_not(name, change, message):
    model = build(name, **change)
    with pytest.raises(NotDrivenError, match=message):
        Decoder(model, torch.float32).check()


class RoundedLinear(nn.Linear):
    """As a quantised layer would be: of its weight it makes another one."""

    def forward(self, x):
        step = self.weight.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


class OddTensor(Tensor):
    """As some quantised weights are: a tensor in name, and something else in memory."""


def round_linear(model):
    model.model.layers[1].mlp.down_proj.__class__ = RoundedLinear


def replace_weight(model):
    linear = model.model.layers[0].self_attn.k_proj
    del linear.weight
    linear.weight = linear.weight_of_its_own = torch.randn(24, 48).as_subclass(OddTensor)


def quantise(model):
    layer = model.model.layers[0].self_attn
    layer.q_proj = torch.ao.nn.quantized.dynamic.Linear(48, 48)


def scale_logits(model):
    """As Granite does."""
    model.lm_head.register_forward_hook(lambda module, args, output: output / 3)


def scale_residual(model):
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: output * 0.8)


def drop_a_norm(model):
    model.model.layers[1].input_layernorm.forward = lambda x: x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (round_linear, "RoundedLinear for a linear layer"),
        (replace_weight, "OddTensor for a weight"),
        (quantise, "torch.ao.nn.quantized.*for a linear layer"),
        (scale_logits, "its logits are not what the decoder makes of its weights"),
        (scale_residual, "its logits are not what"),
        (drop_a_norm, "its logits are not what"),
    ],
)
def test_models_that_are_not_what_their_configuration_says(change, message, dtype):
    model = build("llama").to(dtype)
    Decoder(model, dtype).check()
    change(model)
    with pytest.raises(NotDrivenError, match=message):
        Decoder(model, dtype).check()


def test_attention_in_both_directions_is_refused():
    with pytest.raises(NotDrivenError, match="its logits are not what"):
        Decoder(build("gemma3", use_bidirectional_attention=True), torch.float32).check()


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_model_as_it_was(training):
    """And does not take dropout for another model."""
    model = build("gpt2").train(training)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    Decoder(model, torch.float32).check()
    assert model.training == training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- LoRA adapters


def with_adapter(name: str = "llama", **options):
    """A model with its adapter, which changes it as much as its weights do."""
    base = build(name)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, **options)).eval()
    shake(model)
    return base, model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Another state of the adapters; what they begin with changes nothing."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
            parameter += 0.1 * torch.randn_like(parameter)


def assert_follows(base: nn.Module, model: nn.Module) -> None:
    """The decoder of the model inside gives the logits of the one with the adapter."""
    assert_as_good_as_own(decoded_logits(base, torch.float32), own_logits(model), exact_logits(model))


SOME = ["q_proj", "v_proj", "up_proj"]
ADAPTERS = {
    "some": ("llama", {"target_modules": SOME}),
    "all": ("qwen3", {"target_modules": "all-linear"}),
    "biases of its own": ("llama", {"target_modules": SOME, "lora_bias": True}),
    "biases beside biases": ("llama with biases", {"target_modules": SOME, "lora_bias": True}),
    "biases of the model": ("llama with biases", {"target_modules": SOME, "bias": "all"}),
    "another scale": ("llama", {"target_modules": SOME, "use_rslora": True}),
    "ranks by layer": (
        "llama",
        {"target_modules": SOME, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}},
    ),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("llama tied", {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embeddings": ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "saved head": ("llama", {"target_modules": SOME, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norms": ("gemma3", {"target_modules": SOME, "modules_to_save": ["norm", "q_norm", "input_layernorm"]}),
    "saved mlp": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"], "lora_bias": True}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_at_work(adapter):
    name, options = ADAPTERS[adapter]
    base, model = with_adapter(name, **options)
    assert rms(own_logits(model) - own_logits(build(name))) > 0.05
    assert_follows(base, model)


@pytest.mark.parametrize("adapter", ["some", "head", "saved norms", "saved head", "saved mlp", "gpt2"])
def test_adapters_may_be_disabled_and_merged(adapter):
    name, options = ADAPTERS[adapter]
    base, model = with_adapter(name, **options)
    decoder = Decoder(base, torch.float32)
    with model.disable_adapter():
        assert_follows(base, model)
        decoder.check()
    decoder.check()
    model.merge_adapter()
    assert_follows(base, model)
    with model.disable_adapter():
        assert_follows(base, model)
    decoder.check()


def test_several_adapters():
    base, model = with_adapter(target_modules=SOME)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    shake(model)
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        assert_follows(base, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_that_came_after_the_decoder(name):
    """And one that has gone."""
    base = build(name)
    decoder = Decoder(base, torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2")).eval()
    shake(model)
    decoder.check()
    merged = model.merge_and_unload()
    shake(merged)
    decoder.check()


def test_adapters_in_another_dtype_than_the_model():
    base = build("llama").bfloat16()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).eval()
    shake(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    ours = decoded_logits(base, torch.bfloat16)
    assert rms(ours - exact_logits(model)) <= 2 * rms(own_logits(model) - exact_logits(model))


def test_adapters_of_another_kind_are_refused():
    base, _ = with_adapter(target_modules=["q_proj"], use_dora=True)
    with pytest.raises(NotDrivenError, match="DoraLinearVariant of peft"):
        Decoder(base, torch.float32).check()
    base = build("llama")
    get_peft_model(base, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    with pytest.raises(NotDrivenError, match=r"peft\.tuners\.ia3.*for a linear layer"):
        Decoder(base, torch.float32).check()


def test_weights_that_changed_are_seen():
    model = build("gemma2")
    decoder = Decoder(model, torch.float32)
    for seed in range(2):
        randomised(model, seed + 5)
        decoder.check()


# ------------------------------------------------------------------------------------------- packed linear layers

NUMBERS = (0, 1, 5, 6, 7, 47, 48, 49, 200)  # of rows of x, around the blocks of the kernel
K_AND_ROWS = ((1, 1), (1, 65), (2, 64), (3, 63), (17, 128), (64, 130), (577, 40), (1500, 70))


class Packed:
    """A linear layer with random weights, packed and as it came."""

    def __init__(self, columns, width, dtype=torch.float32, *, norm=None, activation=None, bias=False, gated=False):
        self.dtype, self.norm, self.activation, self.gated = dtype, norm, activation, gated
        self.weights = [torch.randn(width, columns) / columns**0.5 for _ in range(2 if gated else 1)]
        self.biases = [torch.randn(width) if bias else None for _ in self.weights]
        self.norm_weight = 1 + 0.3 * torch.randn(columns) if norm else None
        self.norm_bias = 0.3 * torch.randn(columns) if norm == "layer" else None
        self.packed = pack(*self.weights, dtype=dtype)

    def add_to(self, out: Tensor, x: Tensor, adds: bool = False) -> Tensor:
        bias = None if self.biases[0] is None else torch.cat(self.biases)
        norm = (NORMS[self.norm], self.norm_weight, self.norm_bias, 1e-3 if self.norm else 0.0)
        ops.packed_linear_(out, x, self.packed, bias, *norm, ACTIVATIONS[self.activation], self.gated, adds)
        return out

    def __call__(self, x: Tensor) -> Tensor:
        return self.add_to(torch.full((len(x), len(self.weights[0])), torch.nan), x)

    def oracle(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype` all through, from the weights as they are packed."""
        x = x.to(dtype)
        if self.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        if self.norm:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * self.norm_weight.to(dtype)
        if self.norm_bias is not None:
            x = x + self.norm_bias.to(dtype)
        parts = [x @ w.to(self.dtype).to(dtype).T for w in self.weights]
        parts = [y if b is None else y + b.to(dtype) for y, b in zip(parts, self.biases, strict=True)]
        gelu = nn.functional.gelu
        functions = {None: lambda y: y, "silu": nn.functional.silu, "gelu": gelu}
        functions["gelu_tanh"] = functools.partial(gelu, approximate="tanh")
        self.largest = max(y.abs().max().item() for y in parts)
        self.spread = max((x.square() @ w.to(dtype).square().T).max().sqrt().item() for w in self.weights)
        y = functions[self.activation](parts[0])
        return y * parts[1] if self.gated else y

    def compare(self, x: Tensor, ours: Tensor, before: Tensor | None = None) -> None:
        """Each of K roundings is half an EPS of a sum that is no larger than the results: as a random walk, six of its
        standard deviations. The activations are good to 8 EPS. A processor that multiplies bf16 gets x in bf16: six
        standard deviations of that too. A gated result has the errors of one factor times the other."""
        exact = self.oracle(x, torch.float64)
        slack = (8 + 3 * x.shape[1] ** 0.5) * EPS * self.largest
        if self.dtype == torch.bfloat16:
            slack += 2 * torch.finfo(self.dtype).eps * self.spread
        if self.gated:
            slack *= max(1.0, self.largest)
        eager = self.oracle(x, self.dtype)
        if before is not None:
            exact, eager = exact + before, before + eager
            slack += EPS * before.abs().max().item()
        assert_as_good_as_eager(ours, eager, exact, slack)


def pack(*weights: Tensor, dtype=torch.float32) -> Tensor:
    """Weights of one size, panel by panel in turn; what the memory held before is nan."""
    rows, columns = weights[0].shape
    panels = -(-rows // PANEL)
    packed = torch.full((len(weights) * panels, PANEL * (columns + columns % 2)), torch.nan, dtype=dtype)
    for i, weight in enumerate(weights):
        ops.pack_weight_(packed, weight, i, len(weights))
    return packed


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", NUMBERS)
def test_packed_products(n, dtype):
    for columns, width in K_AND_ROWS:
        linear, x = Packed(columns, width, dtype), torch.randn(n, columns)
        ours = linear(x)
        assert ours.shape == (n, width)
        if n:
            linear.compare(x, ours)


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_norms_activations_biases_and_what_is_added_to(norm, activation, gated, dtype):
    for n, columns, width in ((7, 50, 70), (49, 33, 129), (1, 3, 5)):
        for bias in (False, True):
            linear = Packed(columns, width, dtype, norm=norm, activation=activation, bias=bias, gated=gated)
            x, before = 2 * torch.randn(n, columns) + 1, torch.randn(n, width)
            linear.compare(x, linear(x))
            linear.compare(x, linear.add_to(before.clone(), x, adds=True), before)


@kernel_only
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_far_out(activation):
    """K = 1 and a weight of 1 give the activation of x itself."""
    linear = Packed(1, 1, activation=activation)
    linear.weights = [torch.ones(1, 1)]
    linear.packed = pack(*linear.weights)
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e30, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e30])])
    ours, exact = linear(x[:, None]).double(), linear.oracle(x[:, None], torch.float64)
    assert ((ours - exact).abs() <= 8 * EPS * x[:, None].double().abs().clamp(max=1) + 8 * EPS * exact.abs()).all()


@kernel_only
def test_rows_of_any_size_are_normed():
    for norm in ("rms", "layer"):
        linear = Packed(96, 64, norm=norm)
        for size in (1e-3, 1.0, 1e4, 1e15):
            x = size * torch.randn(5, 96)
            linear.compare(x, linear(x))
        exact = linear.oracle(torch.zeros(1, 96), torch.float64)
        torch.testing.assert_close(linear(torch.zeros(1, 96)).double(), exact, rtol=1e-5, atol=1e-6)


@kernel_only
def test_strided_rows_in_and_out():
    linear, x = Packed(33, 70, norm="rms", bias=True), torch.randn(9, 33)
    expected = linear(x)
    wide = torch.full((18, 40), torch.nan)
    wide[::2, 3:36] = x
    out = torch.full((18, 80), 7.0)
    linear.add_to(out[::2, 5:75], wide[::2, 3:36])
    assert same_bits(out[::2, 5:75].contiguous(), expected)
    out[::2, 5:75] = 7.0
    assert (out == 7.0).all()
    assert same_bits(linear(x[:1].expand(9, -1)), expected[:1].expand(9, -1).contiguous())


@kernel_only
def test_strided_weights_and_several_side_by_side():
    """A weight's rows may lie anywhere; each begins a panel."""
    weights = [torch.randn(rows, 20) for rows in (128, 64, 70)]
    wide = torch.full((262, 50), torch.nan)
    wide[:, 7:27] = torch.cat(weights)
    packed = torch.empty(5, PANEL * 20)
    first = 0
    for weight in (wide[:128, 7:27], wide[128:192, 7:27], wide[192:, 7:27]):
        ops.pack_weight_(packed, weight, first, 1)
        first += -(-len(weight) // PANEL)
    assert same_bits(packed, pack(torch.cat(weights)))
    assert same_bits(pack(weights[0].T.contiguous().T.contiguous()), pack(weights[0]))


@kernel_only
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_packing_rounds_as_torch_does(source, target):
    """The packed numbers, in any order, are those of the weight, and zeros where there are none."""
    bits = {2: torch.int16, 4: torch.int32}
    every = torch.arange(-(2**15), 2**15).short()
    numbers = {
        torch.float32: torch.randint(-(2**31), 2**31, (2**16,)).int().view(torch.float32),
        torch.bfloat16: every.view(torch.bfloat16),
        torch.float16: every.view(torch.float16),
    }[source]
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-45]).to(
        source
    )
    weight = torch.cat([numbers[~numbers.isnan()], edges])
    weight = weight[: len(weight) // 62 * 62].view(-1, 62)
    packed = pack(weight, dtype=target)
    expected = torch.zeros_like(packed).flatten()
    expected[: weight.numel()] = weight.to(target).flatten()
    ours, expected = (x.flatten().view(bits[x.element_size()]).sort().values for x in (packed, expected))
    assert torch.equal(ours, expected)
    assert pack(torch.full((3, 2), torch.nan, dtype=source), dtype=target).isnan().sum() == 6


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_lies_where_it_belongs(dtype):
    """Rows of the unit matrix pick the columns of a weight."""
    weight = torch.randn(130, 67).to(dtype).float()
    linear = Packed(67, 130, dtype)
    linear.packed = pack(weight, dtype=dtype)
    assert torch.equal(linear(torch.eye(67)), weight.T)
    linear = Packed(67, 130, dtype, gated=True)
    linear.packed = pack(weight, torch.ones(130, 67), dtype=dtype)
    assert torch.equal(linear(torch.eye(67)), weight.T)


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_batch_nor_the_threads_change_a_bit(dtype):
    """Of a product large enough to be cut into pieces."""
    linear = Packed(577, 1000, dtype, norm="layer", activation="gelu", bias=True, gated=True)
    x = torch.randn(200, 577)
    expected, before = linear(x), torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(linear(x), expected)
    torch.set_num_threads(before)
    for begin, end in ((0, 1), (3, 8), (10, 16), (20, 27), (100, 147), (100, 148), (199, 200)):
        assert same_bits(linear(x[begin:end]), expected[begin:end])
    order = torch.randperm(200)
    assert same_bits(linear(x[order]), expected[order])


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(dtype):
    linear, x = Packed(50, 70, dtype, norm="rms"), torch.randn(8, 50)
    expected = linear(x)
    x[2, 7], x[5] = torch.nan, torch.inf
    ours, good = linear(x), torch.tensor([0, 1, 3, 4, 6, 7])
    assert ours[2].isnan().all()
    assert not ours[5].isfinite().any()
    assert same_bits(ours[good], expected[good])


def call_of_packed_linear(**change):
    """A gated layer of 20 columns and 70 rows."""
    arguments = {
        "out": torch.zeros(3, 70),
        "x": torch.zeros(3, 20),
        "packed": torch.zeros(4, PANEL * 20),
        "bias": torch.zeros(140),
        "norm": 2,
        "norm_weight": torch.zeros(20),
        "norm_bias": torch.zeros(20),
        "eps": 1e-5,
        "activation": 1,
        "gated": True,
        "adds": False,
    }
    ops.packed_linear_(*(arguments | change).values())


@kernel_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 20).bfloat16()}, "x: wanted"),
        ({"x": torch.zeros(20)}, "x: wanted"),
        ({"x": torch.zeros(3, 0)}, "x: wanted"),
        ({"x": torch.zeros(20, 3).T}, "x: wanted"),
        ({"x": torch.zeros(3, 21)}, "packed: wanted"),
        ({"out": torch.zeros(2, 70)}, "out: wanted"),
        ({"out": torch.zeros(3, 70).double()}, "out: wanted"),
        ({"out": torch.zeros(70, 3).T}, "out: wanted"),
        ({"out": torch.zeros(3, 0)}, "out: wanted"),
        ({"out": torch.zeros(3, 129), "bias": torch.zeros(258)}, "packed: wanted"),
        ({"out": torch.zeros(3, 64), "bias": torch.zeros(128)}, "packed: wanted"),
        ({"packed": torch.zeros(2, PANEL * 20)}, "packed: wanted"),
        ({"gated": False}, "packed: wanted"),
        ({"packed": torch.zeros(4, PANEL * 40)[:, : PANEL * 20]}, "packed: wanted"),
        ({"packed": torch.zeros(4, PANEL * 20).double()}, "packed: "),
        ({"bias": torch.zeros(70)}, "bias: wanted"),
        ({"bias": torch.zeros(140).half()}, "bias: wanted"),
        ({"norm_weight": torch.zeros(21)}, "norm_weight: wanted"),
        ({"norm_weight": torch.zeros(40)[::2]}, "norm_weight: wanted"),
        ({"norm_bias": torch.zeros(19)}, "norm_bias: wanted"),
        ({"norm": 3}, "norm, activation: wanted"),
        ({"norm": -1}, "norm, activation: wanted"),
        ({"activation": 4}, "norm, activation: wanted"),
    ],
)
def test_what_does_not_fit_is_a_value_error(change, message):
    call_of_packed_linear()
    with pytest.raises(ValueError, match=message):
        call_of_packed_linear(**change)


@kernel_only
@pytest.mark.parametrize(
    ("packed", "weight", "first", "step", "message"),
    [
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 5), 0, 1, "packed: wanted"),
        (torch.zeros(1, PANEL * 4), torch.zeros(70, 3), 0, 1, "packed: wanted"),
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 3), 1, 1, "packed: wanted"),
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 3), 0, 2, "packed: wanted"),
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 3), -1, 1, "packed: wanted"),
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 3), 0, 0, "packed: wanted"),
        (torch.zeros(4, PANEL * 4)[::2], torch.zeros(70, 3), 0, 1, "packed: wanted"),
        (torch.zeros(2, PANEL * 4).double(), torch.zeros(70, 3), 0, 1, "packed: "),
        (torch.zeros(2, PANEL * 4), torch.zeros(70, 3).double(), 0, 1, "weight: "),
        (torch.zeros(2, PANEL * 4), torch.zeros(70), 0, 1, "weight: wanted"),
        (torch.zeros(2, PANEL * 4), torch.zeros(3, 70).T, 0, 1, "weight: "),
        (torch.zeros(2, PANEL * 4), torch.zeros(0, 3), 0, 1, "weight: wanted"),
    ],
)
def test_weights_that_cannot_be_packed(packed, weight, first, step, message):
    ops.pack_weight_(torch.zeros(2, PANEL * 4), torch.zeros(70, 3), 0, 1)
    with pytest.raises(ValueError, match=message):
        ops.pack_weight_(packed, weight, first, step)


@kernel_only
@pytest.mark.parametrize("capability", ["avx512", "avx2", "portable"])
def test_the_other_builds(capability):
    if f"({capability})" in SERVED_BY:
        pytest.skip("this is the build the other tests ran")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    architectures = "(logits_are or same_bits) and (gemma3 or neox or upcast)"
    command += [
        "-k",
        f"packed_products or norms_act or far_out or any_size or strided or rounds or belongs or {architectures}",
    ]
    environment = os.environ | {"FASTRLHF_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "FASTRLHF_CPU_CAPABILITY: got" in run.stdout + run.stderr:
        pytest.skip(f"no {capability} here")
    assert run.returncode == 0, run.stdout[-2000:]
