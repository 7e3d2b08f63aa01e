"""Pairs of a chosen and a rejected text: their tokens, and the checks that all trainers of preferences share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastrlhf.data import cells
from fastrlhf.data.encode import Encoder, Rendered
from fastrlhf.data.prepare import Rows, lengths_of, map_rows
from fastrlhf.data.turns import turn_ends

PREFERENCE_LAYOUTS = "`chosen` and `rejected`, with or without `prompt` and `margin`"
SIDES = ("chosen", "rejected")
RATINGS = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class PairRules:
    """What becomes of pairs that say little or the wrong thing; each kind is counted in the PairReport anyway.

    ties: rated alike, by a column `tie` that is true, or a gap of 0 between `score_chosen` and `score_rejected`, or a
        `margin` of 0.
    contradictions: the same two texts with the labels both ways; "drop" drops all rows about them.
    empty_completions: one side's completion has nothing but white space.
    too_long: a side has more tokens than the trainer's max_length.
    """

    ties: str = "keep"
    contradictions: str = "keep"
    empty_completions: str = "drop"
    too_long: str = "error"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            choices = ("error", "drop") if name == "too_long" else ("keep", "drop")
            if value not in choices:
                raise ValueError(f"pair_{name}={value!r} must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class PairReport:
    """How many rows there were, how many are kept, and how many are of each kind; a row may be of several."""

    rows: int
    kept: int
    ties: int = 0
    contradictions: int = 0
    empty_completions: int = 0
    identical: int = 0
    too_long: int = 0
    different_prompts: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def summary(self) -> str:
        """One line: what was found, and what is left."""
        words = {
            "ties": "ties",
            "contradictions": "with labels that contradict each other",
            "empty_completions": "with an empty completion",
            "identical": "with the same tokens in chosen and rejected",
            "too_long": "longer than max_length",
            "different_prompts": "with different prompts in chosen and rejected",
        }
        found = [f"{getattr(self, name)} {said}" for name, said in words.items() if getattr(self, name)]
        return f"{', '.join(found) or 'nothing to remark'}; {self.kept} of {self.rows} pairs kept"


def prepare_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, rules: PairRules | None = None
) -> Dataset:
    """The pairs of `prepare_pairs`, without its report."""
    return prepare_pairs(dataset, tokenizer, max_length, rules)[0]


def prepare_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rules: PairRules | None = None,
    *,
    starts: bool = False,
    turns: bool = False,
    objectives: Sequence[str] = (),
) -> tuple[Dataset, PairReport]:
    """Columns `chosen_ids` and `rejected_ids` of the pairs that are fit to be learned from, and what was found.

    Reads `chosen` and `rejected`, each a string or messages, put after `prompt` (string or messages) where there is
    such a column, unless they begin with it. Transcripts as in Anthropic's hh-rlhf are plain text, whose completion
    begins after the last "\\n\\nAssistant:". Texts end with EOS, once. Further columns:
        margin: a float, if the data set has it.
        gap: how much better the chosen text was rated, a float, if there are `score_chosen` and `score_rejected`.
        chosen_start, rejected_start, with `starts`: the index of the completion's first token.
        chosen_turns, rejected_turns, with `turns`: the index of the last token of each assistant turn.
        objectives: named columns of numbers, kept; above 0 where the chosen text is the better one by that measure,
            below 0 where the rejected is, 0 or missing where neither.

    Pairs whose two sides have the same tokens are dropped, with `starts` also those that answer different prompts, and
    of the others what `rules` says; anything found is told in one warning. Raises ValueError for other columns, an
    empty data set, a cell of a wrong type (with its row), a text longer than max_length unless these are dropped, a
    completion whose beginning cannot be told (`starts`), or when no pair is left.
    """
    rules = rules or PairRules()
    cells.require_dataset(dataset, "preferences")
    columns, encoder = dataset.column_names, Encoder(tokenizer)
    if not set(SIDES) <= set(columns):
        raise cells.wrong_columns(dataset, "preferences", PREFERENCE_LAYOUTS)
    missing = [name for name in objectives if name not in columns]
    if missing:
        raise cells.wrong_columns(dataset, "preferences", f"also the objectives {', '.join(missing)}")

    def prepare(rows: Rows, indices: list[int]) -> Rows:
        batch: Rows = {"row": indices}
        for side in SIDES:
            texts = [_rendered(encoder, rows, i, row, side, starts) for i, row in enumerate(indices)]
            encoded = encoder.texts([text for text, _ in texts])
            batch[f"{side}_ids"] = [ids for ids, _ in encoded]
            batch[f"{side}_empty"] = [_is_empty(text, messages) for text, messages in texts]
            if starts:
                batch[f"{side}_start"] = [start for _, start in encoded]
            if turns:
                batch[f"{side}_turns"] = [
                    turn_ends(encoder, text, messages, ids, row)
                    for (text, messages), (ids, _), row in zip(texts, encoded, indices, strict=True)
                ]
        batch["tied"] = [_is_tie(rows, i, row) for i, row in enumerate(indices)]
        batch |= {name: _numbers(rows[name], name, indices) for name in ("margin",) if name in rows}
        batch |= {name: _numbers(rows[name], name, indices, missing=0.0) for name in objectives}
        if set(RATINGS) <= set(rows):
            batch["gap"] = [_gap(rows, i, row) for i, row in enumerate(indices)]
        return batch

    prepared = map_rows(dataset, prepare, "Tokenising pairs", remove_columns=columns)
    return _checked(prepared, max_length, rules, starts)


def _rendered(
    encoder: Encoder, rows: Rows, i: int, row: int, side: str, starts: bool
) -> tuple[Rendered, list[cells.Message] | None]:
    """A side as one text, whose prompt is known where it can be, and the messages that it was made of, if it was."""
    answer = cells.check_text(rows[side][i], side, row)
    if "prompt" in rows:
        prompt = cells.check_text(rows["prompt"][i], "prompt", row)
        return encoder.render(prompt, answer, row), cells.chat_of(prompt, answer)
    if isinstance(answer, str):
        if starts or cells.LAST_TURN in answer:
            return encoder.render(*cells.split_transcript(answer, side, row), row), None
        return Rendered("", answer, chat=False), None
    if not starts:
        return encoder.render_chat(answer, 0, row), answer
    turn = cells.last_assistant_turn(answer, side, row)
    return encoder.render_chat(answer[: turn + 1], turn, row), answer[: turn + 1]


def _is_empty(text: Rendered, messages: list[cells.Message] | None) -> bool:
    said = text.whole[len(text.prompt) :] if messages is None else messages[-1].get("content")
    return isinstance(said, str) and not said.strip() and not (messages and messages[-1].get("tool_calls"))


def _is_tie(rows: Rows, i: int, row: int) -> bool:
    return ("tie" in rows and bool(rows["tie"][i])) or _gap(rows, i, row) == 0


def _gap(rows: Rows, i: int, row: int) -> float | None:
    if set(RATINGS) <= set(rows):
        scores = [cells.check_number(rows[name][i], name, row) for name in RATINGS]
        return scores[0] - scores[1]
    return cells.check_number(rows["margin"][i], "margin", row) if "margin" in rows else None


def _numbers(values: list, column: str, rows: list[int], missing: float | None = None) -> list[float]:
    filled = [missing if value is None and missing is not None else value for value in values]
    return [cells.check_number(value, column, row) for value, row in zip(filled, rows, strict=True)]


def _checked(prepared: Dataset, max_length: int, rules: PairRules, starts: bool) -> tuple[Dataset, PairReport]:
    lengths = np.maximum(lengths_of(prepared, "chosen_ids"), lengths_of(prepared, "rejected_ids"))
    too_long = lengths > max_length
    if too_long.any() and rules.too_long == "error":
        raise ValueError(
            f"preferences: {too_long.sum()} of {len(lengths)} pairs have a text longer than max_length={max_length} "
            f"tokens (the first is row {prepared['row'][int(too_long.argmax())]}, the longest has {lengths.max()}). "
            "Cut off, they could lose the very words they were judged by: raise max_length to "
            f"{lengths.max()}, leave them out (pair_too_long='drop'), or filter the data set."
        )
    texts = [[tuple(ids) for ids in prepared[f"{side}_ids"]] for side in SIDES]
    pairs = list(zip(*texts, strict=True))
    stated = set(pairs)
    found = {
        "ties": np.array(prepared["tied"], dtype=bool),
        "contradictions": np.array([a != b and (b, a) in stated for a, b in pairs]),
        "empty_completions": np.array(prepared["chosen_empty"]) | np.array(prepared["rejected_empty"]),
        "identical": np.array([a == b for a, b in pairs]),
        "too_long": too_long,
        "different_prompts": np.array(_different_prompts(prepared) if starts else [False] * len(pairs)),
    }
    always = ("identical", "different_prompts")
    dropped = [marks for name, marks in found.items() if name in always or getattr(rules, name) == "drop"]
    keep = ~np.any(dropped, axis=0)
    counts = {name: int(marks.sum()) for name, marks in found.items()}
    report = PairReport(rows=len(pairs), kept=int(keep.sum()), **counts)
    if not keep.any():
        raise ValueError(f"preferences: nothing is left to train on: {report.summary()}")
    if any(counts.values()):
        warnings.warn(f"Pairs: {report.summary()}.", stacklevel=3)
    prepared = prepared.remove_columns(["row", "tied", *(f"{side}_empty" for side in SIDES)])
    return (prepared if keep.all() else prepared.select(np.flatnonzero(keep))), report


def _different_prompts(prepared: Dataset) -> list[bool]:
    prompts = [
        [ids[:start] for ids, start in zip(prepared[f"{side}_ids"], prepared[f"{side}_start"], strict=True)]
        for side in SIDES
    ]
    return [a != b for a, b in zip(*prompts, strict=True)]
