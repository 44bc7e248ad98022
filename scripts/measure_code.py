"""Measure the code itself: lines by room, functions, and helpers that are called once.

python scripts/measure_code.py                  # a table; tests are measured apart
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
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.sh", "*.jinja"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = [Path(name) for name in sorted(set(listed)) if (ROOT / name).is_file()]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    code = {path: text for path, text in texts.items() if not path.is_relative_to("tests")}
    if not folder:
        rooms: Counter[str] = Counter()
        for path, text in code.items():
            rooms[room_of(path)] += len(text.splitlines())
        core = sum(len(code[path].splitlines()) for path in code if any(path.is_relative_to(part) for part in CORE))
        for room, lines in sorted(rooms.items()):
            print(f"{lines:7,}  {room}")
        print(f"{core:7,}  core: {', '.join(CORE)}")
        print(f"{rooms.total():7,}  whole (Python, shell, templates)")
        print(f"{sum(len(text.splitlines()) for text in texts.values()) - rooms.total():7,}  tests")
    describe(code, folder)


def room_of(path: Path) -> str:
    match path.parts:
        case ("qilin_med", room, _, *_):
            return f"qilin_med/{room}"
        case (folder, _, *_):
            return f"{folder}/"
    return "top level"


def describe(code: dict[Path, str], folder: str | None) -> None:
    nodes = [(path, node) for path in code if path.suffix == ".py" for node in ast.walk(ast.parse(code[path]))]
    uses = Counter(getattr(node, "id", None) or getattr(node, "attr", None) for _, node in nodes)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    here = [(path, node) for path, node in nodes if path.is_relative_to(folder or "") and isinstance(node, functions)]
    found = [(node.end_lineno - node.lineno + 1, node.name, path) for path, node in here]
    private = [(path, name) for _, name, path in found if name.startswith("_") and not name.endswith("__")]
    once = [(path, name) for path, name in private if uses[name] <= 1]
    lines = [line.strip() for path in code if path.is_relative_to(folder or "") for line in code[path].splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    longest, name, path = max(found, default=(0, "", ""))
    middle = median([size for size, _, _ in found] or [0])
    print(f"{len(lines):,} lines, {comments} of comments ({comments / max(len(lines), 1):.1%})")
    print(f"{len(found):,} functions, median {middle:g} lines, longest {longest} ({path}: {name})")
    print(f"{len(once)} private functions called once ({len(once) / max(len(found), 1):.0%} of all functions)")
    if folder:
        print("longest:", ", ".join(f"{name} {size}" for size, name, _ in sorted(found, reverse=True)[:8]))
        print("called once:", ", ".join(f"{path.stem}.{name}" for path, name in once))


if __name__ == "__main__":
    main()
