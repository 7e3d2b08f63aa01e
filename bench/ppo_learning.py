"""Do our PPOTrainer and TRL's last one learn alike? Reward curves on the demo's task, some seeds of each.

Both start from the demo's SFT model, with its reward model as reward and as the value model's beginning, in fp32, with
the same hyper-parameters: nearly those of the demo's PPO at half its rollout, and no bound on the gradient's norm, as
TRL has none. EOS ends a response. Scores are those of TRL on both sides: at the last token that the policy wrote, where
ours otherwise puts an EOS behind a response without one, as the reward model met texts in its training.

What stays different is the place of the score where a response ended early (ours: its last token; TRL: the one after),
and the random numbers. With `--full_length` EOS ends none, and only the random numbers are left.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastrlhf.bench import ppo_worker, records
from fastrlhf.bench.peers import trl_ppo
from fastrlhf.bench.ppo_step import QUIETLY
from fastrlhf.bench.ppo_worker import OURS, TRL, Plan

FAMILY = "ppo_learning"
PROVIDERS = (OURS, TRL)
CURVES = {"objective/scores": "score", "objective/kl": "KL to the start, nats a response"}
ITERATIONS, SEEDS = 20, 3
PROMPTS, MINI_BATCHES, RESPONSE = 16, 2, 16
HYPER = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "num_ppo_epochs": 1,
    "num_mini_batches": MINI_BATCHES,
    "response_length": RESPONSE,
    "temperature": 1.0,
    "kl_coef": 0.05,
    "vf_coef": 0.1,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
}
# Two means of three seeds each differ by more than this many pooled spreads in one of twenty cases, were the providers
# equal: Student's t with 4 degrees of freedom, times the root of 1/3 + 1/3. Written down before measuring: the
# curves overlap if at most two of twenty iterations are further apart.
APART = 2.776 * (2 / 3) ** 0.5
OUTSIDE = 0.1
FULL_LENGTH = "-full-length"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastrlhf bench ppo_learning", description=_HELP, allow_abbrev=False)
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="folder of a demo; begun if it isn't there"
    )
    parser.add_argument("--full_length", action="store_true", help="EOS ends no response")
    parser.add_argument("--quick", action="store_true", help="two iterations of two seeds: does it all run?")
    parser.add_argument("--output", type=Path, default=None, help="folder for the results (bench/results of a clone)")
    options = parser.parse_args(arguments)
    console = Console()
    trl_ppo.version()  # says at once what is missing
    folder, prompts = demo(options.demo, console)
    iterations, seeds = (2, 2) if options.quick else (ITERATIONS, SEEDS)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in PROVIDERS}
    for seed in range(seeds):
        for name in PROVIDERS if seed % 2 == 0 else reversed(PROVIDERS):
            plan = worker_plan(name, folder, prompts, iterations, seed, eos=not options.full_length)
            runs[name].append(checked(name, ppo_worker.run(plan)))
            last = runs[name][-1][-1]["metrics"]["objective/scores"]
            console.print(f"{name}, seed {seed}: score {last:.3g} after {iterations} iterations", highlight=False)
    target = (options.output or records.folder()) / records.slug(records.device_name("cpu"))
    kind = FULL_LENGTH if options.full_length else ""
    path = target / f"ppo-learning{kind}{records.variant(options.quick)}.json"
    content = {**records.environment("cpu"), "family": FAMILY, "hyper_parameters": HYPER, **result(runs)}
    records.write(path, content)
    draw(content, path.with_suffix(".png"))
    console.print(f"{statement(content)}\n{path}", highlight=False)


def checked(provider: str, iterations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The iterations. Raises RuntimeError where one has not as many optimiser steps as planned."""
    steps, wanted = {x["optimizer_steps"] for x in iterations}, HYPER["num_ppo_epochs"] * MINI_BATCHES
    if steps != {wanted}:
        raise RuntimeError(f"{provider} made {sorted(steps)} optimiser steps an iteration, wanted {wanted}")
    return iterations


def demo(folder: Path, console: Console) -> tuple[Path, list[str]]:
    """A demo's folder with SFT and reward model, made by the quick recipe where they are missing; and its prompts."""
    from fastrlhf.demo import stages
    from fastrlhf.demo.data import load_demo_data
    from fastrlhf.demo.recipe import DemoArguments
    from fastrlhf.demo.workspace import Workspace

    args = DemoArguments(quick=True, output_dir=str(folder))
    recipe = args.recipe()
    data, base = load_demo_data(args, recipe, console)
    if not all((folder / name / "model.safetensors").exists() for name in ("sft", "reward_model")):
        workspace = Workspace(str(folder), console, {"model": args.model, "dataset": args.dataset, **recipe.as_dict()})
        workspace.stage("sft", "SFT", stages.sft, base, data, recipe)
        sft = workspace.stage_folder("sft")
        workspace.stage("reward_model", "Reward model", stages.reward, sft, data.pairs, data, recipe)
    return folder.resolve(), list(data.prompts["prompt"])


