"""Mutated rows and hostile files: every row is accounted for, nothing raises but a UserError, memory and time are bounded.

python tests/test_hostile_files.py 100000 200     # so many mutated rows, so many mutated files
"""

import gzip
import json
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import openpyxl
import pytest
import zstandard
from reading import chat, content, read, records, source, write_rows

from qilin_med.config.experiment import KINDS
from qilin_med.data.read import files
from qilin_med.data.read.readers import READERS, raw_files, read_raw
from qilin_med.data.read.tables import JSON_SIGN, Elements
from qilin_med.errors import UserError
from qilin_med.records import Chat, Skipped

ODD = [None, 3, -1.5, float("nan"), True, "", " ", "x", "\ud83d", "①", "9" * 5000, "问：甲\n答：乙", "A.一 B.二",
       [], [[]], ["a"], ["甲", "乙"],
       [["甲", "乙"]], [{"a": 1}], [{"role": "user", "content": "甲"}], {}, {"A": "一", "B": "二"}, {"a": []},
       [None, 2]]  # fmt: skip
WELL_FORMED = {
    "text": {"text": "正文"}, "huatuo": {"questions": [["甲"]], "answers": ["乙"]},
    "exam": {"question": "题", "options": {"A": "一", "B": "二"}, "answer": "A"},
    "cpubmed_kg": {"head": "甲病", "relation": "症状", "tail": "发热"}, "xywy_kg": {"name": "甲病", "desc": "虚构的病"},
    "39health_kg": {"name": "甲病", "part": "头"}, "department_qa": {"title": "甲", "ask": "乙", "answer": "丙"},
    "meddialog": {"description": "甲", "dialogue": ["病人：甲", "医生：乙"]}, "chat": {"question": "甲", "answer": "乙"},
    "instruct_chat": {"input": ["甲"], "output": ["乙"]}, "multiturn_chat": {"instruction": "Human:甲", "output": "乙"},
    "hc3": {"question": "甲", "chatgpt_answers": ["乙"]}, "safety_prompts": {"prompt": "甲", "response": "乙"},
    "preference": {"prompt": "甲", "chosen": "乙", "rejected": "丙"},
    "zhongjing": {"instruction": "甲", "output": ["乙", "丙"]},
}  # fmt: skip
PIECES = [
    '"',
    "\\",
    "\n",
    "\r",
    ",",
    "\t",
    "{",
    "}",
    "[",
    "]",
    ":",
    "\0",
    "\ud83d",
    "病",
    "\\ud83d",
    "NaN",
    "'",
    "\ufeff",
]
ENCODINGS = ["utf-8", "gb18030", "big5", "utf-16", "latin-1"]


