"""The page "Use fastrlhf inside ...": its examples run, and its tables name everything that is replaced."""

from __future__ import annotations

import importlib
import json
import re
from importlib import metadata
from pathlib import Path

import datasets
import pytest
from compat_peers import PEERS
from tiny import save_tiny_model

from fastrlhf.compat import FRAMEWORKS, _patch

pytestmark = pytest.mark.usefixtures("peers")
FOLDER = Path(_patch.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
TITLES = {"trl": "TRL", "liger": "Liger", "verl": "verl", "openrlhf": "OpenRLHF", "torchrl": "torchrl"}
TITLES |= {"torchtune": "torchtune", "nemo_rl": "NeMo-RL"}
QUICK = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def unpatched():
    yield
    for found in list(_patch._active.values()):
        found.restore()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_example(framework, tmp_path, monkeypatch, unpatched, tmp_path_factory):
    package = FRAMEWORKS[framework]
    if not (PEERS / package).is_dir():
        pytest.skip(f"{package} is not installed; `make .venv/.peers` does that")
    (block,) = blocks(SECTIONS[TITLES[framework]])
    try:
        ours = importlib.import_module(f"fastrlhf.compat.{framework}")
        for place in _patch._expected(ours, metadata.version(getattr(ours, "DISTRIBUTION", package))):
            _patch._owner(place)
    except ImportError as error:
        pytest.skip(f"{framework} cannot be imported here: {error}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    Path("sft.jsonl").write_text((json.dumps({"prompt": "the film was", "completion": " good"}) + "\n") * 8)
    save_tiny_model(Path("runs/model"))
    block = block.replace("HuggingFaceTB/SmolLM2-135M", "runs/model")
    exec(re.sub(r'(Config\(output_dir="[^"]*")', rf"\1, **{QUICK}", block), {})
    assert framework in _patch._active


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_five_lines(framework):
    (block,) = blocks(SECTIONS[TITLES[framework]])
    assert len([line for line in block.splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("framework", [x for x in FRAMEWORKS if (FOLDER / f"{x}.py").exists()])
def test_everything_replaced_is_named(framework):
    ours = importlib.import_module(f"fastrlhf.compat.{framework}")
    names = {place.rsplit(".", 1)[1] for place in ours.REPLACEMENTS}
    assert {name for name in names if not re.search(rf"[`.]{name}`", SECTIONS[TITLES[framework]])} == set()


def test_the_first_example(unpatched, capsys):
    pytest.importorskip("trl", reason="trl is not installed; `make .venv/.peers` does that")
    exec(blocks(PAGE)[0], {})
    assert "selective_log_softmax" in capsys.readouterr().out
    assert _patch._active == {}
