import json
import subprocess
import sys

import pytest

from qilin_med.config.experiment import DataSource
from qilin_med.data.read.readers import find_files, read_chats, read_documents, read_preferences
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Message, Preference, Skipped

Q, A = Message("user", "发热怎么办"), Message("assistant", "多喝水")
Q2, A2 = Message("user", "还要吃药吗"), Message("assistant", "不用")
SYSTEM = Message("system", "你是医生")


def sources(*paths, text: str = "text") -> list[DataSource]:
    return [DataSource(path=str(path), text=text) for path in paths]


def turns(*messages: Message, keys=("from", "value"), names=("system", "input", "output")) -> list[dict[str, str]]:
    roles = dict(zip(("system", "user", "assistant"), names, strict=True))
    return [{keys[0]: roles[m.role], keys[1]: m.content} for m in messages]


def chatml(*messages: Message) -> list[dict[str, str]]:
    return turns(*messages, keys=("role", "content"), names=("system", "user", "assistant"))


# ---------------------------------------------------------------------------------------------------------- files


def test_folders_are_read_in_name_order_and_the_files_of_a_split_stand_alone(write_lines, tmp_path):
    for name in ("b.jsonl", "a/z.txt", "a/MANIFEST.json", "a/notes.md", ".hidden.json"):
        write_lines({}, name=name)
    for name in ("c/train-1.jsonl", "c/train-0.jsonl", "c/dev-0.jsonl", "c/valid.jsonl", "c/inner/x.jsonl"):
        write_lines({}, name=name)
    found = [str(file.relative_to(tmp_path)) for file, _ in find_files(sources(tmp_path))]
    assert found == ["a/z.txt", "b.jsonl", "c/train-0.jsonl", "c/train-1.jsonl"]
    dev = DataSource(path=str(tmp_path / "c"), split="dev")
    assert [file.name for file, _ in find_files([dev])] == ["dev-0.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.jsonl", "no such data file"), ("empty.jsonl", "is empty"), ("bare", "no usable file"), ("x.pdf", "pdf")],
)
def test_useless_paths_are_refused_by_name(tmp_path, name, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "x.pdf").write_text("a,b")
    with pytest.raises(UserError, match=message) as error:
        find_files(sources(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_a_file_in_another_encoding_is_refused_with_line_and_byte(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes("好\n".encode() + "发热".encode("gb18030") + b"\n")
    with pytest.raises(UserError, match=r"old\.txt: line 2, byte 5 of the file: not UTF-8.*iconv -f gb18030"):
        list(read_documents(sources(path)))


def test_an_array_that_is_cut_off_is_refused_with_line_and_column(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text": "a"},\n{"te')
    with pytest.raises(UserError, match=r"rows\.json: line 3, column 2: not valid JSON"):
        list(read_documents(sources(path)))


def test_a_broken_line_is_skipped_under_its_number_and_blank_lines_do_not_count(write_lines):
    path = write_lines({"text": "一"}, "", '{"text": "二', "  ", {"text": "三"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    first, broken, last = read_documents(sources(path))
    assert (first, last) == (Document(f"{path}:1", "一"), Document(f"{path}:5", "三"))
    assert broken == Skipped(f"{path}:3", "broken JSON: Unterminated string starting at", '{"text": "二')


@pytest.mark.parametrize("first", ['{"text": "一"}', '{"text": "一'])
def test_a_json_file_may_hold_lines_also_when_the_first_is_broken(write_lines, first):
    path = write_lines(first, {"text": "二"}, {"text": "三"}, name="lines.json")
    records = list(read_documents(sources(path)))
    assert [record.id for record in records] == [f"{path}:{number}" for number in (1, 2, 3)]
    assert isinstance(records[0], Skipped) == (first[-1] != "}")


def test_a_json_file_may_hold_an_array_or_one_object(tmp_path):
    array, single = tmp_path / "a.json", tmp_path / "b.json"
    array.write_text(json.dumps([{"content": ["一", "二"]}, {"content": "三"}], indent=1))
    single.write_text(json.dumps({"title": "t", "content": "四"}, indent=1))
    assert list(read_documents(sources(array, single, text="content"))) == [
        Document(f"{array}#0", "一\n二"),
        Document(f"{array}#1", "三"),
        Document(f"{single}#0", "四"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"title": "x"}, "no field 'text'"),
        ({"text": " \n"}, "empty text"),
        ({"text": 7}, "wrong type: 'text' is a number, expected text"),
        ('{"text": "\\ud83d"}', "not Unicode: half a surrogate pair"),
        ('"text"', "unknown layout: the row is text, expected an object"),
        ("[" * 100_000, "broken JSON: a number or nesting beyond all bounds"),
    ],
)
def test_documents_that_cannot_be_used(write_lines, row, reason):
    [record] = read_documents(sources(write_lines(row)))
    assert record.reason == reason and len(record.raw) <= 2000


# ---------------------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": turns(Q, A)}, (Q, A)),
        ({"conversations": turns(SYSTEM, Q, A, Q2, A2, names=("system", "human", "gpt"))}, (SYSTEM, Q, A, Q2, A2)),
        ({"conversations": turns(Q, A, names=("", "user", "assistant")), "system": "你是医生"}, (SYSTEM, Q, A)),
        ({"messages": chatml(SYSTEM, Q, A)}, (SYSTEM, Q, A)),
        ({"messages": chatml(Message("system", " "), Q, A)}, (Q, A)),
        ({"instruction": " 发热怎么办\n", "input": "", "output": "多喝水 "}, (Q, A)),
        ({"instruction": "发热", "input": "三天", "output": "多喝水"}, (Message("user", "发热\n三天"), A)),
        ({"instruction": ["发热怎么办"], "input": None, "output": ["多喝水"], "id": 3}, (Q, A)),
        (
            {"instruction": "还要吃药吗", "output": "不用", "system": "你是医生",
             "history": [["发热怎么办", "多喝水"]]},
            (SYSTEM, Q, A, Q2, A2),
        ),
    ],
)  # fmt: skip
def test_every_chat_layout(write_lines, row, messages):
    path = write_lines(row)
    assert list(read_chats(sources(path))) == [Chat(f"{path}:1", messages)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "发热"}, "no answer"),
        ({"conversations": turns(Q)}, "no answer"),
        ({"conversations": []}, "no answer"),
        ({"instruction": " ", "input": "", "output": "休息"}, "empty question"),
        ({"instruction": "发热", "output": "\n"}, "empty answer"),
        ({"conversations": turns(A, Q, A)}, "roles out of order"),
        ({"conversations": turns(Q, Q, A)}, "roles out of order"),
        ({"conversations": turns(Q, SYSTEM, A)}, "roles out of order"),
        ({"conversations": turns(Q, A, Q2)}, "ends with a question"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, 'unknown role "tool"'),
        ({"conversations": [{"value": "x"}]}, "unknown role null"),
        ({"conversations": "x"}, "wrong type: 'conversations' is text, expected a list of messages"),
        ({"messages": [3]}, "wrong type: 'conversations' holds a number, expected messages"),
        ({"instruction": "a", "output": ["b", "c"]}, "wrong type: 'output' is a list of 2, expected text"),
        ({"instruction": "a", "output": 1}, "wrong type: 'output' is a number, expected text"),
        ({"instruction": "a", "output": "b", "history": [["x"]]},
         "wrong type: 'history', expected a list of [question, answer]"),
        ({"ask": "a"}, "unknown layout: fields ask; expected conversations, messages, instruction/input/output, "
         "question/answer, input/target, conversation or a list of turns; in a corpus file this may help: columns "
         '{"question": "ask"}'),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_used(write_lines, row, reason):
    path = write_lines(row)
    [record] = read_chats(sources(path))
    assert (record.id, record.reason) == (f"{path}:1", reason)
    assert json.loads(record.raw) == row


# ---------------------------------------------------------------------------------------------------- preferences

PAIR = {"chosen": "多喝水", "rejected": "不知道"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "发热怎么办", "response_chosen": " 多喝水", "response_rejected": "不知道"}, (Q,)),
        ({"conversations": turns(Q, names=("system", "human", "gpt")), **PAIR, "system": "你是医生"}, (SYSTEM, Q)),
        ({"conversations": turns(Q), **{k: {"from": "gpt", "value": v} for k, v in PAIR.items()}}, (Q,)),
        ({"prompt": "发热怎么办", **PAIR}, (Q,)),
        ({"prompt": chatml(Q2, A2, Q), **PAIR}, (Q2, A2, Q)),
        ({"prompt": chatml(Q), **{k: chatml(Message("assistant", v)) for k, v in PAIR.items()}}, (Q,)),
        ({"prompt": "发热怎么办", **{k: chatml(SYSTEM, Q, Message("assistant", v)) for k, v in PAIR.items()}},
         (SYSTEM, Q)),
    ],
)  # fmt: skip
def test_every_preference_layout(write_lines, row, prompt):
    path = write_lines(row)
    assert list(read_preferences(sources(path))) == [Preference(f"{path}:1", prompt, "多喝水", "不知道")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", **PAIR}, "empty prompt"),
        ({"prompt": [], **PAIR}, "empty prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "empty rejected"),
        ({"prompt": "a", "chosen": " b", "rejected": "b\n"}, "chosen and rejected are the same"),
        ({"conversations": turns(A, Q), **PAIR}, "roles out of order"),
        ({"conversations": turns(Q, A), **PAIR}, "the prompt does not end with a question"),
        ({"prompt": "a", "chosen": chatml(Q), "rejected": "b"}, "roles out of order: 'chosen' is no answer"),
        ({"prompt": "a", "chosen": chatml(Q, A), "rejected": "b"}, "chosen and rejected answer different prompts"),
        ({"prompt": "a", "chosen": "b"}, "unknown layout: fields prompt, chosen; expected question/response_chosen/"
         "response_rejected, conversations/chosen/rejected or prompt/chosen/rejected; in a corpus file this may help: columns "
         '{"question": "prompt", "response_chosen": "chosen"}'),
    ],
)  # fmt: skip
def test_preferences_that_cannot_be_used(write_lines, row, reason):
    [record] = read_preferences(sources(write_lines(row)))
    assert record.reason == reason


def test_data_modules_start_without_torch_and_transformers():
    modules = "qilin_med.records, qilin_med.data.read.readers, qilin_med.prompt.template, qilin_med.data.rows"
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