def fuzz_rows(folder: Path, number: int, seed: int = 0) -> Counter[str]:
    """Rows of every kind with odd values, in lines: the rows read are the lines written. Returns what became of them."""
    rng, counts = random.Random(seed), Counter()
    for kind in KINDS:
        names, rows = [*READERS[kind].fields, "x"], []
        for _ in range(number // len(KINDS)):
            odd = {name: rng.choice(ODD) for name in rng.sample(names, rng.randrange(min(4, len(names) + 1)))}
            rows.append({**WELL_FORMED[kind], **odd} if rng.random() < 0.8 else rng.choice([odd, *ODD]))
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = read(kind, path)
        counts["read"] += (found := sum(rows for rows, _ in pairs))
        counts["skipped"] += (lost := sum(rows for rows, record in pairs if isinstance(record, Skipped)))
        counts["used"] += sum(rows for rows, record in pairs if not isinstance(record, Skipped))
        # Of an object without a prompt, safety prompts read each value as a row.
        assert found == len(rows) or (kind == "safety_prompts" and found > len(rows)), kind
        assert 0 < lost <= found
    assert counts["read"] == counts["used"] + counts["skipped"]
    return counts


def fuzz_files(folder: Path, number: int, seed: int = 0) -> Counter[str]:
    """Well-formed files of every format, then damaged: they are read or refused in one line. Rows untouched stay."""
    rng, counts = random.Random(seed), Counter()
    rows = [{"question": f"问题{n}，发热、咳嗽的病人", "answer": f"回答{n}：多喝水，注意休息"} for n in range(40)]
    for count in range(number):
        suffix = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".zip", ".jsonl.gz", ".json.zst"])
        path = write_rows(folder / str(count) / f"rows{suffix}", rows)
        data = bytearray(path.read_bytes())
        if suffix in (".jsonl", ".json", ".csv", ".tsv") and rng.random() < 0.4:
            text = data.decode()
            for _ in range(rng.randrange(1, 6)):
                place = rng.randrange(len(text))
                text = text[:place] + rng.choice(PIECES) + text[place + rng.randrange(3) :]
            data = bytearray(text.encode(rng.choice(ENCODINGS), "replace" if rng.random() < 0.5 else "ignore"))
        else:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = data[: rng.randrange(1, len(data))] if rng.random() < 0.3 else data
        path.write_bytes(data)
        try:
            pairs = read("chat", path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            counts["refused"] += 1
            continue
        counts["read"] += sum(rows for rows, _ in pairs)
        counts["skipped"] += sum(rows for rows, record in pairs if isinstance(record, Skipped))
        counts["files read"] += 1
    return counts


def test_mutated_rows_and_files_are_read_skipped_or_refused(tmp_path):
    assert fuzz_rows(tmp_path, 3000)["used"] > 1000
    counts = fuzz_files(tmp_path, 60)
    assert counts["files read"] > 20 and counts["refused"] > 5 and counts["read"] > counts["skipped"] > 0


# ------------------------------------------------------------------------------------------ one fault, one lost row

GOOD = [{"question": f"问{n}", "answer": f"答{n}"} for n in range(5)]
LINES = [json.dumps(row, ensure_ascii=False) for row in GOOD]


def outcome(path: Path, **columns: str) -> list:
    return [
        content(record)[0] if isinstance(record, Chat) else record.reason for record in records("chat", path, **columns)
    ]


@pytest.mark.parametrize(
    "bad",
    [
        '{"question": "他说"好"了", "answer": "b"}', '{"question": "5" 高", "answer": "b"}', '{"question": "a", "answer": }',
        "{'question': 'a'}", '{"question": "a" "answer": "b"}', '{"question": "a", "answer": "b"}}',
        '{"question": "a", "answer": "b\\"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("between", [", ", ",\n  "])
def test_a_broken_element_of_an_array_costs_itself_alone(tmp_path, bad, between):
    path = tmp_path / "rows.json"
    path.write_text("[" + between.join([*LINES[:3], bad, *LINES[3:]]) + "]")
    good = [text for text in outcome(path) if text.startswith("问")]
    assert good == ["问0", "问1", "问2", "问3", "问4"] and "broken JSON" in outcome(path)


@pytest.mark.parametrize(
    "bad", ['{"c": [{"v": "一"}]', '{"c": [{"v": "一"}', '{"c": [{"v": "一}]}', '{"c": [{"v": "一"]}', '{"c": [], ']
)
def test_damage_costs_time_for_what_it_damages_alone(tmp_path, monkeypatch, bad):
    """50 damaged elements among 5,000: the others are read, and nowhere near 50 times in search of an end."""
    signs, next_sign, path = [], Elements._next_sign, tmp_path / "rows.json"
    monkeypatch.setattr(Elements, "_next_sign", lambda self: signs.append(next_sign(self)) or signs[-1])
    good = [f"第{n}问" for n in range(5000)]
    rows = [json.dumps({"c": [{"v": text}, {"v": "答" * 200}]}, ensure_ascii=False) for text in good]
    rows[50::100], good[50::100] = [bad] * 50, ["broken JSON"] * 50
    path.write_text(f"[{', '.join(rows)}]")
    found = records("chat", path, question="c[0].v", answer="c[1].v")
    found = [content(record)[0] if isinstance(record, Chat) else record.reason for record in found]
    assert found == good and len(signs) < 3 * sum(map(len, (JSON_SIGN.findall(row) for row in rows)))


def test_nan_surrogates_and_depth_cost_their_elements_alone(tmp_path):
    path = tmp_path / "rows.json"
    odd = ['{"question": "\\ud83d", "answer": "b"}', '{"question": NaN, "answer": "b"}', "[" * 10**6 + "]" * 10**6]
    path.write_text("[" + ", ".join([LINES[0], odd[0], LINES[1], odd[1], LINES[2], odd[2], LINES[3]]) + "]")
    reasons = ["not Unicode", "wrong type", "broken JSON"]
    assert outcome(path) == ["问0", reasons[0], "问1", reasons[1], "问2", reasons[2], "问3"]


@pytest.mark.parametrize("end", ["", "\nx,y"])
def test_a_quotation_mark_that_is_not_closed_costs_its_line_alone(tmp_path, end):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n问0,答\n问1,"答\n问2,"答，\n续"\n问3,答"好"\n问4,答' + end)
    found = read("chat", path)
    unclosed = "a quotation mark is not closed"
    assert [record.id.rsplit(":")[1] for _, record in found][:5] == ["2", "3", "4", "6", "7"]
    assert outcome(path)[:5] == ["问0", unclosed, "问2", "问3", "问4"] and len(found) == 5 + bool(end)


@pytest.mark.parametrize("encoding", ["big5", "gb18030", "utf-16", "utf-8-sig", "utf-32"])
def test_national_encodings_are_told_apart(tmp_path, encoding):
    simplified = encoding == "gb18030"
    rows = ("感冒的病人要休息吗？,多喝水。" if simplified else "感冒的病人要休息嗎？,多喝水，治療發熱。").split(",")
    path = tmp_path / "rows.csv"
    path.write_bytes(f"question,answer\n{rows[0]},{rows[1]}\n".encode(encoding))
    assert [content(record) for record in records("chat", path)] == [tuple(rows)]


def test_replacement_characters_and_cut_ones_leave_a_file_utf_8(tmp_path):
    lines = ["建议多喝水休息\ufffd\ufffd\ufffd".encode(), "必要时复查血常规，".encode()[:-1]]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines) + b"\n")
    assert [content(r) for r in records("text", tmp_path)] == [
        "建议多喝水休息\ufffd\ufffd\ufffd",
        "必要时复查血常规\ufffd",
    ]


def test_a_member_that_zipfile_cannot_unpack_is_refused(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", LINES[0])
    data = bytearray(path.read_bytes())
    data[8] = data[data.rfind(b"PK\1\2") + 10] = 9  # Deflate64, which Windows writes for large files
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows\.zip: cannot be unpacked \(That compression method is not supported\)"):
        read("chat", path)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zip", ".xlsx"])
def test_a_decompression_bomb_is_refused_early(tmp_path, suffix):
    path, zeros = tmp_path / f"rows.jsonl{suffix}", bytes(1 << 20)
    if suffix == ".gz":
        with gzip.open(path, "wb") as stream:
            stream.writelines([zeros] * 200)
    elif suffix == ".zst":
        with zstandard.open(path, "wb") as stream:
            [stream.write(zeros) for _ in range(200)]
    else:
        path = tmp_path / f"rows{suffix}"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("rows.jsonl", "w") as stream:
            [stream.write(zeros) for _ in range(200)]
    with pytest.raises(UserError, match=r"unpacks to more than 100 times its size.*max_expansion"):
        read("chat", path)


def test_what_is_too_long_is_skipped_in_pieces(tmp_path, monkeypatch):
    for module in ("files", "tables"):
        monkeypatch.setattr(f"qilin_med.data.read.{module}.LONGEST", 1000)
    monkeypatch.setattr("qilin_med.data.read.tables.READ_CHARACTERS", 300)
    held, read_on = [], Elements._read_on
    monkeypatch.setattr(Elements, "_read_on", lambda self, n: held.append(len(self._text)) or read_on(self, n))
    long = json.dumps({"question": 'x"[{' * 5000, "answer": "b"})
    for name, text in {
        "a.jsonl": "\n".join([LINES[0], long, LINES[1]]),
        "b.json": f"[{LINES[0]}, {long}, {LINES[1]}]",
    }.items():
        (tmp_path / name).write_text(text)
        first, reason, last = outcome(tmp_path / name)
        assert (first, last) == ("问0", "问1") and "longer than" in reason
    assert 1000 < max(held) < 2000  # characters in memory


# ------------------------------------------------------------------------------------------------------- folders


def test_files_that_no_reader_takes_are_named_once(tmp_path, capsys):
    for name in ("a.jsonl", "b.pdf", "c/d.docx", "README.md", "LICENSE", ".hidden", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES[0])
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        [archive.writestr(name, LINES[0]) for name in ("a.jsonl", "f.pdf", "README.md")]
    files.name_unread.cache_clear()
    for _ in range(2):
        raw_files(source("chat", tmp_path))
    line, packed = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: not read: b.pdf, gone, c/d.docx; expected .jsonl")
    assert packed.startswith(f"{tmp_path}/e.zip: not read: f.pdf; expected .jsonl")


def test_links_out_of_a_data_folder_are_refused_and_loops_are_not_followed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(LINES[0])
    (data / "loop").symlink_to(data)
    assert [path.name for path in raw_files(source("chat", data))] == ["a.jsonl"]
    (tmp_path / "secret.jsonl").write_text(LINES[0])
    (data / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match=r"data/b\.jsonl: a link out of the data folder, to .*secret\.jsonl"):
        raw_files(source("chat", data))
    assert len(records("chat", data / "b.jsonl")) == 1  # what the configuration names itself may be a link


SHEET = (
    '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{}</sheetData></worksheet>'
)


@pytest.mark.parametrize("sheet", ["<x", SHEET.format('<row r="900000000"/>')])
def test_a_book_without_a_sound_sheet_is_refused(tmp_path, sheet):
    book = openpyxl.Workbook()
    book.save(tmp_path / "rows.xlsx")
    with zipfile.ZipFile(tmp_path / "rows.xlsx") as whole, zipfile.ZipFile(tmp_path / "bad.xlsx", "w") as bad:
        for name in whole.namelist():
            bad.writestr(name, sheet if "sheet1" in name else whole.read(name))
    with pytest.raises(UserError, match=r"bad\.xlsx: no readable \.xlsx"):
        read("chat", tmp_path / "bad.xlsx")


def test_columns_and_rows_of_odd_shapes(tmp_path):
    assert outcome_of(tmp_path, [{"a": {"q": "甲", "r": ["乙", "丙"]}}], question="a.q", answer="a.r[1]") == [
        ("甲", "丙")
    ]
    assert outcome_of(tmp_path, [["甲", "乙"]], question="[0]", answer="[1]") == [("甲", "乙")]
    assert outcome_of(tmp_path, [{"问题(中文)": "甲", "b": "乙"}], question="问题(中文)", answer="b") == [("甲", "乙")]
    (tmp_path / "keyed.json").write_text(json.dumps({"1": GOOD[0], "2": GOOD[1]}, indent=1))
    keyed = source("chat", tmp_path / "keyed.json").model_copy(update={"rows": "*"})
    found = [content(record) for _, record in read_raw(keyed, tmp_path / "keyed.json")]
    assert found == [("问0", "答0"), ("问1", "答1")]
    (tmp_path / "listed.jsonl").write_text(
        json.dumps({"list": [{"q": "甲", "a": ["乙", "丙"]}, {"q": "丁", "a": ["戊", "己"]}]})
    )
    listed = source("chat", tmp_path / "listed.jsonl", question="q", answer="a").model_copy(update={"rows": "list"})
    found = [record.id.rsplit(":")[1] for _, record in read_raw(listed, tmp_path / "listed.jsonl")]
    assert found == ["1~1", "1~1~2", "1~2", "1~2~2"]
    with pytest.raises(UserError, match=r"columns\.answer is 'b\[', which is no JMESPath expression"):
        raw_files(source("chat", tmp_path, question="a", answer="b["))


def outcome_of(folder: Path, rows: list, **columns: str) -> list:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = records("chat", path, **columns)
    assert found[0] == Chat(f"{path}:1", chat(*content(found[0])))
    return [content(record) for record in found]


if __name__ == "__main__":
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        print("rows:", dict(fuzz_rows(Path(scratch), int(sys.argv[1]), seed=1)), f"{time.monotonic() - start:.1f} s")
        print("files:", dict(fuzz_files(Path(scratch), int(sys.argv[2]), seed=1)), f"{time.monotonic() - start:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
