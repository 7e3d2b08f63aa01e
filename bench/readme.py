"""Writes the measured tables of the pages from the committed results: `python -m fastrlhf.bench.readme`.

With --check it only says whether the pages are up to date (exit 1 if not).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from fastrlhf.bench import accuracy, compat_training, ppo_learning, records, report
from fastrlhf.compare import report as compare
from fastrlhf.compare.table import rows as compare_rows
from fastrlhf.demo.report import measures, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
COMPAT_PAGE = ROOT / "fastrlhf" / "compat" / "README.md"

FAMILIES = {
    "log_probs": "From logits",
    "lm_head": "From hidden states (the limit: the bare matrix products, into warm memory)",
    "advantages": "Advantages",
    "losses": "Losses",
    "layers": "Inside the decoder layers, on CPU",
}
VARIANTS = {"huge-pages": "huge pages", "avx2": "AVX2 build", "portable": "portable build"}
ROLLOUT, PPO, SCORING = "rollout", "ppo", "scoring"
PAIR_STEPS = {
    "dpo": (
        "Steps of DPO on the same pairs, after the reference's log-probs are computed; TRL as it comes runs the "
        "reference in every step and recomputes activations."
    ),
    "reward": (
        "Steps of a reward model on the same pairs, with the prompt that two answers share read once, and with five "
        "heads on one trunk; TRL as it comes recomputes activations."
    ),
}
PHASES = ("rollout", "reward", "reference", "update", "backward", "optimizer")  # the last two are parts of the update
LEARNING = {
    "": "What PPO learns, ours and TRL's on the demo's task.",
    ppo_learning.FULL_LENGTH: "The same where EOS ends no response, so that the score stands in the same place on both "
    "sides (TRL has it one token after an EOS).",
}
PAIR_PARTS = {
    "cpu_s": "of all threads",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "reference_s": "reference, before the training",
}
NOTHING = "No results are committed yet."


def demo_table(folder: Path) -> str:
    """The demo's table for each machine it was measured on."""
    parts = []
    for path in sorted(folder.glob("*/demo.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        body = table(["", "SFT", "PPO"], rows(summary))
        parts.append(f"{summary['machine']}:\n\n{body}\n\n{measures(summary)}")
    return "\n\n".join(parts)


def compare_table(folder: Path) -> str:
    """The comparison's table, figure and claims, once they are measured."""
    path = folder / "quality" / compare.SUMMARY
    if not path.exists():
        return ""
    summary = json.loads(path.read_text(encoding="utf-8"))
    seeds = summary["seeds"]
    return "\n\n".join(
        [
            f"{summary['machine']}, {seeds} seeds, {compare.closing(summary)}",
            table(*compare_rows(summary["table"])),
            f"![gold and proxy score against the distance from SFT](bench/results/quality/{compare.FIGURE})",
            table(*compare.fitted_rows(summary)),
            "\n".join(f"- {line}" for line in compare.claim_lines(summary)),
        ]
    )


def performance_tables(folder: Path) -> str:
    """For each device: its families, the other builds of the kernels, the calls and the accuracy."""
    parts = [part for device in sorted(folder.glob("*/")) for part in _of_device(device)]
    return "\n\n".join(parts) or NOTHING


def _of_device(folder: Path) -> list[str]:
    families = (*FAMILIES, "calls", "accuracy", ROLLOUT, PPO, *PAIR_STEPS, SCORING)
    known = [*families, *(f"{name}-{variant}" for name in families for variant in VARIANTS)]
    found = {name: records.read(folder / f"{name}.json") for name in known if (folder / f"{name}.json").exists()}
    usual = {name: found[name] for name in families if name in found}
    if not usual:
        return []
    about = next(iter(usual.values()))
    build = sorted(set(about["backends"].values()))
    threads = f"{about['threads']} threads, " if "cuda" not in about else ""
    parts = [f"**{about['device']}** ({threads}{', '.join(build)}, torch {about['torch']}):", _who(about["peers"])]
    cut_short = [name for name, content in found.items() if not content["complete"]]
    if cut_short:
        parts.append(f"Stopped before the last row: {', '.join(cut_short)}.")
    parts += [f"{title}:\n\n{family(usual[name])}" for name, title in FAMILIES.items() if name in usual]
    for variant, title in VARIANTS.items():
        contents = [found[f"{name}-{variant}"] for name in FAMILIES if f"{name}-{variant}" in found]
        if contents:
            body = family({**contents[0], "rows": [row for content in contents for row in content["rows"]]})
            parts.append(f"The same with {title}:\n\n{body}")
    if "calls" in usual:
        parts.append(f"Small inputs, where only the call costs:\n\n{calls(usual['calls'])}")
    if "accuracy" in usual:
        parts.append(f"Largest error against fp64, log-prob / entropy / gradient:\n\n{errors(usual['accuracy'])}")
    rollouts = next((found[name] for name in (ROLLOUT, f"{ROLLOUT}-huge-pages") if name in found), None)
    if rollouts is not None:
        parts.append(f"{_of_rollouts(rollouts)}\n\n{family(rollouts)}")
    ppo = next((found[name] for name in (PPO, f"{PPO}-huge-pages") if name in found), None)
    if ppo is not None:
        parts += [_of_ppo(ppo), family(ppo), "Where the time goes, in seconds, with the peak of memory:", phases(ppo)]
    for name, about in PAIR_STEPS.items():
        if name in found:
            parts += [_of_pairs(about, found[name]), family(found[name]), "The peak of memory and seconds:"]
            parts.append(pair_parts(found[name]))
    if SCORING in found:
        about = "Verdicts of a judge and scores of a reward model, on texts that begin alike:"
        parts.append(f"{about}\n\n{family(found[SCORING])}")
    for kind, about in LEARNING.items():
        learning = folder / f"ppo-learning{kind}.json"
        if learning.exists():
            parts.append(f"{about} {ppo_learning.statement(records.read(learning))}")
            parts.append(f"![reward curves](bench/results/{folder.name}/{learning.with_suffix('.png').name})")
    return parts


def _of_ppo(content: dict[str, Any]) -> str:
    return (
        "Whole iterations of PPO, on equal work: the same models, prompts, tokens and optimiser steps. The limit, of "
        "an iteration without its rollout, is the matrix products of trunks and head alone. Ours keeps fp32 masters of "
        f"bf16 weights, TRL has all weights in bf16. {_who(content['peers'])}"
    )


def _of_pairs(about: str, content: dict[str, Any]) -> str:
    return (
        f"{about} Ours in bf16 keeps fp32 masters, and its memory is compared with TRL's with fp32 weights. "
        f"{_who(content['peers'])}"
    )


def pair_parts(content: dict[str, Any]) -> str:
    """Of every contender: memory, the step and parts of it, and what a reference takes for all pairs before."""
    results = [result for row in content["rows"] for result in row["results"].values() if "peak_mib" in result]
    parts = {key: title for key, title in PAIR_PARTS.items() if any(key in result for result in results)}
    lines = {}
    for row in content["rows"]:
        for name, result in row["results"].items():
            if "peak_mib" not in result:
                continue
            title = f"{row['work']}, {row['dtype']}" if name == records.OURS else name
            numbers = (f"{result[key]:.3g}" if key in result else "" for key in parts)
            lines[title] = (title, f"{result['peak_mib'] / 1024:.1f}", report.time(result["median_ms"]), *numbers)
    return table(["", "GiB", "step", *parts.values()], list(lines.values()))


def phases(content: dict[str, Any]) -> str:
    """What an iteration of each contender is made of; backward pass and optimiser are parts of the update."""
    lines = {}
    for row in content["rows"]:
        for name, result in row["results"].items():
            if "peak_mib" not in result:
                continue
            title = f"{row['work']}, {row['dtype']}" if name == records.OURS else name
            numbers = (f"{result[f'{phase}_s']:.3g}" for phase in PHASES)
            peak = f"{result['peak_mib'] / 1024:.1f}"
            lines[title] = (title, report.time(result["median_ms"]), *numbers, str(result["optimizer_steps"]), peak)
    return table(["", "iteration", *PHASES, "optimiser steps", "GiB"], list(lines.values()))


def _of_rollouts(content: dict[str, Any]) -> str:
    limits = [row["limit"] for row in content["rows"] if "peak" in row.get("limit", {})]
    peaks = {f"{row['dtype']} {row['limit']['peak']}" for row in content["rows"] if "peak" in row.get("limit", {})}
    about = f" (read at {limits[0]['gb_s']:.3g} GB/s; peak by {', '.join(sorted(peaks))})" if limits else ""
    pages = " Everybody's large tensors lie in huge pages." if content["huge_pages"] else ""
    return (
        f"Rollouts, the limit of a step being its roofline{about}.{pages} A step is the time of a whole rollout, "
        "prompts and packing of the weights included, divided by its tokens; `step alone` is without those, "
        "`repacking` is packing the weights once. Packed weights are counted in the MiB. Every response gets the "
        f"tokens that it was told, and `transformers, sorted` knew them beforehand. {_who(content['peers'])}"
    )


def _who(peers: dict[str, dict[str, str]]) -> str:
    others = {name: state for name, state in peers.items() if name not in (records.OURS, "eager", "torch.compile")}
    here = [f"{name} {state['version']}" for name, state in others.items() if "version" in state]
    missing = [f"{name} ({state['missing']})" for name, state in others.items() if "missing" in state]
    return "".join(
        f"{title}: {', '.join(names)}. " for title, names in (("Peers", here), ("Not measured", missing)) if names
    ).rstrip()


def family(content: dict[str, Any]) -> str:
    """Ours in milliseconds and in units of the limit; every peer in units of ours. Missed targets in brackets."""
    everyone = dict.fromkeys([*content["peers"], *(name for row in content["rows"] for name in row["results"])])
    names = [name for name in everyone if any(_ran(row, name) for row in content["rows"]) and name != records.OURS]
    rates = ["tokens/s"] if any("tokens" in row for row in content["rows"]) else []
    lines = []
    for row in content["rows"]:
        ours = row["results"][records.OURS]
        targets = records.reached(row)
        cells = [report.time(ours["median_ms"]) if "median_ms" in ours else "failed"]
        if rates:
            there = "tokens" in row and "median_ms" in ours
            cells.append(f"{report.tokens_per_second(row, ours):.0f}" if there else "")
        cells.append(_ratio(records.ratio_to_limit(row), targets.get("limit")))
        cells += [_ratio(records.ratio_to_ours(row, name), targets.get(name)) for name in names]
        cells.append(_ratio(ours.get("extra_mib"), targets.get("extra_mib"), ""))
        lines.append((f"{row['work']}, {row['shape']}, {row['dtype']}", *cells))
    return table(["", "ours", *rates, "limit", *names, "MiB extra"], lines)


def calls(content: dict[str, Any]) -> str:
    """Microseconds a call, without autograd and with the backward pass; eager and torch.compile in units of ours."""
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    names = ("eager", "torch.compile")
    head = ["", "ours", *names, "ours, with backward", *names]
    lines = []
    for op, measured in by_op.items():
        cells = []
        for row in measured:
            ours, targets = row["results"][records.OURS], records.reached(row)
            us = 1e3 * ours["median_ms"] if "median_ms" in ours else None
            cells.append(_ratio(us, targets.get("us"), " µs"))
            cells += [_ratio(records.ratio_to_ours(row, name), targets.get(name)) for name in names]
        lines.append((f"`{op}`", *cells, *[""] * (len(head) - 1 - len(cells))))
    return table(head, lines)


def errors(content: dict[str, Any]) -> str:
    measured = {name for row in content["rows"] for name, found in row["results"].items() if "log_prob" in found}
    names = [name for name in content["peers"] if name in measured]
    lines = []
    for row in content["rows"]:
        found = [row["results"].get(name, {}) for name in names]
        cells = (" / ".join(f"{x[result]:.0e}" for result in accuracy.RESULTS if result in x) for x in found)
        start = "hidden states, " if row.get("op") == accuracy.LINEAR else ""
        lines.append((f"{start}{row['dtype']}, logits × {row['scale']}", *cells))
    return table(["", *names], lines)


def compat_tables(folder: Path) -> str:
    """For each device: the frameworks' functions and trainers, with ours in their place and as they are."""
    parts = []
    for path in sorted(folder.glob("*/compat.json")):
        content = records.read(path)
        parts.append(f"**{content['device']}** ({content['threads']} threads), torch {content['torch']}:")
        if not content["complete"]:
            parts.append("Stopped before the last row.")
        calls = [row for row in content["rows"] if "largest_difference" not in row["results"][records.OURS]]
        parts += [_swaps(calls), _trainings([row for row in content["rows"] if row not in calls])]
    return "\n\n".join(filter(None, parts)) or NOTHING


def _swaps(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        pair = [row["results"].get(name, {}) for name in (records.OURS, compat_training.THEIRS)]
        times = [report.time(x["median_ms"]) if "median_ms" in x else x.get("failed", "") for x in pair]
        ratio = _ratio(
            records.ratio_to_ours(row, compat_training.THEIRS), records.reached(row).get(compat_training.THEIRS)
        )
        memory = [f"{x['extra_mib']:.3g}" if "extra_mib" in x else "" for x in pair]
        lines.append((f"{row['work']}, {row['shape']}", *times, ratio, *memory))
    return table(["", "ours", "theirs", "theirs / ours", "MiB extra, ours", "theirs"], lines)


def _trainings(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        ours, theirs = (row["results"][name] for name in (records.OURS, compat_training.THEIRS))
        times = (report.time(x["median_ms"]) for x in (ours, theirs))
        target = records.reached(row).get(compat_training.THEIRS)
        ratio = _ratio(records.ratio_to_ours(row, compat_training.THEIRS), target)
        memory = (f"{x['peak_mib']:.0f}" for x in (ours, theirs))
        lines.append((f"{row['work']}, {row['shape']}", *times, ratio, *memory, f"{ours['largest_difference']:.0e}"))
    return table(["", "patched", "unpatched", "ratio", "peak MiB, patched", "unpatched", "largest difference"], lines)


def table(head: list[str], lines: list[tuple[str, ...]]) -> str:
    rule = "|---|" + "--:|" * (len(head) - 1)
    return "\n".join([_line(head), rule, *map(_line, lines)])


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _ran(row: dict[str, Any], name: str) -> bool:
    return "median_ms" in row["results"].get(name, {})


def _ratio(x: float | None, target: tuple[float, float | None, bool | None] | None, unit: str = "×") -> str:
    if x is None:
        return ""
    missed = f" [{target[0]:g}]" if target is not None and target[2] is False else ""
    return f"{x:.3g}{unit}{missed}"


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """A page with what stands between its table markers made anew."""
    tables = {
        "demo table": demo_table,
        "compare table": compare_table,
        "performance tables": performance_tables,
        "compat tables": compat_tables,
    }
    for name in (name for name in tables if f"<!-- {name} -->" in text):
        body = tables[name](folder)
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}" if body else match[1] + match[2],
            text,
            flags=re.DOTALL,
        )
    return text


def main(argv: list[str]) -> int:
    stale = 0
    for page in (README, COMPAT_PAGE):
        text = page.read_text(encoding="utf-8")
        wanted = with_tables(text)
        if "--check" not in argv:
            page.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            print(f"{page.relative_to(ROOT)} does not show the committed results; run python -m fastrlhf.bench.readme")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
