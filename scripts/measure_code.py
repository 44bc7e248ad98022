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
    texts = read_texts()
    code = {path: text for path, text in texts.items() if not path.is_relative_to("tests")}
    uses = count_names(code)
    if folder:
        describe({path: text for path, text in code.items() if path.is_relative_to(folder)}, uses, in_detail=True)
        return
    rooms: Counter[str] = Counter()
    for path, text in code.items():
        rooms[room_of(path)] += len(text.splitlines())
    for room, lines in sorted(rooms.items()):
        print(f"{lines:7,}  {room}")
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    core = sum(lines[path] for path in code if any(path.is_relative_to(part) for part in CORE))
    print(f"{core:7,}  core: {', '.join(CORE)}")
    print(f"{rooms.total():7,}  whole (Python, shell, templates)")
    print(f"{sum(lines.values()) - rooms.total():7,}  tests")
    describe(code, uses)


def read_texts() -> dict[Path, str]:
    """The repository's files of code, by their paths in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.sh", "*.jinja"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = (Path(name) for name in sorted(set(listed)) if (ROOT / name).is_file())
    return {file: (ROOT / file).read_text(encoding="utf-8") for file in files}


def room_of(path: Path) -> str:
    match path.parts:
        case ("qilin_med", room, _, *_):
            return f"qilin_med/{room}"
        case (folder, _, *_):
            return f"{folder}/"
    return "top level"


def count_names(texts: dict[Path, str]) -> Counter[str]:
    """How often each name is used, as a variable or an attribute, in all files together."""
    nodes = [node for path, text in texts.items() if path.suffix == ".py" for node in ast.walk(ast.parse(text))]
    names = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    return names + Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))


def describe(texts: dict[Path, str], uses: Counter[str], in_detail: bool = False) -> None:
    found = [
        (node.end_lineno - node.lineno + 1, node.name, path)
        for path, text in texts.items()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    private = [(path, name) for _, name, path in found if name.startswith("_") and not name.endswith("__")]
    once = [(path, name) for path, name in private if uses[name] <= 1]
    lines = [line.strip() for text in texts.values() for line in text.splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    longest, name, path = max(found, default=(0, "", ""))
    middle = median([size for size, _, _ in found] or [0])
    print(f"{len(lines):,} lines, {comments} of comments ({comments / max(len(lines), 1):.1%})")
    print(f"{len(found):,} functions, median {middle:g} lines, longest {longest} ({path}: {name})")
    print(f"{len(once)} private functions called once ({len(once) / max(len(found), 1):.0%} of all functions)")
    if in_detail:
        print("longest:", ", ".join(f"{name} {size}" for size, name, _ in sorted(found, reverse=True)[:8]))
        print("called once:", ", ".join(f"{path.stem}.{name}" for path, name in once))


if __name__ == "__main__":
    main()
