"""From data sets to pairs that are judged, and from judgements to rows that reward models and DPO learn from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from datasets import Dataset

from fastrlhf.data import cells

Pair = dict[str, Any]  # prompt, first, second


def labelled_pairs(data: Dataset) -> list[Pair]:
    """`prompt`, `first` and `second` of rows with `chosen` and `rejected`, in this order.

    With or without a `prompt`; of conversations and hh-rlhf transcripts, the last turn is the answer.
    """
    pairs = []
    for row, each in enumerate(data):
        pair: Pair = {}
        for side, name in (("chosen", "first"), ("rejected", "second")):
            value = cells.check_text(each[side], side, row)
            if "prompt" in each:
                prompt = cells.check_text(each["prompt"], "prompt", row)
                answer = value if isinstance(value, str) else value[-1]["content"]
            elif isinstance(value, str):
                prompt, answer = cells.split_transcript(value, side, row)
            else:
                turn = cells.last_assistant_turn(value, side, row)
                prompt, answer = value[:turn], value[turn]["content"]
            pair |= {"prompt": prompt, name: answer}
        pairs.append(pair)
    return pairs


def all_pairs(prompts: Sequence[cells.Text], responses: Sequence[Any]) -> list[Pair]:
    """Every two different responses to each prompt. Raises ValueError, with its row, for what is no list of two strings
    or more, and where no pair is left."""
    pairs = []
    for row, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise cells.wrong_cell(row, "responses", texts, "a list of at least two strings")
        for first, second in combinations(dict.fromkeys(texts), 2):
            pairs.append({"prompt": prompt, "first": first, "second": second})
    if not pairs:
        raise ValueError("responses: no prompt has two that differ")
    return pairs


def preference(prompt: cells.Text, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """A row for RewardTrainer or DPO; answers to a conversation are messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt, str):
        sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": prompt, **sides, **more}


def judged_preferences(records: Sequence[dict[str, Any]], keep_ties: bool) -> list[dict[str, Any]]:
    """Rows of the pairs with a winner, with the probability that it is the better one; with `keep_ties` also the ties,
    marked `tie`. records: pairs with the fields of their Judgement."""
    rows = []
    for record in records:
        if record["verdict"] == "neither" or (record["verdict"] == "tie" and not keep_ties):
            continue
        first = record["probability"] >= 0.5
        better, worse = ("first", "second") if first else ("second", "first")
        sure = record["probability"] if first else 1 - record["probability"]
        marks = {"tie": record["verdict"] == "tie"} if keep_ties else {}
        rows.append(preference(record["prompt"], record[better], record[worse], probability=sure, **marks))
    return rows
