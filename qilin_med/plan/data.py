"""How much data a stage has: its prepared rows, else the built corpus, else what the user says."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qilin_med.artifact import read_manifest
from qilin_med.config.experiment import Experiment, PretrainingConfig, StageConfig, StageName
from qilin_med.data.read.readers import find_files
from qilin_med.data.rows import row_settings
from qilin_med.errors import UserError


@dataclass(frozen=True)
class Amount:
    rows: int
    """Blocks (pretraining), conversations (sft) or pairs (dpo)."""
    tokens: float
    """Without padding; a preference pair's question counts once."""
    trained: float
    """Tokens that a loss is taken on."""
    longest: int | None
    """Tokens of the longest sequence, None where no one has looked."""
    source: str
    """Where these figures are from."""


def row_shape(section: StageConfig) -> tuple[int, float]:
    """(tokens of the longest sequence, share of them that a loss is taken on)."""
    if isinstance(section, PretrainingConfig):
        return section.block_size, 1.0
    whole = section.max_source_length + section.max_target_length
    return whole, section.max_target_length / whole


def find_amount(experiment: Experiment, stage: StageName) -> Amount | None:
    """Of the newest rows that an earlier run prepared from these files with these settings; else of the built corpus,
    where that is all that the stage reads; else None."""
    section = experiment.stage(stage)
    with suppress(UserError):  # the data are elsewhere
        files = [(str(file), file.stat().st_size) for file, _ in find_files(section.data)]
        found = (Path(experiment.output_dir) / "cache").glob(f"{stage}-*/MANIFEST.json")
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(UserError):  # damaged, or of an earlier version: the stage will make these rows again
                manifest = read_manifest(path.parent)
                counts = manifest["counts"]
                # Held-out sets lie in the same cache.
                same_files = [(file["path"], file["bytes"]) for file in counts["files"]] == files
                if same_files and manifest["inputs"]["settings"] == row_settings(stage, section):
                    numbers = (counts[name] for name in ("rows", "tokens", "trained_tokens", "longest"))
                    return Amount(*numbers, f"prepared rows, {path.parent}")
    manifest = Path(section.data[0].path).parent / "manifest.json"
    if len(section.data) > 1 or not manifest.is_file():
        return None
    total = json.loads(manifest.read_text(encoding="utf-8"))["totals"].get(stage)
    if not total or not total["train"]:
        return None
    tokens = total["tokens"] * total["train"] / (total["train"] + total["dev"])
    rows = tokens / row_shape(section)[0] if stage == "pretraining" else total["train"]
    return replace(stated_amount(experiment, stage, rows, tokens), source=f"corpus, {manifest}; role marks left out")


def stated_amount(experiment: Experiment, stage: StageName, rows: float | None, tokens: float | None) -> Amount:
    """From a user's numbers; what is not said follows from rows that are full."""
    length, targets = row_shape(experiment.stage(stage))
    # A pair is a question with two answers; the question counts once.
    full = length * (1 + targets) if stage == "dpo" else length
    rows = rows or tokens / full
    tokens = tokens or rows * full
    scored = 2 * targets / (1 + targets) if stage == "dpo" else targets
    return Amount(math.ceil(rows), tokens, tokens * scored, None, "as stated")
