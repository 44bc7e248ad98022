import gzip
import json
import random
import tracemalloc
import zipfile
from collections import Counter
from types import GeneratorType

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from reading import chat, content, pack, read, records, same, source, write_rows

from qilin_med.config.experiment import DataSource
from qilin_med.data.read.files import HEAD_BYTES, not_text, open_parts, share_of_lines
from qilin_med.data.read.readers import raw_files, read_chats, read_documents, read_preferences, read_raw
from qilin_med.data.read.tables import read_rows
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Preference, Skipped

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
    places = {"a.jsonl": (":1", ":2"), "b.json": (":1", ":2"), "c.json": ("#0", "#1"), "d.json": ("#0", "#1"),
              "e.csv": (":3", ":5"), "f.tsv": (":2", ":3"), "g.xlsx": (":3", ":4"), "h.parquet": ("#0", "#1")}  # fmt: skip
    found = records("chat", tmp_path)
    assert [record.messages for record in found] == EXPECTED * 8
    assert [record.id for record in found] == [f"{tmp_path}/{name}{place}" for name in places for place in places[name]]


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
    with pytest.raises(UserError, match=r"a\.zip: no usable file in this archive; expected \.txt, \.jsonl"):
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
    assert next(read_chats([DataSource(path=str(path))])) == Chat(f"{path}#0", chat("a", "b"))
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


