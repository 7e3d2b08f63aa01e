"""The columns each trainer reads, made from the layouts data sets come in. How texts become tokens: encode.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastrlhf.data import cells
from fastrlhf.data.encode import Encoder, Rendered

Rows = dict[str, list]

SFT_LAYOUTS = "`messages`, or `prompt` and `completion`, or `text`, or `chosen` (with or without `prompt`)"
PROMPT_LAYOUTS = "`prompt`, or `messages`, or `chosen` conversations to take the prompt from"


def prepare_sft(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only_loss: bool = True
) -> Dataset:
    """Columns `input_ids` and `labels` (the token where it is trained, -100 elsewhere) for supervised fine-tuning.

    The first layout of these that the data set has is taken:
        messages: a conversation. Every assistant turn is trained if the tokenizer's chat template marks them with
            {% generation %}; otherwise the last assistant turn only, and what follows it is cut off.
        prompt, completion: each a string or messages. The completion is trained.
        text: a string, trained as a whole.
        chosen, with or without prompt: preferences; the chosen answer is trained. An hh-rlhf transcript without a
            prompt column is cut after its last "\\n\\nAssistant:".

    completion_only_loss=False trains all tokens. Texts end with EOS, once. What is longer than max_length loses its
    end; rows with nothing left to train are dropped with one warning. Raises ValueError for other columns, an empty
    data set, a cell of a wrong type (with its row), or when nothing is left.
    """
    cells.require_dataset(dataset, "supervised fine-tuning")
    columns, encoder = dataset.column_names, Encoder(tokenizer)
    if "messages" in columns:
        tokenize = _sft_messages
    elif {"prompt", "completion"} <= set(columns):
        tokenize = _sft_pairs("completion")
    elif "text" in columns:
        tokenize = _sft_texts
    elif "chosen" in columns:
        tokenize = _sft_pairs("chosen")
    else:
        raise cells.wrong_columns(dataset, "supervised fine-tuning", SFT_LAYOUTS)

    def prepare(rows: Rows, indices: list[int]) -> Rows:
        batch: Rows = {"input_ids": [], "labels": []}
        for ids, trained in tokenize(encoder, rows, indices):
            labels = [token if t else -100 for token, t in zip(ids, trained, strict=True)]
            batch["input_ids"].append(ids[:max_length])
            batch["labels"].append((labels if completion_only_loss else ids)[:max_length])
        return batch

    prepared = map_rows(dataset, prepare, "Tokenising texts", remove_columns=columns)
    # The first token is never predicted, so a label there trains nothing.
    return _keep(
        prepared,
        [any(label != -100 for label in labels[1:]) for labels in prepared["labels"]],
        f"have no token to train within max_length={max_length}: an empty text, or a prompt as long as that. Raise "
        "max_length or look at those rows",
    )


Tokenized = list[tuple[list[int], list[bool]]]


def _sft_messages(encoder: Encoder, rows: Rows, indices: list[int]) -> Tokenized:
    out = []
    for row, value in zip(indices, rows["messages"], strict=True):
        messages = cells.check_messages(value, "messages", row)
        answer = cells.last_assistant_turn(messages, "messages", row)
        if encoder.marks_assistant_turns():
            ids, mask = encoder.marked(messages, row)
            out.append((ids, [bool(m) for m in mask]))
        else:
            text = encoder.render_chat(messages[: answer + 1], answer, row)
            out.extend(_after_prompt(encoder, [text]))
    return out


def _sft_pairs(column: str) -> Callable[[Encoder, Rows, list[int]], Tokenized]:
    def tokenize(encoder: Encoder, rows: Rows, indices: list[int]) -> Tokenized:
        prompts = rows.get("prompt", [None] * len(indices))
        texts = []
        for row, prompt, completion in zip(indices, prompts, rows[column], strict=True):
            completion = cells.check_text(completion, column, row)
            if "prompt" in rows:
                text = encoder.render(cells.check_text(prompt, "prompt", row), completion, row)
            elif isinstance(completion, str):
                text = encoder.render(*cells.split_transcript(completion, column, row), row)
            else:
                answer = cells.last_assistant_turn(completion, column, row)
                text = encoder.render_chat(completion[: answer + 1], answer, row)
            texts.append(text)
        return _after_prompt(encoder, texts)

    return tokenize


def _sft_texts(encoder: Encoder, rows: Rows, indices: list[int]) -> Tokenized:
    texts = [cells.check_string(text, "text", row) for row, text in zip(indices, rows["text"], strict=True)]
    return _after_prompt(encoder, [Rendered("", text, chat=False) for text in texts])


def _after_prompt(encoder: Encoder, texts: list[Rendered]) -> Tokenized:
    return [(ids, [i >= start for i in range(len(ids))]) for ids, start in encoder.texts(texts)]


def prepare_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Dataset:
    """Adds `prompt_ids`, the tokens PPO samples a response to, and keeps all other columns for the reward functions.

    Reads `prompt`, a string or messages (these get the header of an assistant turn). Without such a column the prompt
    is taken from `messages` or `chosen` and added as `prompt`: all messages before the last assistant turn or, of an
    hh-rlhf transcript, everything up to and including its last "\\n\\nAssistant:". Failing these, `input_ids` are the
    tokens, without those that `attention_mask` leaves out, and `prompt` is their text with its special tokens.

    Raises ValueError for other columns, an empty data set, a cell of a wrong type, an empty prompt, or one of more than
    max_prompt_length tokens, with its row.
    """
    cells.require_dataset(dataset, "prompts")
    encoder = Encoder(tokenizer)
    source = _prompt_source(dataset, ("input_ids",))

    def prepare(rows: Rows, indices: list[int]) -> Rows:
        if source == "input_ids":
            return _tokenised_prompts(rows, indices, tokenizer)
        prompts = [_prompt_of(source, value, row) for row, value in zip(indices, rows[source], strict=True)]
        batch: Rows = {"prompt_ids": encoder.prompts(prompts, indices)}
        return batch if source == "prompt" else {"prompt": prompts, **batch}

    prepared = map_rows(dataset, prepare, "Tokenising prompts")
    lengths = lengths_of(prepared, "prompt_ids")
    if (lengths == 0).any():
        raise ValueError(
            f"prompts: row {int((lengths == 0).argmax())} has an empty prompt, and the tokenizer puts no BOS token "
            "before it, so there is nothing to continue. Leave such rows out with dataset.filter(...)."
        )
    too_long = np.flatnonzero(lengths > max_prompt_length)
    if too_long.size:
        raise ValueError(
            f"prompts: row {too_long[0]} has a prompt of {lengths[too_long[0]]} tokens, more than "
            f"max_prompt_length={max_prompt_length} ({too_long.size} of {len(lengths)} rows are too long, the longest "
            f"has {lengths.max()}). Raise max_prompt_length, or leave those rows out with dataset.filter(...)."
        )
    return prepared


def prompt_texts(dataset: Dataset) -> list[cells.Text]:
    """The prompts of a data set as texts or messages, from the columns that `prepare_prompts` takes them from but
    `input_ids`, with the same errors."""
    cells.require_dataset(dataset, "prompts")
    source = _prompt_source(dataset)
    return [_prompt_of(source, value, row) for row, value in enumerate(dataset[source])]


def _prompt_source(dataset: Dataset, more: tuple[str, ...] = ()) -> str:
    layouts = ("prompt", "messages", "chosen", *more)
    source = next((name for name in layouts if name in dataset.column_names), None)
    if source is None:
        raise cells.wrong_columns(dataset, "prompts", ", or ".join([PROMPT_LAYOUTS, *(f"`{name}`" for name in more)]))
    return source


def _prompt_of(source: str, value: object, row: int) -> cells.Text:
    text = cells.check_text(value, source, row)
    if source == "prompt":
        return text
    if isinstance(text, str):
        return cells.split_transcript(text, source, row)[0]
    return text[: cells.last_assistant_turn(text, source, row)]


def _tokenised_prompts(rows: Rows, indices: list[int], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """`prompt_ids` of `input_ids` without padding, and `prompt`, the text that gives these tokens again."""
    # A reward model's tokenizer puts the BOS before the text anew.
    bos = tokenizer("")["input_ids"][:1]
    prompts, prompt_ids = [], []
    for place, row in enumerate(indices):
        tokens = rows["input_ids"][place]
        mask = rows["attention_mask"][place] if "attention_mask" in rows else [1] * len(tokens)
        if not all(isinstance(token, int) for token in tokens) or len(mask) != len(tokens):
            raise ValueError(
                f"prompts: row {row} has input_ids={str(tokens)[:80]} and {len(mask)} numbers in attention_mask; a "
                "list of tokens and as many numbers are wanted"
            )
        kept = [token for token, seen in zip(tokens, mask, strict=True) if seen]
        prompt_ids.append(kept)
        prompts.append(tokenizer.decode(kept[1:] if bos and kept[:1] == bos else kept))
    return {"prompt": prompts, "prompt_ids": prompt_ids}


def map_rows(dataset: Dataset, prepare: Callable, desc: str, remove_columns: list[str] | None = None) -> Dataset:
    # Not from the cache: its key does not change when the code of this package does.
    return dataset.with_format(None).map(
        prepare,
        with_indices=True,
        batched=True,
        remove_columns=remove_columns,
        load_from_cache_file=False,
        desc=desc,
    )


def lengths_of(dataset: Dataset, column: str) -> np.ndarray:
    batches = dataset.with_format("arrow").select_columns(column).iter(10_000)
    return np.concatenate([pyarrow.compute.list_value_length(batch[column]).to_numpy() for batch in batches])


def _keep(dataset: Dataset, keep: list[bool], why: str) -> Dataset:
    if all(keep):
        return dataset
    dropped = f"{keep.count(False)} of {len(keep)} rows {why}"
    if not any(keep):
        raise ValueError(f"nothing is left to train on: {dropped}.")
    warnings.warn(f"Dropped: {dropped}.", stacklevel=3)
    return dataset.select(np.flatnonzero(keep))
