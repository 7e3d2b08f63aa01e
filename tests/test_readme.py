"""What the README shows runs: its Python as it stands, on files and a model of two layers in place of the hub's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from tiny import save_tiny_model
from transformers import TrainingArguments

from fastrlhf.cli_best_of_n import BestOfNArguments, RejectionArguments, SamplingArguments
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.trainers import DPOConfig, PPOConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALTERNATIVES_PAGE = (ROOT / "fastrlhf/trainers/ALTERNATIVES.md").read_text(encoding="utf-8")
ROOMS = ("rollout", "rewards", "feedback")  # each has a page with one block
PAGES = [README, ALTERNATIVES_PAGE]
PAGES += [(ROOT / f"fastrlhf/{room}/README.md").read_text(encoding="utf-8") for room in ROOMS]
BLOCKS, *PAGE_BLOCKS = (re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) for page in PAGES)
ROWS = {
    "sft.jsonl": {"prompt": "the film was", "completion": " good"},
    "pairs.jsonl": {"prompt": "the film was", "chosen": " good", "rejected": " bad"},
    "prompts.jsonl": {"prompt": "the film was"},
}
# So that each runs in a second.
QUICK = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
QUICK_PPO = {**QUICK, "rollout_batch_size": 4, "per_device_train_batch_size": 4, "response_length": 4}


def test_each_piece_has_its_block():
    assert len(BLOCKS) == 7
    assert all(len(block.split("\n")) - block.count("\n\n") - 1 <= 5 for block in BLOCKS)


@pytest.mark.parametrize(
    "block",
    [*BLOCKS, *(block for blocks in PAGE_BLOCKS for block in blocks)],
    ids=[
        *("ops", "linear_ops", "sft", "reward", "ppo", "dpo", "rollout", "best_of_n"),
        *(f"{room}_page" for room in ROOMS),
    ],
)
def test_block(block, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        Path(name).write_text((json.dumps(row) + "\n") * 8)
    save_tiny_model(Path("runs/sft"))
    save_tiny_model(Path("runs/reward"), reward=True)
    RewardSettings(temperatures=[1.5]).save("runs/reward")
    block = block.replace("HuggingFaceTB/SmolLM2-135M", "runs/sft")
    block = re.sub(r'((SFT|Reward|DPO)Config\(output_dir="[^"]*")', rf"\1, **{QUICK}", block)
    block = re.sub(r'(PPOConfig\(output_dir="[^"]*")', rf"\1, **{QUICK_PPO}", block)
    exec(block, {})


def test_the_tables_are_the_committed_results():
    done = subprocess.run(
        [sys.executable, "-m", "fastrlhf.bench.readme", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_ppo_names_every_field():
    page = (ROOT / "fastrlhf/trainers/ppo/README.md").read_text(encoding="utf-8")
    own = {field.name for field in fields(PPOConfig)} - {field.name for field in fields(TrainingArguments)}
    assert {name for name in own if f"`{name}`" not in page} == set()


def test_the_page_of_alternatives_names_every_field_and_flag():
    own = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    assert {name for name in own if f"`{name}`" not in ALTERNATIVES_PAGE} == set()
    flags = [field.name for kind in (SamplingArguments, BestOfNArguments, RejectionArguments) for field in fields(kind)]
    assert {name for name in flags if f"--{name}" not in ALTERNATIVES_PAGE} == set()


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("fastrlhf/**/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8"))]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
