"""The report's pictures: drawn by matplotlib, as SVG that takes its colours and its font from the page."""

import io
import math
import re
import textwrap
import warnings
from html import escape
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 350  # px, at which letters have their size: a phone shows it unscaled
SIZE = 12  # px of the smallest letter
LINE = 15  # px from line to line
BUCKETS = 120
SERIES = 6  # colours of lines and bars
# Colours that matplotlib draws with stand for the page's variables.
_LEFT_OUT = r"^.*?<svg.*?>|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->| id=\"[\w.]+_\d+\"| font-family: [^;]*;"
_VARIABLES = ("ink", "paper", "soft", "rule", "faint", *(f"line{number}" for number in range(SERIES)))
COLOUR = {name: f"#0102{number:02d}" for number, name in enumerate(_VARIABLES, 10)}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "qilin-med", "text.parse_math": False, "font.size": SIZE,
    "text.color": COLOUR["ink"], "axes.edgecolor": COLOUR["rule"], "axes.labelcolor": COLOUR["soft"],
    "xtick.color": COLOUR["soft"], "ytick.color": COLOUR["soft"], "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "grid.color": COLOUR["faint"], "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none",
    "legend.frameon": False, "legend.handlelength": 1, "legend.loc": "lower center",
}  # fmt: skip
style = matplotlib.rc_context(STYLE)

Row = dict[str, Any]
Line = list[tuple[float, float, float, float]]
"""(step, mean, lowest, highest) of a few neighbouring optimizer steps."""
CURVES = {
    "Loss, nats per token": ["loss"], "Loss, nats per pair": ["pair loss"], "Gradient norm": ["grad_norm"],
    "Rewards": ["rewards/chosen", "rewards/rejected"], "Reward margin, chosen minus rejected": ["rewards/margin"],
    "Reward accuracy, share of pairs": ["rewards/accuracy"], "Tokens per second": ["speed"],
    "Learning rate": ["learning_rate"],
}  # fmt: skip
_SMALL = ("Tokens per second", "Learning rate")


