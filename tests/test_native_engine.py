"""The native engine: greedy tokens and log-probs against the model, batches and pages that change no bit, when a
response ends, seeds, memory, interrupts."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from causal_models import VOCABULARY, assert_as_good_as_own, build, in_fp64, logits_of, randomised
from oracle import same_bits
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_sampling import UNLIKELY, chi_square_p_value
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fastrlhf import backends
from fastrlhf.functional.decoding import PAGE
from fastrlhf.rollout import NativeEngine, NotDrivenError, Rollout, RolloutInterrupted, SamplingParams, decoding_loop
from fastrlhf.rollout.decoder import Decoder

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
BORDERS = (1, 15, 16, 17, 31, 32, 33)  # around the ends of pages
ARCHITECTURES = ("llama", "mistral", "qwen2 with windows", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox")
SERVED_BY = backends.backend_table()["paged_attention"]["cpu"]
kernel_only = pytest.mark.skipif(SERVED_BY == "reference", reason="torch's products hang on the batch")


@functools.cache
def engine_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> NativeEngine:
    return NativeEngine(build(name).to(dtype), TOKENIZER)


def prompts_of(lengths=BORDERS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def sampling(max_new_tokens: int = 20, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens, **{"seed": 7, **options})


def assert_same(a: Rollout, b: Rollout) -> None:
    """Token for token and bit for bit."""
    assert a.prompts == b.prompts
    assert a.responses == b.responses
    assert a.finish_reasons == b.finish_reasons
    assert same_bits(a.log_probs, b.log_probs)
    assert (a.hidden is None) == (b.hidden is None)
    if a.hidden is not None:
        assert same_bits(a.hidden, b.hidden)


def joined(rollouts: list[Rollout]) -> Rollout:
    lists = ([x for rollout in rollouts for x in getattr(rollout, name)] for name in FIELDS)
    hidden = [] if rollouts[0].hidden is None else [torch.cat([rollout.hidden for rollout in rollouts])]
    return Rollout(*lists, torch.cat([rollout.log_probs for rollout in rollouts]), *hidden)


FIELDS = ("prompts", "responses", "finish_reasons")


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(name):
    engine, prompts = engine_of(name), prompts_of()
    ours = engine.generate(prompts, sampling(temperature=0))
    assert ours.prompts == prompts
    for prompt, response, reason in zip(prompts, ours.responses, ours.finish_reasons, strict=True):
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": EOS, "pad_token_id": 2}
        expected = engine.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert response == expected[0, len(prompt) :].tolist()
        assert reason == ("stop" if response[-1] == EOS else "length")
        assert len(response) == 20 or reason == "stop"


def predicting(model: nn.Module, rollout: Rollout) -> Tensor:
    """The model's own logits that each token was sampled from [N, V]."""
    rows = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        rows.append(logits_of(model, prompt + response)[len(prompt) - 1 : -1])
    return torch.cat(rows)


OPTIONS = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "min_new_tokens": 3},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_log_probs_are_those_of_a_forward(name, options):
    """Unfiltered, at the temperature, whatever was forbidden; with at most twice the error of the model's own."""
    model = engine_of(name).model
    rollout = engine_of(name).generate(prompts_of((5, 16, 40)), sampling(24, **options))
    assert rollout.log_probs.dtype == torch.float32
    assert rollout.log_probs.shape == rollout.tokens.shape
    temperature = options.get("temperature") or 1.0

    def log_probs(logits):
        return (logits / temperature).log_softmax(-1).gather(-1, rollout.tokens[:, None])[:, 0]

    own, exact = log_probs(predicting(model, rollout)), log_probs(predicting(in_fp64(model), rollout))
    assert_as_good_as_own(rollout.log_probs, own, exact)


