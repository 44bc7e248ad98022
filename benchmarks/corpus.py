"""Build a corpus of growing size and prepare its rows: CPU seconds for a MB, growth from size to size, peak memory.

    python scripts/benchmark.py corpus
    python scripts/benchmark.py corpus --megabytes 40 400 2000 --workers 16
    python scripts/benchmark.py dedup     # near-deduplication alone, on planted copies

The corpus is grown from the real rows in ../shared/data (corpus.json beside this file names them), or the demo's where that
is absent: each text is a row with one Chinese character in twelve replaced by a draw from a fixed seed, so that neither rows
nor passages repeat more often in a larger corpus; 2% are exact copies, 3% near copies. It lies in one large file of each
layout: JSON lines, a JSON array, a table, text. Build and rows are those of scripts/build_chimed.py and of the stages, in
their own processes.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Cost, cost_of, describe_moment, fresh_processes, write_result
from qilin_med.config.corpus import load_corpus_settings
from qilin_med.config.experiment import STAGES, RawFiles, StageName, count, load_experiment
from qilin_med.data.read.formats.reading import UnusableRow
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.data.render import render, to_row
from qilin_med.records import Skipped
from qilin_med.report.tables import markdown_table

Row = dict[str, Any]
Costs = dict[str, Cost]  # by step
SHARED = ROOT.parent / "shared"
# Share of the bytes, stage, kind and file of each source.
FILES: tuple[tuple[float, StageName, str, str], ...] = (
    (0.35, "pretraining", "text", "articles.jsonl"),
    (0.15, "pretraining", "text", "lines.txt"),
    (0.15, "pretraining", "department_qa", "consultations.csv"),
    (0.2, "sft", "chat", "chats.jsonl"),
    (0.1, "sft", "chat", "chats.json"),
    (0.05, "dpo", "preference", "pairs.jsonl"),
)
BEFORE_AND_AFTER = {".json": ("[\n", "\n]\n"), ".csv": ("department,title,ask,answer\n", "\n")}  # all rows of a layout
EXACT_SHARE, NEAR_SHARE = 0.02, 0.03
EDITED_EVERY, NEAR_EVERY = 12, 400  # characters
PAPER_MEGABYTES, PAPER_CORES = 15_000, 16
LINE = re.compile(r"^(\w+) +\d+ of \d+ tasks +([\d.]+) s +([\d.]+) CPU s +(\d+) MiB", re.MULTILINE)
ALONE = ("near", "publish")  # steps of one task
SMALL = 2.0  # CPU seconds: too short to tell how they grow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--megabytes", type=count, nargs="+", default=[40, 400], help="sizes (default: 40 400)")
    parser.add_argument("--workers", type=count, default=cores, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> None:
    costs: dict[int, Costs] = {}
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as temporary:
        for megabytes in sorted(arguments.megabytes):
            folder = (arguments.folder or Path(temporary)) / str(megabytes)
            folder.mkdir(parents=True, exist_ok=True)
            settings = write_corpus(folder, megabytes, arguments.workers)
            costs[megabytes] = build_costs(folder, arguments.workers)
            for stage in STAGES:
                with fresh_processes(1) as pool:
                    cost = pool.submit(prepare, stage, folder, settings["tokenizer"])
                    costs[megabytes][f"rows of {stage}"] = cost.result()
            show(megabytes, costs)
            shutil.rmtree(folder)
    show_plan(costs)
    print(f"\n{describe_moment()}; {arguments.workers} workers")
    plain = {size: {name: cost._asdict() for name, cost in found.items()} for size, found in costs.items()}
    write_result(arguments, costs=plain)


# ---------------------------------------------------------------------------------------------------- the corpus


def real_rows() -> tuple[dict[StageName, list[Row]], list[dict[str, Any]]]:
    """(rows as training sets hold them, by stage; entries of the corpus file for the evaluation questions)."""
    folder, file = SHARED / "data", ROOT / "benchmarks/corpus.json"
    if not folder.is_dir():
        folder, file = ROOT, ROOT / "configs/demo_chimed.json"
        subprocess.run([sys.executable, str(ROOT / "scripts/make_demo.py"), "--no-training"], cwd=ROOT, check=True)
    settings = load_corpus_settings(file)

    def located(entry: RawFiles) -> RawFiles:
        return entry.model_copy(update={"paths": [str(folder / path) for path in entry.paths]})

    rows: dict[StageName, list[Row]] = {"pretraining": [], "sft": [], "dpo": []}
    for source in map(located, settings.sources):
        for _, record in (found for file in raw_files(source) for found in read_raw(source, file)):
            try:
                rows[source.stage] += [] if isinstance(record, Skipped) else [to_row(render(record, source.stage))]
            except UnusableRow:
                continue
    return rows, [located(questions).model_dump() for questions in settings.decontamination.files]


def edited(value: Any, draw: np.random.Generator, every: int) -> Any:
    """A value with one Chinese character in `every` of its texts replaced."""
    if isinstance(value, dict):
        return {key: text if key in ("from", "id") else edited(text, draw, every) for key, text in value.items()}
    if isinstance(value, list):
        return [edited(part, draw, every) for part in value]
    codes = np.frombuffer(value.encode("utf-32-le", "replace"), np.uint32).copy()
    chinese = np.flatnonzero((codes >= 0x4E00) & (codes < 0x9FA6))
    places = chinese[int(draw.integers(every)) :: every]
    codes[places] = draw.integers(0x4E00, 0x5E00, len(places))
    return codes.tobytes().decode("utf-32-le", "replace")


def grown(rows: list[Row], seed: int) -> Iterator[Row]:
    """Rows without end."""
    draw, row = np.random.default_rng(seed), {}
    for number, real in enumerate(cycle(rows)):
        chance = draw.random() if row else 1
        if chance > EXACT_SHARE:
            is_near = chance < EXACT_SHARE + NEAR_SHARE
            row = edited(row, draw, NEAR_EVERY) if is_near else edited(real, draw, EDITED_EVERY)
        yield {**row, "id": f"{seed}-{number}"}


def write_corpus(folder: Path, megabytes: int, workers: int) -> dict[str, Any]:
    """Write the raw files and their corpus file, which is returned."""
    rows, held_out = real_rows()
    sources, written = [], []
    with fresh_processes(workers) as pool:
        for seed, (share, stage, kind, name) in enumerate(FILES):
            real = rows["sft" if kind == "department_qa" else stage]
            written.append(pool.submit(write_file, folder / name, real, int(share * megabytes * 10**6), seed))
            sources.append({"stage": stage, "name": name, "kind": kind, "paths": [str(folder / name)], "licence": "-"})
        for file in written:
            file.result()
    settings = {"name": "grown", "output_dir": str(folder / "processed"), "sources": sources,
                "tokenizer": str(write_tokenizer(folder / "tokenizer")), "decontamination": {"files": held_out}}  # fmt: skip
    (folder / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    return settings


def write_file(path: Path, rows: list[Row], size: int, seed: int) -> None:
    """Rows until they are so many bytes, in the layout that the file's name says."""
    before, after = BEFORE_AND_AFTER.get(path.suffix, ("", "\n"))
    with path.open("wb") as file:
        made = file.write(before.encode())
        for row in grown(rows, seed):
            text = laid_out(row, path.suffix).encode()
            if made + len(text) >= size:
                break
            made += file.write(text)
        file.write(text.rstrip(b",\n") + after.encode())


