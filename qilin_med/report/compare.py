"""Several runs in one report: paired tests between them (ablations), and the spread over seeds."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

from qilin_med.artifact import differences as changes_between
from qilin_med.config.experiment import STAGES, load_experiment
from qilin_med.errors import UserError
from qilin_med.evaluate.comparison import averages_of, compare_samples
from qilin_med.evaluate.results import result_folder
from qilin_med.report.collect import Run, collect_run
from qilin_med.report.figures import Dot
from qilin_med.report.pages import write_pages
from qilin_med.report.tables import UNITS, Panel, Table, asides, pivot, points, score_table, step_of

Runs = dict[str, Run]
"""By the name of their folders; the first is what the others are compared with."""


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


def write_comparison(runs: Runs, folder: Path) -> Path:
    """Write report.html, report.md and the folder report/ into `folder`; returns the first. UserError: nothing in common."""
    trained = {name: {key: run.settings[key] for key in ("seed", "model", *STAGES)} for name, run in runs.items()}
    alike = {name: json.dumps(settings | {"seed": None}, sort_keys=True) for name, settings in trained.items()}
    groups = list(dict.fromkeys(alike.values()))
    panels = list(compare(runs, {name: 1 + groups.index(key) for name, key in alike.items()}))
    if not panels:
        raise UserError(
            f"{', '.join(runs)}: no set of questions that the same stage of two runs answered; evaluate them"
        )
    first, changes = next(iter(trained.values())), []
    for name, settings in trained.items():
        old, new = dict(first), dict(settings)
        for stage in [stage for stage in STAGES if not (old[stage] and new[stage])]:
            old[stage], new[stage] = ("trained" if side[stage] else "left out" for side in (old, new))
        changes += [(name, *change.split(": ", 1)) for change in changes_between(old, new)]
    scores = [(column, row["model"], row[column]) for row in score_table(panels) for column in list(row)[1:]]
    contents = {
        "runs": list(runs), "now": time.strftime("%Y-%m-%d %H:%M %z"), "panels": panels,
        "is_invented": any(run.is_invented for run in runs.values()),
        "scores": pivot("set and model", scores),
        "tests": pivot("set and model", ((panel.title, dot.label, dot.note) for panel in panels for dot in panel.dots[1:])),
        "seeds": [row for panel in panels for row in spread(panel)],
        "settings": [{"run": name, "setting": key, "first -> this run": values} for name, key, values in changes],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return write_pages("comparison.md.jinja", contents, folder)


def compare(runs: Runs, series: dict[str, int]) -> Iterator[Panel]:
    """A picture of whatever at least two runs have, and was not made by one and the same model (the base of all)."""
    for name, label in dict.fromkeys((r.name, r.label) for run in runs.values() for r in run.results if r.headline):
        results = {n: r for n, run in runs.items() for r in run.results if (r.name, r.label) == (name, label)}
        if len({result.contents["model"]["fingerprint"] for result in results.values()}) < 2:
            continue
        folders = [result_folder(runs[n].experiment, r.model, r.name) for n, r in results.items()]
        first, dots, said = next(iter(results.values())), [], []
        for (run, result), folder in zip(results.items(), folders, strict=True):
            test = compare_samples(folders[0], folder, averages_of(first.contents)) if result is not first else None
            measured = result.contents["metrics"][result.headline]
            scores = [points(result.headline, measured[key]) for key in ("value", "low", "high")]
            dots.append(Dot(run, *scores, step_of(test, result.headline, 1), series[run]))
            if test and test["questions"] < result.questions:
                said.append(f"{run}: compared on {test['questions']:,} questions that the first run was asked, too")
            said += [f"{run}: {note}" for note in asides(result.contents["counts"])]
        words = f"{first.questions:,} questions; {first.origin}"
        yield Panel(f"{first.title}, {first.label}", words, UNITS[first.headline], 1, dots, said)


def spread(panel: Panel) -> Table:
    """A row for each group of runs that differ in their seeds alone."""
    table = []
    for series in dict.fromkeys(dot.series for dot in panel.dots):
        dots = [dot for dot in panel.dots if dot.series == series]
        values = [dot.value for dot in dots]
        if len(values) > 1:
            found = {
                "mean": mean(values),
                "standard deviation": stdev(values),
                "lowest": min(values),
                "highest": max(values),
            }
            row = {"set and model": panel.title, "runs": ", ".join(dot.label for dot in dots), "seeds": len(dots)}
            table.append(row | {name: f"{value:.1f}" for name, value in found.items()})
    return table
