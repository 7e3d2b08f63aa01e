"""The extension, its builds, the backends, and what an import costs."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrlhf
from fastrlhf.backends import CPU_ONLY

ROOT = Path(__file__).parents[1]
OP_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("log_probs", "log_probs_contract", "lm_head", "lm_head_contract", "kl", "advantages", "gae_packed"),
        *("rollout_advantages", "losses", "losses_contract", "masked", "preferences"),
    )
]
CHOSEN = fastrlhf.backend_table()["gae"]["cpu"]
X86 = platform.machine().lower() in ("x86_64", "amd64")


def python(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_build_of_the_kernels_passes_the_tests_of_the_ops(capability):
    """The build this processor chooses by itself is tested by the test files directly."""
    if f"({capability})" in CHOSEN:
        pytest.skip("this is the build the other test files ran")
    probe = python("-c", "import torch, fastrlhf; fastrlhf.backend_table()", FASTRLHF_CPU_CAPABILITY=capability)
    if "the best this processor and this build can run" in probe.stderr:
        pytest.skip(f"this processor has no {capability}")
    # The products of bf16 are all that avx512_bf16 has besides avx512.
    files = ["tests/test_lm_head.py"] if f"({capability}_bf16)" in CHOSEN else OP_TESTS
    run = python(
        *("-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", *files),
        *("-k", "not opcheck and not compile and not allocates"),
        FASTRLHF_CPU_CAPABILITY=capability,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_the_reference_serves_every_op_when_asked_to():
    table = python(
        "-c",
        "import json, torch, fastrlhf; print(json.dumps(fastrlhf.backend_table()))",
        FASTRLHF_BACKEND="reference",
    )
    backends = {backend for row in json.loads(table.stdout).values() for backend in row.values()}
    assert backends == {"reference", "none"}  # those that only the rollout engine has, on CPU


def test_the_reference_passes_the_tests_of_the_ops():
    not_for_the_reference = {
        # Torch's sums depend on the number of threads.
        "test_losses_contract.py::test_the_number_of_threads_changes_no_bit",
        "test_masked.py::test_threads_change_no_bit",
        "test_rollout_advantages.py::test_rows_are_independent_and_threads_change_no_bit",
        # Plain PyTorch holds softmax(z / T) whole: what the kernels are there to avoid.
        "test_log_probs.py::test_forward_allocates_nothing_of_the_vocabularys_size",
        "test_log_probs.py::test_a_slice_is_not_copied",
        "test_log_probs.py::test_inplace_backward_allocates_nothing_of_the_vocabularys_size",
    }
    run = python(
        *("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *OP_TESTS),
        *(argument for name in not_for_the_reference for argument in ("--deselect", f"tests/{name}")),
        FASTRLHF_BACKEND="reference",
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_the_backend_table_names_every_op():
    table = fastrlhf.backend_table()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrlhf::")}
    assert {f"fastrlhf::{name}" for name in table} == registered
    for name, row in table.items():
        assert set(row) == {"cpu", "cuda", "other"}
        assert row["other"] == ("none" if name in CPU_ONLY else "reference")
    if os.environ.get("FASTRLHF_BACKEND") != "reference":
        assert all(row["cpu"] == CHOSEN for row in table.values())
        assert table["token_log_probs"]["cuda"] == "triton (log_probs)"


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "FASTRLHF_CPU_CAPABILITY",
            "FASTRLHF_CPU_CAPABILITY: got 'sse9', wanted one of 'avx512_bf16', 'avx512', 'avx2', 'portable'",
        ),
        ("FASTRLHF_BACKEND", "FASTRLHF_BACKEND: got 'sse9', wanted 'reference' or nothing"),
    ],
)
def test_a_bad_environment_variable_is_named(variable, message):
    code = "import torch; from fastrlhf import functional as F; F.gae(torch.ones(1, 2), torch.ones(1, 2))"
    run = python("-c", code, **{variable: "sse9"})
    assert run.returncode != 0
    assert f"ValueError: {message}" in run.stderr


def test_devices_without_a_kernel_are_served_by_the_reference():
    for op in ("ppo_loss", "gae", "token_log_probs"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrlhf::{op}", "PrivateUse1") or (
            torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastrlhf::{op}", "PrivateUse1")
        )


def test_a_missing_extension_says_what_to_do():
    run = python("-c", "import sys; sys.modules['fastrlhf._C'] = None; import fastrlhf.functional")
    assert "ImportError: fastrlhf's C++ extension fastrlhf._C is not there" in run.stderr
    assert "pip install --no-build-isolation -e ." in run.stderr


def test_importing_pulls_in_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import fastrlhf, fastrlhf.functional;"
        "print(*(set(m.split('.')[0] for m in set(sys.modules) - before)))"
    )
    loaded = set(python("-c", code).stdout.split())
    assert "fastrlhf" in loaded
    assert not loaded & {"transformers", "triton", "datasets", "accelerate", "peft", "numpy", "flash_attn", "sympy"}


def test_importing_the_package_alone_does_not_even_load_the_extension():
    code = "import sys, fastrlhf; print('torch' in sys.modules, 'fastrlhf._C' in sys.modules)"
    assert python("-c", code).stdout.split() == ["False", "False"]


def test_unknown_public_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastrlhf' has no attribute 'PPO'"):
        _ = fastrlhf.PPO


def run_setup(tmp_path, prologue="pass", **environment):
    code = (
        f"import sys; {prologue}; folder = {str(tmp_path)!r};"
        "sys.argv = ['setup.py', '-q', 'build_ext', '--force', '--build-temp', folder, '--build-lib', folder];"
        "exec(open('setup.py').read())"
    )
    return python("-c", code, **environment)


def test_building_without_a_compiler_says_what_to_do(tmp_path):
    run = run_setup(tmp_path, "pass", CXX="no-such-compiler")
    assert run.returncode != 0
    assert "no C++ compiler: `no-such-compiler` was not found" in run.stderr
    assert "apt install g++" in run.stderr


def test_building_without_torch_says_what_to_do(tmp_path):
    run = run_setup(tmp_path, "sys.modules['torch'] = None")
    assert run.returncode != 0
    assert "torch is not installed in the environment that builds" in run.stderr
    assert "install torch >= 2.10 first" in run.stderr


@pytest.mark.parametrize(("version", "old"), [("2.9.1+cu128", True), ("1.13", True), ("2.10.0", False), ("3.0", False)])
def test_building_with_an_old_torch_says_what_to_do(tmp_path, version, old):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = 0\n"
    )
    run = run_setup(tmp_path / "build", PYTHONPATH=str(tmp_path), CXX="no-such-compiler")
    assert run.returncode != 0
    assert (f"is {version}, older than 2.10" in run.stderr) == old
    assert ("no C++ compiler" in run.stderr) == (not old)


def test_the_list_of_packages_is_complete():
    packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("fastrlhf/**/__init__.py")}
    elsewhere = {"fastrlhf.kernels", "fastrlhf.bench", "fastrlhf.bench.peers"}
    assert set(re.findall(r'"(.*?)"', packages)) == folders | elsewhere


@pytest.mark.skipif(not (X86 and shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm on x86")
@pytest.mark.parametrize("source", ["log_probs", "losses", "kl", "advantages", "masked"])
def test_hot_files_define_nothing_that_the_linker_could_share(source, tmp_path):
    """A weak symbol in the AVX-512 build (an inline function of a standard header, say) may be the copy that the linker
    keeps for everyone, and an older processor would meet an instruction it does not know."""
    target = tmp_path / "hot.o"
    macros = ["-DFASTRLHF_CAPABILITY=avx512", "-DFASTRLHF_CAPABILITY_AVX512"]
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    subprocess.run(["g++", *flags, *macros, "-c", f"csrc/cpu/kernels/{source}.cpp", "-o", target], cwd=ROOT, check=True)
    symbols = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    defined = [line.split(maxsplit=2) for line in symbols if not line.startswith(" ")]
    assert [name for _, kind, name in defined if kind in "VWu"] == []
    assert all("fastrlhf::avx512::" in name for _, kind, name in defined if kind == "T")


def test_the_extension_uses_the_stable_abis_only():
    """One build for every Python from 3.10 and every torch from 2.10: no symbol of c10 or at."""
    extension = next((ROOT / "fastrlhf").glob("_C.abi3.*"), None)
    if extension is None or not shutil.which("nm"):
        pytest.skip("no extension in the source tree, or no nm")
    needed = subprocess.run(["nm", "-D", "-C", "--undefined-only", extension], capture_output=True, text=True)
    assert not [line for line in needed.stdout.splitlines() if " c10::" in line or " at::" in line]


def test_the_source_archive_holds_everything_that_the_build_and_the_tests_need(tmp_path):
    run = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    listed = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().split())
    files = [path for folder in ("csrc", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.*")]
    needed = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".h", ".cpp", ".py")}
    assert needed
    assert needed <= listed
