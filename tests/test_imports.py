"""Imports point one way through the rooms, and what does not compute starts without torch."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room imports only from rooms before it; demo, benchmarks and scripts are imported by none.
ROOMS = ["errors", "records", "console", "config", "artifact", "launch", "prompt", "model", "convert", "data",
         "plan", "retrieve", "train",
         "evaluate", "check", "report", "chat"]  # fmt: skip
WITHOUT_TORCH = ["config.experiment", "records", "errors", "console.progress", "artifact", "train.job",
                 "prompt.template", "data.rows", "data.build", "retrieve.index", "retrieve.retriever", "retrieve.models",
                 "evaluate.results", "report.pages", "plan.preflight", "plan.tables"]  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    file = ROOT / f"qilin_med/{room}.py"
    allowed = {*ROOMS[: ROOMS.index(room)], room}
    for path in [file] if file.exists() else sorted((ROOT / "qilin_med" / room).rglob("*.py")):
        parts = [name.split(".") for name in imported_modules(path)]
        upward = {part[1] for part in parts if part[0] == "qilin_med" and len(part) > 1} - allowed
        outside = {part[0] for part in parts} & {"demo", "benchmarks", "scripts", "tests"}
        assert not upward | outside, f"{path.relative_to(ROOT)} imports from above: {upward | outside}"


def test_the_list_of_rooms_is_whole():
    found = {path.stem for path in (ROOT / "qilin_med").iterdir() if not path.name.startswith("__")}
    assert found == set(ROOMS)
    files = {path.stem for path in (ROOT / "qilin_med").glob("*.py")}
    assert files == {"__init__", "errors", "records", "artifact"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_data_work_needs_no_torch(module):
    code = f"import sys, qilin_med.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["contenders", "corpus", "dedup", "evaluation", "training"])
def test_benchmarks_find_what_they_import(name):
    """No other test runs them."""
    import_module(f"benchmarks.{name}")
