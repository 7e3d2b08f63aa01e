"""Writes the measured tables of the README from the committed results: `python bench/readme.py`.

With --check it only says whether the README is up to date (exit 1 if not).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fastrlhf.demo.report import measures, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def demo_table() -> str:
    """The demo's table for each machine it was measured on."""
    parts = []
    for path in sorted(RESULTS.glob("*/demo.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        lines = ["| | SFT | PPO |", "|---|--:|--:|", *(f"| {a} | {b} | {c} |" for a, b, c in rows(summary))]
        parts.append(f"{summary['machine']}:\n\n" + "\n".join(lines) + f"\n\n{measures(summary)}")
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """The README with what stands between its table markers made anew."""
    return re.sub(
        r"(<!-- demo table -->\n).*?(<!-- /demo table -->)",
        lambda match: f"{match[1]}\n{demo_table()}\n\n{match[2]}",
        text,
        flags=re.DOTALL,
    )


def main(argv: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    wanted = with_tables(text)
    if "--check" in argv:
        if wanted != text:
            print("README.md does not show the committed results; run python bench/readme.py")
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
