"""Samples of SFT: what best-of-n chooses from, and what rejection sampling and DPO learn from."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fastrlhf.compare import rewards
from fastrlhf.compare.recipe import Recipe
from fastrlhf.compare.rewards import TABLE, RewardVariant
from fastrlhf.data import prepare_prompts
from fastrlhf.demo import judgement
from fastrlhf.demo.data import DemoData
from fastrlhf.demo.workspace import Workspace
from fastrlhf.loading import weights_digest
from fastrlhf.rollout import NativeEngine, SamplingParams, ScoredSamples, read_samples, sample_and_score

SAMPLES, SCORES = "samples.jsonl", "scores.json"


def of_prompts(workspace: Workspace, name: str, prompts: Dataset, count: int, recipe: Recipe) -> list[ScoredSamples]:
    """`count` samples of SFT to every prompt with their rewards, in the stage's folder; those there are not remade."""
    sft = workspace.stage_folder("sft")
    policy, tokenizer = judgement.load_policy(sft), AutoTokenizer.from_pretrained(sft)
    return sample_and_score(
        prepare_prompts(prompts, tokenizer, recipe.max_length),
        NativeEngine(policy, tokenizer),
        tokenizer,
        SamplingParams(recipe.response_length, n=count),
        rewards.rewards(workspace, TABLE, recipe),
        workspace.folder / name / SAMPLES,
        seed=recipe.seed,
        about={"model": weights_digest(policy)},
    )


def to_learn_from(
    workspace: Workspace, name: str, data: DemoData, prompts: int, count: int, recipe: Recipe
) -> list[ScoredSamples]:
    """`count` samples to so many of the prompts that PPO has too, or to all there are."""
    shuffled = data.prompts.shuffle(seed=recipe.seed)
    chosen = shuffled.select(range(min(prompts, len(shuffled))))
    return of_prompts(workspace, name, chosen, count, recipe)


def sample(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: to every evaluation prompt one response for SFT, and the candidates of best-of-n."""
    found = of_prompts(workspace, name, data.eval_prompts, 1 + recipe.num_candidates, recipe)
    totals = torch.tensor([x.rewards for x in found])
    return {"reward": totals.mean().item(), "best": totals[:, 1:].max(1).values.mean().item()}


def read(workspace: Workspace, stage: str) -> list[ScoredSamples]:
    return read_samples(workspace.folder / stage / SAMPLES)


def score(
    workspace: Workspace, name: str, samples: str, judge: RewardVariant | str, count: int, recipe: Recipe
) -> dict[str, Any]:
    """Stage: scores of the samples of another stage to the first `count` prompts.

    judge: a reward model that is compared, or the folder of another.
    """
    found = read(workspace, samples)[:count]
    by = (
        rewards.model(workspace, judge, recipe)
        if isinstance(judge, RewardVariant)
        else judgement.reward_model(workspace.stage_folder(judge))
    )
    size = len(found[0].completions)
    scores = torch.tensor(
        by([x.prompt for x in found for _ in range(size)], [text for x in found for text in x.completions])
    )
    path = workspace.folder / name / SCORES
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores.reshape(len(found), size).tolist()), encoding="utf-8")
    return {"mean": scores.mean().item()}


def read_scores(workspace: Workspace, stage: str) -> torch.Tensor:
    """[prompts, samples], of a stage that `score` ran."""
    return torch.tensor(json.loads((workspace.folder / stage / SCORES).read_text(encoding="utf-8")))
