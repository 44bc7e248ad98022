import gzip
import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from types import GeneratorType

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from qilin_med.config.corpus import RawFiles, RawSource
from qilin_med.config.experiment import KINDS, DataSource
from qilin_med.data.read.files import HEAD_BYTES
from qilin_med.data.read.readers import READERS, raw_files, read_raw
from qilin_med.data.read.records import read_chats, read_documents, read_preferences
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Message, Preference, Question, Skipped


def source(kind: str, *paths: Path, **columns: str) -> RawFiles:
    return RawFiles(name="x", kind=kind, paths=[str(path) for path in paths], columns=columns)


def read(kind: str, *paths: Path, **columns: str) -> list:
    """(rows, record) of all files."""
    files = source(kind, *paths, **columns)
    return [pair for file in raw_files(files) for pair in read_raw(files, file)]


def records(kind: str, *paths: Path, **columns: str) -> list:
    return [record for _, record in read(kind, *paths, **columns)]


def chat(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


def content(record):
    """What a record says, without its place."""
    if isinstance(record, Chat):
        return tuple(message.content for message in record.messages)
    if isinstance(record, Preference):
        return (*(message.content for message in record.prompt), record.chosen, record.rejected)
    return record.text if isinstance(record, Document) else record.reason


def test_every_kind_has_a_reader():
    assert set(READERS) == set(KINDS)


# ------------------------------------------------------------------------------------------------- rows of each kind


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " 正文\n二 "}, " 正文\n二 "),
        ("text", {"text": ["一", "二"]}, "一\n二"),
        ("huatuo", {"questions": ["发热", "发烧"], "answers": ["喝水"], "label": "x"}, ("发热", "喝水")),
        ("huatuo", {"questions": [["发热", "发烧"], ["热"]], "answers": ["喝水", "喝水"]}, ("发热", "喝水")),
        ("huatuo", {"instruction": ["发热"], "input": "", "output": ["喝水"], "id": ""}, ("发热", "喝水")),
        ("huatuo", {"instruction": "发热", "input": "三天", "output": "喝水"}, ("发热\n三天", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "三天了", "answer": "喝水"}, ("发热？\n三天了", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "无", "answer": "喝水"}, ("发热？", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "", "answer": "喝水"}, ("发热？", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "孩子发热三天", "answer": "喝水"}, ("孩子发热三天", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "发热", "answer": "喝水"}, ("发热？", "喝水")),
        ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ("a", "b")),
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("a", "b")),
        ("chat", {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}, ("d", "e", "a\nb", "c")),
        ("chat", {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}, tuple("abcd")),
        ("chat", ["病人：a", "医生：b", "医生: c", "患者：d", "医生：e"], ("a", "b\nc", "d", "e")),
        ("chat", {"question": "a", "answer": "b"}, ("a", "b")),
        ("chat", {"input": "病人：a\\n医生：b\\n病人：c\\n医生：", "target": "d"}, tuple("abcd")),
        ("chat", {"input": "a：b", "output": "c"}, ("a：b", "c")),
        ("instruct_chat", {"input": ["a", "c"], "output": ["b", "d"]}, tuple("abcd")),
        ("instruct_chat", {"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:b\nHuman：c\nAssistant：", "input": "", "output": "d"},
         tuple("abcd")),
        ("multiturn_chat", {"instruction": " <user>: a <bot>: b <user>: c", "output": "d", "input": ""}, tuple("abcd")),
        ("multiturn_chat", {"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
        ("multiturn_chat", {"instruction": "Human: a: Human: b\nc\nAssistant:", "output": "d"}, ("a: Human: b\nc", "d")),
        ("hc3", {"question": "a", "human_answers": ["b"], "chatgpt_answers": ["c", "d"]}, ("a", "c")),
        ("hc3", {"question": "a", "human_answers": ["", "b"], "chatgpt_answers": [" "]}, ("a", "b")),
        ("safety_prompts", {"prompt": "a", "response": "b", "type": "t"}, ("a", "b")),
        ("preference", {"question": "a", "response_chosen": "b", "response_rejected": "c"}, ("a", "b", "c")),
        ("preference", {"prompt": "a", "messages": [], "chosen": [{"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}, ("a", "b", "c")),
        ("zhongjing", {"instruction": "a", "input": "b", "output": ["c", "d"]}, ("a\nb", "c", "d")),
        ("zhongjing", {"query": "e", "history": "[['a', 'b']]", "rank1": "c", "rank2": "d", "rank3": "", "rank4": "c"},
         ("a", "b", "e", "c", "d")),
        ("zhongjing", {"query": "e", "history": "[]", "rank1": "c", "rank2": "x", "rank3": "d"}, ("e", "c", "d")),
    ],
)  # fmt: skip
def test_a_row_of_each_kind(write_lines, kind, row, expected):
    path = write_lines(row)
    [(rows, record)] = read(kind, path)
    assert (rows, record.id, content(record)) == (1, f"{path}:1", expected)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("text", {"text": " "}, "empty text"),
        ("text", {"content": "a"}, "no field 'text'"),
        ("text", {"text": 3}, "wrong type"),
        ("huatuo", {"questions": [], "answers": ["a"]}, "empty question"),
        ("huatuo", {"questions": ["a"], "answers": []}, "empty answer"),
        ("huatuo", {"questions": ["a"], "answers": [{"x": 1}]}, "wrong type"),
        ("huatuo", {"ask": "a"}, "unknown layout"),
        ("department_qa", {"title": "a", "answer": "b"}, "unknown layout"),
        ("department_qa", {"title": "a", "ask": "无", "answer": " "}, "empty answer"),
        ("chat", {"ask": "a"}, "unknown layout"),
        ("chat", ["a", "b"], "unknown layout"),
        ("chat", [], "no answer"),
        ("chat", ["病人：a"], "no answer"),
        ("chat", ["医生：a", "病人：b"], "roles out of order"),
        ("chat", {"conversation": ["a"]}, "unknown layout"),
        ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "unknown role"),
        ("chat", {"messages": [{"content": "a"}]}, "unknown role"),
        ("chat", {"question": "\ud83d", "answer": "a"}, "not Unicode"),
        ("chat", 7, "unknown layout"),
        ("instruct_chat", {"input": ["a", "b"], "output": ["c"]}, "not as many answers as questions"),
        ("instruct_chat", {"input": ["a"]}, "unknown layout"),
        ("instruct_chat", ["病人：a", "医生：b"], "unknown layout"),
        ("multiturn_chat", {"instruction": "x\nHuman:a\nAssistant:", "output": "d"}, "text before the first turn"),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:b", "output": "d"}, "roles out of order"),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:", "output": ""}, "empty answer"),
        ("hc3", {"question": "a", "human_answers": [], "chatgpt_answers": []}, "empty answer"),
        ("hc3", {"question": "a", "answer": "b"}, "unknown layout"),
        ("safety_prompts", {"prompt": "a"}, "unknown layout"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ("preference", {"prompt": "a", "chosen": "b"}, "unknown layout"),
        ("zhongjing", {"instruction": "a", "output": ["b"]}, "unknown layout"),
        ("zhongjing", {"query": "a", "history": "__import__('os')", "rank1": "b", "rank2": "c"}, "unreadable history"),
        ("zhongjing", {"query": "a", "history": "", "rank1": "b", "rank2": "b"}, "chosen and rejected are the same"),
        ("meddialog", ["医生：a"], "no answer"),
        ("meddialog", ["a"], "unknown layout"),
        ("meddialog", {"x": 1}, "unknown layout"),
        ("xywy_kg", {"desc": "a"}, "no name"),
        ("xywy_kg", {"name": "a", "symptom": [" "], "_id": {"$oid": "1"}}, "nothing but a name"),
        ("39health_kg", {"name": "a", "part": "b", "rate": "收费标准不一致"}, "shifted cells"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, kind, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    [(rows, record)] = read(kind, path)
    assert (rows, record.id, record.reason) == (1, f"{path}:1", reason)
    assert json.loads(record.raw) == row


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_raises_and_none_vanishes(tmp_path, kind):
    """Every field with every odd value, alone and beside well-formed ones."""
    odd = [None, 3, 1.5, True, "", "x", "\ud83d", [], [[]], ["a"], [["a", "b"]], [{"a": 1}], {}, {"a": []}, [None, 2]]
    names = [name for name in READERS[kind].fields if len(name) > 1] or ["x"]
    rows = [*odd, *({name: value} for name in names for value in odd)]
    rows += [{**dict.fromkeys(names, other), name: value} for name in names for value in odd for other in ("b", ["b"])]
    path = tmp_path / ("rows.txt" if kind == "cpubmed_kg" else "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, "[" * 5000]))
    assert sum(count for count, _ in read(kind, path)) == len(rows) + 1


def test_several_answers_are_several_chats_of_one_row(write_lines):
    path = write_lines({"questions": ["a", "b"], "answers": ["c", "d", "c"]}, {"questions": ["e"], "answers": ["f"]})
    assert read("huatuo", path) == [
        (1, Chat(f"{path}:1", chat("a", "c"))),
        (0, Chat(f"{path}:1~2", chat("a", "d"))),
        (1, Chat(f"{path}:2", chat("e", "f"))),
    ]


def test_columns_rename_and_unknown_fields_are_refused(write_lines):
    path = write_lines({"question": "a", "raw_anwser": "b"})
    assert records("chat", path, answer="raw_anwser") == [Chat(f"{path}:1", chat("a", "b"))]
    with pytest.raises(UserError, match=r"columns maps 'reply'.*kind hc3.*question, human_answers, chatgpt_answers"):
        raw_files(source("hc3", path, reply="x"))


# ---------------------------------------------------------------------------------------------------- how rows lie


JSON_ROWS = [{"question": "发热怎么办？", "answer": "多喝水\u2028休息"}, {"question": "咳嗽", "answer": "喝\u0085水"}]
EXPECTED = [chat("发热怎么办？", "多喝水\u2028休息"), chat("咳嗽", "喝\u0085水")]


def lines(rows=JSON_ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)


def test_lines_arrays_and_tables_give_the_same_chats(tmp_path):
    table = [["question", "answer", ""], *(list(row.values()) for row in JSON_ROWS)]
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "b.json").write_text(lines())
    (tmp_path / "c.json").write_text(json.dumps(JSON_ROWS, ensure_ascii=False, indent=1))
    (tmp_path / "d.json").write_text(json.dumps(JSON_ROWS))
    (tmp_path / "e.csv").write_text("\n\n".join(",".join(row) for row in table))
    (tmp_path / "f.tsv").write_text("\n".join("\t".join(row) for row in table))
    book = openpyxl.Workbook()
    for row in ([], *table, [None]):
        book.active.append(row)
    book.save(tmp_path / "g.xlsx")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(JSON_ROWS), tmp_path / "h.parquet")
    places = [":1", ":2", ":1", ":2", "#0", "#1", "#0", "#1", ":3", ":5", ":2", ":3", ":3", ":4", "#0", "#1"]
    found = records("chat", tmp_path)
    assert [record.messages for record in found] == EXPECTED * 8
    assert [record.id[len(str(tmp_path)) :] for record in found] == [
        f"/{name}{place}" for name, place in zip(
            [name for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.csv", "f.tsv", "g.xlsx", "h.parquet")
             for _ in range(2)], places, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".array.json", ".csv"])
def test_encodings_give_the_same_chats(tmp_path, encoding, suffix):
    text = {
        ".csv": "question,answer\r\n发热怎么办？,多喝水\u2028休息\r\n咳嗽,喝\u0085水\r\n",
        ".array.json": json.dumps(JSON_ROWS, ensure_ascii=False),
    }
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(text.get(suffix, lines()).encode(encoding))
    assert [record.messages for record in records("chat", path)] == EXPECTED


def test_one_bad_byte_is_marked_and_does_not_change_the_encoding(tmp_path):
    for encoding in ("utf-8", "gb18030"):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes(("发热怎么办\n" * 9).encode(encoding) + b"\xff\n" + "咳嗽\n".encode(encoding))
        assert [record.text for record in records("text", path)] == ["发热怎么办"] * 9 + ["\ufffd", "咳嗽"]


def test_the_encoding_is_judged_by_the_start_alone(tmp_path):
    path = tmp_path / "long.txt"
    line = "发热怎么办\n".encode()
    path.write_bytes(line * (HEAD_BYTES // len(line) + 2) + "咳嗽\n".encode("gb18030"))
    *same, last = records("text", path)
    assert {record.text for record in same} == {"发热怎么办"} and "\ufffd" in last.text


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        middle = len(data) // 2
        data = b"".join(zstandard.ZstdCompressor().compress(half) for half in (data[:middle], data[middle:]))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["chat", "cpubmed_kg", "exam"])
def test_packed_files_give_the_same_records_as_plain_ones(tmp_path, kind):
    name, data = {
        "chat": ("rows.jsonl", lines([*JSON_ROWS, {"x": 1}]) * 50),
        "cpubmed_kg": ("rows.tsv", "肺炎@@疾病\t症状\t发热@@症状\n坏\n" * 50),
        "exam": ("rows.csv", "Question,Options,Answer\n题,\"A 一\nB 二\",A\n题,A 一,B\n" * 50),
    }[kind]  # fmt: skip
    (tmp_path / "plain").mkdir()
    plain = pack(tmp_path / "plain" / name, data.encode())
    expected = [(rows, record.id[len(str(plain)) :], record) for rows, record in read(kind, plain)]
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("inner/" + name, data)
        archive.writestr("inner/b/" + name + ".gz", gzip.compress(data.encode()))
        archive.writestr("README.md", "x")
        archive.writestr("__MACOSX/" + name, "x")
    for packed in (tmp_path / f"{name}.gz", tmp_path / f"{name}.zst"):
        pack(packed, data.encode())
        found = read(kind, packed)
        assert [(rows, record.id[len(str(packed)) :]) for rows, record in found] == [pair[:2] for pair in expected]
        assert [same(record) for _, record in found] == [same(record) for *_, record in expected]
    in_zip = read(kind, tmp_path / "rows.zip")
    places = [tmp_path / f"rows.zip!inner/{inner}{name}" for inner in ("b/", "")]
    assert Counter(record.id for _, record in in_zip) == Counter(
        f"{place}{end}{id_}" for place, end in zip(places, (".gz", ""), strict=True) for _, id_, _ in expected
    )
    assert Counter(same(record) for _, record in in_zip) == Counter(same(record) for *_, record in expected * 2)


def same(record):
    """A record without its place."""
    return type(record)("", *(getattr(record, name) for name in record.__slots__[1:]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl.gz", gzip.compress(b"x" * 9, mtime=0)[:-6], "cannot be unpacked"),
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("rows.jsonl.zst", zstandard.ZstdCompressor().compress(random.Random(1).randbytes(9999))[:-9], "cannot be unpacked"),
        ("rows.jsonl.zst", b"no zstandard", "cannot be unpacked"),
        ("rows.zip", b"no zip", "no readable .zip"),
        ("rows.xlsx", b"no xlsx", "no readable .xlsx"),
        ("rows.parquet", b"no parquet", "no readable .parquet"),
        ("rows.json", b'[{"question": "a", "answer": "b"}, {"x"', "not valid JSON after 1 whole rows"),
        ("rows.json", b"nothing", "not valid JSON after 0 whole rows"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.pdf", b"x", "unknown kind of file '.pdf'"),
        ("folder", None, "no usable file in this folder"),
        ("missing", None, "no such data file or folder"),
    ],
)  # fmt: skip
def test_useless_files_are_refused_by_name(tmp_path, name, data, message):
    path = tmp_path / name
    (tmp_path / "folder").mkdir()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read("chat", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_archive_without_usable_members_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", "x")
    with pytest.raises(UserError, match=r"a\.zip: no usable file in this archive; expected \.txt, \.tsv|\.tsv, \.txt"):
        read("cpubmed_kg", tmp_path / "a.zip")


def test_folders_give_what_the_kind_reads_in_name_order(write_lines, tmp_path):
    for name in ("b.csv", "a/z.jsonl.gz", "a/y.txt", ".hidden.json", ".git/c.json", "README.md", "LICENSE", "a.zip",
                 "manifest.json", "d.pdf", "readme.json", "dir.json/e.json"):  # fmt: skip
        write_lines({}, name=name)
    names = [str(path.relative_to(tmp_path)) for path in raw_files(source("chat", tmp_path))]
    assert names == ["a/z.jsonl.gz", "a.zip", "b.csv", "dir.json/e.json"]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "rows.json"
    row = json.dumps({"question": "a", "answer": "b"})
    path.write_text(f"[{row}, " + ",".join([row] * 5000) + ", broken")
    pairs = read_raw(source("chat", path), path)
    assert isinstance(pairs, GeneratorType)
    assert next(pairs) == (1, Chat(f"{path}#0", chat("a", "b")))
    with pytest.raises(UserError, match="after 5001 whole rows"):
        list(pairs)


@pytest.mark.parametrize("good_first", [True, False])
def test_a_json_file_of_lines_may_hold_a_broken_one(tmp_path, good_first):
    good, broken = json.dumps({"question": "a", "answer": "b"}), '{"question": "a", "ans'
    path = tmp_path / "rows.json"
    path.write_text("\n".join([good, broken, good] if good_first else [broken, good, good]))
    found = records("chat", path)
    assert Counter(type(record) for record in found) == {Chat: 2, Skipped: 1}
    assert found[good_first] == Skipped(f"{path}:{good_first + 1}", "broken JSON", broken)


def test_an_element_nested_too_deep_is_skipped(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[" * 3000 + "]" * 2999 + ', {"question": "a", "answer": "b"}]')
    deep, good = records("chat", path)
    assert isinstance(deep, Skipped) and good.id == f"{path}#1"


def test_one_object_is_one_row(tmp_path):
    path = tmp_path / "guide.json"
    path.write_text(json.dumps({"title": "t", "content": "正文"}, indent=1))
    assert read("text", path, text="content") == [(1, Document(f"{path}#0", "正文"))]


def test_tables_set_spilled_rows_aside(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer,,\na,"b\nb",,\na,b,,c\na\n\n,,,\nc,d,,\ne,"f')
    assert read("chat", path) == [
        (1, Chat(f"{path}:2", chat("a", "b\nb"))),
        (1, Skipped(f"{path}:4", "more cells than columns", "a,b,,c")),
        (1, Skipped(f"{path}:5", "fewer cells than columns", "a")),
        (1, Chat(f"{path}:8", chat("c", "d"))),
        (1, Chat(f"{path}:9", chat("e", "f"))),
    ]


def test_a_quotation_mark_that_is_never_closed_costs_no_more_than_its_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\na,"b\n' + "c,d\n" * (1 << 20) + "e,f\n" * 4)
    (_, broken), *rest = read("chat", path)
    assert (broken.id, broken.reason) == (f"{path}:2", "a quotation mark is not closed")
    assert rest and rest[-1][1].messages == chat("e", "f")


def test_every_sheet_of_a_book_is_read(tmp_path):
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet("二")):
        sheet.append(["question", "answer"])
        sheet.append(["a", 3.0])
    book.save(tmp_path / "a.xlsx")
    assert [(record.id.rsplit("!")[1], record.messages) for record in records("chat", tmp_path)] == [
        ("Sheet:2", chat("a", "3")),
        ("二:2", chat("a", "3")),
    ]


def test_safety_prompts_are_keyed_by_category_or_a_list(tmp_path):
    rows = [{"prompt": str(n), "response": f"答{n}", "type": "t"} for n in range(5)]
    for indent in (None, 1):
        path = tmp_path / f"{indent}.json"
        keyed = {"Insult": rows[:2], "a.b": rows[2:4], "Empty": [], "note": "x", "one": rows[4]}
        path.write_text(json.dumps(keyed, indent=indent))
        *before, note, last = read("safety_prompts", path)
        assert before == [(1, Chat(f"{path}#{n}", chat(str(n), f"答{n}"))) for n in range(4)]
        assert note == (1, Skipped(f"{path}#4", "unknown layout", "x"))
        assert last == (1, Chat(f"{path}#5", chat("4", "答4")))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert len(records("safety_prompts", tmp_path / "list.json")) == 5


# ----------------------------------------------------------------------------------------------------------- text


def test_lines_are_joined_until_a_document_is_long_enough(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("一二三\r\n\r\n四五六七\n八九十百千万\n  \n亿".encode("gb18030"))
    joined = RawSource(
        name="x", kind="text", paths=[str(path)], stage="pretraining", licence="x", join_lines=6
    )  # fmt: skip
    assert list(read_raw(joined, path)) == [
        (2, Document(f"{path}:1", "一二三\n四五六七")),
        (1, Document(f"{path}:4", "八九十百千万")),
        (1, Document(f"{path}:6", "亿")),
    ]
    assert [rows for rows, _ in read("text", path)] == [1] * 4


# ---------------------------------------------------------------------------------------------------------- exams

AB = (("A", "一"), ("B", "二"))


@pytest.mark.parametrize(
    ("row", "options", "answer"),
    [
        ({"Options": "A 一\nB 二", "Answer": "B"}, AB, "B"),
        ({"Options": "A 一\\nB 二", "Answer": "ba"}, AB, "AB"),
        ({"Options": "Ａ．一\r\nＢ、二\n", "Answer": "Ｂ，Ａ"}, AB, "AB"),
        ({"Options": "A：一\n\nB: 二", "Answer": "A、B"}, AB, "AB"),
        ({"Options": "A p53 Ⅱ\nB C反应蛋白\nA级", "Answer": "A"}, (("A", "p53 Ⅱ"), ("B", "C反应蛋白\nA级")), "A"),
        ({"choices": ["一", "二"], "answer": ["b"]}, AB, "B"),
        ({"choices": {"b": "二", "a": "一"}, "answer": "A B"}, AB, "AB"),
        ({"A": "一", "B": "二", "C": "", "answer": "A"}, AB, "A"),
        ({"A": "0", "B": 2, "answer": "A"}, (("A", "0"), ("B", "2")), "A"),
    ],
)
def test_options_and_answers_in_every_layout(write_lines, row, options, answer):
    path = write_lines({"Question": " 题 ", **row})
    assert read("exam", path) == [(1, Question(f"{path}:1", "题", options, answer))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"Question": " "}, "no stem"),
        ({"Question": "nan"}, "no stem"),
        ({"Options": ""}, "no options"),
        ({"Options": None}, "no options"),
        ({"Options": []}, "no options"),
        ({"Options": "一\n二"}, "options without letters"),
        ({"Options": "A 一\nA 二"}, "an option letter is given twice"),
        ({"Options": "A 一\nB \nC 三"}, "empty option"),
        ({"Options": "A 一\nB"}, "empty option"),
        ({"Options": ["一", ""]}, "empty option"),
        ({"Options": {"A": "", "B": "二"}}, "empty option"),
        ({"Answer": "AC"}, "answer is not among the options"),
        ({"Answer": "甲"}, "answer is no letter"),
        ({"Answer": ""}, "no answer"),
        ({"Answer": "nan"}, "no answer"),
        ({"Answer": 1}, "unknown layout"),
        ({"Options": 3, "x": 1}, "no options"),
    ],
)
def test_questions_that_cannot_be_used(write_lines, row, reason):
    good = {"Question": "题", "Options": "A 一\nB 二", "Answer": "A"}
    path = write_lines(good, {**good, **row})
    (_, question), (rows, record) = read("exam", path)
    assert isinstance(question, Question) and (rows, record.id, record.reason) == (1, f"{path}:2", reason)


def test_cmexam_tables_tell_facets_and_explanations(tmp_path):
    head = "Question,Options,Answer,Explanation,Disease Group,Clinical Department,Difficulty level\r\n"
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (head + r"题\n干,A 一\nB 二,B,因\n为,nan,儿科,3").encode())
    facets = (("Clinical Department", "儿科"), ("Difficulty level", "3"))
    assert records("exam", path) == [Question(f"{path}:2", "题\n干", AB, "B", "因\n为", facets)]


@pytest.mark.parametrize("head", ["id,question,A,B", "id,question,A,B,answer"])
def test_a_file_that_tells_no_answers_keeps_its_questions(tmp_path, head):
    rows = ["0,$\\nu$ 题,一,二", "1,题,一,二"]
    end = "," if "answer" in head else ""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("test/x.csv", "\n".join([head, *(row + end for row in rows)]))
        archive.writestr("val/x.csv", "id,question,A,B,answer\n0,题,一,二,A\n1,题,一,二,\n")
    place = f"{tmp_path}/a.zip!"
    first, second, told, untold = records("exam", tmp_path)
    assert first == Question(f"{place}test/x.csv:2", "$\\nu$ 题", AB, "")
    assert (second.answer, told) == ("", Question(f"{place}val/x.csv:2", "题", AB, "A"))
    assert (untold.id, untold.reason) == (f"{place}val/x.csv:3", "no answer")


# ---------------------------------------------------------------------------------------------------------- graphs


def test_triples_become_a_passage_for_each_head(tmp_path):
    path = tmp_path / "graph.tsv"
    path.write_text("肺炎@@疾病\t症状\t发热@@症状\n肺炎@@疾病\t病因\t细菌@@其他\n肺炎@@疾病\t症状\t咳嗽@@症状\n感冒\t症状\t发热\n"
                    "肺炎@@疾病\t症状\t发热@@症状\n")  # fmt: skip
    found = {record.id[len(str(path)) :]: (rows, record.text) for rows, record in read("cpubmed_kg", path)}
    rows, text = found.pop(":1")
    first, second, end = text.split("。")
    assert rows == 4 and text.count("肺炎（疾病）") == 1 and text.count("肺炎") == 2 and end == ""
    assert "症状" in first and "发热、咳嗽" in first and "病因" in second and "细菌" in second
    rows, text = found.pop(":4")
    assert rows == 1 and all(word in text for word in ("感冒", "症状", "发热")) and not found


def test_grouping_needs_no_order_and_wordings_vary(tmp_path):
    triples = [(f"病{n % 97}", f"关系{n % 3}", f"尾{n}") for n in range(2000)]
    lines_ = [f"{head}@@疾病\t{relation}\t{tail}@@症状" for head, relation, tail in triples] + ["坏\t行"]
    texts = []
    for seed in (None, 5):
        if seed:
            random.Random(seed).shuffle(lines_)
        path = tmp_path / f"{seed}.tsv"
        path.write_text("\n".join(lines_))
        pairs = read("cpubmed_kg", path)
        assert sum(rows for rows, _ in pairs) == 2001 and len(pairs) == 98
        documents = [record for _, record in pairs if isinstance(record, Document)]
        assert {int(document.id.rsplit(":")[1]) for document in documents} == first_lines(lines_)
        texts.append(documents)
    # The order of the triples decides that of a passage's sentences, not what it says.
    assert Counter("".join(sorted(d.text)) for d in texts[0]) == Counter("".join(sorted(d.text)) for d in texts[1])
    frames = {d.text.split("。")[0].split("（")[1].split("尾")[0] for d in texts[0] if d.text.startswith("病")}
    assert len(frames) > 3


def first_lines(rows: list[str]) -> set[int]:
    first = {}
    for number, line in enumerate(rows, 1):
        if "@@" in line:
            first.setdefault(line.split("@@")[0], number)
    return set(first.values())


@pytest.mark.parametrize(
    ("lines_", "columns", "expected"),
    [
        (["head\thead_type\trelation\ttail\ttail_type", "a\t疾病\tr\tb\tx", "a\t疾病\tr\tb"],
         {}, [(1, "not as many cells as columns"), (1, "a（疾病）")]),
        (["t\th\tr", "b\ta\tr1"], {"head": "h", "relation": "r", "tail": "t"}, [(1, "a")]),
        (["a\t其他\tr\tb\tx"], {}, [(1, "a")]),
        (["a@@疾病\tr", "@@疾病\tr\tb", "a\t\tb", "a@@疾病\tr\t@@x", "", "a\tr\tb"], {},
         [(1, "not three or five columns"), *[(1, "empty head, relation or tail")] * 3, (1, "a")]),
    ],
)  # fmt: skip
def test_layouts_of_triples_and_broken_lines(tmp_path, lines_, columns, expected):
    path = tmp_path / "graph.txt"
    path.write_text("\n".join(lines_))
    found = read("cpubmed_kg", path, **columns)
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]
    for (_, record), (_, told) in zip(found, expected, strict=True):
        assert told in record.text if isinstance(record, Document) else record.reason == told


def test_xywy_diseases_tell_every_field(tmp_path):
    row = {"_id": {"$oid": "1"}, "name": "百日咳", "desc": "急性传染病。\r\n\r\n 多见于儿童。", "category": ["疾病百科", "儿科"],
           "prevent": "隔离。", "cause": "细菌。\n二", "symptom": ["咳嗽", " ", "低热"], "yibao_status": "否", "get_prob": "0.5%",
           "easy_get": "小儿", "get_way": "呼吸道传播", "acompany": ["肺不张"], "cure_department": ["内科"],
           "cure_way": ["药物治疗"], "cure_lasttime": "1月", "cured_prob": "98%", "common_drug": ["药甲"], "cost_money": "千元",
           "check": ["血常规"], "do_eat": ["南瓜"], "not_eat": ["海虾"], "recommand_eat": ["蛋羹"], "recommand_drug": [],
           "drug_detail": ["药乙(药乙)"]}  # fmt: skip
    path = tmp_path / "medical.json"
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
    first, second = records("xywy_kg", path)
    assert (first.id, second.id, first.text) == (f"{path}:1", f"{path}:2", second.text)
    told = ["百日咳：急性传染病。\n多见于儿童", "儿科", "隔离", "细菌。\n二", "咳嗽、低热", "：否", "0.5%", "小儿",
            "呼吸道传播", "肺不张", "内科", "药物治疗", "1月", "98%", "药甲", "千元", "血常规", "南瓜", "海虾", "蛋羹",
            "药乙(药乙)"]  # fmt: skip
    assert all(text in first.text for text in told)
    # One sentence for each field; the drugs that none recommends have none.
    assert (first.text.count("百日咳"), "推荐的药物" in first.text, "。。" in first.text) == (21, False, False)


def test_39health_cells_lose_the_marks_of_cut_pages(tmp_path):
    head = "name,alias,part,drug,symptom,treatment,rate,money,,"
    cells = ["肺炎", '"肺热，lung fever,肺感染 肺病"', "肺 气管", "药甲... 药甲... 药乙 [详细]", "咳嗽 发热... [详细"]
    row = ",".join([*cells, "应该如何用药？用什么药？ [详细]", "暂无相关资料", "", "", ""])
    path = tmp_path / "disease.csv"
    path.write_bytes(f"{head}\n{row}\n发热,,,,,,,,,错\n".encode("gb18030"))
    document, spilled = records("39health_kg", path)
    for told in ("肺热、lung fever、肺感染、肺病", "肺、气管", "药甲、药乙", "咳嗽、发热"):
        assert told in document.text
    assert document.text.count("肺炎") == 4 and not any(
        mark in document.text for mark in ("...", "详细", "暂无", "如何用药")
    )
    assert spilled.reason == "more cells than columns"


# ------------------------------------------------------------------------------------------------------- dialogues

BLOCKS = """
id=1
https://x

Doctor faculty
某院

Description
疾病： 肺炎
病情描述： 咳嗽
三天
希望获得的帮助： 吃药吗
过敏史： 无（2020-03-23填写）

Dialogue
医生：
您好
医生：
几天了？
病人：
三天
既往病史： 无（2020-03-23填写）
医生：休息
两天
病人：
谢谢

Diagnosis and suggestions
总结：多休息

id=2
Description
疾病： 感冒

id = 3
Description
病情描述： 头痛

Dialogue
病人： 医生好，头痛
病人：怎么办
医生： 休息

Description
病情描述： 又痛了

Dialogue
医生：
复诊

id=4
Dialogue
病人：
在吗

id=5
Dialogue
医生：
您好
"""


def test_text_blocks_become_dialogues_from_patient_to_doctor(tmp_path):
    path = tmp_path / "dialogues.txt"
    path.write_text(BLOCKS)
    told = "疾病：肺炎\n病情描述：咳嗽\n三天\n希望获得的帮助：吃药吗"
    assert [(rows, record.id.rsplit(":")[1], content(record)) for rows, record in read("meddialog", path)] == [
        (1, "2", (told, "您好\n几天了？", "三天", "休息\n两天")),
        (1, "31", "no dialogue"),
        (1, "35", ("医生好，头痛\n怎么办", "休息", "病情描述：又痛了", "复诊")),
        (1, "51", "no answer"),
        (1, "56", "no answer"),
    ]


def test_text_that_is_no_block_is_skipped(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("前言\n二\nid=1\nDialogue\n病人：a\n医生：b\nid=2\nDialogue\n无名\n病人：a\n医生：b")
    assert [content(record) for record in records("meddialog", path)] == [
        "unknown layout",
        ("a", "b"),
        "unknown layout",
    ]


def test_lists_of_turns_become_dialogues(tmp_path):
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([["医生：喂", "病人：a", "病人：b", "医生：c", "病人：d"],
                                {"description": "疾病：肺炎", "dialogue": ["医生：c"]}]))  # fmt: skip
    assert records("meddialog", path) == [
        Chat(f"{path}#0", chat("a\nb", "c")),
        Chat(f"{path}#1", chat("疾病：肺炎", "c")),
    ]


def test_ranked_tables_quote_line_breaks(tmp_path):
    path = tmp_path / "ranks.tsv"
    head = "id\tquery\thistory\trank1\trank2\trank3\trank4"
    path.write_text(f"{head}\n0\t\"问\n二\"\t[('a', 'b')]\t好\t中\t\t\n1\t问\t[\t好\t中\t差\t\n")
    good, bad = records("zhongjing", path)
    assert good == Preference(f"{path}:2", chat("a", "b", "问\n二"), "好", "中")
    assert (bad.id, bad.reason) == (f"{path}:4", "unreadable history")


# --------------------------------------------------------------------------------------------- stage files as parquet


def test_stage_files_may_be_parquet(tmp_path):
    message = {"from": "human", "value": "a"}
    for name, rows in {
        "text": [{"text": "一"}, {"text": None}, {"text": "三"}],
        "chat": [{"conversations": [message, {"from": "gpt", "value": "b"}]}, {"instruction": "a", "output": "b"}],
        "pair": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    }.items():
        fields = {field: None for row in rows for field in row}
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([fields | row for row in rows]), tmp_path / f"{name}.parquet"
        )
    found = [
        list(read_stage([DataSource(path=str(tmp_path / f"{name}.parquet"))]))
        for read_stage, name in ((read_documents, "text"), (read_chats, "chat"), (read_preferences, "pair"))
    ]
    place = f"{tmp_path}/"
    assert found == [
        [Document(f"{place}text.parquet#0", "一"), Skipped(f"{place}text.parquet#1", "no field 'text'", "{}"),
         Document(f"{place}text.parquet#2", "三")],
        [Chat(f"{place}chat.parquet#{n}", chat("a", "b")) for n in range(2)],
        [Preference(f"{place}pair.parquet#0", chat("a"), "b", "c")],
    ]  # fmt: skip


def test_a_broken_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: no readable \.parquet"):
        list(read_documents([DataSource(path=str(tmp_path))]))


# ------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize(
    ("kind", "path", "rows", "skipped", "columns"),
    [
        ("exam", "cmexam/val.xlsx", 6811, {"no answer": 1}, {}),
        ("exam", "cmexam/cmexam_test.jsonl", 6811, {"answer is not among the options": 1}, {}),
        ("exam", "cmexam/cmexam_test_01_clinical_depart.csv", 606, {}, {}),
        ("exam", "cmexam/cmexam_test_01_difficulty_level.csv", 598, {}, {}),
        ("exam", "cmexam/test_10.csv", 9, {}, {}),
        ("exam", "cmexam/test_10.xlsx", 9, {}, {}),
        ("exam", "ceval/ceval.zip", 260 + 1346 + 12342, {}, {}),
        ("chat", "cmexam/train_CMExam_single_sft.json", 262, {}, {}),
        ("chat", "cmexam/CMExam_multiple_sft.json", 3, {}, {}),
        ("huatuo", "huatuo26m/huatuo26M_test.json", 6000, {}, {}),
        ("text", "kg_xywy/dict", 3353 + 37 + 54 + 8807 + 3828 + 4870 + 17201 + 5998, {}, {}),
        ("xywy_kg", "kg_xywy/medical1.json", 308, {}, {}),
        ("xywy_kg", "kg_xywy/medical_sample.json", 10, {}, {}),
        ("39health_kg", "kg_39health/disease.csv", 14336, {"more cells than columns": 11, "shifted cells": 4}, {}),
        ("department_qa", "dialogue_toyhom", 7644, {}, {}),
        ("meddialog", "dialogue_covid_ucsd/COVID-Dialogue-Dataset-Chinese.txt", 775,
         {"no dialogue": 33, "no answer": 18}, {}),
        ("meddialog", "dialogue_covid_ucsd/validate_data.json", 99, {}, {}),
        ("meddialog", "dialogue_covid_ucsd/test_data.json", 98, {}, {}),
        ("chat", "dialogue_bianque/cMedialog_example.csv", 128, {}, {}),
        ("chat", "dialogue_disc/cmd_samples.json", 120, {}, {"answer": "raw_anwser"}),
        ("chat", "dialogue_disc/cmid_samples.json", 120, {"unknown layout": 120}, {}),
        ("chat", "sft_general/Belle_open_source_1k.json", 1000, {}, {}),
        ("chat", "sft_general/sharegpt_zh_1K_format.jsonl", 993,
         {"ends with a question": 6, "no answer": 1, "empty question": 1}, {}),
        ("chat", "sft_general/medical_sft_1K_format.jsonl", 1000, {}, {}),
        ("chat", "sft_general/belle_zh_seed_tasks.json", 175, {"no answer": 175}, {}),
        ("chat", "sft_general/belle_eval_set.json", 1000, {"empty answer": 369}, {"answer": "std_answer"}),
        ("chat", "sft_general/belle_dev1K.json", 1000, {}, {}),
        ("chat", "sft_general/alpaca_zh_demo.json", 1000, {}, {}),
        ("chat", "sft_general/firefly_dummy_data.jsonl", 33, {}, {}),
        ("chat", "rag_cpt/bentsao_llama_data.json", 8658, {}, {}),
        ("instruct_chat", "sft_general/chinese_vicuna_instruct_data_sample.jsonl", 10, {}, {}),
        ("instruct_chat", "sft_general/chinese_vicuna_chat_data_sample.jsonl", 3, {}, {}),
        ("safety_prompts", "sft_general/safety_augmentation_prompts.json", 13, {"unknown layout": 13}, {}),
        ("multiturn_chat", "rag_cpt/liver_cancer.json", 1000, {}, {}),
        ("multiturn_chat", "rag_cpt/bentsao_infer.json", 5, {}, {}),
        ("preference", "preference/dpo_zh_500.jsonl", 498, {}, {}),
        ("preference", "preference/dpo_zh_demo.json", 300, {}, {}),
        ("preference", "preference/medical_reward_test.json", 100, {}, {}),
        ("preference", "preference/firefly_dummy_dpo.jsonl", 16, {}, {}),
        ("zhongjing", "preference/zhongjing_total_dataset.tsv", 1, {}, {}),
        ("zhongjing", "preference/rlhf_label_tool_output_result.tsv", 2, {}, {}),
        ("text", "rag_cpt/medical_corpus.txt", 87, {}, {}),
        ("text", "rag_cpt/fever.txt", 985, {}, {}),
        ("text", "rag_cpt/firefly_dummy_pretrain.jsonl", 45, {}, {}),
        ("text", "rag_cpt/nhc_guides", 4, {}, {"text": "content"}),
        ("text", "rag_cpt/tcm_ancient_books", 3576 + 1499, {}, {}),
    ],
)  # fmt: skip
def test_published_files_are_read_whole(shared, kind, path, rows, skipped, columns):
    pairs = read(kind, shared / "data" / path, **columns)
    found = [record for _, record in pairs]
    assert sum(count for count, _ in pairs) == rows
    assert Counter(record.reason for record in found if isinstance(record, Skipped)) == skipped
    assert len(found) == rows and len({record.id for record in found}) == rows


def test_published_dialogues_keep_their_turns(shared):
    """Turns counted by their marks in the files themselves."""
    liver = records("multiturn_chat", shared / "data/rag_cpt/liver_cancer.json")
    assert Counter(len(record.messages) // 2 for record in liver) == {1: 292, 2: 285, 3: 272, 4: 126, 5: 22, 6: 3}
    firefly = records("chat", shared / "data/sft_general/firefly_dummy_data.jsonl")
    assert sum(len(record.messages) for record in firefly) == 2 * 154


def test_published_exams_are_read_exactly(shared):
    folder = shared / "data/cmexam"
    questions = [record for record in records("exam", folder / "cmexam_test.jsonl") if isinstance(record, Question)]
    answers = Counter(len(question.answer) for question in questions)
    assert answers == {1: 6607, 2: 40, 3: 70, 4: 69, 5: 24}
    table, book = (records("exam", folder / f"test_10.{suffix}") for suffix in ("csv", "xlsx"))
    assert [same(question) for question in table] == [same(question) for question in book]
    assert all(len(question.options) == 5 and len(question.facets) == 5 for question in table)
    ceval = records("exam", shared / "data/ceval/ceval.zip")
    parts = Counter((record.id.split("!")[1].split("/")[0], bool(record.answer)) for record in ceval)
    assert parts == {("dev", True): 260, ("val", True): 1346, ("test", False): 12342}
    assert Counter(q.answer for q in ceval if "!val/" in q.id) == {"A": 310, "B": 338, "C": 344, "D": 354}


def test_a_published_table_reads_alike_in_another_encoding_and_packed(shared, tmp_path):
    [path] = (shared / "data/dialogue_toyhom").glob("*.csv")
    packed = tmp_path / "rows.csv.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes().decode("gb18030").encode()))
    assert [same(record) for record in records("department_qa", packed)] == [
        same(record) for record in records("department_qa", path)
    ]


def test_frames_of_any_size_are_unpacked_exactly(tmp_path):
    text = random.Random(0).randbytes(300_000).hex()
    path = pack(tmp_path / "a.txt.zst", text.encode())
    assert [document.text for document in records("text", path)] == [text]
