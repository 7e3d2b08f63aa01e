"""`fastrlhf constitutional`: answers, their revisions by principles, and the pairs that these make."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastrlhf.cli_arguments import parse
from fastrlhf.data import prompt_texts
from fastrlhf.data.turns import waiting_turns
from fastrlhf.feedback.arguments import ConstitutionalArguments
from fastrlhf.feedback.constitutional import Constitutional
from fastrlhf.feedback.judge import LMJudge
from fastrlhf.feedback.pair_judge import PairJudge, summary
from fastrlhf.feedback.preferences import preference
from fastrlhf.feedback.principles import load_principles
from fastrlhf.feedback.records import Records, write_json_lines
from fastrlhf.feedback.runs import batches, context_of, load_rows, progress, report, settings, writer


def main(argv: list[str]) -> None:
    """Leaves revisions.jsonl, preferences.jsonl and report.json in output_dir."""
    (args,) = parse("constitutional", argv, ConstitutionalArguments)
    principles = load_principles(args.principles)
    data = load_rows(args)
    prompts = prompt_texts(data)
    told = [asdict(principle) for principle in principles]
    records = Records(args.output_dir, "revisions.jsonl", settings(args, data, principles=told))
    model, tokenizer, engine, sampling = writer(args.model, args)
    revise = Constitutional(engine, tokenizer, principles, sampling, rounds=args.rounds, context=context_of(model))
    if tokenizer.chat_template:
        prompts = [waiting_turns(prompt) for prompt in prompts]
    judge = PairJudge(LMJudge(model, tokenizer)) if args.judge_revisions else None
    for batch in batches(len(data), records.done, args.batch_size):
        asked = [prompts[row] for row in batch]
        found = revise(batch, asked, data[batch].get("response"))
        made = [
            {"row": row, "prompt": prompt, "revision": each.revision, **each.as_dict()}
            for row, prompt, each in zip(batch, asked, found, strict=True)
        ]
        if judge is not None:
            _add_judgements(judge, made)
        records.add(made)
        progress("revised", len(records.done), len(data))
    made = records.in_order()
    kept = [record for record in made if record["skipped"] is None]
    if judge is not None:
        kept = [record for record in kept if record["judgement"]["verdict"] == "first"]
    preferences = [preference(record["prompt"], record["revision"], record["response"]) for record in kept]
    write_json_lines(Path(args.output_dir) / "preferences.jsonl", preferences)
    numbers: dict[str, Any] = {
        "rows": len(made),
        "preferences": len(preferences),
        "skipped": dict(Counter(record["skipped"] for record in made if record["skipped"] is not None)),
        "principles": dict(Counter(each["principle"] for record in made for each in record["rounds"])),
    }
    if judge is not None:
        numbers["judgements"] = summary([record["judgement"] for record in made if "judgement" in record])
    report(args.output_dir, numbers)


def _add_judgements(judge: PairJudge, records: list[dict[str, Any]]) -> None:
    """Of each revision against the first answer."""
    usable = [record for record in records if record["skipped"] is None]
    if not usable:
        return
    columns = ([record[name] for record in usable] for name in ("prompt", "revision", "response"))
    for record, judgement in zip(usable, judge(*columns), strict=True):
        record["judgement"] = judgement.as_dict()
