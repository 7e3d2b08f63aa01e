"""Rollouts by vLLM: its responses, log-probs and weights beside transformers', and what a server is told.

Most of it needs vLLM itself; what does not runs everywhere.
"""

import copy
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, worst
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import free_port, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastrlhf.rollout.types import RolloutInterrupted, SamplingParams
from fastrlhf.rollout.vllm_engine import EXTENSION, VLLMEngine, checkpoint_weights, request_seed

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SMOLLM2 = Path.home() / ".cache/fastrlhf/SmolLM2-135M-Instruct"
PROMPTS = [[5, 6, 7], [10, 20, 30, 40, 50], [9], [5, 6, 7, 8]]
CONTEXT = 64


def randomise(model, seed=0, std=0.3):
    """Weights that make some tokens far more likely than others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def tiny_llama(**options):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{"tie_word_embeddings": True} | options,
    )
    return randomise(LlamaForCausalLM(config)).eval()


@torch.no_grad()
def forward_log_probs(model, rollout, temperature=1.0):
    """Of the rollout's tokens, from a forward of transformers over each sequence, in the model's dtype, then fp64."""
    results = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_probs = (
            logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) / temperature
        ).log_softmax(-1)
        results.append(log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(results)


def greedy_of_transformers(model, prompt, count):
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=2
    )
    return output[0, len(prompt) :].tolist()


def assert_follows(engine, model, sampling):
    """The engine's log-probs are the model's, as near as a forward of transformers in the same dtype."""
    rollout = engine.generate(PROMPTS, sampling)
    temperature = sampling.temperature or 1.0
    exact = forward_log_probs(copy.deepcopy(model).double(), rollout, temperature)
    eager = forward_log_probs(model, rollout, temperature)
    # Half an eps for the rounding of the token's logit, and half for that of the most likely one's.
    eps = torch.finfo(next(model.parameters()).dtype).eps
    assert_as_good_as_eager(rollout.log_probs, eager, exact, eps * exact.abs().max().item(), "log-probs")
    return rollout


# Without vLLM


def test_a_missing_vllm_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        VLLMEngine(tiny_llama(), tiny_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "elsewhere"}, "mode='elsewhere'"),
        ({"mode": "colocated", "transfer_dir": "/tmp"}, "transfer_dir"),
        ({"mode": "http://localhost:1", "dtype": "bfloat16"}, "dtype"),
    ],
)
def test_options_that_cannot_be_met(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(tiny_llama(), tiny_tokenizer(), **options)


def test_weights_go_by_the_names_of_a_checkpoint(tmp_path):
    for model in (tiny_llama(), tiny_llama(tie_word_embeddings=False)):
        model.save_pretrained(tmp_path)
        saved, weights = load_file(tmp_path / "model.safetensors"), checkpoint_weights(model)
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], weights[name]) for name in saved)


def with_lora(model, targets=("q_proj", "down_proj"), **options):
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **options))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return policy.eval()


def test_adapters_are_merged_and_the_policy_stays_as_it_is():
    policy = with_lora(tiny_llama())
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    weights = checkpoint_weights(policy)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    merged = copy.deepcopy(policy).merge_and_unload()
    expected = checkpoint_weights(merged)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"])


def test_adapters_that_a_checkpoint_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="tied"):
        checkpoint_weights(with_lora(tiny_llama(), ("embed_tokens",)))
    with pytest.raises(ValueError, match="lm_head: modules_to_save"):
        checkpoint_weights(with_lora(tiny_llama(tie_word_embeddings=False), modules_to_save=["lm_head"]))


def test_seeds_side_by_side_share_no_sample():
    seeds = [request_seed(seed, number) for seed in range(100) for number in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(3, 4) == request_seed(3, 4)


class Stand:
    """Answers as vLLM's server does, with responses of the prompt's first token, and keeps what it was asked."""

    def __init__(self):
        self.asked, self.weights, self.aborted = [], [], threading.Event()
        self.held = lambda body: False
        self.description = {"context": CONTEXT, "logprobs_mode": "raw_logprobs"}
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply({"data": [{"id": "policy"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(stand.answer(self.path, body))

            def reply(self, answer):
                self.send_response(200 if answer is not None else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        self.asked.append((path, body))
        if path == "/collective_rpc":
            if body["method"] == "fastrlhf_update_weights":
                self.weights.append(load_file(Path(body["args"][0]) / "model.safetensors"))
            return {"results": [self.description if body["method"] == "fastrlhf_describe" else None]}
        if path == "/abort_requests":
            self.aborted.set()
            return {}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/v1/completions":
            tokens, reason = [body["prompt"][0]] * body["max_tokens"], "length"
            if self.held(body):
                self.aborted.wait()
                tokens, reason = [], "abort"
            log_probs = [-float(token) for token in tokens]
            choice = {"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}, "finish_reason": reason}
            return {"choices": [choice]}
        return None

    def completions(self):
        return [body for path, body in self.asked if path == "/v1/completions"]


@pytest.fixture
def stand():
    stand = Stand()
    yield stand
    stand.server.shutdown()
    stand.server.server_close()


def test_what_a_server_is_asked_for(stand):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    engine = VLLMEngine(model, tokenizer, mode=stand.url)
    sampling = SamplingParams(5, temperature=0.7, top_k=3, min_new_tokens=2, n=2, stop_token_ids=(8,), stop=("x",))
    long = [7] * (CONTEXT - 1)
    rollout = engine.generate([[5], [6, 6], long, [9] * CONTEXT], sampling, seeds=[1, 2, 1, 1])
    assert rollout.prompts == [[5], [5], [6, 6], [6, 6], long, long, [9] * CONTEXT, [9] * CONTEXT]
    assert rollout.responses == [[5] * 5, [5] * 5, [6] * 5, [6] * 5, [7], [7], [], []]
    assert rollout.finish_reasons == ["length"] * 8
    assert torch.equal(rollout.log_probs, -rollout.tokens.float())
    assert ("/collective_rpc", {"method": "fastrlhf_set_temperature", "args": [0.7]}) in stand.asked
    for body in stand.completions():
        wanted = {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0, "stop": ["x"], "stop_token_ids": [1, 8]}
        wanted |= {"ignore_eos": True, "logprobs": 0, "model": "policy", "min_tokens": min(2, body["max_tokens"])}
        assert body.items() >= wanted.items()
    seeds = {(body["prompt"][0], body["seed"]) for body in stand.completions()}
    assert {seed for first, seed in seeds if first == 5} == {seed for first, seed in seeds if first == 7}
    assert not {seed for first, seed in seeds if first == 5} & {seed for first, seed in seeds if first == 6}


def test_a_server_gets_the_weights_as_they_are_now(stand):
    model = tiny_llama()
    engine = VLLMEngine(model, tiny_tokenizer(), mode=stand.url)
    first = {name: weight.clone() for name, weight in checkpoint_weights(model).items()}
    randomise(model, seed=1)
    engine.update_weights()
    for got, wanted in zip(stand.weights, (first, checkpoint_weights(model)), strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got)
    assert [path for path, _ in stand.asked].count("/reset_prefix_cache") == 2
    assert not list(Path(engine.backend.folder.name).iterdir())


@pytest.fixture
def interruptible():
    """A process that a shell began in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_server_leaves_what_was_finished(stand):
    engine = VLLMEngine(tiny_llama(), tiny_tokenizer(), mode=stand.url)

    def hold(body):
        if body["prompt"] != [7]:
            return False
        os.kill(os.getpid(), signal.SIGINT)
        return True

    stand.held = hold
    with pytest.raises(RolloutInterrupted) as interrupted:
        engine.generate([[5], [6], [7], [8]], SamplingParams(3, batch_size=1))
    assert interrupted.value.indices == [0, 1]
    assert interrupted.value.rollout.responses == [[5] * 3, [6] * 3]
    assert stand.aborted.is_set()


