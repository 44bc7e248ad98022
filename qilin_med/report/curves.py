"""Training curves from metrics.jsonl, drawn as SVG that takes its colours from the page."""

import math
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from markupsafe import Markup

Row = dict[str, Any]
Line = list[tuple[float, float, float, float]]
"""(step, mean, lowest, highest) of a few neighbouring optimizer steps."""

BUCKETS = 120
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 350, 8, 176
PANELS: dict[str, dict[str, Callable[[Row], float | None]]] = {
    "Loss, nats per token": {"": lambda row: None if "rewards/margin" in row else row.get("loss")},
    "Loss, nats per pair": {"": lambda row: row.get("loss") if "rewards/margin" in row else None},
    "Learning rate": {"": lambda row: row.get("learning_rate")},
    "Throughput, tokens per second": {"": lambda row: row["tokens"] / row["seconds"] if row.get("seconds") else None},
    "Rewards": {
        "chosen": lambda row: row.get("rewards/chosen"),
        "rejected": lambda row: row.get("rewards/rejected"),
    },
    "Reward margin, chosen minus rejected": {"": lambda row: row.get("rewards/margin")},
    "Reward accuracy, share of pairs": {"": lambda row: row.get("rewards/accuracy")},
}


def draw_curves(rows: list[Row]) -> Iterator[tuple[str, Markup, str]]:
    """(title, SVG, the picture in words) for each thing that a stage logged."""
    for title, read in PANELS.items():
        lines, words = {name: line for name, value in read.items() if (line := gather(rows, value))}, []
        for name, line in lines.items():
            _, means, lows, highs = zip(*line, strict=True)
            bounds = f"(lowest {min(lows):.4g}, highest {max(highs):.4g})"
            words.append(f"{name} from {means[0]:.4g} to {means[-1]:.4g} {bounds}".strip())
        if lines:
            yield title, _draw(title, lines), "; ".join(words)


def gather(rows: list[Row], value: Callable[[Row], float | None]) -> Line:
    """At most BUCKETS points, each of the same number of neighbouring steps."""
    pairs = [(row["step"], float(v)) for row in rows if (v := value(row)) is not None and math.isfinite(v)]
    size, line = math.ceil(len(pairs) / BUCKETS) or 1, []
    for start in range(0, len(pairs), size):
        steps, values = zip(*pairs[start : start + size], strict=True)
        line.append((sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)))
    return line


def _draw(title: str, lines: dict[str, Line]) -> Markup:
    """A line of means for each name, over a band from the lowest to the highest step."""
    steps, _, lows, highs = zip(*(point for line in lines.values() for point in line), strict=True)
    # From 0 where all values are positive, so that changes look as large as they are.
    first, last, low, high = min(steps), max(steps), min(0.0, *lows), max(0.0, *highs)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first or 1) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low or 1) * (BOTTOM - TOP)

    def corners(points: list[tuple[float, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = []
    for tick in ticks(low, high if high > low else 1.0):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{_label(tick)}</text>')
    for tick in ticks(first, last):
        parts.append(f'<text class="middle" x="{x(tick):.1f}" y="{BOTTOM + 15}">{_label(tick)}</text>')
    parts.append(f'<text class="end" x="{RIGHT}" y="{HEIGHT - 3}">optimizer step</text>')
    for number, (name, line) in enumerate(lines.items()):
        band = [(step, high) for step, _, _, high in line] + [(step, low) for step, _, low, _ in reversed(line)]
        parts.append(f'<polygon class="band{number}" points="{corners(band)}"/>')
        parts.append(f'<polyline class="line{number}" points="{corners([point[:2] for point in line])}"/>')
        if name:
            place = LEFT + 4 + 70 * number
            parts.append(f'<path class="line{number}" d="M{place} {HEIGHT - 7}h14"/>')
            parts.append(f'<text x="{place + 18}" y="{HEIGHT - 3}">{escape(name)}</text>')
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return Markup("".join([frame, *parts, "</svg>"]))


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
