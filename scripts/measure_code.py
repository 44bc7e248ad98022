"""Measure the code itself: lines by room, functions, and helpers that are called once.

python scripts/measure_code.py            # a table; tests are measured apart
python scripts/measure_code.py qilin_med/plan   # one folder, with its longest functions and helpers called once
"""

import argparse
import ast
import subprocess
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
STAGE_SCRIPTS = ["pretraining.py", "supervised_finetuning.py", "dpo_training.py"]
CORE = ["qilin_med/config", "qilin_med/artifact.py", "qilin_med/prompt", "qilin_med/model", "qilin_med/data/rows.py",
        "qilin_med/train", *STAGE_SCRIPTS]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a folder or file of the repository (default: all but tests)")
    folder = parser.parse_args().folder
    files = [path for path in tracked_files() if not path.startswith("tests/")]
    calls = count_names(files)
    if folder:
        describe([path for path in files if is_below(path, folder)], calls, in_detail=True)
        return
    rooms = sorted({room_of(path) for path in files})
    for room in rooms:
        print(f"{lines([path for path in files if room_of(path) == room]):7,}  {room}")
    print(
        f"{lines([path for path in files if any(is_below(path, part) for part in CORE)]):7,}  core: {', '.join(CORE)}"
    )
    print(f"{lines(files):7,}  whole (Python, shell, templates)")
    print(f"{lines([path for path in tracked_files() if path.startswith('tests/')]):7,}  tests")
    describe(files, calls)


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.sh", "*.jinja"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return sorted({path for path in listed if (ROOT / path).is_file()})


def is_below(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part.rstrip('/')}/")


def room_of(path: str) -> str:
    parts = path.split("/")
    return (
        "/".join(parts[:2])
        if parts[0] == "qilin_med" and len(parts) > 2
        else f"{parts[0]}/"
        if parts[1:]
        else "top level"
    )


def lines(files: list[str]) -> int:
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files)


def functions_of(path: str) -> list[ast.FunctionDef]:
    if not path.endswith(".py"):
        return []
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def count_names(files: list[str]) -> Counter[str]:
    """How often each name is used, as a variable or an attribute, in all files together."""
    found: Counter[str] = Counter()
    for path in files:
        if path.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                found.update([node.id] if isinstance(node, ast.Name) else [])
                found.update([node.attr] if isinstance(node, ast.Attribute) else [])
    return found


def describe(files: list[str], calls: Counter[str], in_detail: bool = False) -> None:
    found = [(length(node), node.name, path) for path in files for node in functions_of(path)]
    private = [(path, name) for _, name, path in found if name.startswith("_") and not name.endswith("__")]
    once = [(path, name) for path, name in private if calls[name] <= 1]
    text = [line.strip() for path in files for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    comments = sum(line.startswith("#") for line in text)
    longest, name, path = max(found, default=(0, "", ""))
    middle = median([size for size, _, _ in found] or [0])
    print(f"{len(text):,} lines, {comments} of comments ({comments / max(len(text), 1):.1%})")
    print(f"{len(found):,} functions, median {middle:g} lines, longest {longest} ({path}: {name})")
    print(f"{len(once)} private functions called once ({len(once) / max(len(found), 1):.0%} of all functions)")
    if in_detail:
        print("longest:", ", ".join(f"{name} {size}" for size, name, _ in sorted(found, reverse=True)[:8]))
        print("called once:", ", ".join(f"{Path(path).stem}.{name}" for path, name in once))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    main()