def test_servers_that_cannot_serve_are_refused(stand):
    stand.description = {"context": CONTEXT, "logprobs_mode": "processed_logprobs"}
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        VLLMEngine(tiny_llama(), tiny_tokenizer(), mode=stand.url)
    with pytest.raises(ConnectionError, match=r"answered 404.*--worker-extension-cls"):
        VLLMEngine(tiny_llama(), tiny_tokenizer(), mode=stand.url + "nowhere")
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match="does not answer"):
        VLLMEngine(tiny_llama(), tiny_tokenizer(), mode=url)


# With vLLM


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def colocated():
    """Makes an engine: eager, as compiling takes a minute, with a cache of 64 MiB."""
    engines = []

    def make(model, tokenizer=None, **options):
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26} | options
        engines.append(VLLMEngine(model, tokenizer or tiny_tokenizer(pad_is_eos=False), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(llama, colocated):
    return colocated(llama)


@needs_vllm
def test_there_is_one_at_a_time(engine, llama, colocated):
    with pytest.raises(RuntimeError, match=r"close\(\) it first"):
        colocated(llama)
    first = engine.generate(PROMPTS, SamplingParams(5, seed=0)).responses
    engine.close()
    assert colocated(llama).generate(PROMPTS, SamplingParams(5, seed=0)).responses == first


@needs_vllm
def test_greedy_is_transformers(engine, llama):
    rollout = engine.generate(PROMPTS, SamplingParams(20, temperature=0, min_new_tokens=20))
    assert rollout.responses == [greedy_of_transformers(llama, prompt, 20) for prompt in PROMPTS]
    assert rollout.finish_reasons == ["length"] * 4


@needs_vllm
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(30, temperature=0, min_new_tokens=10),
        SamplingParams(30, n=4, seed=1),
        SamplingParams(30, temperature=0.6, n=4, seed=2),
        SamplingParams(30, temperature=1.4, top_k=20, top_p=0.9, min_p=0.01, min_new_tokens=5, n=4, seed=3),
    ],
    ids=["greedy", "plain", "cold", "filtered"],
)
def test_log_probs_are_of_the_scaled_distribution_without_filters(engine, llama, sampling):
    rollout = assert_follows(engine, llama, sampling)
    assert len(rollout) == len(PROMPTS) * sampling.n
    assert rollout.log_probs.shape == rollout.tokens.shape


