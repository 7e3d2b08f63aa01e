"""Batches of reward models: the distinct texts of the pairs, and what is said of them."""

from __future__ import annotations

from typing import Any

import torch

from fastrlhf.batching import text_batches

# Columns that may come with a pair, each a number.
NUMBERS = ("margin", "gap")


class PreferenceCollator:
    """Pairs to the distinct texts among them, and each pair's two.

    packed: the texts are packed, and what several begin with, a prompt at least, is read once.
    objectives: columns with the labels of each head, which become `objectives` [B, k]. `one_batch` pads all texts to
    one length, for sharded models: a forward of theirs is a collective, and each rank would have its own number.
    """

    one_batch = False

    def __init__(self, pad_token_id: int, objectives: list[str] | None = None, *, packed: bool) -> None:
        self.pad_token_id, self.packed = pad_token_id, packed
        self.objectives = objectives or []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        chosen, rejected = ([_text(row, side) for row in rows] for side in ("chosen", "rejected"))
        texts = list(dict.fromkeys([*chosen, *rejected]))
        number = {text: i for i, text in enumerate(texts)}
        batch: dict[str, Any] = {
            "chosen": torch.tensor([number[text] for text in chosen]),
            "rejected": torch.tensor([number[text] for text in rejected]),
            "length_differences": torch.tensor(
                [len(better) - len(worse) for (better, _), (worse, _) in zip(chosen, rejected, strict=True)]
            ),
        }
        for name in NUMBERS:
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        if self.objectives:
            batch["objectives"] = torch.tensor([[float(row[name]) for name in self.objectives] for row in rows])
        if "draws" in rows[0]:
            batch["draws"] = torch.tensor([row["draws"] for row in rows])
        turns = [places for _, places in texts]
        batch["count"] = len(texts)
        batch["texts"] = text_batches(
            [ids for ids, _ in texts],
            self.pad_token_id,
            turns if any(turns) else None,
            packed=self.packed,
            one_batch=self.one_batch,
        )
        return batch


def _text(row: dict[str, Any], side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Its tokens, and the places of its turns' ends where there are any."""
    return tuple(row[f"{side}_ids"]), tuple(row.get(f"{side}_turns", ()))
