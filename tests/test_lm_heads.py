"""Scored tokens of every kind of LM head: the model's own numbers, without its logits."""

import copy
import re

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager
from peft import LoraConfig, get_peft_model
from recorder import Recorder
from tiny import tiny_config
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastrlhf import functional as F
from fastrlhf import reference
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.trainers import linear_lm_head, lm_heads, register_lm_head
from fastrlhf.trainers.ppo.actor_critic import ActorCritic
from fastrlhf.trainers.token_scorer import TokenScorer

TEMPERATURE = 0.7
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # logits of a few units, large enough to be capped
    "pad_token_id": 2,
}


def llama(tied=False):
    config = tiny_config()
    config.initializer_range, config.tie_word_embeddings = SMALL["initializer_range"], tied
    return LlamaForCausalLM(config)


def gpt2():
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, **options))


def phi():
    model = PhiForCausalLM(PhiConfig(**SMALL))
    nn.init.normal_(model.lm_head.bias)
    return model


def falcon_h1():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SMALL, **mamba, lm_head_multiplier=2.0))


MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "phi, with a bias": phi,
    "gemma 2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "cohere, multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=2.0)),
    "granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.5)),
    "falcon h1, multiplied": falcon_h1,
    "hyperclovax, multiplied": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SMALL, logits_scaling=2.0)),
}


@pytest.fixture(params=MODELS)
def model(request):
    set_seed(0)
    return MODELS[request.param]().eval()


def batch():
    """input_ids [2, 7], the second row padded by two; positions; the tokens predicted there."""
    input_ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([1, 2, 3, 4, 5, 7, 8, 9, 10])
    return input_ids, positions, input_ids.flatten()[positions + 1]


def from_logits(model, dtype=None, temperature=TEMPERATURE):
    """Log-probs and entropies by log_softmax of the model's own logits."""
    input_ids, positions, tokens = batch()
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]
    log_p = (logits.to(dtype or torch.float32) / temperature).log_softmax(-1)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def constants():
    generator = torch.Generator().manual_seed(2)
    old, advantages = torch.randn(2, 9, generator=generator)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0])
    return 0.3 * old - 6.0, advantages, mask


LOSSES = {
    "log-probs and entropies": (
        lambda scored: sum((x * w).sum() for x, w in zip(scored.log_probs_and_entropy(), constants(), strict=False)),
        lambda log_probs, entropy: sum((x * w).sum() for x, w in zip((log_probs, entropy), constants(), strict=False)),
    ),
    "cross-entropy": (
        lambda scored: scored.cross_entropy(denominator=20.0)[0],
        lambda log_probs, entropy: -log_probs.sum() / 20.0,
    ),
    "ppo": (
        lambda scored: scored.ppo_loss(*constants(), entropy_coef=0.1, denominator=20.0)[0],
        lambda log_probs, entropy: reference.ppo_loss(
            log_probs, *constants(), entropy=entropy, entropy_coef=0.1, denominator=torch.tensor(20.0)
        )[0],
    ),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Of a log-prob: four roundings of logits of up to 10 in fp32. A gradient is as wrong as the probabilities and ratios in
# it, whose relative error is a log-prob's absolute one.
SLACK = 4 * EPS * 10


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
def test_log_probs_and_entropies_are_the_models_own(model, lm_head):
    ours = TokenScorer(model, lm_head)(*batch(), TEMPERATURE)
    exact = from_logits(copy.deepcopy(model).double(), torch.float64)
    for name, mine, eager, wanted in zip(("log_probs", "entropy"), ours, from_logits(model), exact, strict=True):
        assert wanted.std() > 0.05
        assert_as_good_as_eager(mine, eager, wanted, SLACK, name)


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_models_own(model, loss, lm_head):
    of_scored, of_numbers = LOSSES[loss]
    fuse_layers(model)  # as the scorer does: it is the head that is judged
    double = copy.deepcopy(model).double()
    exact_loss = of_numbers(*from_logits(double, torch.float64))
    exact = gradients(double, exact_loss)
    eager_loss = of_numbers(*from_logits(model))
    eager = gradients(model, eager_loss)
    our_loss = TokenScorer(model, lm_head)(*batch(), TEMPERATURE, loss=of_scored)
    ours = gradients(model, our_loss)
    assert_as_good_as_eager(our_loss, eager_loss, exact_loss, SLACK)
    assert ours.keys() == exact.keys() == dict(model.named_parameters()).keys()
    for name, wanted in exact.items():
        assert_as_good_as_eager(ours[name], eager[name], wanted, SLACK * wanted.abs().max().item(), name)


def test_the_head_is_never_called_and_sees_the_positions_only():
    scorer = TokenScorer(llama())
    called = []
    scorer.model.lm_head.register_forward_hook(lambda *call: called.append(call))
    for loss, op in (
        (None, "token_log_probs"),
        (LOSSES["cross-entropy"][0], "cross_entropy"),
        (LOSSES["ppo"][0], "ppo_loss"),
    ):
        with Recorder() as recorder:
            scorer(*batch(), TEMPERATURE, loss=loss)
        assert recorder.rows == {f"linear_{op}": [9]}
    assert not called


def test_bf16():
    """The model's own bf16 logits are rounded; ours are not, so the judge is the same head in fp64."""
    model = llama().bfloat16()
    ours = TokenScorer(model)(*batch(), TEMPERATURE)
    input_ids, positions, tokens = batch()
    hidden = model.model(input_ids).last_hidden_state.flatten(0, 1)[positions]
    head = (hidden.double(), model.lm_head.weight.double(), tokens)
    exact = reference.linear_token_log_probs_and_entropy(*head, temperature=TEMPERATURE)
    for mine, eager, wanted in zip(ours, from_logits(model), exact, strict=True):
        assert_as_good_as_eager(mine, eager, wanted, SLACK)


def test_a_head_of_another_dtype():
    """Mamba's last hidden state is fp32 over a bf16 head."""
    model = MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.4)
    )
    log_probs, _ = TokenScorer(model.bfloat16())(*batch())
    torch.testing.assert_close(log_probs, from_logits(model, temperature=1.0)[0], rtol=0, atol=0.02)