@needs_vllm
def test_filters_filter(engine, llama):
    rollout = engine.generate(PROMPTS, SamplingParams(30, top_k=3, n=4, seed=0, min_new_tokens=30))
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        logits = llama(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits[:, 1] = -torch.inf
        assert (logits.topk(3).indices == torch.tensor(response)[:, None]).any(-1).all()


@needs_vllm
def test_samples_come_from_the_distribution(engine, llama):
    """Chi-square of the first token against the model's distribution: 4 bins of about equal mass, 4000 draws."""
    rollout = engine.generate([[5, 6, 7]], SamplingParams(1, temperature=1.5, n=4000, seed=0, batch_size=256))
    p = (llama(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 1.5).softmax(-1)
    bins = (p.cumsum(0) * 4).long().clamp(max=3)
    mass = torch.zeros(4, dtype=torch.float64).index_add_(0, bins, p)
    counts = torch.bincount(bins[rollout.tokens], minlength=4)
    chi_square = ((counts - 4000 * mass).square() / (4000 * mass)).sum()
    assert chi_square < 21.1  # 3 degrees of freedom: exceeded once in 10^4


@needs_vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updated_weights_are_sampled_from(dtype, colocated):
    """Tied embeddings too: their copy in the LM head is one that vLLM packs on CPU. Nothing changes before the call."""
    model = tiny_llama().to(getattr(torch, dtype))
    engine = colocated(model)
    greedy = SamplingParams(20, temperature=0, min_new_tokens=20)
    for seed in (1, 2):
        before = engine.generate(PROMPTS, greedy)
        randomise(model, seed)
        again = engine.generate(PROMPTS, greedy)
        assert again.responses == before.responses
        assert torch.equal(again.log_probs, before.log_probs)
        engine.update_weights()
        after = assert_follows(engine, model, greedy)
        assert after.responses != before.responses
        assert_follows(engine, model, SamplingParams(20, n=4, seed=0))


@needs_vllm
def test_a_policy_with_adapters(colocated):
    policy = with_lora(tiny_llama())
    engine = colocated(policy)
    merged = copy.deepcopy(policy).merge_and_unload()
    first = assert_follows(engine, merged, SamplingParams(20, temperature=0, min_new_tokens=20))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-3)
    engine.update_weights()
    merged = copy.deepcopy(policy).merge_and_unload()
    assert (
        assert_follows(engine, merged, SamplingParams(20, temperature=0, min_new_tokens=20)).responses
        != first.responses
    )


@needs_vllm
def test_a_policy_in_fp32_sampled_in_bf16(llama, colocated):
    rollout = assert_follows(
        colocated(llama, dtype="bfloat16"), copy.deepcopy(llama).bfloat16(), SamplingParams(30, seed=0)
    )
    assert worst(rollout.log_probs, forward_log_probs(copy.deepcopy(llama).double(), rollout)) > 100 * EPS


@needs_vllm
def test_samples_depend_on_their_seeds(engine):
    sampling = SamplingParams(20, n=3, seed=5)
    rollout = engine.generate(PROMPTS, sampling)
    assert engine.generate(PROMPTS, sampling).responses == rollout.responses
    assert engine.generate(PROMPTS, SamplingParams(20, n=3, seed=5, batch_size=2)).responses == rollout.responses
    assert engine.generate(PROMPTS, SamplingParams(20, n=3, seed=6)).responses != rollout.responses
    assert len({tuple(response) for response in rollout.responses}) == len(rollout)
    own = engine.generate(PROMPTS, sampling, seeds=[1, 2, 3, 4])
    back = engine.generate(PROMPTS[::-1], sampling, seeds=[4, 3, 2, 1])
    assert [own.responses[i : i + 3] for i in range(0, 12, 3)] == [back.responses[i : i + 3] for i in range(9, -1, -3)]
    torch.manual_seed(0)
    first = engine.generate(PROMPTS, SamplingParams(20)).responses
    assert engine.generate(PROMPTS, SamplingParams(20)).responses != first
    torch.manual_seed(0)
    assert engine.generate(PROMPTS, SamplingParams(20)).responses == first


@needs_vllm
def test_how_responses_end(engine, llama):
    tokenizer = engine.tokenizer
    (whole,) = engine.generate([[5, 6, 7]], SamplingParams(30, temperature=0, min_new_tokens=30)).responses

    def greedy(**options):
        rollout = engine.generate([[5, 6, 7]], SamplingParams(30, temperature=0, **options))
        return rollout.responses[0], rollout.finish_reasons[0]

    place = next(i for i in range(3, 30) if whole[i] not in whole[:i])
    assert greedy(stop_token_ids=(whole[place],)) == (whole[: place + 1], "stop")
    response, _ = greedy(stop_token_ids=(whole[place],), min_new_tokens=place + 2)
    assert whole[place] not in response[: place + 2]
    # A string over two tokens, where the text has it first; of whole characters, as a token may end within one.
    many = engine.generate([[5, 6, 7, last] for last in range(3, 103)], SamplingParams(30, temperature=0))
    cases = [
        (prompt, response, end)
        for prompt, response in zip(many.prompts, many.responses, strict=True)
        for end in range(3, len(response) - 1)
        if (text := tokenizer.decode(response[end - 1 : end + 1])).isascii() and text.isprintable()
        if text not in tokenizer.decode(response[:end])
    ]
    assert cases
    for prompt, response, end in cases[:10]:
        sampling = SamplingParams(30, temperature=0, stop=(tokenizer.decode(response[end - 1 : end + 1]),))
        rollout = engine.generate([prompt], sampling)
        assert (rollout.responses, rollout.finish_reasons) == ([response[: end + 1]], ["stop"])
    assert greedy(stop=("nowhere",)) == (whole, "length")
    # EOS: the tokenizer's, whatever the model's configuration says.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(whole[place])
    other = copy.copy(engine)
    other.tokenizer = tokenizer
    rollout = other.generate([[5, 6, 7]], SamplingParams(30, temperature=0))
    assert (rollout.responses[0], rollout.finish_reasons[0]) == (whole[: place + 1], "stop")


@needs_vllm
def test_limits(engine, llama):
    prompts = [[5] * CONTEXT, [6] * (CONTEXT - 2), [7]]
    rollout = engine.generate(prompts, SamplingParams(5, temperature=0, min_new_tokens=5))
    assert rollout.lengths.tolist() == [0, 2, 5]
    assert rollout.finish_reasons == ["length"] * 3
    assert rollout.responses[1:] == [
        greedy_of_transformers(llama, prompts[1], 2),
        greedy_of_transformers(llama, [7], 5),
    ]
    empty = engine.generate(prompts, SamplingParams(0))
    assert empty.responses == [[], [], []]
    assert empty.log_probs.shape == (0,)
    for wrong in ([], [[]], [[300]], [[5] * (CONTEXT + 1)]):
        with pytest.raises(ValueError, match="prompts"):
            engine.generate(wrong, SamplingParams(5))


@pytest.mark.usefixtures("interruptible")
@needs_vllm
def test_an_interrupt_leaves_finished_samples_and_a_sound_engine(engine, monkeypatch):
    core, sampling = engine.backend.llm.llm_engine, SamplingParams(10, n=2, seed=0, min_new_tokens=10, batch_size=2)
    whole = engine.generate(PROMPTS, sampling)
    step, steps = core.step, []

    def interrupted_step():
        steps.append(None)
        if len(steps) == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(core, "step", interrupted_step)
    with pytest.raises(RolloutInterrupted) as interrupted:
        engine.generate(PROMPTS, sampling)
    monkeypatch.undo()
    indices, rollout = interrupted.value.indices, interrupted.value.rollout
    assert 0 < len(indices) < len(whole)
    assert rollout.responses == [whole.responses[i] for i in indices]
    assert not core.has_unfinished_requests()
    assert engine.generate(PROMPTS, sampling).responses == whole.responses
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@needs_vllm
def test_the_process_is_left_as_it_was(llama, colocated):
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    threads, set_num_threads, environment = torch.get_num_threads(), torch.set_num_threads, dict(os.environ)
    colocated(llama)
    assert (random.random(), np.random.rand(), torch.rand(())) == wanted  # noqa: NPY002
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_num_threads)
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == environment.get("VLLM_ENABLE_V1_MULTIPROCESSING")