@pytest.mark.parametrize("options", OPTIONS[4:], ids=str)
def test_filters_let_nothing_else_through(options):
    engine = engine_of()
    rollout = engine.generate(prompts_of((5, 16)), sampling(40, n=4, **options))
    logits = predicting(engine.model, rollout) / options.get("temperature", 1.0)
    p, order = logits.softmax(-1).sort(-1, descending=True)
    rank = (order == rollout.tokens[:, None]).int().argmax(-1, keepdim=True)
    assert (rank < (options.get("top_k") or VOCABULARY)).all()
    least = options.get("min_p", 0.0) * p[:, :1]
    assert (p.gather(-1, rank) >= least * (1 - 1e-4)).all()
    if "top_p" in options:
        kept = p[:, : options["top_k"]] / p[:, : options["top_k"]].sum(-1, keepdim=True) if "top_k" in options else p
        assert ((kept.cumsum(-1) - kept).gather(-1, rank) < options["top_p"] + 1e-5).all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_hidden_states_are_the_last_ones_of_the_model(name):
    """What the head makes its logits of."""
    engine = engine_of(name)
    rollout = engine.generate(prompts_of((3, 17)), sampling(n=2), hidden=True)
    assert rollout.hidden.dtype == torch.float32
    assert rollout.hidden.shape == (len(rollout.tokens), 48)
    seen = []
    for model in (engine.model, in_fp64(engine.model)):
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        predicting(model, rollout)
        handle.remove()
    rows = [slice(len(p) - 1, -1) for p in rollout.prompts]
    own, exact = (torch.cat([x[row] for x, row in zip(xs, rows, strict=True)]) for xs in (seen[:4], seen[4:]))
    assert_as_good_as_own(rollout.hidden, own, exact)


def test_the_first_token_has_the_distribution_of_the_model():
    """By Pearson's chi-square over 20000 copies of a prompt, and over 20000 seeds."""
    engine, (prompt,) = engine_of(), prompts_of((6,))
    p = logits_of(in_fp64(engine.model), prompt)[-1].softmax(-1)
    rollout = engine.generate([prompt], sampling(1, n=20_000, batch_size=5000))
    assert chi_square_p_value(rollout.tokens.bincount(minlength=VOCABULARY), p) > UNLIKELY
    rollout = engine.generate([prompt] * 20_000, sampling(1, batch_size=5000), seeds=list(range(20_000)))
    assert chi_square_p_value(rollout.tokens.bincount(minlength=VOCABULARY), p) > UNLIKELY


def test_two_tokens_have_the_distribution_of_the_model():
    """The second given the first; an EOS has nothing after it."""
    vocabulary = 8
    engine = NativeEngine(build("gpt2", vocab_size=vocabulary), TOKENIZER)
    prompt = [3, 0, 5]
    model = in_fp64(engine.model)
    first = logits_of(model, prompt)[-1].softmax(-1)
    p = torch.stack([first[i] * logits_of(model, [*prompt, i])[-1].softmax(-1) for i in range(vocabulary)])
    p[EOS] = 0.0
    p[EOS, EOS] = first[EOS]
    rollout = engine.generate([prompt], sampling(2, n=20_000, batch_size=2000, temperature=1.0))
    pairs = torch.tensor([response[0] * vocabulary + response[-1] for response in rollout.responses])
    assert all(len(response) == 2 or response == [EOS] for response in rollout.responses)
    assert chi_square_p_value(pairs.bincount(minlength=vocabulary**2), p.flatten()) > UNLIKELY


# ---------------------------------------------------------------------------- what changes no bit of a response


def mixed() -> tuple[list[list[int]], list[int]]:
    """Prompts of all lengths, of which some come again, and their seeds."""
    prompts = prompts_of((17, 3, 33, 16, 41, 1))
    return [*prompts, prompts[0], prompts[2], prompts[0], prompts[3]], [5, 2**63 - 1, 0, 7, 8, 9, 10, 11, 5, 13]


LONG_TAILED = {"temperature": 1.2, "stop_token_ids": tuple(range(40))}  # ends after about eight tokens


@functools.cache
def alone(name: str, dtype: torch.dtype) -> Rollout:
    """One prompt a call."""
    engine = engine_of(name, dtype)
    calls = (
        engine.generate([prompt], sampling(40, **LONG_TAILED), seeds=[seed], hidden=True)
        for prompt, seed in zip(*mixed(), strict=True)
    )
    return joined(list(calls))


@kernel_only
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_batches_are_their_responses_one_by_one(name, dtype, batch_size):
    prompts, seeds = mixed()
    expected = alone(name, dtype)
    assert len({len(response) for response in expected.responses}) > 3  # they leave the batch at different times
    options = sampling(40, batch_size=batch_size, **LONG_TAILED)
    assert_same(engine_of(name, dtype).generate(prompts, options, seeds=seeds, hidden=True), expected)


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_responses_of_a_prompt_are_those_of_one_slot(dtype):
    """Their numbers decide, not what runs beside them."""
    engine, prompts = engine_of("llama", dtype), prompts_of((16, 20, 5, 33, 48))
    calls = [
        engine.generate([p], sampling(30, n=4, batch_size=1, **LONG_TAILED), seeds=[i], hidden=True)
        for i, p in enumerate(prompts)
    ]
    expected = joined(calls)
    assert len({tuple(response) for response in expected.responses}) == 20
    for batch_size in (1, 2, 3, 7, 64):
        options = sampling(30, n=4, batch_size=batch_size, **LONG_TAILED)
        assert_same(engine.generate(prompts, options, seeds=list(range(5)), hidden=True), expected)


