"""`fastrlhf best-of-n` and `fastrlhf rejection-sampling`: prompts to the best of several responses, and to a policy
that is fine-tuned on them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from fastrlhf import trainers
from fastrlhf.cli_arguments import DatasetArguments, LoadArguments, ModelArguments, RewardSources, parse
from fastrlhf.cli_train import load_function, reward_functions
from fastrlhf.data import prepare_prompts
from fastrlhf.loading import load_causal_lm, tokenizer_with_pad, weights_digest
from fastrlhf.rewards import Rewards
from fastrlhf.rollout import (
    SamplingParams,
    ScoredSamples,
    best_of_n_summary,
    create_engine,
    sample_and_score,
    winners,
)

SAMPLES, BEST, SUMMARY, ROUND = "samples.jsonl", "best.jsonl", "summary.json", "round.json"


@dataclass
class SamplingArguments:
    """How responses are sampled, and what their rewards are."""

    num_generations: int = field(default=16, metadata={"help": "Responses to each prompt: N."})
    num_best: int = field(default=1, metadata={"help": "How many of them are taken, the best different ones."})
    max_prompt_length: int = field(
        default=512, metadata={"help": "Longest prompt in tokens; a longer one is an error, not cut in silence."}
    )
    response_length: int = field(default=128, metadata={"help": "Most tokens of a response."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Responses decoded at a time."})
    rollout_engine: Literal["native", "transformers", "vllm"] = field(
        default="native", metadata={"help": "What samples the responses; see fastrlhf ppo --help."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each when not given."}
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a reward function is held to hang; no limit when not given."},
    )
    reward_retries: int = field(
        default=0, metadata={"help": "How many times a reward function that raised or hung is called again."}
    )

    _argument_group_name = "sampling"

    def __post_init__(self) -> None:
        if not 1 <= self.num_best <= self.num_generations:
            raise ValueError(f"num_best={self.num_best} must be from 1 to num_generations={self.num_generations}")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0: all responses would be the same")
        self.params  # noqa: B018  (an error for what else is out of range)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            self.response_length,
            self.temperature,
            n=self.num_generations,
            batch_size=self.rollout_batch_size,
        )

    def rewards(self, sources: RewardSources, tokenizer: Any, device: torch.device) -> Rewards:
        options = {"timeout": self.reward_timeout, "retries": self.reward_retries}
        return Rewards(reward_functions(sources), self.reward_weights, tokenizer, **options).to(device)


@dataclass
class BestOfNArguments:
    """Where the results go, and what else is to judge them."""

    output_dir: str = field(
        default="runs/best-of-n", metadata={"help": "Folder for samples, the best of them, and the summary."}
    )
    seed: int = field(default=42, metadata={"help": "Of the samples."})
    finished_only: bool = field(
        default=False, metadata={"help": "Take responses only that ended by themselves within response_length."}
    )
    gold_models: list[str] | None = field(
        default=None, metadata={"help": "Reward models that judge the responses without a part in the choice."}
    )
    gold_functions: list[str] | None = field(
        default=None, metadata={"help": "Functions that do, as package.module:function or file.py:function."}
    )

    _argument_group_name = "results"


@dataclass
class RejectionArguments:
    """How often the policy is sampled from and fine-tuned."""

    num_rounds: int = field(default=1, metadata={"help": "Rounds, each from the policy of the one before."})
    keep_unfinished: bool = field(
        default=False,
        metadata={"help": "Train on responses, too, that did not end within response_length, as if they had."},
    )

    _argument_group_name = "rejection sampling"

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ValueError(f"num_rounds={self.num_rounds} must be at least 1")


def best_of_n(argv: list[str]) -> None:
    """The best of N responses to each prompt, in output_dir/best.jsonl, and what best-of-n is worth at every n."""
    types = (LoadArguments, DatasetArguments, RewardSources, SamplingArguments, BestOfNArguments)
    load, data, sources, sampling, args = parse("best-of-n", argv, *types)
    functions = [load_function(name, "gold_functions") for name in args.gold_functions or []]
    gold = [*(args.gold_models or []), *functions]
    folder = Path(args.output_dir)
    samples = _sampled(load.model, load.init_kwargs(), data, sources, sampling, folder / SAMPLES, args.seed, gold)
    best = winners(samples, sampling.num_best, args.finished_only)
    _write_lines(folder / BEST, list(best))
    summary = best_of_n_summary(
        torch.tensor([x.rewards for x in samples]), torch.tensor([x.gold for x in samples]) if gold else None
    )
    _write(folder / SUMMARY, {"prompts": len(samples), "taken": len(best), **summary})
    Console().print(_table(summary))
    print(f"The best responses are in {folder / BEST}")


def rejection_sampling(argv: list[str]) -> None:
    """Fine-tunes the policy on the best of its own responses and leaves model and tokenizer in output_dir.

    Touvron et al. 2023 (arXiv:2307.09288), section 3.2.3; Dong et al. 2023 (arXiv:2304.06767). Each round has a folder
    in output_dir; what is there is not made again.
    """
    types = (ModelArguments, DatasetArguments, trainers.SFTConfig, RewardSources, SamplingArguments, RejectionArguments)
    model, data, args, sources, sampling, rejection = parse("rejection-sampling", argv, *types)
    if model.lora_r and rejection.num_rounds > 1:
        raise ValueError(
            f"lora_r={model.lora_r}: every one of num_rounds={rejection.num_rounds} would have its adapters on top of "
            "those before; train all weights, or make one round"
        )
    output, policy = args.output_dir, model.model
    for number in range(1, rejection.num_rounds + 1):
        folder = Path(output) / f"round-{number}"
        if not (folder / ROUND).exists():
            seed = args.seed + number - 1
            samples = _sampled(policy, model.init_kwargs(), data, sources, sampling, folder / SAMPLES, seed)
            best = winners(samples, sampling.num_best, finished_only=not rejection.keep_unfinished)
            args.output_dir = str(folder)
            trainer = trainers.SFTTrainer(
                policy,
                args,
                best.select_columns(["prompt", "completion"]),
                peft_config=model.peft_config("CAUSAL_LM"),
                model_init_kwargs=model.init_kwargs(),
            )
            trainer.train(resume_from_checkpoint=trainers.last_checkpoint(args.output_dir))
            for place in (args.output_dir, output):
                trainer.save_model(place)
            mean = {
                "reward": torch.tensor([x.rewards for x in samples]).mean().item(),
                "taken_reward": sum(best["reward"]) / len(best),
            }
            _write(folder / ROUND, {"prompts": len(samples), "taken": len(best), **mean})
            print(f"Round {number}: {len(best)} responses taken, {mean}")
        policy = str(folder)
    print(f"The model is in {output}")


def _sampled(
    name: str,
    options: dict[str, Any],
    data: DatasetArguments,
    sources: RewardSources,
    sampling: SamplingArguments,
    path: Path,
    seed: int,
    gold: list[Any] | None = None,
) -> list[ScoredSamples]:
    """Responses of the model `name` to the prompts of the data, from the file `path` as far as it has them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_causal_lm(name, **options).to(device).eval()
    tokenizer = tokenizer_with_pad(None, model, trust_remote_code=options.get("trust_remote_code", False))
    return sample_and_score(
        prepare_prompts(data.load_one(), tokenizer, sampling.max_prompt_length),
        create_engine(sampling.rollout_engine, model, tokenizer),
        tokenizer,
        sampling.params,
        sampling.rewards(sources, tokenizer, device),
        path,
        gold=Rewards(gold, processing_class=tokenizer).to(device) if gold else None,
        seed=seed,
        about={"model": weights_digest(model)},
    )


def _table(summary: dict[str, list[float]]) -> Table:
    """The powers of 2, and N."""
    count = len(summary["n"])
    table = Table(title="Best of n, estimated from all samples")
    for title in ("n", "KL at most (nats)", *(name for name in ("reward", "gold") if name in summary)):
        table.add_column(title, justify="right")
    for n in sorted({count, *(2**i for i in range(count.bit_length()))}):
        cells = [
            f"{summary[x][n - 1]:.4g} ± {summary[f'{x}_se'][n - 1]:.2g}" for x in ("reward", "gold") if x in summary
        ]
        table.add_row(str(n), f"{summary['kl'][n - 1]:.4g}", *cells)
    return table


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
