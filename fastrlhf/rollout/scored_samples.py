"""Samples and their rewards, prompt by prompt, in a file that a run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastrlhf.rewards import Rewards
from fastrlhf.rollout.best_of_n import best_indices
from fastrlhf.rollout.transformers_engine import TransformersEngine
from fastrlhf.rollout.types import Rollout, RolloutEngine, SamplingParams

# Samples between two times that results go to the disk: enough for the engine's batches to stay full.
BLOCK = 512


@dataclass
class ScoredSamples:
    """N responses to one prompt.

    row: of the data set. prompt: a string or messages. completions: texts. rewards: their weighted sums. each: the
    rewards by function. gold: scores that had no part in the choice, or None. tokens: in each response, EOS included.
    finished: whether it ended by itself.
    """

    row: int
    prompt: Any
    completions: list[str]
    rewards: list[float]
    each: dict[str, list[float]]
    gold: list[float] | None
    tokens: list[int]
    finished: list[bool]


def sample_and_score(
    prompts: Dataset,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingParams,
    rewards: Rewards,
    path: str | Path,
    *,
    gold: Rewards | None = None,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> list[ScoredSamples]:
    """`sampling.n` responses to every prompt, with their rewards, one line of JSON a prompt in the file `path`.

    prompts: with `prompt` and `prompt_ids`, as fastrlhf.data.prepare_prompts makes them; other columns go to the
        reward functions.
    gold: scores the samples too.
    seed: with a prompt's row, decides on its samples, whatever else is sampled (TransformersEngine: on those of a whole
        block).
    about: what else the samples hang on, such as the model.

    What the file has already, of whole blocks, is not made again. Its first line says what the samples hang on.
    Raises ValueError if that is something else than now, and RewardError for a reward function that failed: what was
    done is in the file then.
    """
    path = Path(path)
    settings = {
        **asdict(replace(sampling, seed=seed)),
        "rewards": dict(zip(rewards.names, rewards.weights, strict=True)),
    }
    settings |= {"gold": gold.names if gold else None, "prompts": _digest(prompts), **(about or {})}
    settings = json.loads(json.dumps(settings))
    size = max(1, BLOCK // sampling.n)
    done = _continued(path, settings, size, len(prompts))
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(prompts), initial=len(done), desc="Prompts") as bar:
        for start in range(len(done), len(prompts), size):
            rows = list(prompts.select(range(start, min(start + size, len(prompts)))))
            rollout = _rollout(engine, [row["prompt_ids"] for row in rows], sampling, seed, start)
            samples = list(_scored(start, rows, rollout, tokenizer, sampling.n, rewards, gold))
            file.writelines(json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in samples)
            file.flush()
            done += samples
            bar.update(len(rows))
    return done


def read_samples(path: str | Path) -> list[ScoredSamples]:
    """The samples in a file that `sample_and_score` finished."""
    return [ScoredSamples(**record) for record in _records(Path(path))[1:]]


def winners(samples: list[ScoredSamples], count: int = 1, finished_only: bool = False) -> Dataset:
    """Columns prompt, completion and reward: the `count` best different responses to each prompt, best first.

    finished_only: among those that ended by themselves; a prompt without any is left out. Raises ValueError when
    nothing is left.
    """
    rows = []
    for x in samples:
        places = [i for i, finished in enumerate(x.finished) if finished or not finished_only]
        best = best_indices([x.rewards[i] for i in places], [x.completions[i] for i in places], count)
        for i in (places[place] for place in best):
            text = x.completions[i]
            said = text if isinstance(x.prompt, str) else [{"role": "assistant", "content": text}]
            rows.append({"prompt": x.prompt, "completion": said, "reward": x.rewards[i]})
    if not rows:
        raise ValueError("no response to any prompt ended by itself: raise response_length, or keep unfinished ones")
    return Dataset.from_list(rows)


def _rollout(
    engine: RolloutEngine, prompts: list[list[int]], sampling: SamplingParams, seed: int, start: int
) -> Rollout:
    if isinstance(engine, TransformersEngine):  # it has one generator for a batch
        return engine.generate(prompts, replace(sampling, seed=_seed(seed, start)))
    return engine.generate(prompts, sampling, seeds=[_seed(seed, start + place) for place in range(len(prompts))])


def _scored(
    start: int,
    rows: list[dict[str, Any]],
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    rewards: Rewards,
    gold: Rewards | None,
) -> Iterator[ScoredSamples]:
    repeated = [row for row in rows for _ in range(n)]
    prompts, texts = [row["prompt"] for row in repeated], rollout.texts(tokenizer)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name not in ("prompt", "prompt_ids")}
    scores, each = rewards(prompts, completions, columns)
    judged = gold(prompts, completions, columns)[0].tolist() if gold else None
    lengths, scores = rollout.lengths.tolist(), scores.tolist()
    for place, row in enumerate(rows):
        own = slice(place * n, place * n + n)
        yield ScoredSamples(
            row=start + place,
            prompt=row["prompt"],
            completions=texts[own],
            rewards=scores[own],
            each={name: values[own].tolist() for name, values in each.items()},
            gold=judged[own] if judged else None,
            tokens=lengths[own],
            finished=[reason == "stop" for reason in rollout.finish_reasons[own]],
        )


def _continued(path: Path, settings: dict[str, Any], size: int, count: int) -> list[ScoredSamples]:
    """The samples in the file, which has no others and no broken line afterwards; a new file begins."""
    samples: list[ScoredSamples] = []
    if path.exists():
        records = _records(path)
        if records:
            _check_settings(path, records[0], settings)
            whole = len(records) - 1 if len(records) - 1 == count else (len(records) - 1) // size * size
            samples = [ScoredSamples(**record) for record in records[1 : 1 + whole]]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        records = [settings, *map(asdict, samples)]
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(new, path)
    return samples


def _records(path: Path) -> list[dict[str, Any]]:
    """What stands in the whole lines of a file. Responses may hold whatever `splitlines` splits at."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _check_settings(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    different = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    if different:
        each = ", ".join(f"{name}={there.get(name)!r} there and {now.get(name)!r} now" for name in different)
        raise ValueError(f"{path} has samples made otherwise: {each}. Take another output_dir, or remove the file")


def _seed(seed: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "little") >> 1


def _digest(prompts: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in prompts.select_columns("prompt_ids").iter(1000):
        digest.update(json.dumps(list(batch["prompt_ids"])).encode())
    return digest.hexdigest()[:16]