def worker_plan(provider: str, folder: Path, prompts: list[str], iterations: int, seed: int, eos: bool = True) -> Plan:
    arguments = {**HYPER, **QUIETLY, "seed": seed}
    if provider == TRL:
        # One micro-batch an optimiser step: TRL cuts mini-batches from it.
        arguments |= {"per_device_train_batch_size": PROMPTS, "local_rollout_forward_batch_size": PROMPTS}
        arguments |= {"total_episodes": iterations * PROMPTS, "stop_token": "eos" if eos else None}
    else:
        arguments |= {"per_device_train_batch_size": PROMPTS // MINI_BATCHES, "rollout_batch_size": PROMPTS}
        arguments |= {"max_steps": iterations, "max_grad_norm": 0.0}
    policy, reward = str(folder / "sft"), str(folder / "reward_model")
    threads = torch.get_num_threads()
    models = policy, reward, reward, "float32", "eager"
    return Plan(provider, *models, prompts, arguments, threads, eos=eos, as_written=True)


def result(runs: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Curves [seed][iteration] of each provider, and how far apart their means are."""
    curves = {
        name: {metric: [[x["metrics"][metric] for x in run] for run in of] for metric in CURVES}
        for name, of in runs.items()
    }
    scores = [curves[name]["objective/scores"] for name in PROVIDERS]
    seconds = {name: statistics.median(x["seconds"] for run in of for x in run[1:]) for name, of in runs.items()}
    return {"curves": curves, "seconds_an_iteration": seconds, "overlap": overlap(*scores)}


def overlap(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """For each iteration: |difference of the means|, and the spread over seeds, pooled from both.

    They are apart in an iteration where the difference is more than APART spreads.
    """
    differences, spreads = [], []
    for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        differences.append(abs(statistics.mean(a) - statistics.mean(b)))
        spreads.append(((statistics.variance(a) + statistics.variance(b)) / 2) ** 0.5)
    apart = sum(d > APART * s for d, s in zip(differences, spreads, strict=True))
    return {
        "difference": differences,
        "spread": spreads,
        "apart": apart,
        "overlaps": apart <= OUTSIDE * len(differences),
    }


def statement(content: dict[str, Any]) -> str:
    found = content["overlap"]
    many = len(found["difference"])
    ends = {
        name: statistics.mean(curve[-1] for curve in content["curves"][name]["objective/scores"]) for name in PROVIDERS
    }
    return (
        f"The curves {'overlap' if found['overlaps'] else 'do not overlap'}: in {many - found['apart']} of {many} "
        f"iterations the means over seeds differ by at most {APART:.2f} pooled spreads (95 % if the trainers were "
        f"equal). Last iteration: ours {ends[OURS]:.3g}, TRL {ends[TRL]:.3g}. On average the means differ by "
        f"{statistics.mean(found['difference']):.2g}, the spread is {statistics.mean(found['spread']):.2g}. Mean of "
        f"the later half of the iterations, ± the spread over seeds: {_later_half(content)}."
    )


def _later_half(content: dict[str, Any]) -> str:
    texts = []
    for metric, name in zip(CURVES, ("score", "KL"), strict=True):
        for provider in PROVIDERS:
            curves = content["curves"][provider][metric]
            each = [statistics.mean(curve[len(curve) // 2 :]) for curve in curves]
            texts.append(f"{name} {provider} {statistics.mean(each):.2f} ± {statistics.stdev(each):.2f}")
    return ", ".join(texts)


def draw(content: dict[str, Any], picture: Path) -> None:
    """Every seed as a thin line, the means as thick ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(9, 3.5), layout="constrained")
    for axis, (metric, label) in zip(axes, CURVES.items(), strict=True):
        for name, colour in zip(PROVIDERS, ("tab:blue", "tab:orange"), strict=True):
            curves = content["curves"][name][metric]
            steps = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(steps, curve, color=colour, alpha=0.3, linewidth=1)
            means = [statistics.mean(x) for x in zip(*curves, strict=True)]
            axis.plot(steps, means, color=colour, linewidth=2, label=name)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("PPO iteration")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


_HELP = """Trains 20 iterations of PPO on the demo's task with our trainer and with TRL's last one, three seeds each,
and says whether the reward curves overlap. Takes a quarter of an hour beside the demo, whose SFT and reward model it
needs."""
