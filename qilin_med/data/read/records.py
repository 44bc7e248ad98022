"""Files on disk -> records. Every row becomes a record or is skipped with a reason; none vanishes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qilin_med.config.experiment import DataSource
from qilin_med.data.read.files import LONE_SURROGATE, UnusableRow, existing, open_parts, skipped, with_content
from qilin_med.data.read.tables import is_json, parquet_rows
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Message, Preference, Role, Skipped

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
EXPECTED_FILES = "expected .txt (one sample a line), .jsonl, .json or .parquet files"
ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "output"), "assistant"),
}

Record = TypeVar("Record", Document, tuple[Document, str], Chat, Preference)
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- files


def find_files(sources: list[DataSource]) -> list[tuple[Path, DataSource]]:
    """The data files of all sources, in order; a folder is read recursively in name order.

    A folder that holds files of the source's split, such as `train-*`, gives only those (neither its other files nor its
    sub-folders, where held-out parts lie). Manifests and hidden names are passed over. UserError: a path is missing, empty
    or holds nothing usable.
    """
    return [(file, source) for source in sources for file in _files_of(Path(source.path), source.split)]


def _files_of(path: Path, split: str) -> list[Path]:
    files = _walk(path, split) if existing(path, EXPECTED_FILES).is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no usable file in this folder; {EXPECTED_FILES}")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: unknown kind of file '{file.suffix}'; {EXPECTED_FILES}")
        with_content(file)
    return files


def _walk(folder: Path, split: str) -> list[Path]:
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in visible if entry.is_file() and _is_data(entry)]
    if chosen := [file for file in files if file.name.startswith(f"{split}-")]:
        return chosen
    inner = [file for entry in visible if entry.is_dir() for file in _walk(entry, split)]
    return sorted(files + inner)


def _is_data(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.name.lower() != "manifest.json"


# ----------------------------------------------------------------------------------------------------------- rows


def read_documents(sources: list[DataSource]) -> Iterator[Document | Skipped]:
    """Documents: the lines of .txt files; elsewhere the field `source.text`, a string or a list of strings (joined by
    newlines). Text is kept as it stands. UserError: a file is not UTF-8, or a whole-file .json does not parse."""
    for file, source in find_files(sources):
        if file.suffix.lower() == ".txt":
            for number, line in _lines(file):
                yield _record(f"{file}:{number}", line, lambda id_, line: Document(id_, checked_text(line)))
        else:
            field = source.text
            yield from _row_records(file, lambda id_, row, field=field: Document(id_, document_text(row, field)))


def read_named_documents(sources: list[DataSource]) -> Iterator[tuple[Document, str] | Skipped]:
    """As `read_documents`, each with the name of its source: `id` and `source` of the row where it has them (a built
    corpus does), else the place and the name of the file."""
    for file, source in find_files(sources):
        if file.suffix.lower() == ".txt":
            for number, line in _lines(file):
                yield _record(f"{file}:{number}", {"text": line}, partial(_named_document, "text", file.name))
        else:
            yield from _row_records(file, partial(_named_document, source.text, file.name))


def _named_document(field: str, file: str, id_: str, row: Row) -> tuple[Document, str]:
    name, source = (str(row[key]) if isinstance(row.get(key), str | int) else "" for key in ("id", "source"))
    return Document(name or id_, document_text(row, field)), source or file


def read_chats(sources: list[DataSource]) -> Iterator[Chat | Skipped]:
    """Conversations in the ChiMed, ShareGPT, messages and instruction/input/output layouts, one or more turns.

    Contents are stripped of surrounding white space. A chat must be: an optional system text, then questions and
    answers in turn, ending with an answer; any other is skipped, also one that ends with a question, because cutting
    a turn off would be a silent loss. UserError as in `read_documents`.
    """
    for file, _ in find_files(sources):
        yield from _row_records(file, lambda id_, row: Chat(id_, checked_chat(chat_messages(row))))


def read_preferences(sources: list[DataSource]) -> Iterator[Preference | Skipped]:
    """Pairs of answers in the layouts question/response_chosen/response_rejected, conversations/chosen/rejected and
    prompt/chosen/rejected. Contents are stripped of surrounding white space. UserError as in `read_documents`."""
    for file, _ in find_files(sources):
        yield from _row_records(file, read_preference)


def _row_records(file: Path, parse: Callable[[str, Row], Record]) -> Iterator[Record | Skipped]:
    suffix = file.suffix.lower()
    if suffix == ".txt":
        raise UserError(
            f"{file}: a .txt file holds only documents (pretraining); expected .jsonl, .json or .parquet files here"
        )
    if suffix == ".jsonl" or (suffix == ".json" and _holds_lines(file)):
        for number, line in _lines(file):
            yield _record(f"{file}:{number}", line, lambda id_, line: parse(id_, _parsed(line)))
    else:
        for index, row in _indexed_rows(file):
            yield _record(f"{file}#{index}", row, lambda id_, row: parse(id_, _object(row)))


def _indexed_rows(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix.lower() == ".parquet":
        [part] = open_parts(file, SUFFIXES)
        return parquet_rows(part)
    return enumerate(_whole_file(file))


def _record(id_: str, raw: Any, parse: Callable[[str, Any], Record]) -> Record | Skipped:
    try:
        return parse(id_, raw)
    except UnusableRow as error:
        return skipped(id_, str(error), raw)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    offset = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            line = _decoded(raw, file, number, offset).rstrip("\r\n")
            offset += len(raw)
            if line.strip():
                yield number, line


def _decoded(raw: bytes, file: Path, line: int, offset: int) -> str:
    try:
        # A byte order mark is legal at the start of the file only.
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}: line {line}, byte {offset + error.start + 1} of the file: not UTF-8; expected UTF-8 text: "
            f"convert it, for Chinese mostly with: iconv -f gb18030 -t utf-8 '{file}' > converted{file.suffix}"
        ) from None


def _holds_lines(file: Path) -> bool:
    """Whether a .json file holds JSON lines, as many published ones do: its first line is a whole object, or it is no
    single JSON value but a later line is an object (then the first line is broken)."""
    _, first = next(_lines(file), (0, ""))
    if first.lstrip().startswith("["):
        return False
    if is_json(first, dict):
        return True
    try:
        _whole_file(file)
    except UserError:
        return any(is_json(line, dict) for _, line in _lines(file))
    return False


def _whole_file(file: Path) -> list[Any]:
    """Rows of a .json file that is one array; a single object is one row."""
    try:
        value = json.loads(_decoded(file.read_bytes(), file, 1, 0))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); expected one array of "
            "objects, one object, or an object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); expected one array of objects") from None
    return value if isinstance(value, list) else [value]


def _parsed(line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UnusableRow(f"broken JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise UnusableRow("broken JSON: a number or nesting beyond all bounds") from None
    return _object(value)


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise UnusableRow(f"wrong type: the row is {_kind(value)}, expected an object")
    return value


# ----------------------------------------------------------------------------------------------------- documents


def document_text(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None:
        raise UnusableRow(f"no field '{field}'")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: '{field}' is {_kind(value)}, expected text")
    return checked_text(value)


def checked_text(text: str) -> str:
    if not text.strip():
        raise UnusableRow("empty text")
    if LONE_SURROGATE.search(text):
        raise UnusableRow("not Unicode: half a surrogate pair")
    return text


# --------------------------------------------------------------------------------------------------------- chats


def chat_messages(row: Row) -> list[Message]:
    if "conversations" in row:
        return _system(row) + _messages(row["conversations"], "conversations")
    if "messages" in row:
        return _system(row) + _messages(row["messages"], "messages")
    if "instruction" in row:
        return _system(row) + history_messages(row) + _instruction(row)
    raise _unknown_layout(row, "conversations, messages or instruction/input/output")


def _messages(value: Any, field: str) -> list[Message]:
    """Messages written as {"from", "value"} or {"role", "content"}."""
    if not isinstance(value, list):
        raise UnusableRow(f"wrong type: '{field}' is {_kind(value)}, expected a list of messages")
    return [_message(entry, field) for entry in value]


def _message(entry: Any, field: str) -> Message:
    if not isinstance(entry, dict):
        raise UnusableRow(f"wrong type: '{field}' holds {_kind(entry)}, expected messages")
    keys = ("from", "value") if "from" in entry else ("role", "content")
    name, content = (entry.get(key) for key in keys)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise UnusableRow(f"unknown role {json.dumps(name, ensure_ascii=False)}"[:80])
    return Message(ROLES[name.lower()], plain_text(content, keys[1]))


def plain_text(value: Any, field: str) -> str:
    """Text without surrounding white space; lists of one text (Huatuo-26M) are taken as that text, null as none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: '{field}' is {_kind(value)}, expected text")
    if LONE_SURROGATE.search(value):
        raise UnusableRow("not Unicode: half a surrogate pair")
    return value.strip()


