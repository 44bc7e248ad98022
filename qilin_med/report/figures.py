"""Numbers as they are printed: percent and points, intervals, p-values."""

from typing import Any

_PLACES = {"perplexity": 2, "answer loss": 3, "preference accuracy": 3}
CHANCE = 0.05  # p-values from here on are called chance


def points(metric: str, value: float) -> float:
    """On a scale to 100: BLEU and ROUGE are so already, shares are not."""
    return value if metric.startswith(("bleu", "rouge")) else 100 * value


def score(metric: str, measured: dict[str, float] | None, interval: bool = True) -> str:
    """ "49.5 [44.9, 54.2]", or "" if it was not measured."""
    if measured is None:
        return ""
    value, low, high = (points(metric, measured[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]" if interval else f"{value:.1f}"


def held_out(name: str, measured: dict[str, Any] | None) -> str:
    """ "0.917 ± 0.021" (standard error), or "" if it was not measured."""
    if measured is None:
        return ""
    places = next(places for prefix, places in _PLACES.items() if name.startswith(prefix))
    error = f" ± {measured['standard_error']:.{places}f}" if "standard_error" in measured else ""
    return f"{measured['value']:,.{places}f}{error}"


def is_better(name: str, before: float, after: float) -> bool:
    """Held-out losses are better when lower, accuracies when higher."""
    return after > before if "accuracy" in name else after < before


def probability(test: dict[str, Any]) -> str:
    """ "McNemar p = 0.0004"."""
    p = test["p"]
    return f"{test['test'].split(',')[0]} " + ("p < 0.0001" if p < 0.0001 else f"p = {p:.2g}")


def may_be_chance(test: dict[str, Any]) -> bool:
    return test["p"] >= CHANCE
