"""Results as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fastrlhf.bench import accuracy, records

FACTS = {
    "packed_mib": "MiB of packed weights",
    "kv_mib": "MiB of KV cache",
    "kernels_a_step": "kernels a step",
    "launches_a_step": "launches a step",
    "rollout_s": "s of rollout",
    "reward_s": "s of reward",
    "reference_s": "s of reference",
    "update_s": "s of update",
    "cpu_s": "s of all threads",
    "peak_mib": "MiB at the peak",
}


def of_row(row: dict[str, Any]) -> Table:
    """All contenders of one row; below it, who cannot take part and why."""
    cannot = "; ".join(f"{name}: {result['cannot']}" for name, result in row["results"].items() if "cannot" in result)
    table = Table(title=f"{row['work']}, {row['shape']}, {row['dtype']}", title_justify="left", caption=cannot or None)
    for column in ("", "median", "min to max", "n", "× limit", "× ours", "MiB extra", "remarks"):
        table.add_column(column, justify="left" if column in ("", "remarks") else "right")
    limit = row.get("limit", {})
    if "median_ms" in limit:
        spread = _spread(limit) if "min_ms" in limit else ""
        what = limit["what"]
        if "peak" in limit:
            what += f" ({limit['gb_s']:.3g} GB/s; {limit['gflop_s']:.4g} GFLOP/s of {limit['peak']})"
        table.add_row("limit", time(limit["median_ms"]), spread, "", "1.00", "", "", what)
    for name, result in row["results"].items():
        if "failed" in result:
            table.add_row(name, *[""] * 6, f"failed: {result['failed']}", style="red")
        if "median_ms" not in result:
            continue
        table.add_row(
            name,
            time(result["median_ms"]),
            _spread(result),
            str(result["repetitions"]),
            _number(records.ratio_to_limit(row, name)),
            _number(records.ratio_to_ours(row, name)),
            f"{result['extra_mib']:.1f}" if "extra_mib" in result else "",
            ", ".join([*filter(None, [result.get("note")]), *_rates(row, name, result)]),
        )
    return table


def of_targets(rows: list[dict[str, Any]]) -> Table:
    """Every target, what was measured, and whether that is good enough."""
    table = Table(title="Targets, written down before measuring")
    for column in ("work", "size", "target", "measured", ""):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for row in rows:
        for key, (wanted, measured, good) in records.reached(row).items():
            sign = "≤" if key in records.AT_MOST else "≥"
            unit = "×" if key in ("limit", records.REPACKING) or key not in records.AT_MOST else ""
            what = {"limit": "limit", "extra_mib": "MiB extra"}.get(key, key)
            verdict = {True: "reached", False: "[red]missed[/red]", None: "[dim]not measured[/dim]"}[good]
            size = f"{row['shape']} {row['dtype']}"
            table.add_row(row["work"], size, f"{sign} {wanted:g}{unit} {what}", _number(measured), verdict)
    return table


def of_accuracy(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Largest error against fp64")
    for column in ("from", "dtype", "logits ×", "", *accuracy.RESULTS):
        table.add_column(column.replace("_", "-"))
    for row in rows:
        for name, errors in row["results"].items():
            cells = [f"{errors[result]:.1e}" if result in errors else "" for result in accuracy.RESULTS]
            if any(cells):
                start = "hidden states" if row["op"] == accuracy.LINEAR else "logits"
                table.add_row(start, row["dtype"], str(row["scale"]), name, *cells)
    return table


def time(ms: float) -> str:
    """Three digits, in the unit that suits."""
    for factor, unit in ((1e-3, "s"), (1.0, "ms"), (1e3, "µs")):
        if ms * factor >= 1 or unit == "µs":
            return f"{ms * factor:.3g} {unit}"
    raise AssertionError


def tokens_per_second(row: dict[str, Any], result: dict[str, Any]) -> float:
    return 1e3 * row["tokens"] / result["median_ms"]


def _spread(result: dict[str, float]) -> str:
    return f"{time(result['min_ms'])} to {time(result['max_ms'])}"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _rates(row: dict[str, Any], name: str, result: dict[str, Any]) -> list[str]:
    parts = []
    if "tokens" in row and name != records.REPACKING:
        parts.append(f"{tokens_per_second(row, result):.0f} tokens/s")
    parts += [f"{result[key]:.4g} {title}" for key, title in FACTS.items() if key in result]
    if "launches" in result:
        parts.append(f"{result['launches']} launches, {result['device_us']:.3g} µs on the device")
    limit = row.get("limit", {})
    if "flops" in limit and "bytes" not in limit:
        rate = limit["flops"] / result["median_ms"] / 1e6
        parts.append(f"{rate:.3g} GFLOP/s" if rate < 1000 else f"{rate / 1000:.3g} TFLOP/s")
    if limit.get("from") == "copy bandwidth":
        rate = limit["bytes"] / result["median_ms"] / 1e6
        parts.append(f"{rate:.0f} GB/s, {limit['median_ms'] / result['median_ms']:.0%} of the copy bandwidth")
    return parts
