"""report.md of a run: what was measured on base and stages, and what made them."""

import json
import time
from pathlib import Path
from typing import Any

from qilin_med.checkpoints import read_manifest
from qilin_med.config import STAGES, Experiment
from qilin_med.errors import UserError
from qilin_med.results import model_folders, read_results

_PLACES = {"perplexity": 2, "answer loss": 3, "preference accuracy": 3}
_SCRIPTS = {"pretraining": "run_pt.sh", "sft": "run_sft.sh", "dpo": "run_dpo.sh"}


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: one row per model, one column per measure."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["measures"]))
    header = ["model", *names]
    rows = [
        [model, *(_cell(name, result["measures"].get(name)) for name in names)] for model, result in results.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _cell(name: str, measure: dict[str, Any] | None) -> str:
    if measure is None:
        return "-"
    places = next(p for prefix, p in _PLACES.items() if name.startswith(prefix))
    error = f" ± {measure['standard_error']:.{places}f}" if "standard_error" in measure else ""
    return f"{measure['value']:.{places}f}{error}"


def write_report(experiment: Experiment, config: str, overrides: list[str]) -> Path:
    """Write runs/<name>/report.md from the result files and manifests; UserError if nothing was evaluated."""
    results = read_results(experiment)
    if not results:
        raise UserError(f"{experiment.output_dir}: no results; run scripts/evaluate.py first")
    manifests = {
        name: read_manifest(folder)
        for name, folder in model_folders(experiment).items()
        if name in STAGES and folder.is_dir()
    }
    sections = [
        f"# {experiment.name}",
        f"Written {time.strftime('%Y-%m-%d %H:%M %z')} from the files of this folder.",
        "## Held-out measures",
        format_table(results),
        "Perplexity: exp of the mean loss over all tokens of held-out text. Answer loss: mean loss, in nats a token, on"
        " held-out answers given their questions. Preference accuracy: share of held-out pairs whose chosen answer is the"
        " likelier one, with its standard error.",
        *(_describe_stage(name, manifest) for name, manifest in manifests.items()),
        "## Again",
        "```bash\n" + "\n".join(_commands(manifests, config, overrides)) + "\n```",
        "## Settings",
        "```json\n" + json.dumps(experiment.model_dump(mode="json"), ensure_ascii=False, indent=2) + "\n```",
    ]
    path = Path(experiment.output_dir) / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _describe_stage(name: str, manifest: dict[str, Any]) -> str:
    counts, final = manifest["data"]["counts"], manifest["final_metrics"] or {}
    set_aside = "; ".join(f"{number} {reason}" for reason, number in counts["set_aside"].items()) or "none"
    numbers = {k: v for k, v in final.items() if k == "loss" or k.startswith(("rewards/", "logps/"))}
    lines = [
        f"## {name}",
        f"- data: {counts['records']:,} records read, {counts['used']:,} used; set aside: {set_aside}",
        f"- rows: {counts['rows']:,} with {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained on",
        f"- training: {manifest['updates']:,} updates on {manifest['ranks']} ranks; at the last one "
        + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()),
        f"- from `{manifest['parent']['folder']}` (fingerprint {manifest['parent']['fingerprint'][:16]}), made"
        f" {manifest['created']}, fingerprint {manifest['fingerprint'][:16]}, code {manifest['commit']}",
        "- libraries: " + ", ".join(f"{library} {number}" for library, number in manifest["versions"].items()),
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _commands(stages: dict[str, Any], config: str, overrides: list[str]) -> list[str]:
    extra = "".join(f" '{override}'" for override in overrides)
    return [
        *(f"CONFIG={config} bash {_SCRIPTS[stage]}{extra}" for stage in stages),
        f".venv/bin/python scripts/evaluate.py --config {config}{extra}",
        f".venv/bin/python scripts/report.py --config {config}{extra}",
    ]