def laid_out(row: Row, layout: str) -> str:
    if layout == ".txt":
        return " ".join(row["text"].split()) + "\n"
    if layout != ".csv":
        return json.dumps(row, ensure_ascii=False) + (",\n" if layout == ".json" else "\n")
    # Department, title, question and answer, of the first turns of a conversation.
    question, answer = [turn["value"] for turn in row["conversations"] if turn["from"] != "system"][:2]
    text = io.StringIO()
    csv.writer(text).writerow(["内科", question[:20], question, answer])
    return text.getvalue()


def write_tokenizer(folder: Path) -> Path:
    from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece
    from qilin_med.prompt.template import QILIN_TEMPLATE

    model = SHARED / "baichuan7b-tiny-original/tokenizer.model"
    if not model.is_file():
        return ROOT / "models/demo-init"
    fast_tokenizer_from_sentencepiece(model, QILIN_TEMPLATE).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- the runs


def build_costs(folder: Path, workers: int) -> Costs:
    """Of each step of a build, as its command prints them."""
    command = ["scripts/build_chimed.py", str(folder / "corpus.json"), f"executor.workers={workers}"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: Cost(*map(float, figures)) for name, *figures in LINE.findall(run.stdout)}


def prepare(stage: StageName, folder: Path, tokenizer_folder: str) -> Cost:
    """Of the preparation of a stage's rows."""
    from qilin_med.console.quiet import quiet_libraries

    quiet_libraries()
    from qilin_med.data.rows import prepare_rows
    from qilin_med.model.load import load_tokenizer

    data = json.dumps([str(folder / "processed" / stage)])
    experiment = load_experiment(ROOT / "configs/qilin_med_7b.json", [f"{stage}.data={data}"])
    tokenizer = load_tokenizer(Path(tokenizer_folder), "own")
    return cost_of(lambda: prepare_rows(stage, getattr(experiment, stage), tokenizer, None, folder / "cache"))


