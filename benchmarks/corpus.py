"""Build a corpus of growing size and prepare its rows: CPU seconds for a MB, growth from size to size, peak memory.

    python scripts/benchmark.py corpus
    python scripts/benchmark.py corpus --megabytes 40 400 2000 --workers 16
    python scripts/benchmark.py dedup     # near-deduplication alone, on planted copies

The corpus is grown from the real rows in ../shared/data, or the demo's where that is absent: each text is a row with one
Chinese character in twelve replaced by a draw from a fixed seed, so that neither rows nor passages repeat more often in a
larger corpus; 2% are exact copies, 3% near copies. It lies in one large file of each layout: JSON lines, a JSON array, a
table, text. Build and rows are those of scripts/build_chimed.py and of the stages, in their own processes.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import ROOT, describe_moment, fresh_processes, write_result
from qilin_med.config.corpus import RawSource, load_corpus_settings
from qilin_med.config.experiment import STAGES, StageName, count, load_experiment
from qilin_med.data.read.formats.reading import UnusableRow
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.data.render import render, to_row
from qilin_med.records import Skipped

Row = dict[str, Any]
SHARED = ROOT.parent / "shared"
REAL: tuple[tuple[StageName, str, str], ...] = (
    ("pretraining", "text", "rag_cpt/fever.txt"),
    ("pretraining", "text", "rag_cpt/medical_corpus.txt"),
    ("pretraining", "xywy_kg", "kg_xywy/medical1.json"),
    ("pretraining", "39health_kg", "kg_39health/disease.csv"),
    ("pretraining", "department_qa", "dialogue_toyhom"),
    ("sft", "chat", "sft_general/alpaca_zh_demo.json"),
    ("sft", "chat", "sft_general/sharegpt_zh_1K_format.jsonl"),
    ("sft", "chat", "sft_general/medical_sft_1K_format.jsonl"),
    ("sft", "chat", "rag_cpt/bentsao_llama_data.json"),
    ("sft", "department_qa", "dialogue_toyhom"),
    ("dpo", "preference", "preference/dpo_zh_500.jsonl"),
    ("dpo", "preference", "preference/dpo_zh_demo.json"),
)
HELD_OUT = (
    ("exam", "cmexam/cmexam_test.jsonl"),
    ("exam", "ceval/ceval.zip"),
    ("huatuo", "huatuo26m/huatuo26M_test.json"),
)
EXAM_COLUMNS = {"question": "problem_text", "options": "choices"}
# Share of the bytes, stage, kind and file of each source.
FILES: tuple[tuple[float, StageName, str, str], ...] = (
    (0.35, "pretraining", "text", "articles.jsonl"),
    (0.15, "pretraining", "text", "lines.txt"),
    (0.15, "pretraining", "department_qa", "consultations.csv"),
    (0.2, "sft", "chat", "chats.jsonl"),
    (0.1, "sft", "chat", "chats.json"),
    (0.05, "dpo", "preference", "pairs.jsonl"),
)
EXACT_SHARE, NEAR_SHARE = 0.02, 0.03
EDITED_EVERY, NEAR_EVERY = 12, 400  # characters
PAPER_MEGABYTES, PAPER_CORES = 15_000, 16
LINE = re.compile(r"^(\w+) +\d+ of (\d+) tasks +([\d.]+) s +([\d.]+) CPU s +(\d+) MiB", re.MULTILINE)
ALONE = ("near", "publish")  # steps of one task
SMALL = 2.0  # CPU seconds: too short to tell how they grow


class Cost(NamedTuple):
    """Of one step."""

    tasks: int
    seconds: float
    cpu_seconds: float
    peak_mib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--megabytes", type=count, nargs="+", default=[40, 400], help="sizes (default: 40 400)")
    parser.add_argument("--workers", type=count, default=cores, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")


# ---------------------------------------------------------------------------------------------------- the corpus


def real_rows() -> tuple[dict[StageName, list[Row]], list[dict[str, Any]]]:
    """(rows as training sets hold them, by stage; entries of the corpus file for the evaluation questions)."""
    if (SHARED / "data").is_dir():
        sources = [(stage, kind, [str(SHARED / "data" / path)]) for stage, kind, path in REAL]
        held_out = [{"name": path, "kind": kind, "paths": [str(SHARED / "data" / path)],
                     "columns": EXAM_COLUMNS if "cmexam" in path else {}} for kind, path in HELD_OUT]  # fmt: skip
    else:
        subprocess.run([sys.executable, str(ROOT / "scripts/make_demo.py"), "--no-training"], cwd=ROOT, check=True)
        demo = load_corpus_settings(ROOT / "configs/demo_chimed.json")
        sources = [(source.stage, source.kind, [str(ROOT / path) for path in source.paths]) for source in demo.sources]
        held_out = [{**file.model_dump(), "paths": [str(ROOT / path) for path in file.paths]}
                    for file in demo.decontamination.files]  # fmt: skip
    rows: dict[StageName, list[Row]] = {"pretraining": [], "sft": [], "dpo": []}
    for stage, kind, paths in sources:
        source = RawSource(stage=stage, name="real", kind=kind, paths=paths, licence="-")
        for file in raw_files(source):
            for _, record in read_raw(source, file):
                try:
                    rows[stage].append(to_row(render(record, stage)) if not isinstance(record, Skipped) else {})
                except UnusableRow:
                    continue
    return {stage: [row for row in found if row] for stage, found in rows.items()}, held_out


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
    draw, rng = np.random.default_rng(seed), Random(seed)
    row: Row = {}
    for number, real in enumerate(cycle(rows)):
        chance = rng.random() if row else 1
        if chance > EXACT_SHARE:
            is_near = chance < EXACT_SHARE + NEAR_SHARE
            row = edited(row, draw, NEAR_EVERY) if is_near else edited(real, draw, EDITED_EVERY)
        yield {**row, "id": f"{seed}-{number}"}


def write_corpus(folder: Path, megabytes: int, workers: int) -> Path:
    """The raw files and their corpus file."""
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
    return folder / "corpus.json"


def write_file(path: Path, rows: list[Row], size: int, seed: int) -> None:
    """Rows until they are so many bytes, in the layout that the file's name says."""
    layout, begins, ends = LAYOUTS[path.suffix]
    with path.open("wb") as file:
        made = file.write(begins.encode())
        for row in grown(rows, seed):
            text = layout(row)
            if made + len(text.encode()) >= size:
                break
            made += file.write(text.encode())
        file.write((layout(row).rstrip(",\n") + ends).encode())


