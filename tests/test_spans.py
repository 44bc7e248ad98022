"""Spans of a file give together exactly what the whole file gives, places and reasons included."""

import csv
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qilin_med.config.corpus import RawSource
from qilin_med.data.read.readers import READERS, read_raw
from qilin_med.data.read.spans import cut_file, line_test
from qilin_med.errors import UserError

PIECES = ["头痛", '"', "，", "\n", "[{", "}]", "\\", "a,b", "😀", " ", "", "发热三天"]


def some_text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(12)))


def table(rng: random.Random, rows: int, end: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    writer.writerow(["title", "ask", "answer"])
    writer.writerows([some_text(rng) for _ in range(rng.choice([2, 3, 3, 3]))] for _ in range(rows))
    return text.getvalue().encode("utf-8-sig")


def made(rng: random.Random, layout: str) -> tuple[str, str, bytes]:
    """(kind, suffix, contents)."""
    texts = [some_text(rng) for _ in range(60)]
    chats = [{"instruction": text, "output": text[::-1]} for text in texts]
    lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" + rng.choice(["", "\n", "{\n"]) for chat in chats)
    blocks = "".join(f"id={n}\nDialogue\n病人：\n{t}\n医生：\n休息{n}\n\n" for n, t in enumerate(texts))
    match layout:
        case "lines":
            return "chat", ".jsonl", lines.encode("utf-8-sig")
        case "lines in GB18030":
            return "chat", ".json", lines.encode("gb18030")
        case "array":
            return "chat", ".json", json.dumps(chats, ensure_ascii=False, indent=rng.choice([None, 1])).encode()
        case "array that ends in its midst":
            return "chat", ".json", json.dumps(chats).encode()[:-700]
        case "table":
            return "department_qa", ".csv", table(rng, 60, rng.choice(["\n", "\r\n"]))
        case "table with a quotation mark that stays open":
            return "department_qa", ".csv", table(rng, 30, "\n") + b'"open,a,b\n' + table(rng, 30, "\n")
        case "dialogues":
            return "meddialog", ".txt", blocks.encode()
        case _:
            return "text", ".txt", "\n".join(texts).encode()


def found(source: RawSource, file: Path, spans: list) -> tuple[list, str]:
    rows = []
    try:
        for span in spans:
            rows += read_raw(source, file, span)
    except UserError as error:
        return rows, str(error)
    return rows, ""


LAYOUTS = ["lines", "lines in GB18030", "array", "array that ends in its midst", "table",
           "table with a quotation mark that stays open", "dialogues", "texts"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spans_give_what_the_file_gives(tmp_path, layout):
    rng, cuts = random.Random(layout), 0
    for _ in range(10):
        kind, suffix, contents = made(rng, layout)
        file = tmp_path / f"data{suffix}"
        file.write_bytes(contents)
        source = RawSource(stage="sft", name="x", kind=kind, paths=[str(file)], licence="-")
        whole = found(source, file, [None])
        assert whole[0]
        for number in (1, 2, 3, 7, 200):
            spans = cut_file(file, READERS[kind], source, number)
            assert len(spans) == number and spans[0].start == 0 and spans[-1].end == len(contents)
            assert found(source, file, spans) == whole
            cuts += sum(span.start < span.end for span in spans) - 1
    assert cuts > 100


def test_row_groups_are_cut_between(tmp_path):
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [f"第{n}段" for n in range(100)]}), file, row_group_size=7)
    source = RawSource(stage="pretraining", name="x", kind="text", paths=[str(file)], licence="-")
    spans = cut_file(file, READERS["text"], source, 4)
    assert [(span.start, span.end, span.first) for span in spans] == [(0, 3, 0), (3, 7, 21), (7, 11, 49), (11, 15, 77)]
    assert found(source, file, spans) == found(source, file, [None])


def test_what_must_be_read_from_its_start_is_not_cut():
    def asked(file: str, kind: str, **more) -> bool:
        source = RawSource(stage="pretraining", name="x", kind=kind, paths=[file], licence="-", **more)
        return line_test(Path(file), READERS[kind], source) is not None

    assert asked("a.jsonl", "text") and asked("a.txt", "text") and asked("a.JSONL", "text", join_lines=9)
    assert not asked("a.txt", "text", join_lines=9) and not asked("a.jsonl", "text", limit=5)
    assert not asked("a.tsv", "cpubmed_kg") and not asked("a.jsonl.gz", "text") and not asked("a.zip", "text")
    assert not asked("a.json", "safety_prompts")