@needs_vllm
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma3_text", {"head_dim": 32}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}),
    ],
)
def test_architectures(kind, options, colocated):
    common = tiny_llama().config.to_diff_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    if kind != "gpt2":
        options = {name: common[name] for name in names} | {"max_position_embeddings": CONTEXT} | options
    config = AutoConfig.for_model(kind, vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2, **options)
    model = randomise(AutoModelForCausalLM.from_config(config)).eval()
    engine = colocated(model)
    randomise(model, seed=1)
    engine.update_weights()
    rollout = assert_follows(engine, model, SamplingParams(20, temperature=0, min_new_tokens=20))
    assert rollout.responses == [greedy_of_transformers(model, prompt, 20) for prompt in PROMPTS]
    assert_follows(engine, model, SamplingParams(20, temperature=0.8, n=2, seed=0))


@needs_vllm
def test_a_model_that_vllm_would_take_from_this_process_is_refused(colocated):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    logits = model(torch.tensor(PROMPTS[:1])).logits
    with pytest.raises(ValueError, match="URL of a server"):
        colocated(model)
    assert torch.equal(model(torch.tensor(PROMPTS[:1])).logits, logits)
    AutoModelForCausalLM.from_config(config)


@needs_vllm
@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2-135M-Instruct is not there; fastrlhf demo fetches it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2(dtype, colocated):
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    engine = colocated(model, tokenizer, max_model_len=256, kv_cache_memory_bytes=2**29)
    texts = ["The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at"]
    prompts = [tokenizer.encode(text) for text in texts]
    rollout = engine.generate(prompts, SamplingParams(32, temperature=0))
    if dtype == torch.float32:
        for prompt, response in zip(prompts, rollout.responses, strict=True):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, len(prompt) :]
            assert response == output.tolist()
    rollout = engine.generate(prompts, SamplingParams(32, n=4, seed=0))
    exact = forward_log_probs(copy.deepcopy(model).double(), rollout)
    eager = forward_log_probs(model, rollout)
    for name, a, b in (
        ("vLLM - fp64", rollout.log_probs, exact),
        ("transformers - fp64", eager, exact),
        ("vLLM - transformers", rollout.log_probs, eager),
    ):
        gap = (a.double() - b.double()).abs()
        print(f"{dtype}: |{name}| mean {gap.mean():.2e} max {gap.max():.2e}")
    assert_as_good_as_eager(
        rollout.log_probs, eager, exact, torch.finfo(dtype).eps * exact.abs().max().item(), "log-probs"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """vLLM's server, with other weights than the test's model."""
    folder = tmp_path_factory.mktemp("server")
    randomise(tiny_llama(), seed=9).save_pretrained(folder)
    tiny_tokenizer(pad_is_eos=False).save_pretrained(folder)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26)]
    command += ["--worker-extension-cls", EXTENSION]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"})
    try:
        while True:
            try:
                urllib.request.urlopen(url + "/health")
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


