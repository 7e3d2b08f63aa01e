"""A causal language model as a judge: the probability that its next word is A or B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import text_batches
from fastrlhf.data.cells import Text
from fastrlhf.data.encode import Encoder
from fastrlhf.grouping import batches_of
from fastrlhf.loading import load_causal_lm, load_tokenizer
from fastrlhf.trainers.token_scorer import TokenScorer

QUESTION = "Which answer is better?"
TEMPLATE = """\
Compare two answers to the same request.

[Request]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

{question} Say A or B, and nothing else."""
# How the judge's answer begins. Small chat models would begin with other words: SmolLM2-135M gives A and B together a
# probability of 0.07 without it, of 0.26 with it, over pairs of film reviews.
LEAD = "The better answer is"


@dataclass(frozen=True)
class Opinion:
    """probability: that the answer shown first is the better one; None: neither A nor B was said, or the texts were too
    long to be read. mass: the probability of A and B together; NaN where nobody knows."""

    probability: float | None
    mass: float = math.nan


class LMJudge:
    """`f(prompts, firsts, seconds, questions) -> list[Opinion]` by the next token after a question of A or B.

    model: a causal language model, or its hub id or folder. processing_class: its tokenizer; the one beside the model
        when None. With a chat template the question is a user's turn and LEAD the beginning of the answer, else both
        are plain text.
    min_mass: an opinion whose A and B have less probability than this together is none.
    batch_size: most texts in one forward. options: for `from_pretrained`, when model is a string.
    A and B count with and without a space before them. Only the last position goes through the LM head, and what
    several questions begin with, the request and the answer shown first, through the model once (texts are packed where
    the model takes that). Raises ValueError for a tokenizer that has no token for A or B.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        min_mass: float = 0.1,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        if not 0 <= min_mass < 1:
            raise ValueError(f"min_mass={min_mass} must be in [0, 1)")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        name = model if isinstance(model, str) else model.config.name_or_path
        self.model = load_causal_lm(model, "judge", **options).eval().requires_grad_(False)
        self.scorer = TokenScorer(self.model, padding_free=None)
        self.tokenizer = processing_class or load_tokenizer(name, "judge")
        self.encoder = Encoder(self.tokenizer)
        self.min_mass, self.batch_size = min_mass, batch_size
        self.words = [self._tokens(word) for word in "AB"]
        config = self.model.config.get_text_config()
        self.max_length = getattr(config, "max_position_embeddings", None) or math.inf

    def _tokens(self, word: str) -> list[int]:
        """Tokens that are the word, with or without a space before it."""
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]
        found = sorted({ids[0] for ids in encoded if len(ids) == 1})
        if not found:
            raise ValueError(f"judge: the tokenizer has no token for {word!r}, with or without a space before it")
        return found

    def __call__(
        self, prompts: Sequence[Text], firsts: Sequence[str], seconds: Sequence[str], questions: Sequence[str]
    ) -> list[Opinion]:
        asked = [self._question(*each) for each in zip(prompts, firsts, seconds, questions, strict=True)]
        sequences = self.encoder.prompts(asked, list(range(len(asked))), LEAD)
        opinions = [Opinion(None)] * len(sequences)
        fit = [i for i, ids in enumerate(sequences) if len(ids) <= self.max_length]
        for batch in batches_of([sequences[i] for i in fit], self.batch_size, self.scorer.padding_free):
            rows = [fit[i] for i in batch]
            masses = self._masses([sequences[i] for i in rows]).tolist()
            for i, (a, b) in zip(rows, masses, strict=True):
                # Not a / (a + b) of two that underflowed; at 0 and 0, min_mass has the say.
                said = a + b > 0 and a + b >= self.min_mass
                opinions[i] = Opinion(a / (a + b) if said else None, a + b)
        return opinions

    def _question(self, prompt: Text, first: str, second: str, question: str) -> Text:
        text = TEMPLATE.format(prompt=as_text(prompt), a=first.strip(), b=second.strip(), question=question)
        return [{"role": "user", "content": text}] if self.tokenizer.chat_template else f"{text}\n\n"

    @torch.no_grad()
    def _masses(self, sequences: list[list[int]]) -> Tensor:
        """[n, 2], fp64: the probabilities of A and of B as the next token."""
        tokens = torch.tensor([token for word in self.words for token in word], device=self.scorer.device)
        masses = torch.empty(len(sequences), len(self.words), dtype=torch.double)
        for batch in text_batches(sequences, 0, packed=self.scorer.padding_free):
            batch = batch.to(self.scorer.device)
            places = batch.places.repeat_interleave(len(tokens))
            log_probs, _ = self.scorer(batch.input_ids, places, tokens.repeat(len(batch.texts)), packing=batch.packing)
            each = log_probs.double().exp().view(len(batch.texts), len(tokens)).cpu()
            words = each.split([len(word) for word in self.words], dim=1)
            masses[batch.texts.cpu()] = torch.stack([word.sum(1) for word in words], dim=1)
        return masses


def as_text(prompt: Text) -> str:
    """A prompt for a reader: messages as lines with their role."""
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
