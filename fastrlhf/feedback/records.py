"""JSON lines that a run killed at any moment goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"


class Records:
    """A file of records with a `row` each, and beside it the settings that they were made with.

    folder: made if need be. name: of the file. settings: fit for JSON; what another run left there must have the same.
    A last line that a killed run was writing is dropped. Raises ValueError for a folder of other settings.
    """

    def __init__(self, folder: str, name: str, settings: dict[str, Any]) -> None:
        self.path = Path(folder) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check(Path(folder) / SETTINGS_FILE, settings)
        self.done: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            kept = self._whole_records()
            write_json_lines(self.path, kept)
            self.done = {record["row"]: record for record in kept}

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        if path.exists() and self.path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in {*there, *settings} if there.get(name) != settings.get(name)]
            if other:
                name = sorted(other)[0]
                raise ValueError(
                    f"output_dir={str(path.parent)!r} holds records that were made with {name}={there.get(name)!r}, "
                    f"not {settings.get(name)!r}; take another output_dir, or delete it to begin anew"
                )
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def _whole_records(self) -> list[dict[str, Any]]:
        kept = []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line) if line.endswith("\n") else None
                except ValueError:
                    record = None
                if isinstance(record, dict) and "row" in record:
                    kept.append(record)
        return kept

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, on disk when this returns."""
        records = list(records)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {record["row"]: record for record in records}

    def in_order(self) -> list[dict[str, Any]]:
        return [self.done[row] for row in sorted(self.done)]


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """All of them, or the file as it was."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(new, path)
