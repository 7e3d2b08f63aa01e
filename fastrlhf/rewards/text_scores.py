"""Scores of texts, at their ends or at places in them, by a sequence classification model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrlhf.batching import TextBatch, text_batches
from fastrlhf.packed_forward import run, why_not_packed
from fastrlhf.packing import Packing

logger = logging.getLogger(__name__)


def score_in_fp32(model: nn.Module) -> nn.Module:
    """Let a half-precision sequence classifier compute its score in fp32; in bf16 scores near 3 are 0.016 apart."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and head.weight.dtype != torch.float32:
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return model


def place_scores(model: nn.Module, batch: TextBatch) -> Tensor:
    """Scores [t, heads], fp32, at the places of a batch.

    model: a sequence classifier, under whatever wrappers. transformers' compute the score at every position and return
    the last one's: where others are wanted, or the texts are packed, they are taken from the score head, the model's
    own forward left as it is. Raises ValueError for a model without a head named `score` then.
    """
    if batch.packing is None and batch.at_ends:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float().view(len(batch.input_ids), -1)
    return _at_head(model, batch.input_ids, batch.attention_mask, batch.packing)[1][batch.places].float()


def _at_head(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the score head and what comes out, [b L, H] and [b L, heads], at every position, and the logits
    that the model returns."""
    head = next((module for name, module in model.named_modules() if name.split(".")[-1] == "score"), None)
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no head named `score` to take scores within texts from")
    kept: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    try:
        if packing is None:
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        else:
            logits = run(model, input_ids, packing).logits
    finally:
        handle.remove()
    hidden, scores = kept[-1]
    return hidden.flatten(0, 1), scores.flatten(0, 1), logits


def text_scores(model: nn.Module, batches: Sequence[TextBatch], count: int) -> Tensor:
    """Scores [count, heads], fp32, of the texts in the batches.

    A text's score is the sum of those at its places, which at the ends of its turns is what preferences between whole
    conversations tell of (Christiano et al. 2017, arXiv:1706.03741, equation 1): turns that two of them share cancel.
    """
    scores = torch.cat([place_scores(model, batch) for batch in batches])
    texts = torch.cat([batch.texts for batch in batches])
    return scores.new_zeros(count, scores.shape[1]).index_add(0, texts, scores)


def scores_by_place(model: nn.Module, batches: Sequence[TextBatch]) -> Tensor:
    """Scores [t, heads], fp32, at all places of the batches, text by text, and in a text as its places were given."""
    scores = torch.cat([place_scores(model, batch) for batch in batches])
    return scores[torch.cat([batch.texts for batch in batches]).argsort(stable=True)]


def takes_packing(model: nn.Module) -> bool:
    """Whether the model gives packed texts the scores that each has alone, which are its head's, and returns that of
    the last token."""

    def states(input_ids: Tensor, packing: Packing | None) -> Tensor:
        hidden, scores, logits = _at_head(model, input_ids, torch.ones_like(input_ids), packing)
        if packing is None and input_ids[0, -1] != model.config.pad_token_id and not torch.equal(scores[-1], logits[0]):
            raise ValueError("it returns another score than that of its head at the last token")
        return hidden.to(next(model.parameters()).dtype)  # which says how much rounding there is

    reason = why_not_packed(model, states)
    if reason is not None:
        logger.info("%s: texts are padded: %s", type(model).__name__, reason)
    return reason is None


def sequence_scores(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    turns: Sequence[Sequence[int]] | None = None,
    *,
    packed: bool = False,
) -> Tensor:
    """Scores [n, heads], fp32, of token sequences. turns: of each, the positions whose scores are summed; the last one
    when None. packed: for a model of which `takes_packing` is true."""
    device = next(model.parameters()).device
    batches = text_batches(sequences, pad_token_id, turns, packed=packed)
    return text_scores(model, [batch.to(device) for batch in batches], len(sequences))
