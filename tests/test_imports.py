"""Imports point one way, and what lies below the rows starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import only from lines below its own.
LAYERS = [
    ["pretraining", "supervised_finetuning", "dpo_training", "scripts"],
    ["report", "reference", "comparisons", "terminal", "page"],
    ["training", "evaluation", "inspection", "harness", "dry_run"],
    ["callbacks", "trainers", "lm", "answers", "planner", "ranks", "chat"],
    ["rows", "models", "baichuan", "retrieval", "tasks", "launch", "operators", "isolation", "reference_log_probs"],
    ["corpus", "template", "tokenizer", "batches", "losses", "nodes", "job", "demo", "universal"],
    ["checkpoints", "cli", "results", "paper"],
    ["config", "records", "prompts", "metrics", "extraction"],
    ["errors", "progress"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
WITHOUT_TORCH = ["config", "records", "errors", "progress", "checkpoints", "job", "operators", "nodes", "launch", "ranks",
                 "template", "rows",
                 "corpus.build", "retrieval.index", "retrieval.retriever", "retrieval.recall", "results",
                 "report.pages", "report.cards", "planner.preflight", "planner.tables"]  # fmt: skip


def layer_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "qilin_med":
        return "scripts" if relative.parts[0] == "scripts" else relative.stem
    return relative.parts[1].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("qilin_med.")}
    return found


def sources() -> list[Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("qilin_med/**/*.py")]
    return sorted(file for file in files if file.name != "__init__.py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = LEVEL[layer_of(path)]
    upward = {name for name in imported_layers(path) - {layer_of(path)} if LEVEL[name] < own}
    sideways = {name for name in imported_layers(path) - {layer_of(path)} if LEVEL[name] == own}
    assert not upward, f"{path.name} imports from above: {upward}"
    # Neighbours may be used, but not by each other at once.
    for name in sideways:
        neighbour = ROOT / "qilin_med" / f"{name}.py"
        assert layer_of(path) not in (imported_layers(neighbour) if neighbour.exists() else set())


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_data_work_needs_no_torch(module):
    code = f"import sys, qilin_med.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
