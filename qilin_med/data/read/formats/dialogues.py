"""MedDialog: text blocks or lists of turns, each turn after its speaker's name."""

import re
from collections.abc import Iterator
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, read_lines
from qilin_med.data.read.formats.chats import checked_chat, join_turns, read_turns
from qilin_med.data.read.formats.reading import (
    Counted,
    Reader,
    UnusableRow,
    convert_row,
    plain_text,
    row_reader,
    text_of,
)
from qilin_med.data.read.tables import Row
from qilin_med.records import Chat, Message

BLOCK = re.compile(r"\s*id\s*=\s*\d+\s*")
SECTIONS = ("Doctor faculty", "Description", "Dialogue", "Diagnosis and suggestions")
TOLD = ("疾病", "疾病名称", "病情描述", "希望获得的帮助")
FORM = (*TOLD, "怀孕情况", "患病多久", "已就诊医院及科室", "用药情况", "过敏史", "既往病史", "预约医生", "检查医院",
        "主诉", "现病史")  # fmt: skip
ENTRY = re.compile(rf"\s*({'|'.join(sorted(FORM, key=len, reverse=True))})\s*[:：]\s*(.*)")
# Left over from the form, in which doctors are named and the day is told on which it was filled in.
FORM_LINE = re.compile(r"\s*预约医生\s*[:：].*|.*[（(]\d{4}-\d\d-\d\d填写[）)]\s*")


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    if part.suffix != ".txt":
        yield from _LISTS.read(part, source)
        return
    for number, lines in _blocks(part):
        row = Row(f"{part.place}:{number}", lines, "\n".join(lines))
        yield from convert_row(row, {}, _block_chat, objects=False)


def _blocks(part: Part) -> Iterator[tuple[int, list[str]]]:
    """The lines of each block and the number of its first; a block begins with "id=7"."""
    start, lines = 0, []
    for number, line in read_lines(part):
        if BLOCK.fullmatch(line) and lines:
            yield start, lines
            lines = []
        start = start if lines else number
        lines.append(line)
    if lines:
        yield start, lines


def _block_chat(id_: str, lines: list[str]) -> Chat:
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if line.strip() in SECTIONS:
            sections.append((line.strip(), []))
        else:
            sections[-1][1].append(line)
    names = [name for name, _ in sections]
    if "Dialogue" not in names:
        raise UnusableRow("no dialogue" if "Description" in names else "unknown layout")
    turns: list[Message] = []
    # From behind, because the patient's next words decide what of a description is new.
    for name, body in reversed(sections):
        if name == "Dialogue":
            turns = read_turns(line for line in body if not FORM_LINE.fullmatch(line)) + turns
        elif name == "Description":
            turns = _described(body, turns)
    return _trimmed_chat(id_, turns)


def _list_chat(id_: str, row: Any) -> Chat:
    """A list of turns, or an object that holds one and perhaps a description."""
    turns = row.get("dialogue") if isinstance(row, dict) else row
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise UnusableRow("unknown layout")
    description = text_of(row, "description") if isinstance(row, dict) else ""
    messages = read_turns(plain_text(turn, "dialogue") for turn in turns)
    return _trimmed_chat(id_, _described(description.split("\n"), messages) if description else messages)


def _described(body: list[str], turns: list[Message]) -> list[Message]:
    """The turns after what the patient wrote before the talk, less what the patient says again in its first turn.

    Of a form, the entries that tell the case; without a form all of the text."""
    entries: list[tuple[str, str]] = []
    for line in body:
        if match := ENTRY.fullmatch(line):
            entries.append((match[1], match[2].strip()))
        elif entries:
            label, text = entries[-1]
            entries[-1] = (label, f"{text}\n{line.strip()}".strip())
    if not entries:
        entries = [("", "\n".join(line.strip() for line in body))]
    first = turns[0].content if turns and turns[0].role == "user" else ""
    told = [(label, text) for label, text in entries if label in ("", *TOLD) and text and text not in first]
    return [Message("user", "\n".join(f"{label}：{text}" if label else text for label, text in told)), *turns]


def _trimmed_chat(id_: str, turns: list[Message]) -> Chat:
    """Without what the doctor says before the patient and what the patient says after the doctor's last turn."""
    turns = join_turns(turns)
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    while turns and turns[-1].role == "user":
        turns = turns[:-1]
    return checked_chat(id_, turns)


_LISTS = row_reader(_list_chat, ("description", "dialogue"), objects=False)
MEDDIALOG = Reader(_read, _LISTS.fields, (".txt", ".jsonl", ".json", ".parquet"))
