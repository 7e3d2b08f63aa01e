"""`fastrlhf compare`: SFT, best-of-n, rejection sampling, DPO, PPO and GRPO on the same data, in one measured table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from fastrlhf.compare.recipe import CompareArguments


def run_from_command_line(argv: Sequence[str]) -> None:
    """Compare with the flags of CompareArguments."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(CompareArguments, prog="fastrlhf compare", description=CompareArguments.__doc__)
    (args,) = parser.parse_args_into_dataclasses(list(argv))
    if args.synthetic:
        from fastrlhf.compare import bradley_terry

        bradley_terry.report(args.output_dir, args.results_dir, args.seed, _console())
    else:
        run(args)


def _console() -> Console:
    """As wide as the table, where it writes to a file."""
    return Console(width=None if sys.stdout.isatty() else 200)


def run(args: CompareArguments) -> dict[str, Any]:
    """Every stage in order; a finished stage is not repeated, an interrupted one goes on. Returns the summary."""
    from fastrlhf.compare import report
    from fastrlhf.demo import quiet
    from fastrlhf.demo.data import load_demo_data
    from fastrlhf.demo.workspace import Workspace

    quiet()
    console, recipe = _console(), args.recipe()
    data, base = load_demo_data(args, recipe, console)
    todo = plan(args.seeds, base, data, recipe)
    workspace = Workspace(args.output_dir, console, args.settings(), [name for name, *_ in todo])
    for stage in todo:
        workspace.stage(*stage)
    return report.write(workspace, args.seeds, recipe, args.results_dir)


def plan(seeds: int, base: str, data: Any, recipe: Any) -> list[tuple[str, str, Callable[..., dict[str, Any]], Any]]:
    """What Workspace.stage takes, stage by stage.

    SFT, reward models and gold judge are the same for all seeds: the methods are compared, given these. What differs
    is sampling, the order of the data, and every training after them.
    """
    from fastrlhf.compare import methods, outcomes, rewards, samples
    from fastrlhf.compare.overoptimization import curve_stage
    from fastrlhf.demo import stages

    todo: list[tuple[Any, ...]] = [
        ("sft", "SFT: learn to write such texts", stages.sft, base, data, recipe),
        (
            "gold",
            "Gold judge: a reward model on ratings of other texts",
            stages.reward,
            base,
            data.gold_pairs,
            data,
            recipe,
        ),
    ]
    for variant in rewards.VARIANTS:
        todo.append((variant.stage, f"Reward model: {variant.title}", rewards.train, variant, data, recipe))
    for number in range(seeds):
        own, of = recipe.of_seed(number), f"seed {number}"
        drawn = f"samples-{number}"
        todo.append((drawn, f"Samples of SFT, {of}", samples.sample, data, own))
        count = len(data.eval_prompts)
        todo.append((f"gold-{drawn}", f"Their gold scores, {of}", samples.score, drawn, methods.GOLD, count, own))
        for name, (title, train) in methods.TRAININGS.items():
            trained = f"{name}-{number}"
            todo.append((trained, f"{title}, {of}", train, data, own))
            todo.append((f"judged-{trained}", f"Judgement of {title}, {of}", outcomes.judge, trained, data, own))
    for variant in rewards.VARIANTS:
        title = f"Overoptimisation, {variant.title}"
        if variant != rewards.TABLE:
            for number in range(seeds):
                drawn = f"samples-{number}"
                inputs = (drawn, variant, recipe.curve_prompts, recipe)
                todo.append((f"{variant.name}-{drawn}", f"{title}: scores of samples", samples.score, *inputs))
        todo.append((curve_stage(variant), f"{title}: PPO", methods.watched_ppo, variant, data, recipe))
    return todo
