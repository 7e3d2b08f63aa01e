"""Packed sequences: the same numbers as padded ones, from models that keep them apart, and a refusal of the others."""

import itertools
import math
import sys
import types

import pytest
import torch
from causal_models import assert_as_good_as_own, build, in_fp64, logits_of, randomised, rms
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomForSequenceClassification,
    LlamaForSequenceClassification,
)

from fastrlhf import packed_attention
from fastrlhf.batching import pack_responses, pack_sharing_prompts, score_responses
from fastrlhf.loading import disable_dropout
from fastrlhf.packing import Packing
from fastrlhf.trainers.ppo.actor_critic import ActorCritic
from fastrlhf.trainers.token_scorer import TokenScorer

TEMPERATURE = 0.7
MODELS = ["llama", "qwen2 with windows", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "gpt_neox"]
LENGTHS = [(3, 5), (1, 1), (7, 0), (20, 25), (5, 13), (9, 2), (8, 13)]  # of prompts and responses; windows are 10


def sequences(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    draw = [[torch.randint(3, 300, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return [prompt for prompt, _ in draw], [response for _, response in draw]


def batches(seed=0, lengths=LENGTHS):
    """The same, padded and packed."""
    prompts, responses = sequences(seed, lengths)
    rows = list(range(len(prompts)))
    return score_responses(prompts, responses, rows), pack_responses(prompts, responses, rows)


def actor_critic(policy, **options):
    disable_dropout(policy)
    scorer = ActorCritic(policy, padding_free=True, **options)
    if scorer.value_head is not None:
        nn.init.normal_(scorer.value_head.weight, generator=torch.Generator().manual_seed(3))
    return scorer.train()


def value_model():
    config = CONFIG_MAPPING["llama"](
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    return randomised(LlamaForSequenceClassification(config))


def forward(scorer, batch, **options):
    return scorer(batch.input_ids, batch.positions, batch.tokens, TEMPERATURE, packing=batch.packing, **options)


def gradients(scorer, batch):
    """Of a PPO loss and a value loss, in one vector of fp32."""
    n = len(batch.tokens)
    old, advantages = torch.full((n,), -5.0), torch.linspace(-1, 1, n)
    loss, _, values = forward(
        scorer, batch, loss=lambda tokens: tokens.ppo_loss(old, advantages, torch.ones(n)), model_values=True
    )
    (loss + (values - advantages).square().mean()).backward()
    parts = [p.grad.float().flatten() for p in scorer.parameters() if p.grad is not None]
    scorer.zero_grad()
    return torch.cat(parts)


def assert_same_gradients(ours, padded):
    """fp32: a few dozen roundings, of sums over some hundred tokens."""
    assert padded.norm() > 0.1
    assert (ours - padded).norm() <= 50 * torch.finfo(torch.float32).eps * padded.norm()


def assert_packed_is_padded(scorer):
    padded, packed = batches()
    for ours, theirs in zip(*(forward(scorer, x, model_values=True) for x in (packed, padded)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(scorer, packed), gradients(scorer, padded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_padded(name, dtype):
    model = build(name).to(dtype)
    exact_model = in_fp64(model)
    scorer = actor_critic(model, lm_head="fused")
    padded, packed = batches()
    prompts, responses = sequences()
    exact = []
    for prompt, response in zip(prompts, responses, strict=True):
        if response:
            logits = logits_of(exact_model, prompt + response)[len(prompt) - 1 : -1] / TEMPERATURE
            exact.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    with torch.no_grad():
        (log_probs, entropy, values), theirs = forward(scorer, packed), forward(scorer, padded)
    assert_as_good_as_own(log_probs, theirs[0], torch.cat(exact))

    if dtype == torch.float32:
        torch.testing.assert_close(entropy, theirs[1], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(values, theirs[2], rtol=1e-5, atol=2e-5)
        assert_same_gradients(gradients(scorer, packed), gradients(scorer, padded))
    else:  # as near to the gradients of the same weights in fp32 as the padded ones
        ours, own = gradients(scorer, packed), gradients(scorer, padded)
        exact = gradients(scorer.float(), padded)
        assert rms(ours - exact) <= 1.5 * rms(own - exact)


def sharing_and_padded():
    """Some of the prompts once or three times each: shared, and padded."""
    prompts, responses = sequences(lengths=[(3, 5), (20, 2), (3, 1), (20, 25), (1, 9), (20, 0), (3, 13)])
    for same in ((0, 2, 6), (1, 3, 5)):
        for row in same:
            prompts[row] = prompts[same[0]]
    rows = [6, 0, 1, 2, 3, 4, 5]
    return pack_sharing_prompts(prompts, responses, rows), score_responses(prompts, responses, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_are_shared_change_nothing(name, dtype):
    """Log-probs, entropies, values and gradients; windows of 10 end in the prompt, at its end, and after it."""
    scorer = actor_critic(build(name).to(dtype))
    shared, padded = sharing_and_padded()
    if dtype == torch.float32:
        for ours, theirs in zip(forward(scorer, shared), forward(scorer, padded), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        assert_same_gradients(gradients(scorer, shared), gradients(scorer, padded))
        return
    ours, own = gradients(scorer, shared), gradients(scorer, padded)
    exact = gradients(scorer.float(), padded)
    assert rms(ours - exact) <= 1.5 * rms(own - exact)


def test_the_models_own_attention_comes_back():
    model = build("llama")
    scorer = actor_critic(model)
    packed = batches()[1]
    before = model(packed.input_ids).logits
    forward(scorer, packed)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(packed.input_ids).logits, before)
    with pytest.raises(IndexError):
        scorer(packed.input_ids + 300, packed.positions, packed.tokens, packing=packed.packing)
    assert model.config._attn_implementation == "sdpa"
    assert packed_attention._current.packing is None


def test_a_scorer_that_was_not_probed_takes_no_packing():
    packed = batches()[1]
    with pytest.raises(ValueError, match="packing: this scorer was made with padding_free=False"):
        forward(TokenScorer(build("llama")), packed)


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
def test_value_model(lm_head):
    scorer = actor_critic(build("qwen3"), value_model=value_model(), lm_head=lm_head)
    assert_packed_is_padded(scorer)
    padded, packed = batches()
    ours = scorer.values(packed.input_ids, packed.positions, packed.packing)
    torch.testing.assert_close(ours, forward(scorer, padded, model_values=True)[2], rtol=1e-5, atol=2e-5)


def test_lora():
    options = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama"), options)
    scorer = actor_critic(model)
    assert_packed_is_padded(scorer)
    padded, packed = batches()
    with model.disable_adapter():
        ours, theirs = (
            TokenScorer.forward(scorer, b.input_ids, b.positions, b.tokens, packing=b.packing)[0]
            for b in (packed, padded)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "wrapped by torch"])
def test_activation_checkpointing(name, how):
    scorer = actor_critic(build(name))
    packed, padded = sharing_and_padded()
    plain = gradients(scorer, packed)
    if how == "wrapped by torch":
        blocks = tuple({type(m) for m in scorer.model.modules() if type(m).__name__ in scorer.model._no_split_modules})
        apply_activation_checkpointing(scorer.model, check_fn=lambda module: isinstance(module, blocks))
    else:
        scorer.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
        scorer.model.enable_input_require_grads()
    assert torch.equal(gradients(scorer, packed), plain)
    assert_same_gradients(plain, gradients(scorer, padded))  # and the padded forward is not in the packing's hands


def test_autocast():
    scorer = actor_critic(build("llama"))
    padded, packed = batches()
    exact = forward(scorer, padded)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, own = (forward(scorer, batch)[0] for batch in (packed, padded))
    assert rms(ours - exact) <= 1.5 * rms(own - exact)


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_change_nothing(name):
    """To the last bit, as every sequence stays in its place."""
    scorer = actor_critic(build(name)).eval()
    lengths = [(4, 9), (6, 12), (2, 5)]
    first, other = batches(0, lengths)[1], batches(1, lengths)[1]
    begin, end = first.packing.cu_seqlens[1:3].tolist()
    mixed = other.input_ids.clone()
    mixed[:, begin:end] = first.input_ids[:, begin:end]
    tokens = torch.where(first.sequences == 1, first.tokens, other.tokens)
    ours = scorer(mixed, first.positions, tokens, packing=first.packing)
    inputs = first.input_ids, first.positions, first.tokens
    for x, y in zip(ours, scorer(*inputs, packing=first.packing), strict=True):
        assert torch.equal(x[first.sequences == 1], y[first.sequences == 1])
        assert not torch.equal(x[first.sequences == 0], y[first.sequences == 0])


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 1), (1, 1)], [(6, 0), (2, 0)], [(30, 4)]])
def test_small_packs(lengths):
    scorer = actor_critic(build("gemma3"))
    padded, packed = batches(lengths=lengths)
    for ours, theirs in zip(forward(scorer, packed), forward(scorer, padded), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    gradients(scorer, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_both_ways_on_padded_rows_give_one_attention(dtype, window, monkeypatch):
    """SDPA, and products with a softmax, against attention within each sequence in fp64."""
    packing, heads, groups = Packing.of([7, 2, 9, 9, 1]), 6, 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 28, d, generator=generator).to(dtype).requires_grad_()
        for n, d in ((heads, 8), (groups, 8), (groups, 8))
    )
    distance = packing.position_ids[0][:, None] - packing.position_ids[0]
    sequence = torch.repeat_interleave(torch.tensor(packing.lengths))
    allowed = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (window or 100))
    corner = torch.arange(9)[:, None] - torch.arange(9)
    mask = None if window is None else ((corner >= 0) & (corner < window))[None, None]
    grad = torch.randn(1, 28, heads, 8, generator=generator)

    def attention(q, k, v):
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~allowed, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def with_gradients(function, *inputs):
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))

    exact = with_gradients(attention, *(x.detach().double().requires_grad_() for x in (q, k, v)))
    own = with_gradients(attention, q, k, v)
    module = types.SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    monkeypatch.setattr(packed_attention._current, "packing", packing)
    for short in (0, 100):
        monkeypatch.setattr(packed_attention, "SHORT_ROW", short)
        ours = with_gradients(
            lambda *qkv: packed_attention.packed_attention_forward(module, *qkv, mask, scaling=0.3)[0], q, k, v
        )
        for x, y, z in zip(ours, own, exact, strict=True):
            assert_as_good_as_own(x, y, z)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_flash_attention_is_told_where_sequences_begin(name, monkeypatch):
    """A stand-in for flash-attn's kernel, written from its documentation."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
               window_size, softcap):  # fmt: skip
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == 44
        out = []
        for begin, end in itertools.pairwise(cu_seqlens_q):
            x, y, z = (t[begin:end].transpose(0, 1) for t in (q, k, v))
            y, z = (t.repeat_interleave(x.shape[0] // t.shape[0], 0) for t in (y, z))
            scores = x @ y.transpose(1, 2) * softmax_scale
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
            out.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ z).transpose(0, 1))
        return torch.cat(out)

    scorer = actor_critic(build(name))
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(packed_attention, "packed_attention", lambda model: "flash_attention_2")
    padded, packed = batches()
    torch.testing.assert_close(forward(scorer, packed)[0], forward(scorer, padded)[0], rtol=1e-5, atol=2e-5)


def test_which_attention_is_no_secret():
    assert actor_critic(build("llama")).packed_attention == "padded_sdpa"


SIZES = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class TestProbe:
    def of(self, kind, **sizes):
        config = CONFIG_MAPPING[kind](**{**SIZES, "bos_token_id": 0, "eos_token_id": 1, **sizes})
        return randomised(AutoModelForCausalLM.from_config(config))

    @pytest.mark.parametrize(
        ("kind", "sizes"),
        [
            ("bloom", {}),
            ("mamba", {}),
            ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
            ("falcon", {}),
        ],
    )
    def test_refused(self, kind, sizes):
        model = self.of(kind, **sizes)
        with pytest.raises(ValueError, match=r"does not work on packed sequences.*Set padding_free=False"):
            TokenScorer(model, lm_head="logits", padding_free=True)
        assert not model.training
        TokenScorer(model, lm_head="logits")

    @pytest.mark.parametrize(
        ("kind", "sizes"),
        [
            ("opt", {"ffn_dim": 72, "word_embed_proj_dim": 48, "max_position_embeddings": 64}),
            ("phi3", {"num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 2}),
            ("mixtral", {"num_key_value_heads": 2, "intermediate_size": 32}),
        ],
    )
    def test_accepted(self, kind, sizes):
        scorer = TokenScorer(self.of(kind, **sizes), lm_head="logits", padding_free=True)
        for packed, padded in (batches()[::-1], sharing_and_padded()):
            torch.testing.assert_close(forward(scorer, packed)[0], forward(scorer, padded)[0], rtol=1e-5, atol=2e-5)

    def test_value_model_is_probed_too(self):
        config = CONFIG_MAPPING["bloom"](vocab_size=300, hidden_size=48, n_layer=2, n_head=4, num_labels=1)
        critic = randomised(BloomForSequenceClassification(config))
        with pytest.raises(ValueError, match="value_model: BloomForSequenceClassification does not work on packed"):
            ActorCritic(build("llama"), critic, padding_free=True)

    def test_in_bf16(self):
        for name in MODELS:
            TokenScorer(build(name).bfloat16(), padding_free=True)


class TestNoValueFunction:
    def test_values_are_none(self):
        scorer = ActorCritic(build("llama"), value_head=False)
        assert forward(scorer, batches()[0])[2] is None
        assert not any("value" in name for name, _ in scorer.named_parameters())

    def test_save_and_load(self, tmp_path):
        scorer = ActorCritic(build("llama"), value_head=False)
        scorer.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.iterdir() if "value" in path.name]
        scorer.load_value_function(tmp_path)


def test_saved_from_whole_weights(tmp_path):
    """As a sharded module is: from a state dictionary of plain tensors."""
    for scorer in (actor_critic(build("llama")), actor_critic(build("llama"), value_model=value_model())):
        given = {name: x + 1 for name, x in scorer.state_dict().items()}
        scorer.save_pretrained(tmp_path, given)
        scorer.load_value_function(tmp_path)
        for name, x in scorer.state_dict().items():
            assert torch.equal(x, given[name]) or not name.startswith("value")
