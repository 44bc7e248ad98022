"""Build a corpus of growing size and prepare its rows: CPU seconds per MB, growth from size to size, peak memory.

    python scripts/benchmark.py corpus
    python scripts/benchmark.py corpus --megabytes 40 400 2000 --workers 16
    python scripts/benchmark.py dedup     # near-deduplication alone, on planted copies

The corpus is grown from the real rows in ../shared/data, or the demo's where that is absent: each text is a row with one
Chinese character in twelve replaced by a draw from a fixed seed, so that neither rows nor passages repeat more often in a
larger corpus; 2% are exact copies, 3% copies with one character changed. It lies in one large file of each layout: JSON
lines, a JSON array, a table. The build is that of scripts/build_chimed.py, with all steps on.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.common import ROOT, describe_moment
from qilin_med.config.corpus import CorpusSettings, RawSource, load_corpus_settings
from qilin_med.config.experiment import StageName, count
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
EXACT_SHARE, NEAR_SHARE, EDITED_EVERY = 0.02, 0.03, 12
PAPER_MEGABYTES, PAPER_CORES = 15_000, 16
LINE = re.compile(r"^(\w+) +(\d+) of (\d+) tasks +([\d.]+) s(?: +([\d.]+) CPU s +(\d+) MiB)?$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--megabytes", type=count, nargs="+", default=[40, 400], help="sizes (default: 40 400)")
    parser.add_argument("--workers", type=count, default=cores, help="processes (default: %(default)s)")
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


def grown(rows: list[Row], size: int, seed: int) -> Iterator[Row]:
    """Rows of about so many bytes together."""
    draw, rng, made = np.random.default_rng(seed), Random(seed), 0
    row: Row = {}
    for number, real in enumerate(cycle(rows)):
        if made >= size:
            return
        chance = rng.random() if row else 1
        if chance > EXACT_SHARE:
            row = edited(row, draw, 400) if chance < EXACT_SHARE + NEAR_SHARE else edited(real, draw, EDITED_EVERY)
        made += len(json.dumps(row, ensure_ascii=False).encode())
        yield {**row, "id": f"{seed}-{number}"}


def write_corpus(folder: Path, megabytes: int) -> Path:
    """The raw files and their corpus file."""
    rows, held_out = real_rows()
    sources = []
    for seed, (share, stage, kind, name) in enumerate(FILES):
        found = grown(rows["sft" if kind == "department_qa" else stage], int(share * megabytes * 10**6), seed)
        WRITERS[Path(name).suffix if kind != "department_qa" else kind](folder / name, found)
        sources.append({"stage": stage, "name": name, "kind": kind, "paths": [str(folder / name)], "licence": "-"})
    tokenizer = write_tokenizer(folder / "tokenizer")
    settings = {"name": "grown", "output_dir": str(folder / "processed"), "tokenizer": str(tokenizer),
                "sources": sources, "decontamination": {"files": held_out}}  # fmt: skip
    CorpusSettings.model_validate(settings)
    (folder / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "corpus.json"


def write_lines(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_texts(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(" ".join(row["text"].split()) + "\n" for row in rows)


def write_array(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        file.writelines(
            (",\n" if number else "") + json.dumps(row, ensure_ascii=False, indent=2) for number, row in enumerate(rows)
        )
        file.write("\n]\n")


def write_table(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["department", "title", "ask", "answer"])
        for row in rows:
            first, second = (turn["value"] for turn in [t for t in row["conversations"] if t["from"] != "system"][:2])
            writer.writerow(["内科", first[:20], first, second])


WRITERS: dict[str, Callable[[Path, Iterator[Row]], None]] = {
    ".jsonl": write_lines, ".txt": write_texts, ".json": write_array, "department_qa": write_table
}  # fmt: skip


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
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as temporary:
        for megabytes in sorted(arguments.megabytes):
            folder = (arguments.folder or Path(temporary)) / str(megabytes)
            folder.mkdir(parents=True, exist_ok=True)
            corpus = write_corpus(folder, megabytes)
            start, cpu = time.time(), os.times()
            command = [
                sys.executable,
                str(ROOT / "scripts/build_chimed.py"),
                str(corpus),
                f"executor.workers={arguments.workers}",
            ]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            print(out.stdout, out.stderr)
            now = os.times()
            print(
                megabytes,
                "wall",
                time.time() - start,
                "cpu",
                now.children_user + now.children_system - cpu.children_user - cpu.children_system,
            )
    print(describe_moment())
