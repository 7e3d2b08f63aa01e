"""What each method answered to the evaluation prompts, and what the judges say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrlhf.compare import rewards, samples
from fastrlhf.compare.methods import GOLD, TRAININGS
from fastrlhf.compare.recipe import Recipe
from fastrlhf.compare.rewards import TABLE
from fastrlhf.demo import judgement
from fastrlhf.demo.data import DemoData
from fastrlhf.demo.judgement import Responses
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rollout import ScoredSamples, best_of_n_kl

OUTCOME = "outcome.json"
JUDGES = ("gold", "vader")
# Candidates of best-of-n in the table.
BEST_OF = (4, 16)
SFT = "sft"
TITLES = {
    SFT: "SFT",
    **{f"best-of-{n}": f"best of {n}" for n in BEST_OF},
    **{name: title for name, (title, _) in TRAININGS.items()},
}


@dataclass
class Outcome:
    """Of one method and seed. scores: [P] by each judge. kl: from SFT, in nats a response: an estimate for policies,
    the bound for best-of-n. reward_calls: texts that the reward model scored for it. seconds: of training, or, for
    best-of-n, of sampling and scoring the candidates."""

    responses: Responses
    scores: dict[str, Tensor]
    kl: float
    reward_calls: int
    seconds: float

    def measures(self, sft: Outcome | None) -> dict[str, float]:
        """The row of the table; win rates against the responses of `sft`, where there are any."""
        row = self.responses.measures(self.scores)
        row |= {"kl": self.kl, "reward_calls": float(self.reward_calls), "seconds": self.seconds}
        if sft is not None:
            for judge in JUDGES:
                row[f"win_rate_{judge}"] = judgement.win_rate(self.scores[judge], sft.scores[judge])[0]
        return row


def judge(workspace: Workspace, name: str, policy: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: a trained policy's responses, scored."""
    prompts = data.eval_prompts["prompt"]
    sft = workspace.stage_folder("sft")
    responses = judgement.respond(workspace.stage_folder(policy), prompts, recipe, reference=sft)
    scores = {
        "gold": judgement.reward_model(workspace.stage_folder(GOLD))(prompts, responses.texts),
        "proxy": rewards.model(workspace, TABLE, recipe)(prompts, responses.texts),
        "vader": judgement.vader_score()(prompts, responses.texts),
    }
    said = {
        "texts": responses.texts,
        "lengths": responses.lengths.tolist(),
        "log_ratio": responses.log_ratio.tolist(),
        "scores": {who: list(each) for who, each in scores.items()},
    }
    folder = workspace.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME).write_text(json.dumps(said), encoding="utf-8")
    return responses.measures({who: torch.tensor(each) for who, each in scores.items()})


def of_seed(workspace: Workspace, number: int) -> dict[str, Outcome]:
    """The outcomes of every method with the seed of this number, by the names of TITLES."""
    stage = f"samples-{number}"
    found, gold = samples.read(workspace, stage), samples.read_scores(workspace, f"gold-{stage}")
    vader = judgement.vader_score()
    seconds = workspace.seconds(stage)
    outcomes = {SFT: _chosen(found, gold, vader, lambda x: 0, kl=0.0, reward_calls=0, seconds=workspace.seconds(SFT))}
    for n in BEST_OF:
        outcomes[f"best-of-{n}"] = _chosen(
            found,
            gold,
            vader,
            lambda x, n=n: max(range(1, n + 1), key=lambda i: x.rewards[i]),
            kl=best_of_n_kl(n),
            reward_calls=n * len(found),
            seconds=seconds * n / len(found[0].completions),
        )
    for name in TRAININGS:
        said = json.loads((workspace.folder / f"judged-{name}-{number}" / OUTCOME).read_text(encoding="utf-8"))
        responses = Responses(said["texts"], torch.tensor(said["lengths"]), torch.tensor(said["log_ratio"]))
        training = f"{name}-{number}"
        outcomes[name] = Outcome(
            responses,
            {who: torch.tensor(each) for who, each in said["scores"].items()},
            responses.log_ratio.mean().item(),
            workspace.results(training)["reward_calls"],
            workspace.seconds(training),
        )
    return outcomes


def _chosen(
    found: list[ScoredSamples],
    gold: Tensor,
    vader: Callable[[list[str], list[str]], list[float]],
    choose: Callable[[ScoredSamples], int],
    **numbers: Any,
) -> Outcome:
    """Of the samples that `choose` takes, one for each prompt."""
    places = [choose(x) for x in found]
    taken = list(zip(found, places, strict=True))
    texts = [x.completions[i] for x, i in taken]
    scores = {
        "gold": gold[torch.arange(len(found)), torch.tensor(places)],
        "proxy": torch.tensor([x.each[rewards.NAME][i] for x, i in taken]),
        "vader": torch.tensor(vader([x.prompt for x in found], texts)),
    }
    return Outcome(Responses(texts, torch.tensor([x.tokens[i] for x, i in taken])), scores, **numbers)
