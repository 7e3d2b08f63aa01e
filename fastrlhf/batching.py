"""Token sequences to padded or packed tensors, with the positions that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrlhf.grouping import group_by_length
from fastrlhf.packing import Packing, share_prefixes


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Sequences as input_ids [b, L] and attention_mask [b, L] (1 = a token of the sequence), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.tensor([[*s, *[pad_token_id] * (longest - len(s))] for s in sequences])
    lengths = torch.tensor([len(s) for s in sequences])
    return input_ids, (torch.arange(longest) < lengths[:, None]).long()


def _on(device: torch.device, batch: Any) -> Any:
    """A dataclass with what can be moved on the device."""
    return replace(batch, **{name: x.to(device) for name, x in vars(batch).items() if hasattr(x, "to")})


@dataclass
class ScoredBatch:
    """b sequences and the tokens in them whose log-probs are wanted.

    input_ids: [b, L], padded on the right, or packed into one row [1, N] if there is a `packing`.
    positions: [n], indices into the flattened input_ids of the places that predict the scored tokens.
    tokens: [n], the scored tokens.
    rows, columns: [n], where each scored token stands in the caller's [B, T] tensors.
    sequences: [n], the sequence of this batch, from 0 to b - 1, that each scored token belongs to.
    sequence_rows: b numbers, the row of the caller's that each sequence is.
    shape: (b, the largest number of scored tokens in a sequence).
    """

    input_ids: Tensor
    positions: Tensor
    tokens: Tensor
    rows: Tensor
    columns: Tensor
    sequences: Tensor
    sequence_rows: list[int]
    shape: tuple[int, int]
    packing: Packing | None = None

    def to(self, device: torch.device) -> ScoredBatch:
        return _on(device, self)

    def take(self, x: Tensor) -> Tensor:
        """The values [n] of a [B, T] tensor at this batch's tokens."""
        return x[self.rows, self.columns]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values [n] of this batch's tokens into a [B, T] tensor."""
        x[self.rows, self.columns] = values

    def by_sequence(self, values: Tensor) -> Tensor:
        """Values [n] as [b, T], 0 after the end of a response; differentiable."""
        return values.new_zeros(self.shape).index_put((self.sequences, self.columns), values)

    def from_sequences(self, x: Tensor) -> Tensor:
        """The values [n] of a [b, T] tensor: what `by_sequence` undoes."""
        return x[self.sequences, self.columns]

    @property
    def mask(self) -> Tensor:
        """[b, T], 1 where `by_sequence` has a token; int64."""
        return self.by_sequence(torch.ones_like(self.tokens))


def fed_tokens(prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """What a model reads to score a response: all but the last token, after which nothing is scored, and of a prompt
    without response one token, to have any."""
    if not prompt:
        raise ValueError("prompts: one has no tokens, and nothing would predict the first token of its response")
    return [*prompt, *response[:-1]] if response else list(prompt[:1])


def score_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """The padded batch that scores every token of `responses[row]` after `prompts[row]`, for each row of `rows`.

    A response may be empty, a prompt may not. The padding is token 0: nothing reads what becomes of it, and a
    tokenizer's own may lie outside the model's vocabulary.
    """
    input_ids, _ = pad_right([fed_tokens(prompts[row], responses[row]) for row in rows], 0)
    begins = [i * input_ids.shape[1] for i in range(len(rows))]
    return ScoredBatch(input_ids, **_scored(responses, rows, _predicting(prompts, responses, rows, begins)))


def pack_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """`score_responses` without padding: all sequences in one row [1, N], in the order of `rows`."""
    sequences = [fed_tokens(prompts[row], responses[row]) for row in rows]
    packing = Packing.of([len(sequence) for sequence in sequences])
    begins = [0, *accumulate(packing.lengths)]
    input_ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = _predicting(prompts, responses, rows, begins)
    return ScoredBatch(input_ids, **_scored(responses, rows, positions), packing=packing)


def pack_sharing_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """`pack_responses` with what several sequences begin with in the row once: a prompt, however many responses it has,
    and the first words of these where they are the same."""
    input_ids, packing, made_of = share_prefixes([fed_tokens(prompts[row], responses[row]) for row in rows])
    positions = [
        tokens[len(prompts[row]) - 1 :] if responses[row] else [] for row, tokens in zip(rows, made_of, strict=True)
    ]
    return ScoredBatch(torch.tensor([input_ids]), **_scored(responses, rows, positions), packing=packing)


def _predicting(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int], begins: Sequence[int]
) -> list[range]:
    """Of every response the places that predict it, where sequences begin at `begins` in the flattened input_ids."""
    # The token before the response's first one predicts it.
    firsts = [begin + len(prompts[row]) - 1 for begin, row in zip(begins, rows, strict=False)]
    return [range(first, first + len(responses[row])) for first, row in zip(firsts, rows, strict=True)]