def as_json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def as_cells(row: Row) -> str:
    """Department, title, question and answer, of the first turns of a conversation."""
    question, answer = [turn["value"] for turn in row["conversations"] if turn["from"] != "system"][:2]
    text = io.StringIO()
    csv.writer(text).writerow(["内科", question[:20], question, answer])
    return text.getvalue()


LAYOUTS: dict[str, tuple[Callable[[Row], str], str, str]] = {
    ".jsonl": (lambda row: as_json(row) + "\n", "", "\n"),
    ".json": (lambda row: as_json(row) + ",\n", "[\n", "\n]\n"),
    ".txt": (lambda row: " ".join(row["text"].split()) + "\n", "", "\n"),
    ".csv": (as_cells, "department,title,ask,answer\n", "\n"),
}
"""How a row is written, and what stands before and after all rows."""


def write_tokenizer(folder: Path) -> Path:
    from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece
    from qilin_med.prompt.template import QILIN_TEMPLATE

    model = SHARED / "baichuan7b-tiny-original/tokenizer.model"
    if not model.is_file():
        return ROOT / "models/demo-init"
    fast_tokenizer_from_sentencepiece(model, QILIN_TEMPLATE).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- the runs


def run(arguments: argparse.Namespace) -> None:
    costs: dict[int, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as temporary:
        for megabytes in sorted(arguments.megabytes):
            folder = (arguments.folder or Path(temporary)) / str(megabytes)
            folder.mkdir(parents=True, exist_ok=True)
            corpus = write_corpus(folder, megabytes, arguments.workers)
            costs[megabytes] = {**build_costs(corpus, arguments.workers), **rows_costs(folder)}
            show(megabytes, costs)
            shutil.rmtree(folder)
    show_plan(costs)
    print(f"\n{describe_moment()}; {arguments.workers} workers")
    plain = {size: {name: cost._asdict() for name, cost in found.items()} for size, found in costs.items()}
    write_result(arguments, costs=plain)


def build_costs(corpus: Path, workers: int) -> dict[str, Cost]:
    """Of each step of a build, as its command prints them."""
    command = [sys.executable, str(ROOT / "scripts/build_chimed.py"), str(corpus), f"executor.workers={workers}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: Cost(int(tasks), *map(float, rest)) for name, tasks, *rest in LINE.findall(printed)}


def rows_costs(folder: Path) -> dict[str, Cost]:
    """Of the preparation of each stage's rows, in a process of its own."""
    found = {}
    for stage in STAGES:
        with fresh_processes(1) as pool:
            found[f"rows of {stage}"] = pool.submit(prepare, stage, folder).result()
    return found


def prepare(stage: StageName, folder: Path) -> Cost:
    from qilin_med.console.quiet import quiet_libraries

    quiet_libraries()
    from qilin_med.data.rows import prepare_rows
    from qilin_med.model.load import load_tokenizer

    settings = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    data = json.dumps([str(folder / "processed" / stage)])
    experiment = load_experiment(ROOT / "configs/qilin_med_7b.json", [f"{stage}.data={data}"])
    tokenizer = load_tokenizer(Path(settings["tokenizer"]), "own")
    start, before = time.perf_counter(), os.times()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_rows(stage, getattr(experiment, stage), tokenizer, None, folder / "cache")
    after = os.times()
    cpu_seconds = sum(after[:4]) - sum(before[:4])
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(2, time.perf_counter() - start, cpu_seconds, max(peaks) / 1024)


def show(megabytes: int, costs: dict[int, dict[str, Cost]]) -> None:
    """A table of one size, with the ratios to the size before."""
    smaller = max((size for size in costs if size < megabytes), default=None)
    print(f"\n| {megabytes} MB | seconds | CPU seconds | MB/s | peak MiB of a process | CPU seconds to {smaller or '-'} MB |"
          "\n|---|---|---|---|---|---|")  # fmt: skip
    for name, cost in costs[megabytes].items():
        before = costs[smaller][name].cpu_seconds if smaller and name in costs[smaller] else 0
        ratio = f"x {cost.cpu_seconds / before:.1f}" if before else "-"
        print(f"| {name} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {megabytes / max(cost.seconds, 0.1):.1f}"
              f" | {cost.peak_mib:.0f} | {ratio} |")  # fmt: skip
    for what, found in parts_of(costs[megabytes]).items():
        total = sum(cost.cpu_seconds for cost in found.values())
        print(
            f"{what}: {sum(cost.seconds for cost in found.values()):.0f} s, {total / megabytes:.2f} CPU seconds per MB",
            flush=True,
        )


def parts_of(costs: dict[str, Cost]) -> dict[str, dict[str, Cost]]:
    rows = {name: cost for name, cost in costs.items() if name.startswith("rows of ")}
    return {"build": {name: cost for name, cost in costs.items() if name not in rows}, "rows": rows}


def show_plan(costs: dict[int, dict[str, Cost]]) -> None:
    """What the paper's corpus would take, if each step goes on growing as from the smallest to the largest size."""
    smallest, largest = min(costs), max(costs)
    for what, found in parts_of(costs[largest]).items():
        seconds = 0.0
        for name, cost in found.items():
            power, before = 1.0, costs[smallest].get(name)
            if smallest < largest and before and before.cpu_seconds > SMALL:
                power = max(1.0, math.log(cost.cpu_seconds / before.cpu_seconds, largest / smallest))
            grown = cost.cpu_seconds * (PAPER_MEGABYTES / largest) ** power
            # One task is one process; the evaluation questions do not grow with the corpus.
            seconds += cost.seconds if name == "evaluation" else grown / (1 if name in ALONE else PAPER_CORES)
        print(f"{what} of {PAPER_MEGABYTES:,} MB on {PAPER_CORES} such cores: {seconds / 60:.0f} minutes")
