"""The GPU kernels as machine code, without a GPU: what bench/gpu_audit.py requires, and that it would notice."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the GPU kernels are written in Triton")
import triton.language as tl  # noqa: E402

from fastrlhf import backends  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set, so there is no compiler to look at", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_audit.py"
spec = importlib.util.spec_from_file_location("gpu_audit", SCRIPT)
gpu_audit = importlib.util.module_from_spec(spec)
sys.modules["gpu_audit"] = gpu_audit  # dataclasses look their module up
spec.loader.exec_module(gpu_audit)

OPS = [f"token_log_probs{entropy}{backward}" for entropy in ("", "_and_entropy") for backward in ("", "_backward")]


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """{(op, kernel, dtype, arch): audit}, by running the script: all for one architecture, bf16 for the others.

    `make gpu-audit` runs the whole.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = []
    for options in (["--arch", "90"], ["--arch", "80", "100", "--dtype", "bfloat16", "--family", "log_probs"]):
        path = tmp_path_factory.mktemp("audit") / "audit.json"
        command = [sys.executable, str(SCRIPT), "--json", str(path), *options]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        found += json.loads(path.read_text())
    return {(a["op"], a["kernel"], a["dtype"], a["arch"]): a for a in found}


def test_every_op_with_a_kernel_is_there(audits):
    dtypes = ("float32", "bfloat16", "float16")
    there = {(op, dtype, arch) for op, _, dtype, arch in audits}
    assert {(op, dtype, 90) for op in OPS for dtype in dtypes} <= there
    assert {(op, "bfloat16", arch) for op in OPS for arch in (80, 100)} <= there
    ops = {op.partition("[")[0] for op, _, _ in there}
    assert {name.removesuffix("_") for names in backends.TRITON.values() for name in names} <= ops


def test_nothing_spills(audits):
    assert {a["spills"] for a in audits.values()} == {0}


def test_loops_over_the_vocabulary_move_128_bits_an_access_and_only_the_bytes_they_need(audits):
    wide = [a for a in audits.values() if a["bytes_needed"]]
    assert {a["op"] for a in wide} >= set(OPS)
    for a in wide:
        assert set(a["loads"]) == {"128"}
        assert set(a["stores"]) <= {"128"}
        assert sorted(a["bytes_moved"]) == sorted(a["bytes_needed"])


def test_bug_liger_and_trl_recompile_for_every_length_and_temperature(audits):
    assert {a["binaries"] for a in audits.values()} == {1}


def test_four_blocks_fit_on_a_multiprocessor(audits):
    """Latency is hidden by loads in flight: 4 blocks x 128 threads x 4 loads x 16 bytes are 32 KiB."""
    for a in audits.values():
        if not a["bytes_needed"]:
            continue
        assert a["registers"] * 128 * 4 <= 65_536
        assert a["shared"] * 4 <= 64 * 1024


# -------------------------------------------------------------------------------------------- would it notice?


@triton.jit
def narrow_kernel(x_ptr, V, LANES: tl.constexpr, ROLL: tl.constexpr):
    for start in range(0, V, LANES * ROLL):
        at = x_ptr + start + tl.arange(0, LANES * ROLL)
        tl.store(at, tl.load(at) + 1)


@triton.jit
def spilling_kernel(x_ptr, V, LANES: tl.constexpr, ROLL: tl.constexpr):
    for start in range(0, V, LANES * ROLL):
        at = x_ptr + start + tl.arange(0, LANES * ROLL)
        x = tl.load(at)
        tl.store(at, tl.cumsum(tl.sort(x), 0) + tl.exp(x) + tl.sin(x))


def compiled(kernel, *arguments, needed=((4, 4),), **options):
    defaults = {"LANES": 512, "ROLL": 16, "num_warps": 4}  # too much a turn for the compiler to unroll
    with gpu_audit.compile_only(90) as launches:
        for args in arguments:
            kernel[(1,)](*args, **(defaults | options))
    return gpu_audit.inspect("some_op", torch.float32, 90, launches, needed)


def test_narrow_accesses_are_noticed():
    x = torch.zeros(8193)
    assert compiled(narrow_kernel, (x, 8192)).problems == []
    (problem,) = compiled(narrow_kernel, (x[1:], 8192)).problems  # not at a 16-byte boundary
    assert "narrower than 128 bits" in problem
    assert compiled(narrow_kernel, (x[1:], 8192), needed=None).problems == []  # required of the vocabulary alone


@triton.jit
def greedy_kernel(x_ptr, y_ptr, V, LANES: tl.constexpr, ROLL: tl.constexpr):
    for start in range(0, V, LANES * ROLL):
        at = start + tl.arange(0, LANES * ROLL)
        tl.store(x_ptr + at, tl.load(x_ptr + at) + tl.load(y_ptr + at))


@triton.jit
def returning_kernel(x_ptr, y_ptr, V, LANES: tl.constexpr, ROLL: tl.constexpr):
    for start in range(0, V, LANES * ROLL):
        at = start + tl.arange(0, LANES * ROLL)
        tl.store(x_ptr + at, tl.load(x_ptr + at) + 1)
    for start in range(0, V, LANES * ROLL):
        at = start + tl.arange(0, LANES * ROLL)
        tl.store(y_ptr + at, tl.load(x_ptr + at) + 1)


def test_a_second_read_is_noticed():
    x = torch.zeros(8192)
    for kernel, moved in ((greedy_kernel, [(8.0, 4.0)]), (returning_kernel, [(4.0, 4.0), (4.0, 4.0)])):
        audit = compiled(kernel, (x, x, 8192))
        assert audit.bytes_moved == moved
        (problem,) = audit.problems
        assert "bytes a column" in problem


def test_spills_are_noticed():
    problems = compiled(
        spilling_kernel, (torch.zeros(8192), 8192), LANES=2048, ROLL=2, num_warps=1, maxnreg=32
    ).problems
    assert any("spills" in problem for problem in problems)


def test_recompilation_is_noticed():
    x = torch.zeros(8192)
    (problem,) = compiled(narrow_kernel, (x, 8192), (x, 8191)).problems
    assert "2 binaries" in problem


KERNEL = """
import triton


@triton.jit
def _new_kernel(x_ptr):
    pass
"""


def test_a_kernel_that_nobody_launches_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text(KERNEL)
    monkeypatch.setattr(gpu_audit, "KERNELS", tmp_path)
    with pytest.raises(SystemExit, match=r"new\.py has kernels but no bench/audit/new\.py"):
        gpu_audit.audit([90])
    monkeypatch.setattr(gpu_audit, "FAMILIES", tmp_path)
    (tmp_path / "new.py").write_text("def launches(ops, dtype):\n    return {}\n\n\n" + KERNEL)
    with pytest.raises(SystemExit, match=r"new\.py: never launched: \['_new_kernel'\]"):
        gpu_audit.audit([90])