def _system(row: Row) -> list[Message]:
    text = plain_text(row.get("system"), "system")
    return [Message("system", text)] if text else []


def history_messages(row: Row) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UnusableRow("wrong type: 'history', expected a list of [question, answer]")
    return [
        Message(role, plain_text(text, "history"))
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _instruction(row: Row) -> list[Message]:
    parts = [plain_text(row["instruction"], "instruction"), plain_text(row.get("input"), "input")]
    question = Message("user", "\n".join(part for part in parts if part))
    if row.get("output") is None:
        raise UnusableRow("no answer")
    return [question, Message("assistant", plain_text(row["output"], "output"))]


def checked_chat(messages: list[Message]) -> tuple[Message, ...]:
    messages = _without_empty_system(messages)
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise UnusableRow("no answer")
    _check_order(roles)
    if roles[-1] == "user":
        raise UnusableRow("ends with a question")
    _check_contents(messages)
    return tuple(messages)


def _without_empty_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.role != "system" or message.content]


def _check_order(roles: list[Role]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        raise UnusableRow("roles out of order")


def _check_contents(messages: list[Message]) -> None:
    for message in messages:
        if not message.content:
            raise UnusableRow("empty question" if message.role == "user" else "empty answer")


# --------------------------------------------------------------------------------------------------- preferences


def read_preference(id_: str, row: Row) -> Preference:
    prompt, chosen, rejected = checked_pair(*preference_parts(row))
    return Preference(id_, tuple(prompt), chosen, rejected)


def preference_parts(row: Row) -> tuple[list[Message], str, str]:
    if {"question", "response_chosen", "response_rejected"} <= row.keys():
        question = Message("user", plain_text(row["question"], "question"))
        answers = (plain_text(row[field], field) for field in ("response_chosen", "response_rejected"))
        return _system(row) + history_messages(row) + [question], *answers
    if not {"chosen", "rejected"} <= row.keys() or not row.keys() & {"conversations", "prompt"}:
        raise _unknown_layout(
            row, "question/response_chosen/response_rejected, conversations/chosen/rejected or prompt/chosen/rejected"
        )
    if "conversations" in row:
        prompt = _messages(row["conversations"], "conversations")
    elif isinstance(row["prompt"], list):
        prompt = _messages(row["prompt"], "prompt")
    else:
        prompt = [*history_messages(row), Message("user", plain_text(row["prompt"], "prompt"))]
    return _with_answers(_system(row) + prompt, row)


def _with_answers(prompt: list[Message], row: Row) -> tuple[list[Message], str, str]:
    """Answers may be text, a message, or a list of messages that may repeat the prompt before the answer."""
    (chosen_before, chosen), (rejected_before, rejected) = (_answer(row[f], f) for f in ("chosen", "rejected"))
    before = chosen_before or rejected_before
    for repeated in (chosen_before, rejected_before):
        if repeated and (repeated != before or repeated[-len(prompt) :] != prompt):
            raise UnusableRow("chosen and rejected answer different prompts")
    # A repeated prompt may say more than `prompt` does (a system text, earlier turns).
    return before or prompt, chosen, rejected


def _answer(value: Any, field: str) -> tuple[list[Message], str]:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value or isinstance(value[0], str):
        return [], plain_text(value, field)
    *before, answer = _messages(value, field)
    if answer.role != "assistant":
        raise UnusableRow(f"roles out of order: '{field}' is no answer")
    return _without_empty_system(before), answer.content


def checked_pair(prompt: list[Message], chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    prompt = _without_empty_system(prompt)
    if not any(message.content for message in prompt):
        raise UnusableRow("empty prompt")
    _check_order([message.role for message in prompt])
    if prompt[-1].role != "user":
        raise UnusableRow("the prompt does not end with a question")
    _check_contents(prompt)
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise UnusableRow(f"empty {field}")
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are the same")
    return prompt, chosen, rejected


def _unknown_layout(row: Row, expected: str) -> UnusableRow:
    fields = ", ".join(map(str, list(row)[:8])) or "none"
    return UnusableRow(f"unknown layout: fields {fields}; expected {expected}")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), "null")