def show(megabytes: int, costs: dict[int, Costs]) -> None:
    """A table of one size, with the ratios to the size before."""
    smaller = max((size for size in costs if size < megabytes), default=None)
    table = []
    for name, cost in costs[megabytes].items():
        before = costs[smaller][name].cpu_seconds if smaller and name in costs[smaller] else 0
        table.append({
            f"{megabytes} MB": name, "seconds": f"{cost.seconds:.1f}", "CPU seconds": f"{cost.cpu_seconds:.1f}",
            "MB/s": f"{megabytes / max(cost.seconds, 0.1):.1f}", "peak MiB of a process": f"{cost.peak_mib:.0f}",
            f"CPU seconds to {smaller or '-'} MB": f"x {cost.cpu_seconds / before:.1f}" if before else "-",
        })  # fmt: skip
    print(f"\n{markdown_table(table)}")
    for what, found in build_and_rows(costs[megabytes]).items():
        seconds, cpu_seconds = (sum(figures) for figures in list(zip(*found.values(), strict=True))[:2])
        print(f"{what}: {seconds:.0f} s, {cpu_seconds / megabytes:.2f} CPU seconds per MB", flush=True)


def build_and_rows(costs: Costs) -> dict[str, Costs]:
    rows = {name: cost for name, cost in costs.items() if name.startswith("rows of ")}
    return {"build": {name: cost for name, cost in costs.items() if name not in rows}, "rows": rows}


def show_plan(costs: dict[int, Costs]) -> None:
    """What the paper's corpus would take, if each step goes on growing as from the smallest to the largest size."""
    smallest, largest = min(costs), max(costs)
    for what, found in build_and_rows(costs[largest]).items():
        seconds = 0.0
        for name, cost in found.items():
            power, before = 1.0, costs[smallest].get(name)
            if smallest < largest and before and before.cpu_seconds > SMALL:
                power = max(1.0, math.log(cost.cpu_seconds / before.cpu_seconds, largest / smallest))
            grown = cost.cpu_seconds * (PAPER_MEGABYTES / largest) ** power
            # One task is one process; the evaluation questions do not grow with the corpus.
            seconds += cost.seconds if name == "evaluation" else grown / (1 if name in ALONE else PAPER_CORES)
        print(f"{what} of {PAPER_MEGABYTES:,} MB on {PAPER_CORES} such cores: {seconds / 60:.0f} minutes")
