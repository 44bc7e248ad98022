"""Several runs in one report: paired tests between them (ablations), and the spread over seeds."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from qilin_med.artifact import differences as changes_between
from qilin_med.config.experiment import STAGES, load_experiment
from qilin_med.errors import UserError
from qilin_med.evaluate.comparison import compare_samples
from qilin_med.evaluate.results import result_folder
from qilin_med.report.collect import Result, Run, collect_run
from qilin_med.report.figures import Dot
from qilin_med.report.pages import write_pages
from qilin_med.report.tables import UNITS, Panel, Table, notes, points, probability, score, step_of

Runs = dict[str, Run]
"""By the name of their folders; the first is what the others are compared with."""


class Compared(NamedTuple):
    """One set of questions, answered by the same model of several runs."""

    results: dict[str, Result]
    """By run."""
    tests: dict[str, dict[str, Any]]
    """By run, its `compare_samples` against the first of `results`."""


def open_runs(paths: list[str]) -> Runs:
    """Of run folders or experiment files. UserError: a folder is no run's, or two have the same name."""
    runs: Runs = {}
    for path in map(Path, paths):
        file, overrides = (path / "config.json", [f"output_dir={path}"]) if path.is_dir() else (path, [])
        if not file.exists():
            raise UserError(f"{file}: not found; name run folders that hold a config.json, or experiment files")
        run = collect_run(load_experiment(file, overrides))
        if (name := Path(run.experiment.output_dir).name) in runs:
            raise UserError(f"{path}: a second run named {name}; the names of the run folders must differ")
        runs[name] = run
    return runs


def compare(runs: Runs) -> Iterator[Compared]:
    """Whatever at least two runs have, and was not made by one and the same model (the base of all)."""
    for name, label in dict.fromkeys((r.name, r.label) for run in runs.values() for r in run.results if r.headline):
        results = {n: r for n, run in runs.items() for r in run.results if (r.name, r.label) == (name, label)}
        if len({result.contents["model"]["fingerprint"] for result in results.values()}) < 2:
            continue
        folders = [result_folder(runs[n].experiment, r.model, r.name) for n, r in results.items()]
        averages = next(iter(results.values())).contents.get("questions", {}).get("averages", {})
        found = (compare_samples(folders[0], folder, averages) for folder in folders[1:])
        yield Compared(results, dict(zip(list(results)[1:], found, strict=True)))


def write_comparison(runs: Runs, folder: Path) -> Path:
    """Write report.html, report.md and the folder report/ into `folder`; returns the first. UserError: nothing in common."""
    compared, trained = list(compare(runs)), {name: _trained(run) for name, run in runs.items()}
    if not compared:
        raise UserError(
            f"{', '.join(runs)}: no set of questions that the same stage of two runs answered; evaluate them"
        )
    alike = {name: json.dumps(settings | {"seed": None}, sort_keys=True) for name, settings in trained.items()}
    groups = list(dict.fromkeys(alike.values()))
    first, *others = trained.values()
    contents = {
        "runs": list(runs), "now": time.strftime("%Y-%m-%d %H:%M %z"), "is_invented": any(r.is_invented for r in runs.values()),
        "panels": [_panel(c, {name: groups.index(key) for name, key in alike.items()}) for c in compared],
        "differences": [row for c in compared for row in _rows(c)],
        "seeds": [row for c in compared for key in groups for row in _spread(c, [n for n in alike if alike[n] == key])],
        "settings": [
            {"run": name, "setting": change.split(": ", 1)[0], "first -> this run": change.split(": ", 1)[1]}
            for name, settings in zip(list(runs)[1:], others, strict=True) for change in changes_between(first, settings)
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return write_pages("comparison.md.jinja", contents, folder)


def _trained(run: Run) -> dict[str, Any]:
    return {key: run.settings[key] for key in ("seed", "model", *STAGES)}


def _panel(compared: Compared, groups: dict[str, int]) -> Panel:
    dots, first = [], next(iter(compared.results.values()))
    for name, result in compared.results.items():
        measured = result.contents["metrics"][result.headline]
        scores = [points(result.headline, measured[key]) for key in ("value", "low", "high")]
        dots.append(Dot(name, *scores, step_of(compared.tests.get(name), result.headline, 1), 1 + groups[name]))
    said = [f"{name}: {note}" for name, result in compared.results.items() for note in notes([result])]
    return Panel(f"{first.title}, {first.label}", first.origin, UNITS[first.headline], 1, dots, said)


def _rows(compared: Compared) -> Table:
    table = []
    for name, result in compared.results.items():
        cells = {"set": result.title, "model": result.label, "run": name, "questions": result.questions,
                 "score": score(result.headline, result.contents["metrics"])}  # fmt: skip
        if test := compared.tests.get(name, {"metrics": {}})["metrics"].get(result.headline):
            cells |= {"difference": f"{points(result.headline, test['difference']):+.1f}", "p": probability(test),
                      "gained / lost": f"{test['gained']} / {test['lost']}" if "gained" in test else "",
                      "questions in common": compared.tests[name]["questions"]}  # fmt: skip
        table.append(cells)
    return table


def _spread(compared: Compared, names: list[str]) -> Table:
    """A row for runs that differ in their seeds alone; nothing for one alone."""
    results = [compared.results[name] for name in names if name in compared.results]
    values = [points(r.headline, r.contents["metrics"][r.headline]["value"]) for r in results]
    if len(values) < 2:
        return []
    spread = {"mean": mean(values), "standard deviation": stdev(values), "lowest": min(values), "highest": max(values)}
    row = {"set": results[0].title, "model": results[0].label, "runs": ", ".join(names), "seeds": len(values)}
    return [row | {name: f"{value:.1f}" for name, value in spread.items()}]