class Dot(NamedTuple):
    """A score with its interval; `note` stands below its value. `series`: of which colour, None for a published one."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    series: int | None = 0


@style
def draw_scores(dots: list[Dot], unit: str, places: int = 1) -> Markup:
    """A row for each dot, its interval and its value; a line joins the dots of the first series."""
    labels, values = [_folded(dot.label) for dot in dots], [f"{dot.value:,.{places}f}" for dot in dots]
    beside = _width([*values, *("+10.0, p < 0.0001" for dot in dots if dot.note)])
    lines = max(1 + any(dot.note for dot in dots), *(label.count("\n") + 1 for label in labels))
    axes = _panel(len(dots) * (lines * LINE + 7), _width(labels), beside)
    right = 1 + 10 / (WIDTH * axes.get_position().width)
    for y, (dot, value) in enumerate(zip(dots, values, strict=True)):
        colour = COLOUR["soft" if dot.series is None else f"line{dot.series % SERIES}"]
        inside = COLOUR["paper"] if dot.series is None else colour
        span = [[dot.value - dot.low], [dot.high - dot.value]]
        axes.errorbar(dot.value, y, xerr=span, fmt="o", color=colour, markerfacecolor=inside, markersize=8, linewidth=2)
        at = {"x": right, "y": y, "transform": axes.get_yaxis_transform()}
        axes.text(s=value, va="bottom" if dot.note else "center", weight="bold", **at)
        axes.text(s=dot.note, va="top", color=COLOUR["soft"], **at)
    path = [(dot.value, y) for y, dot in enumerate(dots) if dot.series == 0]
    axes.plot([x for x, _ in path], [y for _, y in path], color=COLOUR["rule"], linewidth=1, zorder=1)
    axes.margins(x=0.08)
    if max(dot.value for dot in dots) > 100:  # perplexities; all else is a share
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,g}")
    words = (f"{dot.label} {value} {dot.note}".strip() for dot, value in zip(dots, values, strict=True))
    return _svg(_with_rows(axes, labels), unit, "; ".join(words))


@style
def draw_bars(table: list[Row]) -> Markup:
    """Of each row of a table of scores, a bar for each model; its first two columns name the row and count questions."""
    name, _, *models = table[0]
    labels, thick = [_folded(row[name]) for row in table], 0.84 / len(models)
    height = max(len(models) * 9 + 8, max(label.count("\n") + 1 for label in labels) * LINE + 4)
    axes = _panel(len(table) * height, _width(labels), 16, below=46 + LINE * math.ceil(len(models) / 2))
    for number, model in enumerate(models):
        places = [y + (number - (len(models) - 1) / 2) * thick for y in range(len(table))]
        shares = [float(row.get(model, "0").split()[0]) for row in table]
        axes.barh(places, shares, thick, color=COLOUR[f"line{number % SERIES}"], label=model)
    axes.set_xlim(0, 100)
    axes.figure.legend(ncols=2)
    return _svg(_with_rows(axes, labels), "% right", ", ".join(models))


@style
def draw_reliability(bins: list[dict[str, float]]) -> Markup:
    """Share of right answers over confidence; a model that knows how sure it may be lies on the diagonal."""
    axes, most = _panel(180, 44, 16), max(part["questions"] for part in bins)
    axes.plot([0, 1], [0, 1], color=COLOUR["soft"], linewidth=1, linestyle="--")
    x, y = ([part[key] for part in bins] for key in ("confidence", "accuracy"))
    axes.plot(x, y, color=COLOUR["line0"], linewidth=1)
    axes.scatter(x, y, [12 + 120 * part["questions"] / most for part in bins], color=COLOUR["line0"])
    axes.set_ylabel("share right")
    return _svg(axes, "confidence", "; ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(x, y, strict=True)))


@style
def draw_curves(rows: list[Row]) -> list[tuple[str, Markup]]:
    """(title, SVG) for each thing that a stage logged: lines of means, over a band from the lowest to the highest step."""
    drawn = []
    for title, keys in CURVES.items():
        lines = {key.rpartition("/")[2]: line for key in keys if (line := gather(rows, key))}
        if not lines:
            continue
        axes, words = _panel(70 if title in _SMALL else 160, 56, 16, below=40 + LINE * (len(lines) > 1)), []
        for number, (name, line) in enumerate(lines.items()):
            steps, means, lows, highs = zip(*line, strict=True)
            axes.fill_between(steps, lows, highs, color=COLOUR[f"line{number}"], alpha=0.18, linewidth=0)
            axes.plot(steps, means, color=COLOUR[f"line{number}"], linewidth=1.5, label=name)
            words.append(f"{name} from {means[0]:.4g} to {means[-1]:.4g}")
        axes.locator_params(axis="y", nbins=3 if title in _SMALL else 5)
        axes.locator_params(axis="x", nbins=5)
        axes.yaxis.set_major_formatter("{x:,.4g}")
        if len(lines) > 1:
            axes.figure.legend(ncols=2)
        drawn.append((title, _svg(axes, "optimizer step", "; ".join(words))))
    return drawn


def gather(rows: list[Row], key: str) -> Line:
    """At most BUCKETS points, each of the same number of neighbouring steps."""
    if key == "speed":
        rows = [row | {"speed": row["tokens"] / row["seconds"]} for row in rows if row.get("seconds")]
    elif key == "pair loss" or (key == "loss" and any("rewards/margin" in row for row in rows)):
        rows = [{"step": row["step"], "pair loss": row["loss"]} for row in rows if "rewards/margin" in row]
    pairs = [(row["step"], float(row[key])) for row in rows if math.isfinite(row.get(key, math.nan))]
    size, line = math.ceil(len(pairs) / BUCKETS) or 1, []
    for start in range(0, len(pairs), size):
        steps, values = zip(*pairs[start : start + size], strict=True)
        line.append((sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)))
    return line


def _with_rows(axes: Axes, labels: list[str]) -> Axes:
    """A row for each label, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return axes


def _panel(height: float, left: float, right: float, below: float = 38) -> Axes:
    """Axes of this height, with so many pixels around them."""
    whole = height + below + 6
    figure = Figure(figsize=(WIDTH / 72, whole / 72))
    return figure.add_axes((left / WIDTH, below / whole, (WIDTH - left - right) / WIDTH, height / whole))


def _folded(label: str) -> str:
    return textwrap.fill(label, 15 if label.isascii() else 9)


def _width(labels: list[str]) -> float:
    """Pixels that the longest line takes; a Chinese character has twice the width of a Latin one."""
    lines = [line for label in labels for line in label.split("\n")]
    return 14 + max(sum(SIZE if ord(letter) > 0x2E7F else SIZE * 0.59 for letter in line) for line in lines)


def _svg(axes: Axes, label: str, words: str) -> Markup:
    """The picture on one line of HTML, alike whenever it is drawn."""
    axes.set_xlabel(label)
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Chinese letters, which the page's font has
        axes.figure.savefig(out, format="svg", metadata={"Date": None})
    drawn = re.sub(_LEFT_OUT, "", out.getvalue(), flags=re.DOTALL)
    drawn = re.sub(r"#0102(\d\d)", lambda match: f"var(--{_VARIABLES[int(match[1]) - 10]})", drawn)
    width, height = (round(72 * inches) for inches in axes.figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(" ".join(words.split()))}">'
    return Markup(head + " ".join(drawn.split()))
