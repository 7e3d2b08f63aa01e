"""Step-level labels: the tokens of a reasoning, where its steps end, and what people or programs said of each."""

from __future__ import annotations

import warnings

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastrlhf.data import cells
from fastrlhf.data.encode import Encoder, Rendered
from fastrlhf.data.prepare import Rows, lengths_of, map_rows

STEP_LAYOUTS = "`prompt`, `steps` (a list of strings) and `labels` (one a step)"


def split_steps(text: str, separator: str) -> list[int]:
    """How many characters of a text there are up to the end of each of its steps; blank ones are none.

    Raises ValueError for an empty separator.
    """
    if not separator:
        raise ValueError("step_separator: empty, wanted what stands between steps, such as '\\n'")
    ends, start = [], 0
    for piece in text.split(separator):
        if piece.strip():
            ends.append(start + len(piece.rstrip()))
        start += len(piece) + len(separator)
    return ends


def step_places(encoder: Encoder, text: Rendered, content: str, ends: list[int], ids: list[int], row: int) -> list[int]:
    """Indices in `ids` of the tokens at which steps end.

    text, ids: from the encoder. content: what the steps are in, as it stands in the text after the prompt. ends: in
    characters of it. Raises ValueError where a chat template wrote the content otherwise.
    """
    start = text.whole.find(content, len(text.prompt))
    if start < 0:
        raise ValueError(f"row {row}: the tokenizer's chat template changes the text of the steps, so they are lost")
    token_ends = encoder.token_ends(text, ids)
    return [next(i for i, reached in enumerate(token_ends) if reached >= start + end) for end in ends]


def prepare_steps(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, separator: str) -> Dataset:
    """Columns `input_ids`, `places` (where each labelled step ends) and `labels` (in [0, 1]) for process rewards.

    Reads `prompt` (a string, or messages, after which the steps are the assistant's turn), `steps` and `labels`: of
    each step true or false, or the probability that it is right, or nothing where nobody judged it. The steps are put
    after the prompt, with `separator` between them; a text ends with EOS. Rows without a label are dropped with one
    warning. Raises ValueError for other columns, an empty data set, a cell of a wrong type or an empty step (with its
    row), another number of labels than of steps, a text longer than max_length, or when nothing is left.
    """
    cells.require_dataset(dataset, "process rewards")
    columns, encoder = dataset.column_names, Encoder(tokenizer)
    if not {"prompt", "steps", "labels"} <= set(columns):
        raise cells.wrong_columns(dataset, "process rewards", STEP_LAYOUTS)

    def prepare(rows: Rows, indices: list[int]) -> Rows:
        batch: Rows = {"input_ids": [], "places": [], "labels": []}
        texts, contents, ends, labels = [], [], [], []
        for i, row in enumerate(indices):
            steps, said = _checked(rows["steps"][i], rows["labels"][i], separator, row)
            content = separator.join(steps)
            text = encoder.render(cells.check_text(rows["prompt"][i], "prompt", row), content, row)
            texts.append(text)
            contents.append(content)
            reached = split_steps(content, separator)
            ends.append([end for end, label in zip(reached, said, strict=True) if label is not None])
            labels.append([float(label) for label in said if label is not None])
        encoded = encoder.texts(texts)
        for text, content, end, (ids, _), row in zip(texts, contents, ends, encoded, indices, strict=True):
            batch["input_ids"].append(ids)
            batch["places"].append(step_places(encoder, text, content, end, ids, row))
        batch["labels"] = labels
        return batch

    prepared = map_rows(dataset, prepare, "Tokenising steps", remove_columns=columns)
    lengths = lengths_of(prepared, "input_ids")
    if (lengths > max_length).any():
        raise ValueError(
            f"process rewards: {int((lengths > max_length).sum())} of {len(lengths)} rows are longer than "
            f"max_length={max_length} tokens (the first is row {int((lengths > max_length).argmax())}, the longest has "
            f"{lengths.max()}). Raise max_length, or leave those rows out with dataset.filter(...)."
        )
    labelled = lengths_of(prepared, "labels") > 0
    if not labelled.any():
        raise ValueError("process rewards: nothing is left to train on, no step has a label")
    if not labelled.all():
        warnings.warn(f"Dropped: {int((~labelled).sum())} of {len(labelled)} rows without a label.", stacklevel=2)
        prepared = prepared.select(labelled.nonzero()[0])
    return prepared


def _checked(steps: object, labels: object, separator: str, row: int) -> tuple[list[str], list[float | None]]:
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise cells.wrong_cell(row, "steps", steps, "a non-empty list of strings, none of them blank")
    within = next((step for step in steps if separator in step.strip()), None)
    if within is not None:
        raise ValueError(
            f"row {row}: the step {within[:60]!r} has step_separator={separator!r} in it, and would be taken for two "
            "when a response is scored; choose a separator that stands between steps only"
        )
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise cells.wrong_cell(row, "labels", labels, f"a list of {len(steps)} labels, as many as there are steps")
    for label in labels:
        if label is not None and not (isinstance(label, bool | int | float) and 0 <= label <= 1):
            raise cells.wrong_cell(row, "labels", label, "true, false, or a number from 0 to 1")
    return [step.strip(separator) for step in steps], labels
