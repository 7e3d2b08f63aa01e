"""Scores of reward models and verdicts of judges, on texts that begin alike, as they come: several answers to a prompt.

The peer is what transformers offer for it, without a library in between: the same tokens in batches of the same size,
of similar length and padded, through the model's own forward; for the judge with logits of the last position alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from fastrlhf.batching import pad_right
from fastrlhf.bench.decoding_models import load
from fastrlhf.bench.measure import Contender, Row
from fastrlhf.bench.ppo_step import word_tokenizer
from fastrlhf.bench.records import OURS
from fastrlhf.bench.settings import Scoring, Setting
from fastrlhf.grouping import batches_of

TRANSFORMERS = "transformers, padded"
PACKAGES = {OURS: "fastrlhf", "transformers": "transformers"}
BATCH = 16
# Written down before measuring: what is shared is not computed again, and the layers are fused on CPU.
TARGETS = {"reward": {TRANSFORMERS: 1.5}, "judge": {TRANSFORMERS: 1.5}}


class Texts(NamedTuple):
    """prompts: one for each answer."""

    prompts: list[str]
    answers: list[str]


def roll_call() -> dict[str, dict[str, str]]:
    return {name: {"version": metadata.version(package)} for name, package in PACKAGES.items()}


def rows(setting: Setting) -> Iterator[Row]:
    plan = setting.scoring
    for dtype in setting.dtypes:
        name, model = load(plan.model, dtype, setting.device)
        tokenizer, texts = _texts(plan, name, model)
        yield _verdicts(plan, dtype, name, model, tokenizer, texts)
        yield _scores(plan, dtype, name, model, tokenizer, texts)


def _texts(plan: Scoring, name: str, model: nn.Module) -> tuple[Any, Texts]:
    """`plan.answers` to each of `plan.prompts`, cut out of the demo's snippets where they can be had."""
    if name == plan.model:
        from transformers import AutoTokenizer

        from fastrlhf.demo.assets import cache_folder, rated_snippets

        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        stream = tokenizer(" ".join(snippet.text for snippet in rated_snippets(cache_folder(None), offline=False)))
        stream = stream["input_ids"]
    else:
        tokenizer = word_tokenizer(model.config.vocab_size)
        random = torch.Generator().manual_seed(0)
        count = plan.prompts * (plan.prompt + plan.answers * plan.answer)
        stream = torch.randint(2, model.config.vocab_size, (count,), generator=random).tolist()
    pieces = iter(stream)

    def piece(length: int) -> str:
        return tokenizer.decode([next(pieces) for _ in range(length)])

    prompts, answers = [], []
    for _ in range(plan.prompts):
        prompt = piece(plan.prompt)
        for i in range(plan.answers):  # of different lengths, around plan.answer
            prompts.append(prompt)
            answers.append(" " + piece(plan.answer * (2 * i + 1) // (2 * plan.answers) + plan.answer // 2))
    return tokenizer, Texts(prompts, answers)


def _verdicts(plan: Scoring, dtype: str, name: str, model: nn.Module, tokenizer: Any, texts: Texts) -> Row:
    from fastrlhf.feedback import LMJudge, PairJudge
    from fastrlhf.feedback.judge import LEAD, QUESTION
    from fastrlhf.feedback.preferences import all_pairs

    groups = [texts.answers[at : at + plan.answers] for at in range(0, len(texts.answers), plan.answers)]
    pairs = all_pairs(texts.prompts[:: plan.answers], groups)
    shown = [[pair[side] for pair in pairs] for side in ("prompt", "first", "second")]
    judge = LMJudge(copy.deepcopy(model), tokenizer, min_mass=0.0, batch_size=BATCH)
    prompts, firsts, seconds = shown
    asked = [
        judge._question(*each, QUESTION) for each in zip(prompts * 2, firsts + seconds, seconds + firsts, strict=True)
    ]
    sequences = judge.encoder.prompts(asked, list(range(len(asked))), LEAD)
    words = torch.tensor([token for word in judge.words for token in word])

    def transformers(_: Any) -> None:
        for batch in batches_of(sequences, BATCH, packed=False):
            longest = len(sequences[batch[-1]])
            # On the left, as transformers have it where the last position counts.
            padded = [[words[0].item()] * (longest - len(sequences[i])) + sequences[i] for i in batch]
            mask = [[0] * (longest - len(sequences[i])) + [1] * len(sequences[i]) for i in batch]
            input_ids, mask = (torch.tensor(x, device=model.device) for x in (padded, mask))
            output = model(input_ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            output.logits[:, -1].double().softmax(1)[:, words]

    work = f"verdicts on {len(pairs)} pairs in both orders, {name}"
    return _row("judge", work, dtype, sequences, lambda _: PairJudge(judge)(*shown), transformers)


def _scores(plan: Scoring, dtype: str, name: str, model: nn.Module, tokenizer: Any, texts: Texts) -> Row:
    from transformers import AutoModelForSequenceClassification

    from fastrlhf.rewards import RewardModel

    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    scorer = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype).eval()
    scorer.base_model.load_state_dict(model.base_model.state_dict())
    scorer.to(model.device)
    reward = RewardModel(copy.deepcopy(scorer), tokenizer, BATCH)
    scorer.config.pad_token_id = reward.tokenizer.pad_token_id
    encoder, pad = reward.encoder, reward.tokenizer.pad_token_id
    rendered = [encoder.render(*both, row) for row, both in enumerate(zip(*texts, strict=True))]
    sequences = [ids for ids, _ in encoder.texts(rendered)]

    def transformers(_: Any) -> None:
        for batch in batches_of(sequences, BATCH, packed=False):
            input_ids, attention_mask = pad_right([sequences[i] for i in batch], pad)
            scorer(input_ids=input_ids.to(scorer.device), attention_mask=attention_mask.to(scorer.device))

    work = f"scores of {plan.answers} answers to each of {plan.prompts} prompts, {name}"
    return _row("reward", work, dtype, sequences, lambda _: reward(*map(list, texts)), transformers)


def _row(
    op: str, work: str, dtype: str, sequences: list[list[int]], ours: Callable[[Any], Any], transformers: Callable
) -> Row:
    lengths = [len(sequence) for sequence in sequences]
    shape = f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens"

    def contender(work: Callable[[Any], Any]) -> Contender:
        def untracked(argument: Any) -> tuple:
            with torch.no_grad():
                work(argument)
            return ()

        return Contender(untracked)

    everyone = {OURS: contender(ours), TRANSFORMERS: contender(transformers)}
    return Row(op, work, shape, dtype, everyone, None, TARGETS[op], tokens=sum(lengths))
