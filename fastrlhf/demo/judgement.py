"""SFT against PPO on held-out prompts, by judges that had no part in training."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
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


def judge(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Sample both policies on the same prompts, score the texts with both judges, and compare."""
    prompts = data.eval_prompts["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(workspace.stage_folder("ppo"))
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    sampling = SamplingParams(recipe.response_length, seed=recipe.seed + 1)
    rollouts, texts = {}, {}
    log_probs: dict[str, torch.Tensor] = {}
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", model_options()["dtype"]

    def load(policy: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(workspace.stage_folder(policy), dtype=dtype).eval().to(device)

    for policy in ("sft", "ppo"):
        model = load(policy)
        rollouts[policy] = NativeEngine(model, tokenizer).generate(prompt_ids, sampling)
        texts[policy] = rollouts[policy].texts(tokenizer)
        if policy == "ppo":
            log_probs["ppo"] = response_log_probs(model, rollouts["ppo"])
        del model
    reference = load("sft")
    log_probs["sft"] = response_log_probs(reference, rollouts["ppo"])
    kl = log_probs["ppo"] - log_probs["sft"]
    del reference
    gc.collect()

    gold = RewardModel(workspace.stage_folder("gold"), dtype=dtype).to(device)
    proxy = RewardModel(workspace.stage_folder("reward_model"), dtype=dtype).to(device)
    vader = vader_score()
    judges: dict[str, Callable[..., list[float]]] = {"gold": gold, "proxy": proxy, "vader": vader}
    scores = {p: {j: torch.tensor(score(prompts, texts[p])) for j, score in judges.items()} for p in texts}
    with open(workspace.folder / TEXTS_FILE, "w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row = {p: {"text": texts[p][i], **{j: scores[p][j][i].item() for j in judges}} for p in texts}
            file.write(json.dumps({"prompt": prompt, **row}, ensure_ascii=False) + "\n")

    results: dict[str, Any] = {
        policy: {
            "gold_mean": scores[policy]["gold"].mean().item(),
            "proxy_mean": scores[policy]["proxy"].mean().item(),
            "vader_mean": scores[policy]["vader"].mean().item(),
            "positive_share": (scores[policy]["vader"] >= VADER_POSITIVE).float().mean().item(),
            "length": rollouts[policy].lengths.float().mean().item(),
            "distinct_2": distinct_n([text.split() for text in texts[policy]], 2),
        }
        for policy in texts
    }
    results["ppo"]["kl"] = kl.mean().item()
    results["ppo"]["kl_standard_error"] = (kl.std() / math.sqrt(len(kl))).item()
    results["ppo"]["length_ratio"] = results["ppo"]["length"] / results["sft"]["length"]
    for j in ("gold", "vader"):
        rate, low, high = win_rate(scores["ppo"][j], scores["sft"][j])
        results["ppo"][f"win_rate_{j}"] = rate
        results["ppo"][f"win_rate_{j}_interval"] = [low, high]
    return results


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