def test_fp16_has_no_gradients_before_the_loss_is_scaled():
    """A gradient of 1e-8 is 0 in fp16; computed in the backward pass, from a scaled loss, it is not."""
    model = llama()
    scorer = TokenScorer(model)
    for of_scored in (LOSSES["cross-entropy"][0], LOSSES["ppo"][0]):
        wanted = gradients(model, 1e-6 * scorer(*batch(), TEMPERATURE, loss=of_scored))
        with Recorder() as recorder, torch.autocast("cpu", torch.float16):
            loss = scorer(*batch(), TEMPERATURE, loss=lambda scored, of=of_scored: 1e-6 * of(scored))
            ours = gradients(model, 2.0**20 * loss)
        assert recorder.rows.keys() == {"linear_token_log_probs", "linear_token_log_probs_backward"}
        for name, grad in wanted.items():
            torch.testing.assert_close(ours[name] / 2**20, grad, rtol=0.1, atol=0.02 * grad.abs().max().item())


class TestAdapters:
    """peft on the trunk, on the head, and a copy of the head."""

    def model(self, **options):
        set_seed(0)
        model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options))
        return model.eval()

    def check(self, model):
        """Numbers and gradients with the adapters, numbers without them."""
        scorer = TokenScorer(model)
        exact = from_logits(copy.deepcopy(model).double(), torch.float64)
        for mine, eager, wanted in zip(scorer(*batch(), TEMPERATURE), from_logits(model), exact, strict=True):
            assert_as_good_as_eager(mine, eager, wanted, SLACK)
        for of_scored, of_numbers in LOSSES.values():
            ours = gradients(model, scorer(*batch(), TEMPERATURE, loss=of_scored))
            wanted = gradients(model, of_numbers(*from_logits(model)))
            assert ours.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
            for name, grad in wanted.items():
                torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
        with_adapters = scorer(*batch(), TEMPERATURE)[0]
        with model.disable_adapter():
            without = scorer(*batch(), TEMPERATURE)[0]
            torch.testing.assert_close(without, from_logits(model)[0])
        assert (with_adapters - without).abs().max() > 0.1

    def test_on_the_trunk(self):
        model = self.model(target_modules=["q_proj", "v_proj"])
        self.check(model)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_a_frozen_head_has_no_gradient_computed(self, loss):
        config = tiny_config(vocab_size=5000)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, task_type="CAUSAL_LM"))
        scorer = TokenScorer(model)
        with Recorder() as recorder:
            scorer(*batch(), TEMPERATURE, loss=LOSSES[loss][0]).backward()
        assert model.get_output_embeddings().weight.grad is None
        assert recorder.largest < 5000 * 16

    def test_on_the_head(self):
        self.check(self.model(target_modules=["q_proj", "lm_head"]))

    def test_on_the_head_with_a_bias(self):
        self.check(self.model(target_modules=["q_proj", "lm_head"], lora_bias=True))

    def test_on_the_head_in_bf16_small_adapters_are_not_rounded_away(self):
        """W + s B A in bf16 would lose what is below half an ulp of W."""
        model = self.model(target_modules=["lm_head"]).bfloat16()
        base = model.get_base_model()
        base.lm_head.lora_B["default"].weight.data *= 1e-3
        input_ids, positions, tokens = batch()
        scorer = TokenScorer(model)
        hidden = base.model(input_ids).last_hidden_state.flatten(0, 1)[positions].double()
        layer = copy.deepcopy(base.lm_head).double()
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        change = {}
        for name, more in (("with", delta), ("without", 0 * delta)):
            weight = layer.get_base_layer().weight + more
            change[name] = reference.linear_token_log_probs_and_entropy(hidden, weight, tokens)[0]
        wanted = change["with"] - change["without"]
        ours = scorer(input_ids, positions, tokens)[0]
        with model.disable_adapter():
            ours = ours - scorer(input_ids, positions, tokens)[0]
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())

    def test_merged(self):
        model = self.model(target_modules=["q_proj", "lm_head"])
        scorer = TokenScorer(model)
        before = scorer(*batch(), TEMPERATURE)[0]
        model.merge_adapter()
        torch.testing.assert_close(scorer(*batch(), TEMPERATURE)[0], before, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            without = scorer(*batch(), TEMPERATURE)[0]
            torch.testing.assert_close(without, from_logits(model)[0])
        assert (without - before).abs().max() > 0.1

    def test_a_copy_of_the_head(self):
        model = self.model(target_modules=["q_proj"], modules_to_save=["lm_head"])
        nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
        self.check(model)

    def test_a_variant_on_the_head_is_refused(self):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*DoraLinearVariant of peft.*lm_head='logits'"):
            TokenScorer(self.model(target_modules=["lm_head"], use_dora=True))


class Capped(LlamaForCausalLM):
    """A softcap that no configuration names, and too large to show in the logits of two tokens."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(
            logits=50.0 * torch.tanh(output.logits / 50.0), hidden_states=output.hidden_states
        )


class Normalised(LlamaForCausalLM):
    """Each row of the head has length 1."""

    def forward(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        logits = output.last_hidden_state @ nn.functional.normalize(self.lm_head.weight).mT
        return CausalLMOutputWithPast(logits=logits, hidden_states=output.hidden_states)


def normalised(model, hidden):
    head = linear_lm_head(model, hidden)
    return head._replace(weight=nn.functional.normalize(head.weight))


class TestUnknownHeads:
    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch):
        monkeypatch.setattr(lm_heads, "_registered", dict(lm_heads._registered))

    def of(self, kind, **changes):
        set_seed(0)
        return kind(type(tiny_config()).from_dict(tiny_config().to_dict() | changes)).eval()

    @pytest.mark.parametrize("kind", [Capped, Normalised])
    def test_the_error_says_what_to_do(self, kind):
        name = kind.__name__
        with pytest.raises(ValueError, match=rf"logits of {name} .*register_lm_head\({name}, .*lm_head='logits'"):
            TokenScorer(self.of(kind))

    @pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping"])
    def test_a_name_in_the_configuration_that_the_model_does_not_heed(self, name):
        with pytest.raises(ValueError, match="LlamaForCausalLM"):
            TokenScorer(self.of(LlamaForCausalLM, **{name: 20.0}))

    @pytest.mark.parametrize("kind", [Capped, Normalised])
    def test_the_models_own_logits_are_the_way_out(self, kind):
        model = self.of(kind)
        scorer = ActorCritic(model, lm_head="logits")
        nn.init.normal_(scorer.value_head.weight)
        log_probs, entropy, values = scorer(*batch(), TEMPERATURE)
        for mine, wanted in zip((log_probs, entropy), from_logits(model), strict=True):
            torch.testing.assert_close(mine, wanted)
        states = model.model(batch()[0]).last_hidden_state.flatten(0, 1)[batch()[1]]
        torch.testing.assert_close(values, scorer.value_head(states)[:, 0])

    @pytest.mark.parametrize("name", [Normalised, LlamaForCausalLM, "llama"])
    def test_registered(self, name):
        register_lm_head(name, normalised)
        model = self.of(Normalised)
        scorer = TokenScorer(model)
        torch.testing.assert_close(scorer(*batch(), TEMPERATURE), from_logits(model))
        for of_scored, of_numbers in LOSSES.values():
            ours = gradients(model, scorer(*batch(), TEMPERATURE, loss=of_scored))
            wanted = gradients(model, of_numbers(*from_logits(model)))
            for key, grad in wanted.items():
                torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())

    def test_the_nearest_class_counts(self):
        register_lm_head(LlamaForCausalLM, linear_lm_head)
        register_lm_head(Normalised, normalised)
        TokenScorer(self.of(Normalised))
        TokenScorer(self.of(LlamaForCausalLM))

    def test_a_wrong_registration_is_refused(self):
        register_lm_head(Normalised, linear_lm_head)
        with pytest.raises(ValueError, match="Normalised"):
            TokenScorer(self.of(Normalised))

    def test_a_scale_that_is_no_temperature(self):
        register_lm_head("llama", lambda model, hidden: linear_lm_head(model, hidden)._replace(scale=-1.0))
        with pytest.raises(ValueError, match=re.escape("scale=-1.0 and softcap=None must be greater than 0")):
            TokenScorer(self.of(LlamaForCausalLM))

    def test_a_quantised_weight(self):
        model = self.of(LlamaForCausalLM)
        model.lm_head.weight = nn.Parameter(torch.zeros(300, 16, dtype=torch.int8), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM .*Parameter of torch.int8, not a plain float.*'logits'"
        ):
            TokenScorer(model)

    def test_a_weight_of_another_class(self):
        class Packed(torch.Tensor):
            pass

        model = self.of(LlamaForCausalLM)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*Packed of torch.float32, not a plain float"):
            TokenScorer(model)

    def test_a_head_that_is_not_linear(self):
        model = self.of(LlamaForCausalLM)
        model.lm_head = nn.Sequential(model.lm_head)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*Sequential, not a torch.nn.Linear"):
            TokenScorer(model)

    def test_a_head_of_another_width(self):
        model = self.of(LlamaForCausalLM)
        model.lm_head = nn.Linear(8, 300)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*takes 8 numbers, its last hidden state has 16"):
            TokenScorer(model)

    def test_no_trunk(self):
        with pytest.raises(ValueError, match=r"LlamaModel .*cannot be had without its head"):
            TokenScorer(self.of(LlamaForCausalLM).model)

    def test_no_head(self):
        model = self.of(LlamaForCausalLM)
        model.get_output_embeddings = lambda: None
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*it has no LM head"):
            TokenScorer(model)


def test_the_fallbacks_statistics():
    scorer = {name: TokenScorer(llama(), name) for name in ("fused", "logits")}
    set_seed(0)
    scorer["logits"].load_state_dict(scorer["fused"].state_dict())
    stats = {n: s(*batch(), TEMPERATURE, loss=lambda scored: scored.cross_entropy()) for n, s in scorer.items()}
    (loss, fused), (same_loss, logits) = stats["fused"], stats["logits"]
    torch.testing.assert_close((loss, *fused), (same_loss, *logits))
    assert isinstance(logits, F.CrossEntropyStats)


def test_one_graph_for_all_losses_to_come():
    """A loss is a new function in every step, with new tensors in it: that must not compile anew."""
    scorer = TokenScorer(llama())
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(scorer, backend=backend, fullgraph=True, dynamic=True)
    for denominator in (20.0, 21.0, 22.0):
        count, tensors = torch.tensor(denominator), constants()
        loss, _ = compiled(*batch(), loss=lambda scored, n=count, x=tensors: scored.ppo_loss(*x, denominator=n))
        wanted, _ = scorer(*batch(), loss=lambda scored, n=count, x=tensors: scored.ppo_loss(*x, denominator=n))
        torch.testing.assert_close(loss, wanted)
    assert len(graphs) == 1