def _scored(
    responses: Sequence[Sequence[int]], rows: Sequence[int], positions: Sequence[Sequence[int]]
) -> dict[str, Tensor | list[int] | tuple[int, int]]:
    """The other fields of a ScoredBatch; positions: of every response the places that predict it."""
    fields: dict[str, list[int]] = {name: [] for name in ("positions", "tokens", "rows", "columns", "sequences")}
    for sequence, row in enumerate(rows):
        length = len(responses[row])
        fields["positions"] += positions[sequence]
        fields["tokens"] += responses[row]
        fields["rows"] += [row] * length
        fields["columns"] += range(length)
        fields["sequences"] += [sequence] * length
    of_tokens = {name: torch.tensor(x, dtype=torch.long) for name, x in fields.items()}
    shape = len(rows), max(len(responses[row]) for row in rows)
    return {**of_tokens, "sequence_rows": list(rows), "shape": shape}


@dataclass
class TextBatch:
    """Some of n texts, and the places in them where something is wanted of a model.

    input_ids: [b, L], padded on the right, or packed into one row [1, N] if there is a `packing`.
    attention_mask: [b, L], 1 = a token of a text; None of packed texts.
    places: [t], indices into the flattened input_ids. texts: [t], the text, from 0 to n - 1, that each one is in.
    at_ends: whether the places are the last tokens of the texts, one of each.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    places: Tensor
    texts: Tensor
    at_ends: bool
    packing: Packing | None = None

    def to(self, device: torch.device) -> TextBatch:
        return _on(device, self)


def text_batches(
    texts: Sequence[Sequence[int]],
    pad_token_id: int,
    places: Sequence[Sequence[int]] | None = None,
    *,
    packed: bool,
    one_batch: bool = False,
) -> list[TextBatch]:
    """The batches that texts go through a model in, a forward each.

    places: of each text, the positions where something is wanted; its last token when None.
    packed: all in one row in which what several begin with stands once, for models that keep packed texts apart. Else
        groups of similar length, padded, or with `one_batch` all padded to the longest one.
    """
    wanted = [[len(text) - 1] for text in texts] if places is None else places
    if packed:
        row, packing, made_of = share_prefixes(texts)
        at = [made_of[i][place] for i, of_text in enumerate(wanted) for place in of_text]
        return [_text_batch(torch.tensor([row]), None, at, range(len(texts)), wanted, places is None, packing)]
    groups = [list(range(len(texts)))] if one_batch else group_by_length([len(text) for text in texts])
    batches = []
    for group in groups:
        input_ids, attention_mask = pad_right([texts[i] for i in group], pad_token_id)
        at = [number * input_ids.shape[1] + place for number, i in enumerate(group) for place in wanted[i]]
        batches.append(_text_batch(input_ids, attention_mask, at, group, wanted, places is None))
    return batches


def _text_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    at: list[int],
    members: Sequence[int],
    wanted: Sequence[Sequence[int]],
    at_ends: bool,
    packing: Packing | None = None,
) -> TextBatch:
    texts = [i for i in members for _ in wanted[i]]
    long = {"dtype": torch.long}  # of none, too
    return TextBatch(input_ids, attention_mask, torch.tensor(at, **long), torch.tensor(texts, **long), at_ends, packing)