@kernel_only
def test_prompts_that_start_in_several_steps(monkeypatch):
    """As where they have more tokens together than a step takes."""
    prompts, seeds = mixed()
    for most in (1, 20, 50):
        monkeypatch.setattr(decoding_loop, "MOST_PREFILL", most)
        ours = engine_of().generate(prompts, sampling(40, **LONG_TAILED), seeds=seeds, hidden=True)
        assert_same(ours, alone("llama", torch.float32))


def page_bytes(engine: NativeEngine) -> int:
    config = engine.model.config
    size = torch.finfo(next(engine.model.parameters()).dtype).bits // 8
    return config.num_hidden_layers * 2 * config.num_key_value_heads * 12 * PAGE * size


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_the_least_cache_gives_the_same_and_a_byte_less_is_an_error(dtype, n):
    """The longest prompt has 41 tokens; 80 positions are 5 pages, and one more is for what waits."""
    prompts, seeds = mixed()
    model = engine_of("llama", dtype).model
    least = 6 * page_bytes(engine_of("llama", dtype))
    options = sampling(40, n=n)
    expected = engine_of("llama", dtype).generate(prompts, options, seeds=seeds, hidden=True)
    assert expected.lengths.max() == 40
    for more in (0, 1, least // 3, least, 100 * least):
        engine = NativeEngine(model, TOKENIZER, kv_cache_bytes=least + more)
        assert_same(engine.generate(prompts, options, seeds=seeds, hidden=True), expected)
    engine = NativeEngine(model, TOKENIZER, kv_cache_bytes=least - 1)
    message = f"kv_cache_bytes={least - 1} holds 5 pages of {least // 6} bytes.*needs 6.*{least}.*max_new_tokens=40"
    with pytest.raises(MemoryError, match=message):
        engine.generate(prompts, options)
    assert engine.generate(prompts, sampling(3)).responses


def test_the_cache_is_as_large_as_predicted_and_all_its_pages_come_back(monkeypatch):
    loops, allocated = [], []
    run, allocate = decoding_loop.DecodingLoop.run, Decoder.allocate
    monkeypatch.setattr(decoding_loop.DecodingLoop, "run", lambda self: (loops.append(self), run(self)))

    def watched(self, pages, positions):
        allocate(self, pages, positions)
        allocated.append(sum(x.numel() * x.element_size() for pair in self.cache for x in pair))

    monkeypatch.setattr(Decoder, "allocate", watched)
    engine = NativeEngine(build("llama"), TOKENIZER)
    for n, batch_size, bound in ((1, 64, None), (3, 2, None), (4, 5, None), (3, 64, 7 * page_bytes(engine))):
        engine.kv_cache_bytes = bound
        prompts, options = mixed()[0], sampling(40, n=n, batch_size=batch_size, **LONG_TAILED)
        engine.generate(prompts, options)
        allocator = loops[-1].allocator
        assert allocated[-1] == len(allocator.holders) * page_bytes(engine)
        assert allocated[-1] == min(engine.kv_bytes(prompts, options), bound or math.inf)
        assert sorted(allocator.free) == list(range(len(allocator.holders)))
        assert not any(allocator.holders)
        assert sorted(loops[-1].free_slots) == list(range(min(batch_size, n * len(prompts))))
        assert engine.decoder.cache == []


@pytest.mark.parametrize("forced", [False, True], ids=["packed", "plain"])
def test_released_weights_are_read_again(monkeypatch, forced):
    monkeypatch.setattr(backends, "REFERENCE_FORCED", forced)
    engine, prompts = NativeEngine(build("llama"), TOKENIZER), prompts_of()
    before = engine.generate(prompts, sampling())

    def held() -> list[Any]:
        linears = [x for layer in engine.decoder.layers for x in (layer.qkv, layer.output, layer.up, layer.down)]
        return [x.own if forced else x.packed for x in (*linears, engine.decoder.head)]

    assert all(len(x) for x in held())
    engine.release_weights()
    assert not any(held())
    assert_same(engine.generate(prompts, sampling()), before)


def test_a_cache_that_does_not_fit_is_an_error_with_the_numbers(monkeypatch):
    engine = engine_of()
    wanted = engine.kv_bytes(prompts_of(), sampling(50))
    free = SimpleNamespace(available=wanted - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(MemoryError, match=r"GiB, of .* GiB that are free. Lower batch_size or max_new_tokens"):
        engine.generate(prompts_of(), sampling(50))
    free.available = wanted
    engine.generate(prompts_of(), sampling(50))


@kernel_only
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(threads):
    prompts, seeds = mixed()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours = engine_of().generate(prompts, sampling(40, **LONG_TAILED), seeds=seeds, hidden=True)
    torch.set_num_threads(before)
    assert_same(ours, alone("llama", torch.float32))


@kernel_only
def test_decoding_in_bf16_is_that_of_the_model_in_bf16():
    """Where the weights of a model in fp32 are numbers of bf16, the engine's dtype makes it the same."""
    model = build("llama").bfloat16()
    ours = NativeEngine(build("llama").bfloat16().float(), TOKENIZER, dtype=torch.bfloat16)
    expected = NativeEngine(model, TOKENIZER).generate(prompts_of(), sampling(), seeds=list(range(7)), hidden=True)
    assert_same(ours.generate(prompts_of(), sampling(), seeds=list(range(7)), hidden=True), expected)


# ----------------------------------------------------------------------------------------------- seeds and order


def test_two_runs_are_equal_and_other_seeds_are_not():
    engine, prompts = engine_of(), prompts_of()
    first = engine.generate(prompts, sampling(n=2))
    assert_same(engine.generate(prompts, sampling(n=2)), first)
    assert engine.generate(prompts, sampling(n=2, seed=8)).responses != first.responses


def test_equal_prompts_get_different_responses():
    (prompt,) = prompts_of((9,))
    for prompts, n in (([prompt] * 6, 1), ([prompt] * 2, 3), ([prompt], 6)):
        rollout = engine_of().generate(prompts, sampling(n=n))
        assert rollout.prompts == [prompt] * 6
        assert len({tuple(response) for response in rollout.responses}) == 6
    assert engine_of().generate([prompt] * 6, sampling()).responses == rollout.responses


def test_responses_stand_in_the_order_of_the_prompts():
    prompts = prompts_of((2, 40, 7))
    rollout = engine_of().generate(prompts, sampling(n=2, batch_size=2))
    assert rollout.prompts == [prompts[i] for i in (0, 0, 1, 1, 2, 2)]
    assert rollout.cu_seqlens.tolist() == [0, *torch.tensor([len(r) for r in rollout.responses]).cumsum(0)]


@kernel_only
def test_a_seed_of_its_own_goes_with_a_prompt_wherever_it_stands():
    prompts, seeds = prompts_of(), list(range(7))
    forth = engine_of().generate(prompts, sampling(n=2), seeds=seeds)
    back = engine_of().generate(prompts[::-1], sampling(n=2), seeds=seeds[::-1])
    assert back.responses[::-1] == [x for i in range(7) for x in forth.responses[2 * i : 2 * i + 2][::-1]]
    assert forth.responses != engine_of().generate(prompts, sampling(n=2), seeds=[0] * 7).responses


def test_without_a_seed_the_generator_of_torch_decides():
    engine, prompts = engine_of(), prompts_of((4, 20))
    torch.manual_seed(3)
    first, second = (engine.generate(prompts, sampling(seed=None)) for _ in range(2))
    assert first.responses != second.responses
    torch.manual_seed(3)
    assert_same(engine.generate(prompts, sampling(seed=None)), first)
    state = torch.get_rng_state()
    engine.generate(prompts, sampling(seed=0))
    engine.generate(prompts, sampling(seed=None), seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------- when a response ends


@pytest.fixture
def script(monkeypatch):
    """What the engine shall sample: lists of tokens, of response i at number i."""
    lines: list[list[int]] = []

    def sample(logits, *, seed, sequence, position, **options):
        chosen = [lines[s][p] for s, p in zip(sequence.tolist(), position.tolist(), strict=True)]
        return torch.tensor(chosen), torch.zeros(len(chosen))

    monkeypatch.setattr(decoding_loop.F, "sample_tokens", sample)
    return lines


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


OTHER = ids("x y z")


def test_eos_ends_a_response_and_stays_in_it(script):
    """As the first token, in the middle, as the last that is allowed; pad is the same token."""
    assert TOKENIZER.pad_token_id == EOS
    script += [[EOS], [*OTHER, EOS, 4], [4] * 9 + [EOS], [4] * 10]
    rollout = engine_of().generate([[5]] * 4, sampling(10))
    assert rollout.responses == [[EOS], [*OTHER, EOS], [4] * 9 + [EOS], [4] * 10]
    assert rollout.finish_reasons == ["stop", "stop", "stop", "length"]
    assert rollout.mask.sum(1).tolist() == [1, len(OTHER) + 1, 10, 10]


def test_a_prompt_may_have_eos_in_it(script):
    script += [[4, 5, 6]]
    rollout = engine_of().generate([[EOS, 7, EOS]], sampling(3))
    assert (rollout.prompts, rollout.responses) == ([[EOS, 7, EOS]], [[4, 5, 6]])


def test_a_tokenizer_without_eos(script):
    script += [[EOS, 4, 5]]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    rollout = NativeEngine(engine_of().model, tokenizer).generate([[5]], sampling(3))
    assert rollout.responses == [[EOS, 4, 5]]


def test_stop_tokens_end_it_too(script):
    script += [[4, 9, 4], [4, 8, 8], [EOS, 4, 4], [4, 4, 4]]
    rollout = engine_of().generate([[5]] * 4, sampling(3, stop_token_ids=(8, 9)))
    assert rollout.responses == [[4, 9], [4, 8], [EOS], [4, 4, 4]]
    assert rollout.finish_reasons == ["stop", "stop", "stop", "length"]


STOPS = (
    ("the good film", ("oo",)),  # inside of a token
    ("the good film", (" good",)),  # a token
    ("the good film", ("d f",)),  # across
    ("the good film", ("film",)),  # at the end
    ("the good film", ("filmed",)),  # not there
    ("the good film", ("m", "e g")),  # the first of them that is complete
    ("a: ab: abc", ("abc", "ab:")),
    ("aaab aab", ("aab",)),  # begins again inside of itself
    ("abababc", ("ababc",)),
    ("so\n\nHuman: hi", ("\n\nHuman:",)),
    ("so\n\nAssistant: hi", ("\nHuman:", "\n\nAssistant:")),
    ("caf\u00e9 au lait", ("\u00e9",)),  # two tokens for a character
    ("\u65e5\u672c\u8a9e", ("\u672c",)),
    ("ok \U0001f642\U0001f643 fine", ("\U0001f643",)),  # four, of which the first three are those of the other emoji
    ("\U0001f469\u200d\U0001f4bb!", ("\u200d\U0001f4bb",)),  # part of a joined one
    ("e\u0301!", ("\u0301",)),
    ("x\U0001f642 stop", ("\U0001f642 st",)),
)


def first_stop(tokens: list[int], stop: tuple[str, ...], tokenizer=TOKENIZER) -> int | None:
    """After how many tokens the text of all of them first has a stop string in it."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n])
        if any(string in text for string in stop):
            return n
    return None


@pytest.mark.parametrize(("text", "stop"), STOPS)
def test_stop_strings(script, text, stop):
    tokens = ids(text)
    script += [[*tokens, 4, 4, 4, 4], [*ids("so "), *tokens, 4]]
    assert len(script[0]) == len(script[1])
    expected = [first_stop(line, stop) for line in script]
    rollout = engine_of().generate([[5]] * 2, sampling(len(script[0]), stop=stop))
    assert rollout.responses == [line[:n] for line, n in zip(script, expected, strict=True)]
    assert rollout.finish_reasons == ["length" if n is None else "stop" for n in expected]
    assert (None in expected) == (stop == ("filmed",))


def assert_stops(engine: NativeEngine, script: list[list[int]], stops: tuple[str, ...]) -> None:
    """As by a search of the whole text after each token."""
    rollout = engine.generate([[5]] * len(script), sampling(len(script[0]), stop=stops))
    expected = [first_stop(line, stops, engine.tokenizer) for line in script]
    assert {n is None for n in expected} == {True, False}
    assert [len(response) for response in rollout.responses] == [n or len(script[0]) for n in expected]
    assert rollout.finish_reasons == ["length" if n is None else "stop" for n in expected]


def test_stop_strings_of_any_text(script):
    generator = torch.Generator().manual_seed(0)
    letters = [*ids("a"), *ids("b"), *ids("\u00e9"), *ids(" good")]
    for _ in range(200):
        script.append([letters[i] for i in torch.randint(len(letters), (40,), generator=generator)])
    assert_stops(engine_of(), script, ("abb", "baa\u00e9", "\u00e9\u00e9", "goodb", "\u00e9 go"))


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama 2, Mistral and Gemma: words begin with a mark that a text does not, and what is not in the
    vocabulary comes in tokens of a byte, all broken where one that stands beside them is."""
    vocabulary = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["\u2581", "a", "b", "\u2581a", "ab"]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    bpe = models.BPE(numbers, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    marks = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_stop_strings_of_a_sentencepiece_tokenizer(script):
    tokenizer = sentencepiece_tokenizer()
    engine = NativeEngine(engine_of().model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    pieces = [[n] for n in tokenizer.convert_tokens_to_ids(["\u2581", "a", "b", "\u2581a", "ab"])]
    pieces += [[3 + byte for byte in character.encode()] for character in "\u00e9\u65e5\U0001f642"]
    for _ in range(150):
        line = [n for i in torch.randint(len(pieces), (40,), generator=generator) for n in pieces[i]]
        script.append(line[:40])
    for stop in (" \u00e9a", "\u65e5\U0001f642", "ba b", " a a", "\U0001f642\u65e5", " bb", "\u00e9", "\u65e5\u65e5"):
        assert_stops(engine, script, (stop,))


def test_a_stop_string_that_the_prompt_began_does_not_count(script):
    script += [ids(" film and film")]
    rollout = engine_of().generate([ids("the good")], sampling(4, stop=("good film",)))
    assert rollout.finish_reasons == ["length"]


def test_a_stop_string_before_the_least_tokens_does_not_count(script):
    """The next one does."""
    line = ids(" good x good x good")
    first, second, third = (i + 1 for i, token in enumerate(line) if token == line[0])
    script.append(line)
    for least, expected in ((0, first), (1, first), (2, second), (second, second), (second + 1, third)):
        rollout = engine_of().generate([[5]], sampling(len(line), stop=("good",), min_new_tokens=least))
        assert rollout.responses == [line[:expected]]
        assert rollout.finish_reasons == ["stop"]


def loaded(bias: float) -> NativeEngine:
    """An engine whose model has EOS with a logit that is `bias` higher."""
    model = build("llama")
    head = nn.Linear(48, VOCABULARY)
    head.weight.data, head.bias.data = model.lm_head.weight.data, torch.zeros(VOCABULARY)
    model.lm_head = head
    engine = NativeEngine(model, TOKENIZER)
    head.bias.data[EOS] = bias
    return engine


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_until_the_least_tokens_eos_is_forbidden(temperature):
    """And log-probs are those of the distribution that has it: the chosen tokens are unlikely in it."""
    engine = loaded(30.0)
    options = sampling(12, min_new_tokens=5, temperature=temperature)
    rollout = engine.generate(prompts_of(), options, seeds=list(range(7)))
    assert all(len(response) == 6 and EOS not in response[:5] for response in rollout.responses)
    assert all(response[-1] == EOS for response in rollout.responses)
    logits = predicting(engine.model, rollout) / (temperature or 1.0)
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens[:, None])[:, 0]
    torch.testing.assert_close(rollout.log_probs, expected, rtol=1e-5, atol=1e-4)
    assert (rollout.padded(rollout.log_probs)[:, :5] < -20).all()
    # What is drawn is what would be drawn if there were no EOS.
    without = loaded(-math.inf).generate(prompts_of(), sampling(5, temperature=temperature), seeds=list(range(7)))
    assert [response[:5] for response in rollout.responses] == without.responses


def test_stop_tokens_are_forbidden_with_it():
    forbidden = tuple(range(100))
    rollout = engine_of().generate(prompts_of(), sampling(8, n=8, min_new_tokens=8, stop_token_ids=forbidden))
    assert all(len(response) == 8 for response in rollout.responses)
    early = torch.tensor([response[:7] for response in rollout.responses])
    assert (early >= 100).all()


def test_no_new_tokens():
    rollout = engine_of().generate(prompts_of((1, 5)), sampling(0, n=2), hidden=True)
    assert rollout.responses == [[]] * 4
    assert rollout.finish_reasons == ["length"] * 4
    assert rollout.log_probs.shape == rollout.tokens.shape == (0,)
    assert rollout.log_probs.dtype == torch.float32
    assert rollout.hidden.shape == (0, 48)
    assert rollout.mask.shape == (4, 0)
    assert rollout.cu_seqlens.tolist() == [0] * 5
    assert rollout.texts(TOKENIZER) == [""] * 4


@pytest.mark.parametrize(("name", "size"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
@pytest.mark.parametrize("context", [7, 32, 40])
def test_the_context_ends_a_response(name, size, context):
    """A prompt as long as it gets none, and one that is longer is refused."""
    engine = NativeEngine(build(name, **{size: context}), TOKENIZER)
    lengths = (context, context - 1, context - 2, 3)
    prompts = prompts_of(lengths)
    rollout = engine.generate(prompts, sampling(context, temperature=0))
    assert [len(response) for response in rollout.responses] == [0, 1, 2, context - 3]
    assert rollout.finish_reasons == ["length"] * 4
    for prompt, response in zip(prompts[1:], rollout.responses[1:], strict=True):
        logits = logits_of(engine.model, prompt + response)
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == response
    for prompt in prompts_of((context + 1, context + 20)):
        message = rf"prompts\[1\] has {len(prompt)} tokens, more than the model's context of {context}"
        with pytest.raises(ValueError, match=message):
            engine.generate([[3], prompt], sampling())


# ------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    ("prompts", "options", "seeds", "message"),
    [
        ([], {}, None, "prompts: there must be at least one"),
        ([[3], []], {}, None, r"prompts\[1\] is empty"),
        ([[3], [4, VOCABULARY]], {}, None, r"prompts\[1\] has a token outside the vocabulary of 300"),
        ([[-1]], {}, None, r"prompts\[0\] has a token outside the vocabulary"),
        ([[3], [4]], {}, [1], "seeds: got 1 for 2 prompts"),
        ([[3], [4]], {}, [1, -1], r"seeds\[1\]=-1 must be in"),
        ([[3], [4]], {}, [2**63, 1], r"seeds\[0\]=9223372036854775808 must be in"),
        ([[3]], {"stop_token_ids": (300,)}, None, "stop_token_ids=.* outside the vocabulary of 300"),
        ([[3]], {"stop_token_ids": (-1,)}, None, "stop_token_ids"),
    ],
)
def test_what_cannot_be_sampled_is_a_value_error(prompts, options, seeds, message):
    with pytest.raises(ValueError, match=message):
        engine_of().generate(prompts, sampling(**options), seeds=seeds)


@pytest.mark.parametrize(
    "options",
    [
        *(
            {name: -1}
            for name in ("max_new_tokens", "min_new_tokens", "top_k", "n", "batch_size", "temperature", "seed")
        ),
        *({"n": 0}, {"batch_size": 0}, {"temperature": math.inf}, {"temperature": math.nan}, {"seed": 2**63}),
        *({"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}, {"top_p": math.nan}, {"min_p": math.nan}),
        *({"min_new_tokens": 21}, {"stop": "text"}, {"stop": ("",)}, {"stop": (3,)}),
    ],
    ids=str,
)
def test_sampling_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dataclasses.replace(sampling(), **options)


def test_models_that_are_not_driven():
    with pytest.raises(NotDrivenError, match=r"its weights are torch\.float64"):
        NativeEngine(build("llama").double(), TOKENIZER)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotDrivenError, match="its adapter is a learned prompt"):
        NativeEngine(get_peft_model(build("llama"), config), TOKENIZER)


def test_an_adapter_and_weights_that_change_between_two_calls():
    """And dropout, which is the trainer's, does not count."""
    base, greedy = build("llama"), sampling(temperature=0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, bias="all")).train()
    engine, seen = NativeEngine(model, TOKENIZER), []
    for seed in range(3):
        if seed:
            randomised(model, seed)
        model.train()
        rollout = engine.generate(prompts_of(), greedy)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        model.eval()
        assert predicting(model, rollout).argmax(-1).tolist() == rollout.tokens.tolist()
        seen.append(rollout.responses)
    assert seen[0] != seen[1] != seen[2]
    with model.disable_adapter():
        rollout = engine.generate(prompts_of(), greedy)
        assert predicting(model, rollout).argmax(-1).tolist() == rollout.tokens.tolist()
    assert rollout.responses != seen[-1]


# ------------------------------------------------------------------------------------------------------ interrupts


def failing_after(monkeypatch, steps: int, error: type[BaseException]) -> None:
    call, calls = Decoder.__call__, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) > steps:
            raise error("here")
        return call(self, *args)

    monkeypatch.setattr(Decoder, "__call__", counted)


@kernel_only
@pytest.mark.parametrize("steps", [0, 1, 6, 12])
def test_ctrl_c_leaves_what_was_finished(monkeypatch, steps):
    engine = NativeEngine(build("llama"), TOKENIZER)
    prompts, options = [*prompts_of(), *prompts_of()], sampling(40, n=2, batch_size=6, **LONG_TAILED)
    expected = engine.generate(prompts, options, hidden=True)
    with monkeypatch.context() as patch:
        failing_after(patch, steps, KeyboardInterrupt)
        with pytest.raises(RolloutInterrupted, match="responses were finished") as caught:
            engine.generate(prompts, options, hidden=True)
    assert isinstance(caught.value, KeyboardInterrupt)
    rollout, indices = caught.value.rollout, caught.value.indices
    assert len(rollout) == len(indices) < 28
    assert bool(indices) == (steps > 1)
    for name in FIELDS:
        assert getattr(rollout, name) == [getattr(expected, name)[i] for i in indices]
    parts = [expected.log_probs.split(expected.lengths.tolist()), expected.hidden.split(expected.lengths.tolist())]
    assert same_bits(rollout.log_probs, torch.cat([parts[0][i] for i in indices] or [torch.empty(0)]))
    assert same_bits(rollout.hidden, torch.cat([parts[1][i] for i in indices] or [torch.empty(0, 48)]))
    assert rollout.mask.sum() == len(rollout.tokens)
    assert engine.decoder.cache == []
    assert_same(engine.generate(prompts, options, hidden=True), expected)


def test_responses_without_a_token_count_as_finished(monkeypatch):
    engine = NativeEngine(build("llama", max_position_embeddings=20), TOKENIZER)
    failing_after(monkeypatch, 1, KeyboardInterrupt)
    with pytest.raises(RolloutInterrupted) as caught:
        engine.generate(prompts_of((4, 20)), sampling())
    assert caught.value.indices == [1]
    assert caught.value.rollout.responses == [[]]


@pytest.mark.parametrize("where", ["call", "allocate", "sample"])
def test_what_fails_frees_the_cache(monkeypatch, where):
    engine = NativeEngine(build("llama"), TOKENIZER)
    expected = engine.generate(prompts_of(), sampling())
    with monkeypatch.context() as patch:
        if where == "call":
            failing_after(patch, 3, RuntimeError)
        elif where == "allocate":

            def broken(*args):
                raise RuntimeError("here")

            rope = engine.model.model.rotary_emb
            patch.setattr(rope, "forward", broken)
        else:
            patch.setattr(decoding_loop.F, "sample_tokens", lambda *args, **options: 1 / 0)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            engine.generate(prompts_of(), sampling())
    assert engine.decoder.cache == []
    assert_same(engine.generate(prompts_of(), sampling()), expected)


def test_a_model_with_nan_in_it_is_an_error():
    model = build("llama")
    engine = NativeEngine(model, TOKENIZER)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="no distribution"):
        engine.generate(prompts_of(), sampling())
    assert engine.decoder.cache == []
    with pytest.raises(NotDrivenError):
        NativeEngine(model, TOKENIZER)


# ----------------------------------------------------------------------------------------------------------- text


TEXTS = (
    "the good film",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
    "\n\n\tx",
    " the",
    "\u0645\u0631\u062d\u0628\u0627",
    "e\u0301",
)


def test_texts_of_any_prompt_make_whole_texts():
    engine, prompts = engine_of(), [ids(text) for text in TEXTS]
    rollout = engine.generate(prompts, sampling(30, n=3))
    texts = rollout.texts(TOKENIZER)
    assert len(texts) == 18
    for prompt, response, text in zip(rollout.prompts, rollout.responses, texts, strict=True):
        whole = TOKENIZER.decode([*prompt, *response], skip_special_tokens=True)
        assert TOKENIZER.decode(prompt) + text == whole
    assert [TOKENIZER.decode(prompt) for prompt in prompts] == list(TEXTS)


def test_a_text_that_the_model_wrote_comes_back(script):
    script += [[*ids(text), EOS] for text in TEXTS]
    rollout = engine_of().generate([ids("so ")] * len(TEXTS), sampling(100))
    assert rollout.texts(TOKENIZER) == list(TEXTS)


def test_a_character_that_begins_in_the_prompt(script):
    emoji = ids("\U0001f642")
    script += [[*emoji[2:], *ids(" ok")]]
    rollout = engine_of().generate([[*ids("hi"), *emoji[:2]]], sampling(len(script[0]), stop=("ok",)))
    assert rollout.finish_reasons == ["stop"]
    assert rollout.texts(TOKENIZER)[0].endswith(" ok")


# --------------------------------------------------------------------------------------------------- the reference


@kernel_only
@pytest.mark.parametrize(
    ("variable", "value"), [("FASTRLHF_BACKEND", "reference"), ("FASTRLHF_CPU_CAPABILITY", "avx2")]
)
def test_other_backends(variable, value):
    """The plain layers and the reference's ops, and another build of the kernels, give what transformers gives."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    command += ["-k", "greedy or (forward and not gemma) or least_tokens or hidden or frees or one_slot"]
    environment = os.environ | {variable: value}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "FASTRLHF_CPU_CAPABILITY: got" in run.stdout + run.stderr:
        pytest.skip(f"no {value} here")
    assert run.returncode == 0, run.stdout[-2000:]
