"""metrics.jsonl of a stage: one row an optimizer step, read back."""

import json
from pathlib import Path
from typing import Any

from qilin_med.config.schedule import Schedule


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl up to a line that a kill or a power cut left torn."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def trained_on(rows: list[dict[str, Any]], schedule: Schedule) -> dict[str, float] | None:
    """What all steps of a stage together trained on (`model.batches.COUNTED`), and how often they passed over its rows. None
    if a step's row is missing, or an earlier version wrote it."""
    if len(rows) != schedule.steps or any("samples" not in row for row in rows):
        return None
    sums = {name: sum(row[name] for row in rows) for name in ("samples", "tokens", "loss_tokens")}
    return {"optimizer_steps": schedule.steps, **sums, "epochs": sums["samples"] / schedule.rows}


def checkpoint_cost(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How often training waited for a checkpoint, for how many seconds, and which share of its time that was."""
    waits = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
    whole = sum(row["seconds"] for row in rows)
    return {"number": len(waits), "seconds": round(sum(waits), 1), "share": round(sum(waits) / (whole or 1), 4)}
