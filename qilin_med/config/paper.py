"""What the paper (arXiv:2310.09089) states and prints: its tables and its training settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import STAGES, StageName, flatten, load_experiment

Figures = tuple[str, str, str]
_PRINTED = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
CORPUS: dict[StageName, dict[str, tuple[str, Figures]]] = _PRINTED["corpus"]
"""Tables 1 to 3 by stage and data set: its type, and samples, tokens, MB as printed."""
SCORES: dict[str, tuple[str, list[dict[str, str]]]] = _PRINTED["scores"]
"""Tables 4 to 6 by how the names of our tasks begin: caption, and rows by column; a figure that is not printed is ""."""

BASE_MODEL = "baichuan-7b"  # name of the base model's folder
HUB_BASE_MODEL = "baichuan-inc/Baichuan-7B"
EXPERIMENT_FILE = Path(__file__).parents[2] / "configs/qilin_med_7b.json"
STATED: dict[str, Any] = _PRINTED["settings"]
"""Settings by key of the experiment file. `parent` null: each stage starts from the one before it. A global batch is the
paper's batch per GPU times its GPUs: 8 A100s for the first two stages, 4 RTX 3090s for DPO."""

# What a run is called, reads and writes, how it is watched and how memory is spared are no part of the method; nor is how
# an optimizer step is divided among GPUs and laid out in memory, as long as it has the same number of samples.
_NOT_COMPARED = {
    "name", "output_dir", "evaluation", "data", "processes", "threads_per_process", "activation_checkpointing",
    "checkpoint_minutes", "checkpoint_every", "keep_checkpoints", "report_to", "fused_kernels", "attention", "corpus",
    "index", "decontamination", "exam_sources", "dense", "batch_size_per_device", "packing",
}  # fmt: skip


def differences(settings: dict[str, Any], ranks: Mapping[str, int] | None = None) -> list[tuple[str, Any, Any, bool]]:
    """(key, the paper's value, ours, whether the paper states it) of every setting that differs.

    `settings` is a whole experiment as a dictionary, `ranks` the number that trains each stage (default:
    launch.processes). Where the paper is silent, its value is configs/qilin_med_7b.json's. A stage that the experiment
    leaves out is one difference; without a corpus, retrieval is not compared.
    """
    whole = _comparable(load_experiment(EXPERIMENT_FILE).model_dump(mode="json"), {}) | STATED
    ours = _comparable(settings, ranks or {})
    left_out = [stage for stage in STAGES if not settings[stage]]
    found = [(stage, "trained", "left out", True) for stage in left_out]
    if not settings["retrieval"]["corpus"]:
        left_out.append("retrieval")
    for key in dict.fromkeys([*whole, *ours]):
        if key.split(".")[0] not in left_out and whole.get(key) != ours.get(key):
            found.append((key, whole.get(key), ours.get(key), key in STATED))
    return found


def _comparable(settings: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    flat = {key: value for key, value in flatten(settings).items() if not _NOT_COMPARED & set(key.split("."))}
    for stage in filter(settings.get, STAGES):
        batch, processes = settings[stage]["batch_size_per_device"], ranks.get(stage) or settings["launch"]["processes"]
        together = f"{batch} x GPUs" if processes == "auto" else batch * processes
        flat[f"{stage}.global_batch_size"] = settings[stage]["global_batch_size"] or together
    if Path(flat["model.path"]).name.lower() == BASE_MODEL:
        flat["model.path"] = BASE_MODEL
    return flat
