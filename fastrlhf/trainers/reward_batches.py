"""Batches of reward models: the distinct texts of the pairs, in groups of similar length, and what is said of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.batching import group_by_length, pad_right

# Columns that may come with a pair, each a number.
NUMBERS = ("margin", "gap")


class PreferenceCollator:
    """Pairs to the distinct texts among them, in padded groups of similar length, and each pair's places there.

    objectives: columns with the labels of each head, which become `objectives` [B, k]. `one_group` puts all texts of a
    batch into one, for sharded models: a forward of theirs is a collective, and each rank would have its own number.
    """

    one_group = False

    def __init__(self, pad_token_id: int, objectives: list[str] | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.objectives = objectives or []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        chosen, rejected = ([_text(row, side) for row in rows] for side in ("chosen", "rejected"))
        texts = list(dict.fromkeys([*chosen, *rejected]))
        groups = [list(range(len(texts)))] if self.one_group else group_by_length([len(ids) for ids, _ in texts])
        place = {texts[index]: at for at, index in enumerate(i for group in groups for i in group)}
        batch: dict[str, Any] = {
            "chosen": torch.tensor([place[text] for text in chosen]),
            "rejected": torch.tensor([place[text] for text in rejected]),
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
        batch["groups"] = [self._group([texts[i] for i in group]) for group in groups]
        return batch

    def _group(self, texts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad_right([ids for ids, _ in texts], self.pad_token_id)
        group = {"input_ids": input_ids, "attention_mask": attention_mask}
        turns = [(row, place) for row, (_, places) in enumerate(texts) for place in places]
        return {**group, "turns": torch.tensor(turns)} if turns else group


def _text(row: dict[str, Any], side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Its tokens, and the places of its turns' ends where there are any."""
    return tuple(row[f"{side}_ids"]), tuple(row.get(f"{side}_turns", ()))
