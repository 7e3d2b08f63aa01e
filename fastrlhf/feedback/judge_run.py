"""`fastrlhf judge`: which of two answers is the better one, for every pair of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from fastrlhf.cli_arguments import parse
from fastrlhf.cli_train import load_function
from fastrlhf.data import prepare_prompts
from fastrlhf.feedback.arguments import JudgeArguments
from fastrlhf.feedback.judge import QUESTION, LMJudge
from fastrlhf.feedback.pair_judge import PairJudge, summary
from fastrlhf.feedback.preferences import Pair, all_pairs, judged_preferences, labelled_pairs
from fastrlhf.feedback.principles import load_principles
from fastrlhf.feedback.records import Records, write_json_lines
from fastrlhf.feedback.runs import batches, context_of, load_rows, progress, report, settings, writer
from fastrlhf.feedback.seeds import number


def main(argv: list[str]) -> None:
    """Leaves judgements.jsonl, preferences.jsonl and report.json in output_dir."""
    (args,) = parse("judge", argv, JudgeArguments)
    questions = _questions(args)
    data = load_rows(args)
    labelled = args.policy is None and {"chosen", "rejected"} <= set(data.column_names)
    pairs = labelled_pairs(data) if labelled else _unlabelled_pairs(args, data)
    records = Records(args.output_dir, "judgements.jsonl", settings(args, data, questions=questions))
    ask = PairJudge(_judge(args), args.tie_threshold)
    for batch in batches(len(pairs), records.done, args.batch_size):
        asked = [questions[number(args.seed, "question", row) % len(questions)] for row in batch]
        shown = [pairs[row] for row in batch]
        judgements = ask(*([pair[name] for pair in shown] for name in ("prompt", "first", "second")), asked)
        records.add(
            {"row": row, **pair, "question": question, **judgement.as_dict()}
            for row, pair, question, judgement in zip(batch, shown, asked, judgements, strict=True)
        )
        progress("judged", len(records.done), len(pairs))
    made = records.in_order()
    preferences = judged_preferences(made, args.keep_ties)
    write_json_lines(Path(args.output_dir) / "preferences.jsonl", preferences)
    numbers = {**summary(made), "preferences": len(preferences)}
    if labelled:
        decided = [record["verdict"] == "first" for record in made if record["verdict"] in ("first", "second")]
        numbers["agreement"] = sum(decided) / len(decided) if decided else None
    report(args.output_dir, numbers)


def _questions(args: JudgeArguments) -> list[str]:
    if args.principles is None:
        return [args.question or QUESTION]
    principles = load_principles(None if args.principles == "default" else args.principles)
    questions = [principle.question for principle in principles if principle.question]
    if not questions:
        raise ValueError(f"principles: none in {args.principles!r} has a question")
    return questions


def _judge(args: JudgeArguments) -> Callable[..., Any]:
    if args.judge_function is not None:
        return load_function(args.judge_function, "judge_function")
    return LMJudge(args.model, min_mass=args.min_mass, batch_size=args.batch_size, dtype=args.dtype)


def _unlabelled_pairs(args: JudgeArguments, data: Dataset) -> list[Pair]:
    columns = set(data.column_names)
    if args.policy is not None:
        return all_pairs(*_answers(args, data))
    if not {"prompt", "responses"} <= columns:
        raise ValueError(
            "dataset: `chosen` and `rejected`, or `prompt` and `responses`, or prompts for a --policy to answer, are "
            f"wanted; there are {', '.join(data.column_names)}"
        )
    return all_pairs(data["prompt"], data["responses"])


def _answers(args: JudgeArguments, data: Dataset) -> tuple[list[Any], list[list[str]]]:
    """The prompts, and `num_responses` of the policy to each, kept in responses.jsonl."""
    written = Records(args.output_dir, "responses.jsonl", settings(args, data, questions=_questions(args)))
    if len(written.done) < len(data):
        model, tokenizer, engine, sampling = writer(args.policy, args)
        limit = (context_of(model) or 1 << 30) - args.response_length
        prompts = prepare_prompts(data, tokenizer, limit)
        sampling = replace(sampling, n=args.num_responses)
        for batch in batches(len(data), written.done, args.batch_size):
            rows = prompts[batch]
            seeds = [number(args.seed, "answer", row) for row in batch]
            texts = engine.generate(rows["prompt_ids"], sampling, seeds=seeds).texts(tokenizer)
            groups = [texts[at : at + args.num_responses] for at in range(0, len(texts), args.num_responses)]
            written.add(
                {"row": row, "prompt": prompt, "responses": group}
                for row, prompt, group in zip(batch, rows["prompt"], groups, strict=True)
            )
            progress("answered", len(written.done), len(data))
    made = written.in_order()
    return [record["prompt"] for record in made], [record["responses"] for record in made]
