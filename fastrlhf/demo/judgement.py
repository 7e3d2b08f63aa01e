"""SFT against PPO on held-out prompts, by judges that had no part in training."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastrlhf.batching import score_responses
from fastrlhf.demo.data import DemoData
from fastrlhf.demo.recipe import Recipe
from fastrlhf.demo.stages import model_options
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rewards import RewardModel
from fastrlhf.rollout import NativeEngine, Rollout, SamplingParams
from fastrlhf.rollout.diversity import distinct_n
from fastrlhf.trainers.token_scorer import TokenScorer

# VADER's own threshold for a positive text.
VADER_POSITIVE = 0.05
TEXTS_FILE = "texts.jsonl"


@dataclass
class Responses:
    """One response of a policy to each of P prompts.

    texts: without special tokens. lengths: [P], in tokens, EOS included. log_ratio: [P], log-prob under the policy less
    that under the reference, whose mean estimates the KL, in nats; None where there is no reference.
    """

    texts: list[str]
    lengths: torch.Tensor
    log_ratio: torch.Tensor | None = None

    def measures(self, scores: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over the responses. scores: [P] by each judge."""
        means = {f"{judge}_mean": each.mean().item() for judge, each in scores.items()}
        means["positive_share"] = (scores["vader"] >= VADER_POSITIVE).float().mean().item()
        means["length"] = self.lengths.float().mean().item()
        means["distinct_2"] = distinct_n([text.split() for text in self.texts], 2)
        if self.log_ratio is not None:
            means["kl"] = self.log_ratio.mean().item()
            means["kl_standard_error"] = (self.log_ratio.std() / math.sqrt(len(self.log_ratio))).item()
        return means


def judge(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Sample both policies on the same prompts, score the texts with both judges, and compare."""
    prompts = data.eval_prompts["prompt"]
    sft = workspace.stage_folder("sft")
    responses = {
        "sft": respond(sft, prompts, recipe),
        "ppo": respond(workspace.stage_folder("ppo"), prompts, recipe, reference=sft),
    }
    judges = {
        "gold": reward_model(workspace.stage_folder("gold")),
        "proxy": reward_model(workspace.stage_folder("reward_model")),
        "vader": vader_score(),
    }
    scores = {
        policy: {who: torch.tensor(score(prompts, each.texts)) for who, score in judges.items()}
        for policy, each in responses.items()
    }
    with open(workspace.folder / TEXTS_FILE, "w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row = {
                policy: {"text": each.texts[i], **{who: scores[policy][who][i].item() for who in judges}}
                for policy, each in responses.items()
            }
            file.write(json.dumps({"prompt": prompt, **row}, ensure_ascii=False) + "\n")

    results: dict[str, Any] = {policy: each.measures(scores[policy]) for policy, each in responses.items()}
    results["ppo"]["length_ratio"] = results["ppo"]["length"] / results["sft"]["length"]
    for who in ("gold", "vader"):
        rate, low, high = win_rate(scores["ppo"][who], scores["sft"][who])
        results["ppo"][f"win_rate_{who}"] = rate
        results["ppo"][f"win_rate_{who}_interval"] = [low, high]
    return results


def respond(policy: str, prompts: list[str], recipe: Recipe, reference: str | None = None) -> Responses:
    """Sample the model in the folder `policy`; its responses are compared with the model in the folder `reference`."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    sampling = SamplingParams(recipe.response_length, seed=recipe.seed + 1)
    model = load_policy(policy)
    rollout = NativeEngine(model, tokenizer).generate([tokenizer(prompt)["input_ids"] for prompt in prompts], sampling)
    log_ratio = None
    if reference is not None:
        log_ratio = response_log_probs(model, rollout)
        del model
        log_ratio -= response_log_probs(load_policy(reference), rollout)
    gc.collect()
    return Responses(rollout.texts(tokenizer), rollout.lengths, log_ratio)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_policy(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=model_options()["dtype"]).eval().to(device())


def reward_model(folder: str, **options: Any) -> RewardModel:
    """The reward model in a folder, ready to score. options: of RewardModel."""
    return RewardModel(folder, dtype=model_options()["dtype"], **options).to(device())


@torch.no_grad()
def response_log_probs(model: torch.nn.Module, rollout: Rollout, batch_size: int = 32) -> torch.Tensor:
    """Log-prob [B] of each whole response under `model`, in nats."""
    scorer = TokenScorer(model)
    total = torch.zeros(len(rollout))
    order = sorted(range(len(rollout)), key=lambda i: len(rollout.responses[i]))
    for start in range(0, len(order), batch_size):
        batch = score_responses(rollout.prompts, rollout.responses, order[start : start + batch_size])
        on_device = batch.to(scorer.device)
        log_probs, _ = scorer(on_device.input_ids, on_device.positions, on_device.tokens)
        total.index_add_(0, batch.rows, log_probs.cpu())
    return total


def vader_score() -> Callable[[list[str], list[str]], list[float]]:
    """The VADER lexicon's compound score of prompt and completion, from -1 to 1 (Hutto & Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda prompts, completions: [
        analyzer.polarity_scores(prompt + completion)["compound"]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def win_rate(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Share of the pairs that `ours` wins, a tie being half a win, with Wilson's 95 % interval."""
    n, z = ours.numel(), 1.959964
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, centre - half, centre + half