@needs_vllm
def test_a_real_server(server, llama):
    model = tiny_llama()
    engine = VLLMEngine(model, tiny_tokenizer(pad_is_eos=False), mode=server)
    for seed in (1, 2):
        rollout = assert_follows(engine, model, SamplingParams(20, temperature=0, min_new_tokens=20))
        assert rollout.responses == [greedy_of_transformers(model, prompt, 20) for prompt in PROMPTS]
        assert_follows(engine, model, SamplingParams(30, temperature=0.7, top_k=10, n=3, seed=0))
        randomise(model, seed)
        engine.update_weights()
    sampling = SamplingParams(20, n=3, seed=5, batch_size=5)
    rollout = engine.generate(PROMPTS, sampling)
    assert engine.generate(PROMPTS, sampling).responses == rollout.responses
    assert len({tuple(response) for response in rollout.responses}) == len(rollout)
    whole = engine.generate([[5, 6, 7]], SamplingParams(30, temperature=0, min_new_tokens=30)).responses[0]
    place = next(i for i in range(3, 30) if whole[i] not in whole[:i])
    stopped = engine.generate([[5, 6, 7]], SamplingParams(30, temperature=0, stop_token_ids=(whole[place],)))
    assert (stopped.responses, stopped.finish_reasons) == ([whole[: place + 1]], ["stop"])


@pytest.mark.usefixtures("interruptible")
@needs_vllm
def test_an_interrupted_real_server_serves_on(server, monkeypatch):
    engine = VLLMEngine(tiny_llama(), tiny_tokenizer(pad_is_eos=False), mode=server)
    sampling = SamplingParams(40, n=64, seed=0, min_new_tokens=40, batch_size=4)
    whole = engine.generate(PROMPTS[:1], sampling)
    request, answers = engine.backend._request, []

    def interrupting_request(path, body=None):
        answer = request(path, body)
        if path == "/v1/completions":
            answers.append(answer)
            if len(answers) == 9:
                os.kill(os.getpid(), signal.SIGINT)
        return answer

    monkeypatch.setattr(engine.backend, "_request", interrupting_request)
    with pytest.raises(RolloutInterrupted) as interrupted:
        engine.generate(PROMPTS[:1], sampling)
    monkeypatch.undo()
    assert 0 < len(interrupted.value.indices) < 64
    for index, response in zip(interrupted.value.indices, interrupted.value.rollout.responses, strict=True):
        assert response == whole.responses[index]
    assert engine.generate(PROMPTS[:1], sampling).responses == whole.responses
