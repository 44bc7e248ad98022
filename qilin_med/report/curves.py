"""Training curves from metrics.jsonl, drawn as SVG that takes its colours from the page."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

from qilin_med.report.document import Figure

Row = dict[str, Any]
Line = list[tuple[float, float, float, float]]
"""(step, mean, lowest, highest) of a few neighbouring updates."""

BUCKETS = 120
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 10, 8, 34

PANELS: list[tuple[str, str, dict[str, Callable[[Row], float | None]]]] = [
    ("Loss", "nats a token", {"": lambda row: None if "rewards/margin" in row else row.get("loss")}),
    ("Loss", "nats a pair", {"": lambda row: row.get("loss") if "rewards/margin" in row else None}),
    ("Learning rate", "", {"": lambda row: row.get("learning_rate")}),
    ("Throughput", "tokens a second", {"": lambda row: row["tokens"] / row["seconds"] if row.get("seconds") else None}),
    (
        "Rewards",
        "",
        {"chosen": lambda row: row.get("rewards/chosen"), "rejected": lambda row: row.get("rewards/rejected")},
    ),
    ("Reward margin", "chosen minus rejected", {"": lambda row: row.get("rewards/margin")}),
    ("Reward accuracy", "share of pairs", {"": lambda row: row.get("rewards/accuracy")}),
]


def draw_curves(rows: list[Row]) -> list[Figure]:
    """A figure for each thing that a stage logged."""
    figures = []
    for title, unit, read in PANELS:
        lines = {name: line for name, value in read.items() if (line := gather(rows, value))}
        if lines:
            named = f"{title}, {unit}" if unit else title
            said = "; ".join(" ".join(filter(None, (name, _describe(line)))) for name, line in lines.items())
            figures.append(Figure(named, draw(lines, named), said))
    return figures


def gather(rows: list[Row], value: Callable[[Row], float | None]) -> Line:
    """At most BUCKETS points, each of neighbouring updates alike many."""
    pairs = [(row["step"], float(v)) for row in rows if (v := value(row)) is not None and math.isfinite(v)]
    size = math.ceil(len(pairs) / BUCKETS)
    buckets = [pairs[start : start + size] for start in range(0, len(pairs), size or 1)]
    return [_point([step for step, _ in b], [v for _, v in b]) for b in buckets]


def _point(steps: list[int], values: list[float]) -> tuple[float, float, float, float]:
    return sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)


def _describe(line: Line) -> str:
    first, last = line[0][1], line[-1][1]
    lowest, highest = min(point[2] for point in line), max(point[3] for point in line)
    return f"from {first:.4g} to {last:.4g} (lowest {lowest:.4g}, highest {highest:.4g})"


def draw(lines: dict[str, Line], title: str) -> str:
    """One panel: a line of means for each name, over a band from the lowest to the highest update."""
    ends = [line[0][0] for line in lines.values()] + [line[-1][0] for line in lines.values()]
    values = [value for line in lines.values() for point in line for value in point[1:]]
    x, y = _scale(min(ends), max(ends), LEFT, WIDTH - RIGHT), _scale(*_limits(values), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(*_limits(values)):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{_label(tick)}</text>')
    for tick in (tick for tick in ticks(min(ends), max(ends)) if tick >= min(ends)):
        parts.append(f'<text class="middle" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{_label(tick)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">update</text>')
    for number, (name, line) in enumerate(lines.items()):
        up = " ".join(f"{x(step):.1f},{y(high):.1f}" for step, _, _, high in line)
        down = " ".join(f"{x(step):.1f},{y(low):.1f}" for step, _, low, _ in reversed(line))
        means = " ".join(f"{x(step):.1f},{y(mean):.1f}" for step, mean, _, _ in line)
        parts.append(f'<polygon class="band line{number}" points="{up} {down}"/>')
        parts.append(f'<polyline class="line{number}" points="{means}"/>')
        if name:
            place = LEFT + 4 + 70 * number
            parts.append(f'<path class="line{number}" d="M{place} {HEIGHT - 7}h14"/>')
            parts.append(f'<text x="{place + 18}" y="{HEIGHT - 3}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _limits(values: list[float]) -> tuple[float, float]:
    """Of an axis: from 0 where all values are positive, so that changes look as large as they are."""
    low, high = min([0.0, *values]), max([0.0, *values])
    return (low, high) if high > low else (0.0, 1.0)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
