"""What a reward model's folder says about its heads, beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers.utils import cached_file

SETTINGS_FILE = "reward_model.json"
HEADS = ("single", "ensemble", "objectives", "process")


@dataclass
class RewardSettings:
    """The file `reward_model.json`. A folder without it holds a single head.

    heads: "single"; "ensemble", several opinions on one question; "objectives", one each; "process", a single head that
        scores the end of every step.
    names: of the heads.
    turns: "last", the score at the end of a text, or "all", the sum of those at the end of every assistant turn.
    separator: what stands between the steps that "process" scores.
    means, stds: of each head's scores of held-out texts; empty before `RewardTrainer.calibrate`.
    temperatures: what score differences are divided by to be log-odds: one for each objective, else one; empty before.
    """

    heads: str = "single"
    names: list[str] = field(default_factory=lambda: ["score"])
    turns: str = "last"
    separator: str = "\n"
    means: list[float] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.heads not in HEADS:
            raise ValueError(f"{SETTINGS_FILE}: heads={self.heads!r} must be one of {', '.join(HEADS)}")
        for name in ("means", "stds"):
            if len(getattr(self, name)) not in (0, len(self.names)):
                raise ValueError(
                    f"{SETTINGS_FILE}: {len(getattr(self, name))} {name} for {len(self.names)} heads; wanted as many"
                )
        wanted = len(self.names) if self.heads == "objectives" else 1
        if len(self.temperatures) not in (0, wanted):
            raise ValueError(f"{SETTINGS_FILE}: {len(self.temperatures)} temperatures, wanted {wanted}")

    def save(self, folder: str) -> None:
        path = os.path.join(folder, SETTINGS_FILE)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
        os.replace(f"{path}.new", path)

    @classmethod
    def load(cls, name: str) -> RewardSettings:
        """From a folder or hub id; those of a single head where it has no such file. Raises ValueError for a file that
        is not one."""
        path = cached_file(
            name,
            SETTINGS_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return cls()
        with open(path, encoding="utf-8") as file:
            try:
                found: Any = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON: {error}") from error
        known = {each.name for each in fields(cls)}
        if not isinstance(found, dict) or not set(found) <= known:
            raise ValueError(f"{path}: wanted an object with {', '.join(sorted(known))}")
        return cls(**found)
