"""The folder kernels/ must not pass for the Hub package `kernels` that transformers imports.

From the repository's root Python finds the folder first. As long as it has no __init__.py it is only a namespace
candidate, and any regular package of that name further down the path wins.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

REPO = Path(__file__).parents[1]

# Where `kernels` comes from (a namespace package has no file), whether transformers takes it, and whether a model runs.
PROGRAM = """
import sys, torch, kernels
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
print("kernels from", kernels.__file__)
print("taken by transformers:", is_kernels_available())
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
print("logits", list(model(torch.arange(4)[None]).logits.shape))
"""

# As much of the Hub package as transformers needs to start: decorators that change nothing, and names.
STUB = """
def use_kernel_forward_from_hub(*names): return lambda layer: layer
use_kernelized_func = use_kernel_forward_from_hub
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return type(name, (), {})
"""


def output_from_the_root(tmp_path, *path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]  # -c puts the working directory first
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_is_no_package():
    assert (REPO / "kernels").is_dir()
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_model_runs_with_the_hub_package(tmp_path):
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(STUB)
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    out = output_from_the_root(tmp_path, site)
    assert f"kernels from {site / 'kernels' / '__init__.py'}\n" in out
    assert "taken by transformers: True\n" in out
    assert "logits [1, 4, 32]\n" in out


def test_model_runs_without_the_hub_package(tmp_path):
    with contextlib.suppress(metadata.PackageNotFoundError):
        pytest.skip(f"the Hub package kernels {metadata.version('kernels')} is installed here")
    out = output_from_the_root(tmp_path)
    assert "kernels from None\n" in out
    assert "taken by transformers: False\n" in out
    assert "logits [1, 4, 32]\n" in out