def test_spilled_rows_of_tables_are_skipped(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer,,\na,"b\nb",,\na,b,,c\na\n\n,,,\nc,d,,\ne,"f')
    assert read("chat", path) == [
        (1, Chat(f"{path}:2", chat("a", "b\nb"))),
        (1, Skipped(f"{path}:4", "more cells than columns", "a,b,,c")),
        (1, Skipped(f"{path}:5", "fewer cells than columns", "a")),
        (1, Chat(f"{path}:8", chat("c", "d"))),
        (1, Skipped(f"{path}:9", "a quotation mark is not closed", 'e,"f')),
    ]


def test_a_quotation_mark_that_is_never_closed_costs_no_more_than_its_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\na,"b\n' + "c,d\n" * (1 << 20) + "e,f\n" * 4)
    (_, broken), *rest = read("chat", path)
    assert (broken.id, broken.reason) == (f"{path}:2", "a quotation mark is not closed")
    assert rest and rest[-1][1].messages == chat("e", "f")


def test_a_damaged_sheet_is_refused(tmp_path):
    whole, path = write_rows(tmp_path / "whole.xlsx", JSON_ROWS), tmp_path / "rows.xlsx"
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as damaged:
        for name in archive.namelist():
            content_ = archive.read(name)
            damaged.writestr(name, content_[:-99] if name.endswith("sheet1.xml") else content_)
    with pytest.raises(UserError, match=r"rows\.xlsx: no readable \.xlsx"):
        records("chat", path)


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


def test_frames_of_any_size_are_unpacked_exactly(tmp_path):
    text = random.Random(0).randbytes(300_000).hex()
    path = pack(tmp_path / "a.txt.zst", text.encode())
    assert [document.text for document in records("text", path)] == [text]


# ---------------------------------------------------------------------------------------------------- JSON arrays


def test_an_array_is_split_as_json_reads_it_wherever_chunks_end(tmp_path, monkeypatch):
    """Random values with brackets, commas, quotes and backslashes in their texts; and no cut-off array passes."""
    draw = random.Random(0)

    def value(depth: int = 0):
        kind = draw.randrange(6 if depth < 3 else 3)
        if kind == 3:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        if kind > 3:
            return {text(): value(depth + 1) for _ in range(draw.randrange(4))}
        return (text(), draw.choice([0, -1.5, True, None]), text())[kind]

    def text() -> str:
        return "".join(draw.choices('[]{},:"\\ \n病a', k=draw.randrange(6)))

    path = tmp_path / "rows.json"
    for number in range(60):
        rows = [value() for _ in range(draw.randrange(5))]
        whole = json.dumps(rows, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        monkeypatch.setattr("qilin_med.data.read.tables.READ_CHARACTERS", draw.randrange(1, 9))
        path.write_text(f"\n {whole}\n")
        [part] = open_parts(path, (".json",))
        found = list(read_rows(part))
        assert [row.value for row in found] == rows
        assert [row.id for row in found] == [f"{path}#{index}" for index in range(len(rows))]
        path.write_text(whole[: draw.randrange(1, len(whole))] if number % 2 else f"{whole} {draw.choice('[{5')}")
        with pytest.raises(UserError, match=r"rows\.json: line \d+, column \d+: not valid JSON after \d whole rows"):
            list(read_rows(part))


def test_nan_and_half_surrogates_cost_their_rows_alone(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"question": "a", "answer": NaN}, {"question": "\\ud83d", "answer": "b"},\n'
                    ' {"question": "a", "answer": "b"}]')  # fmt: skip
    *unusable, good = records("chat", path)
    assert [record.reason for record in unusable] == ["wrong type", "not Unicode"]
    assert good == Chat(f"{path}#2", chat("a", "b"))


def test_a_first_line_may_be_longer_than_what_is_looked_at(tmp_path):
    rows = [{"text": "发热" * HEAD_BYTES}, {"text": "咳嗽"}]
    path = tmp_path / "books.json"
    path.write_text(lines(rows))
    assert records("text", path) == [Document(f"{path}:{n}", row["text"]) for n, row in enumerate(rows, 1)]


# --------------------------------------------------------------------------------------------------------- stages

STAGE_ROWS = {
    "text": (read_documents, [{"id": "1", "text": "发热，\n三天\t了"}, {"id": "2", "text": '"咳嗽", 两天'}]),
    "chat": (read_chats, [{"instruction": "发热怎么办？", "input": "", "output": "多喝水，\n休息"},
                          {"instruction": "咳嗽", "input": "三天", "output": '"休息"'}]),
    "preference": (read_preferences, [{"prompt": "发热", "chosen": "多喝水，\n休息", "rejected": "不知道"},
                                      {"prompt": "咳嗽", "chosen": "休息", "rejected": "休息"}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGE_ROWS)
@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".json", ".json.zst", ".csv", ".csv.gz", ".tsv", ".xlsx", ".parquet", ".zip"]
)
def test_a_stage_reads_every_format_as_the_builder_does(tmp_path, kind, suffix):
    read_stage, rows = STAGE_ROWS[kind]
    path, plain = (write_rows(tmp_path / f"rows{name}", rows) for name in (suffix, ".jsonl"))
    [*found] = read_stage([DataSource(path=str(path))])
    assert found == records(kind, path)
    assert [content(record) for record in found] == [content(record) for record in records(kind, plain)]
    assert len(found) == 2 and isinstance(found[1], Skipped) == (kind == "preference")


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json.gz"])
def test_a_stage_reads_gb18030(tmp_path, suffix):
    text = {".txt": "发热\n咳嗽\n", ".csv": "text\n发热\n咳嗽\n", ".json.gz": '[{"text": "发热"}, {"text": "咳嗽"}]'}
    path = pack(tmp_path / f"rows{suffix}", text[suffix].encode("gb18030"))
    assert [content(record) for record in read_documents([DataSource(path=str(path))])] == ["发热", "咳嗽"]


@pytest.mark.parametrize("encoding", ["UTF-8", "GB18030"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.zst"])
def test_a_byte_that_is_no_text_stops_a_stage_however_late_it_comes(tmp_path, encoding, suffix):
    line = ("发热" * 9999 + "\n").encode(encoding)
    rest = line * (HEAD_BYTES // len(line) + 2)
    path = pack(tmp_path / f"rows{suffix}", rest + b"\xff\n")
    with pytest.raises(
        UserError, match=rf"line {rest.count(10) + 1}, byte {len(rest) + 1} of the file: not {encoding};"
    ):
        list(read_documents([DataSource(path=str(path))]))
    assert records("text", path)[-1].text == "\ufffd"


def test_text_lines_are_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("发热")
    with pytest.raises(UserError, match=r"a\.txt: a \.txt file holds only documents.*\.jsonl, .*\.parquet files here"):
        list(read_chats([DataSource(path=str(tmp_path))]))


def test_the_share_of_a_files_first_lines(tmp_path):
    data = b"".join(b"%064x\n" % random.Random(n).getrandbits(256) for n in range(20_000))
    plain, packed = pack(tmp_path / "a.txt", data), pack(tmp_path / "a.txt.gz", data)
    assert share_of_lines(plain, 5000) == 0.25 and share_of_lines(packed, 5000) == pytest.approx(0.25, abs=0.1)


def test_lines_of_any_length_are_measured_in_pieces(tmp_path):
    line = "\ufeff头".encode() * 2_000_000
    path = pack(tmp_path / "a.txt", line + b"\n" + "热".encode()[:2] + b"\n" + line * 3)
    tracemalloc.start()
    assert share_of_lines(path, 1) == (len(line) + 1) / path.stat().st_size
    with pytest.raises(UserError, match=f"line 2, byte {len(line) + 2} of the file: not UTF-8;"):
        raise not_text(next(open_parts(path, (".txt",), strict=True)))
    assert tracemalloc.get_traced_memory()[1] < len(line)
    tracemalloc.stop()


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
