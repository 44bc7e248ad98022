"""Dialogues whose turns begin with the speaker's name; MedDialog's text blocks."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, UnusableRow, read_lines
from qilin_med.data.read.formats.reading import Counted, Reader, convert_row, row_reader, unknown_layout
from qilin_med.data.read.records import checked_chat, plain_text
from qilin_med.data.read.tables import Row
from qilin_med.records import Chat, Message, Role

SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("病人", "患者", "用户", "patient", "human", "user"), "user"),
    **dict.fromkeys(("医生", "医师", "大夫", "助手", "doctor", "assistant", "bot"), "assistant"),
}
SPEAKER = re.compile(rf"\s*({'|'.join(SPEAKERS)})\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL)


# --------------------------------------------------------------------------------------------------------- turns


def read_turns(lines: Iterable[str]) -> list[Message]:
    """Messages of lines or texts that begin with "病人：", "医生：", ...; what has no speaker goes on with the last turn.
    UnusableRow: the first has no speaker."""
    turns: list[Message] = []
    for line in lines:
        if match := SPEAKER.fullmatch(line):
            turns.append(Message(SPEAKERS[match[1].lower()], match[2].strip()))
        elif turns:
            turns.append(Message(turns[-1].role, line.strip()))
        elif line.strip():
            raise unknown_layout()
    return join_turns(turns)


def join_turns(turns: Iterable[Message]) -> list[Message]:
    """Turns of one speaker in a row become one, a line each; empty ones go."""
    spoken = (turn for turn in turns if turn.content)
    return [
        Message(role, "\n".join(turn.content for turn in group))
        for role, group in groupby(spoken, lambda turn: turn.role)
    ]


def trim_dialogue(turns: list[Message]) -> list[Message]:
    """Cut off what the doctor says before the patient and what the patient says after the doctor's last turn."""
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    while turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise UnusableRow("no answer")
    return turns


# ---------------------------------------------------------------------------------------------------- text blocks

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
        yield from convert_row(row, {}, lambda id_, lines: Chat(id_, _block_chat(lines)), objects=False)


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


def _block_chat(lines: list[str]) -> tuple[Message, ...]:
    sections = list(_sections(lines))
    if not any(name == "Dialogue" for name, _ in sections):
        raise UnusableRow("no dialogue" if any(name == "Description" for name, _ in sections) else "unknown layout")
    turns: list[Message] = []
    # From behind, because the patient's next words decide what of a description is new.
    for name, body in reversed(sections):
        if name == "Dialogue":
            turns = read_turns(line for line in body if not FORM_LINE.fullmatch(line)) + turns
        elif name == "Description":
            turns = _described(body, turns) + turns
    return checked_chat(trim_dialogue(join_turns(turns)))


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    name, body = "", []
    for line in lines:
        if line.strip() in SECTIONS:
            yield name, body
            name, body = line.strip(), []
        else:
            body.append(line)
    yield name, body


def _described(body: list[str], turns: list[Message]) -> list[Message]:
    """What the patient wrote before the talk, less what the patient says again in its first turn."""
    first = turns[0].content if turns and turns[0].role == "user" else ""
    told = [(label, text) for label, text in _entries(body) if text and text not in first]
    return [Message("user", "\n".join(f"{label}：{text}" if label else text for label, text in told))]


def _entries(body: list[str]) -> Iterator[tuple[str, str]]:
    """The entries of the form that tell the case; without a form all of the text."""
    matches = [ENTRY.fullmatch(line) for line in body]
    if not any(matches):
        yield "", "\n".join(line.strip() for line in body)
        return
    label, text = "", ""
    for line, match in zip(body, matches, strict=True):
        if match:
            yield from [(label, text)] if label in TOLD else []
            label, text = match[1], match[2].strip()
        else:
            text = f"{text}\n{line.strip()}".strip()
    yield from [(label, text)] if label in TOLD else []


def _list_chat(id_: str, row: Any) -> Chat:
    """A list of turns, or an object that holds one and perhaps a description."""
    turns = row.get("dialogue") if isinstance(row, dict) else row
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise unknown_layout()
    description = plain_text(row.get("description"), "description") if isinstance(row, dict) else ""
    messages = read_turns(plain_text(turn, "dialogue") for turn in turns)
    messages = _described(description.split("\n"), messages) + messages if description else messages
    return Chat(id_, checked_chat(trim_dialogue(join_turns(messages))))


_LISTS = row_reader(_list_chat, ("description", "dialogue"), objects=False)
MEDDIALOG = Reader(_read, _LISTS.fields, (".txt", ".jsonl", ".json", ".parquet"))
