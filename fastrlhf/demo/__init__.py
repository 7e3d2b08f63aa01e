"""`fastrlhf demo`: SFT, reward model and PPO on real human ratings, and the numbers that prove it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console

from fastrlhf.demo.recipe import DemoArguments


def run_from_command_line(argv: Sequence[str]) -> None:
    """Run the demo with the flags of DemoArguments."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(DemoArguments, prog="fastrlhf demo", description=DemoArguments.__doc__)
    (args,) = parser.parse_args_into_dataclasses(list(argv))
    run(args)


def run(args: DemoArguments) -> dict:
    """Every stage in order; a finished stage is not repeated, an interrupted one goes on. Returns the summary."""
    from fastrlhf.demo import judgement, report, stages
    from fastrlhf.demo.data import load_demo_data
    from fastrlhf.demo.workspace import Workspace

    quiet()
    console = Console()
    recipe = args.recipe()
    workspace = Workspace(args.output_dir, console, {"model": args.model, "dataset": args.dataset, **recipe.as_dict()})
    data, base = load_demo_data(args, recipe, console)

    workspace.stage("sft", "SFT: learn to write such texts", stages.sft, base, data, recipe)
    # The reward model starts from SFT (Ouyang et al. 2022, section 3.5); the judge shares no training with it.
    sft = workspace.stage_folder("sft")
    workspace.stage(
        "reward_model", "Reward model: learn what people prefer", stages.reward, sft, data.pairs, data, recipe
    )
    gold = "Gold judge: a reward model on ratings of other texts"
    workspace.stage("gold", gold, stages.reward, base, data.gold_pairs, data, recipe)
    workspace.stage("ppo", "PPO: write what the reward model likes, close to SFT", stages.ppo, data, recipe)
    workspace.stage("eval", "Judgement on held-out prompts", judgement.judge, data, recipe)
    return report.write(workspace)


def quiet() -> None:
    """Leave the terminal to the stages."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("fastrlhf").setLevel(logging.ERROR)
