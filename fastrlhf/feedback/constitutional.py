"""A model that criticises its own answers by principles, and revises them (Bai et al. 2022, arXiv:2212.08073)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrlhf.data.cells import Text, as_messages
from fastrlhf.data.encode import Encoder
from fastrlhf.feedback.principles import Principle
from fastrlhf.feedback.seeds import number
from fastrlhf.rollout import RolloutEngine, SamplingParams

CRITIQUE_REQUEST = "Look at your last answer again. {critique} Be brief and specific."
REVISION_REQUEST = "{revision} Write the new answer only, without comments on it."
# The same for plain language models, which go on with a text.
PLAIN_CRITIQUE = "\n\nWhat is wrong with this answer? {critique}\nCritique:"
PLAIN_REVISION = "\n\n{revision}\nNew answer:"
PLAIN_STOP = ("\n\n",)


@dataclass
class Round:
    """principle: its name. critique, revision: what the model wrote."""

    principle: str
    critique: str
    revision: str


@dataclass
class Revision:
    """response: the first answer. rounds: in their order; an answer that was too long to go on with has fewer.

    skipped: why there is nothing to learn from: "prompt too long", "empty response", "empty revision", "unchanged"; or
        None.
    """

    response: str
    rounds: list[Round]
    skipped: str | None = None

    @property
    def revision(self) -> str:
        return self.rounds[-1].revision if self.rounds else self.response

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Constitutional:
    """Answers, and what they become in `rounds` rounds of critique and revision.

    engine: what writes, over a causal language model. tokenizer: its own. principles: one is drawn for each row and
    round, none twice for a row before all had their turn.
    sampling: of answers, critiques and revisions alike; `seed` and the number of a row decide on what is drawn, not
        what is beside it. context: most tokens of prompt and answer together, or None for no limit.
    With a chat template, requests are the user's turns, the model's texts the assistant's; else the model goes on with
    plain text, an answer or critique ending at an empty line.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        principles: Sequence[Principle],
        sampling: SamplingParams,
        *,
        rounds: int = 1,
        context: int | None = None,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1")
        if not principles:
            raise ValueError("principles: empty, at least one is wanted")
        self.engine, self.tokenizer, self.principles = engine, tokenizer, list(principles)
        self.encoder = Encoder(tokenizer)
        self.chat = bool(tokenizer.chat_template)
        seed = 0 if sampling.seed is None else sampling.seed
        self.sampling = replace(sampling, n=1, seed=seed, stop=sampling.stop or (() if self.chat else PLAIN_STOP))
        self.rounds, self.context = rounds, context

    def __call__(
        self, rows: Sequence[int], prompts: Sequence[Text], responses: Sequence[str | None] | None = None
    ) -> list[Revision]:
        """rows: numbers that the random numbers hang on. prompts: strings or messages. responses: first answers that
        there are already; None for one that the model is to write."""
        prompts = [
            as_messages(p, "user") if self.chat else _plain(p, row) for row, p in zip(rows, prompts, strict=True)
        ]
        given = [None] * len(prompts) if responses is None else list(responses)
        written = self._write(rows, prompts, "answer", [i for i, text in enumerate(given) if text is None])
        found = []
        for i, text in enumerate(given):
            said = written.get(i) if text is None else text.rstrip()
            why = "prompt too long" if said is None else None if said.strip() else "empty response"
            found.append(Revision(said or "", [], why))
        for turn in range(self.rounds):
            self._round(turn, rows, prompts, found)
        for revision in found:
            if revision.skipped is None and not revision.rounds:
                revision.skipped = "prompt too long"
            elif revision.skipped is None and not revision.revision.strip():
                revision.skipped = "empty revision"
            elif revision.skipped is None and revision.revision == revision.response:
                revision.skipped = "unchanged"
        return found

    def _round(self, turn: int, rows: Sequence[int], prompts: list[Text], found: list[Revision]) -> None:
        going = [i for i, revision in enumerate(found) if revision.skipped is None and len(revision.rounds) == turn]
        drawn = {i: self._principle(rows[i], turn) for i in going}
        asked: list[Text] = list(prompts)
        for i in going:
            asked[i] = self._ask(prompts[i], found[i].revision, drawn[i].critique, CRITIQUE_REQUEST, PLAIN_CRITIQUE)
        critiques = self._write(rows, asked, f"critique {turn}", going)
        for i, critique in critiques.items():
            asked[i] = self._ask(asked[i], critique, drawn[i].revision, REVISION_REQUEST, PLAIN_REVISION)
        for i, revision in self._write(rows, asked, f"revision {turn}", list(critiques)).items():
            answer = found[i].response
            lead = answer[: len(answer) - len(answer.lstrip())]  # a plain text goes on with a space
            found[i].rounds.append(Round(drawn[i].name, critiques[i].strip(), lead + revision.strip()))

    def _ask(self, before: Text, said: str, principle: str, request: str, plain: str) -> Text:
        values = {"critique": principle, "revision": principle}
        if isinstance(before, str):
            return f"{before}{said}" + plain.format(**values)
        return [
            *before,
            {"role": "assistant", "content": said},
            {"role": "user", "content": request.format(**values)},
        ]

    def _principle(self, row: int, turn: int) -> Principle:
        lap, place = divmod(turn, len(self.principles))
        order = random.Random(number(self.sampling.seed, "principles", lap, row))
        return order.sample(self.principles, len(self.principles))[place]

    def _write(self, rows: Sequence[int], texts: list[Text], purpose: str, which: list[int]) -> dict[int, str]:
        """What the model writes after those texts, as far as they leave room for it in the context."""
        tokens = self.encoder.prompts([texts[i] for i in which], [rows[i] for i in which])
        room = None if self.context is None else self.context - self.sampling.max_new_tokens
        fit = [(i, ids) for i, ids in zip(which, tokens, strict=True) if room is None or len(ids) <= room]
        if not fit:
            return {}
        seeds = [number(self.sampling.seed, purpose, rows[i]) for i, _ in fit]
        rollout = self.engine.generate([ids for _, ids in fit], self.sampling, seeds=seeds)
        return {i: text.rstrip() for (i, _), text in zip(fit, rollout.texts(self.tokenizer), strict=True)}


def _plain(prompt: Text, row: int) -> str:
    if not isinstance(prompt, str):
        raise ValueError(
            f"row {row}: the prompt is a conversation, but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give prompts as strings"
        )
    return prompt
