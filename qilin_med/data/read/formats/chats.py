"""Conversations: ShareGPT, messages, instructions, ChiMed, Huatuo-26M, MedDialog, department tables, safety prompts."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Line, Part, read_lines
from qilin_med.data.read.formats.reading import (
    Counted,
    Fields,
    Reader,
    UnusableRow,
    convert_row,
    field_text,
    name_of,
    plain_text,
    row_reader,
    texts_of,
    unknown_layout,
)
from qilin_med.data.read.raw import RawRow
from qilin_med.records import Chat, Message, Role

SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("病人", "患者", "用户", "问", "patient", "human", "user"), "user"),
    **dict.fromkeys(("医生", "医师", "大夫", "助手", "答", "doctor", "assistant", "bot"), "assistant"),
}
ROLES: dict[str, Role] = {
    **SPEAKERS,
    "system": "system",
    **dict.fromkeys(("input", "question", "query", "prompt"), "user"),
    **dict.fromkeys(("output", "answer", "response", "gpt"), "assistant"),
}
SPEAKER = re.compile(rf"\s*({'|'.join(SPEAKERS)})\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL)
# Turns written into one text: "Human:...\nAssistant:..." (BELLE), "<user>: ... <bot>: ..." (literature dialogues).
MARK = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]|<(user|bot)>\s*[:：]")


# ------------------------------------------------------------------------------------------------------- messages


def read_messages(value: Any, field: str) -> list[Message]:
    """Messages written as {"from", "value"} or {"role", "content"}, as pairs ([question, answer], {"human", "assistant"},
    {"question", "answer"}, ...), or as texts: with their speakers, else in turn."""
    if not isinstance(value, list):
        raise UnusableRow(f"wrong type: '{field}' is {name_of(value)}, expected a list of messages")
    if value and all(isinstance(entry, str) for entry in value):
        texts = [plain_text(entry, field) for entry in value]
        return read_turns(texts) if SPEAKER.fullmatch(texts[0]) else _alternating(texts, field)
    messages = []
    for entry in value:
        if isinstance(entry, list):
            messages += _alternating(entry, field)
            continue
        if not isinstance(entry, dict):
            raise UnusableRow(f"wrong type: '{field}' holds {name_of(entry)}, expected messages")
        role, content = ("from", "value") if "from" in entry else ("role", "content")
        spoken = {ROLES[key.lower()]: key for key in entry if key.lower() in ROLES}
        if role not in entry and {"user", "assistant"} <= spoken.keys():
            messages += [Message(name, field_text(entry, spoken[name])) for name in ("user", "assistant")]
            continue
        name = entry.get(role)
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise UnusableRow(f"unknown role {json.dumps(name, ensure_ascii=False)}"[:80])
        messages.append(Message(ROLES[name.lower()], field_text(entry, content)))
    return messages


def system_message(row: Fields) -> list[Message]:
    text = field_text(row, "system")
    return [Message("system", text)] if text else []


def history_messages(row: Fields) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UnusableRow("wrong type: 'history', expected a list of [question, answer]")
    return _alternating((text for turn in history for text in turn), "history")


def _alternating(texts: Iterable[Any], field: str) -> list[Message]:
    """Questions and answers in turn."""
    return [Message(("user", "assistant")[n % 2], plain_text(text, field)) for n, text in enumerate(texts)]


def read_turns(lines: Iterable[str]) -> list[Message]:
    """Messages of lines or texts that begin with "病人：", "医生：", ...; what has no speaker continues the last turn.
    UnusableRow: the first has no speaker."""
    turns: list[Message] = []
    for line in lines:
        if match := SPEAKER.fullmatch(line):
            turns.append(Message(SPEAKERS[match[1].lower()], match[2].strip()))
        elif turns:
            turns.append(Message(turns[-1].role, line.strip()))
        elif line.strip():
            raise UnusableRow("unknown layout")
    return join_turns(turns)


def join_turns(turns: Iterable[Message]) -> list[Message]:
    """Successive turns of one speaker become one, a line each; empty ones are dropped."""
    spoken = (turn for turn in turns if turn.content)
    return [
        Message(role, "\n".join(turn.content for turn in group))
        for role, group in groupby(spoken, lambda turn: turn.role)
    ]


def checked_turns(messages: list[Message], last: Role, reason: str) -> tuple[Message, ...]:
    """An optional system text, then questions and answers in turn, none of them empty, up to one by `last` (else
    UnusableRow with the reason)."""
    messages = [message for message in messages if message.content or message.role != "system"]
    turns = messages[1:] if messages[0].role == "system" else messages
    if any(turn.role != ("user", "assistant")[number % 2] for number, turn in enumerate(turns)):
        raise UnusableRow("roles out of order")
    if messages[-1].role != last:
        raise UnusableRow(reason)
    for message in messages:
        if not message.content:
            raise UnusableRow("empty question" if message.role == "user" else "empty answer")
    return tuple(messages)


def checked_chat(id_: str, messages: list[Message]) -> Chat:
    """UnusableRow also for a chat that ends with a question: cutting a turn off would be a silent loss."""
    if not any(message.role == "assistant" for message in messages):
        raise UnusableRow("no answer")
    return Chat(id_, checked_turns(messages, "assistant", "ends with a question"))


# ---------------------------------------------------------------------------------------------------------- kinds


def _messages(row: Any) -> list[Message]:
    match row:
        case list():
            return read_messages(row, "turn")
        case {"conversations": turns} | {"messages": turns} | {"conversation": turns}:
            return system_message(row) + read_messages(turns, "conversations")
        case {"instruction": _}:
            parts = (next(iter(texts_of(row["instruction"], "instruction")), ""), field_text(row, "input"))
            question = Message("user", "\n".join(part for part in parts if part))
            if row.get("output") is None:
                raise UnusableRow("no answer")
            answer = Message("assistant", field_text(row, "output"))
            return [*system_message(row), *history_messages(row), question, answer]
        case {"input": [*questions], "output": [*answers]}:
            if len(questions) != len(answers):
                raise UnusableRow("not as many answers as questions")
            return _alternating((text for pair in zip(questions, answers, strict=True) for text in pair), "turn")
        case {"input": _, "target": _} | {"input": _, "output": _}:
            # A question, or earlier turns with the speakers' names, up to the name of the one who answers.
            text = field_text(row, "input")
            lines = text.replace("\\n", "\n").split("\n")
            turns = read_turns(lines) if SPEAKER.fullmatch(lines[0]) else [Message("user", text)]
            return [*turns, Message("assistant", field_text(row, "target" if "target" in row else "output"))]
    raise unknown_layout(
        row,
        "conversations, messages, instruction/input/output, question/answer, input/target, conversation or a list of turns",
    )


def to_chats(id_: str, row: Any) -> list[Chat]:
    """One chat; of a question with several answers one for each. Of several wordings of a question the first is taken."""
    is_pair = isinstance(row, dict) and "question" in row and "answer" in row
    if not is_pair or "conversations" in row or "messages" in row or "conversation" in row:
        return [checked_chat(id_, _messages(row))]
    question = next(iter(texts_of(row["question"], "question")), "")
    before = [*system_message(row), *history_messages(row), Message("user", question)]
    answers = texts_of(row["answer"], "answer") or [""]
    return [
        checked_chat(f"{id_}~{n}" if n > 1 else id_, [*before, Message("assistant", answer)])
        for n, answer in enumerate(answers, 1)
    ]


FIELDS = ("conversations", "messages", "conversation", "system", "history", "instruction", "input", "output", "target",
          "question", "answer")  # fmt: skip
chat = row_reader(*FIELDS, objects=False)(to_chats)
HUATUO = {"question": "not_null(questions, question)", "answer": "not_null(answers, answer)"}
huatuo = row_reader("questions", "answers", *FIELDS, columns=HUATUO)(to_chats)
# ChatGPT's first answer; people's first where it gave none.
HC3 = {"answer": "first([chatgpt_answers, human_answers])"}
hc3 = row_reader("question", "human_answers", "chatgpt_answers", columns=HC3)(to_chats)
SAFETY_PROMPTS = {"question": "prompt", "answer": "response"}
safety_prompts = row_reader("prompt", "response", "type", columns=SAFETY_PROMPTS, rows="prompt && [@] || *[]")(to_chats)


def _one_turn(id_: str, question: str, answer: str) -> Chat:
    return checked_chat(id_, [Message("user", question), Message("assistant", answer)])


@row_reader("department", "title", "ask", "answer")
def department_qa(id_: str, row: Fields) -> Chat:
    """The title, then what the patient adds; neither says what the other says already."""
    if not {"title", "ask", "answer"} <= row.keys():
        raise UnusableRow("unknown layout")
    title, ask = field_text(row, "title"), field_text(row, "ask")
    if ask in ("", "无") or ask in title:
        ask = ""
    elif title.rstrip("？?。！!") in ask:
        title = ""
    return _one_turn(id_, "\n".join(text for text in (title, ask) if text), field_text(row, "answer"))


@row_reader("instruction", "input", "output")
def multiturn_chat(id_: str, row: Fields) -> Chat:
    """Turns inside `instruction`; `output` answers the last question."""
    if not {"instruction", "output"} <= row.keys():
        raise UnusableRow("unknown layout")
    text = field_text(row, "instruction")
    start, *pieces = MARK.split(text)
    if pieces and start.strip():
        raise UnusableRow("text before the first turn")
    turns = [] if pieces else [Message("user", text)]
    for human, user, said in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        turns.append(Message(SPEAKERS[(human or user).lower()], said.strip()))
    turns.append(Message("user", field_text(row, "input")))
    answer = Message("assistant", field_text(row, "output"))
    return checked_chat(id_, [*(turn for turn in turns if turn.content), answer])


# ------------------------------------------------------------------------------------------------------ MedDialog

BLOCK = re.compile(r"\s*id\s*=\s*\d+\s*")
BLOCK_LINES = 10_000
SECTIONS = ("Doctor faculty", "Description", "Dialogue", "Diagnosis and suggestions")
TOLD = ("疾病", "疾病名称", "病情描述", "希望获得的帮助")
FORM = (*TOLD, "怀孕情况", "患病多久", "已就诊医院及科室", "用药情况", "过敏史", "既往病史", "预约医生", "检查医院",
        "主诉", "现病史")  # fmt: skip
ENTRY = re.compile(rf"\s*({'|'.join(sorted(FORM, key=len, reverse=True))})\s*[:：]\s*(.*)")
# Left over from the form: the name of a doctor, and the day on which it was filled in.
FORM_LINE = re.compile(r"\s*预约医生\s*[:：].*|.*[（(]\d{4}-\d\d-\d\d填写[）)]\s*")


def _read_meddialog(part: Part, source: RawFiles) -> Iterator[Counted]:
    """Blocks of a .txt, each of which begins with "id=7" and is placed where it begins; elsewhere lists of turns."""
    if part.suffix != ".txt" or source.header:
        yield from _dialogue_list.read(part, source)
        return
    place, lines, broken = "", [], None
    for number, line, fault in chain(read_lines(part), [Line(0, "id=0")]):
        if BLOCK.fullmatch(line) and lines:
            yield from convert_row(RawRow(place, lines, "\n".join(lines), broken), (), _block_chat, objects=False)
            lines, broken = [], None
        broken = broken or fault
        place = place if lines else f"{part.place}:{number}"
        if len(lines) < BLOCK_LINES:
            lines.append(line)
        else:
            broken = f"a block of more than {BLOCK_LINES:,} lines"


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
    # From the end, because the patient's next words decide what is new in a description.
    for name, body in reversed(sections):
        if name == "Dialogue":
            turns = read_turns(line for line in body if not FORM_LINE.fullmatch(line)) + turns
        elif name == "Description":
            turns = _described(body, turns)
    return _trimmed_chat(id_, turns)


@row_reader("description", "dialogue", objects=False)
def _dialogue_list(id_: str, row: Any) -> Chat:
    """A list of turns, or an object that holds one and perhaps a description."""
    turns = row.get("dialogue") if isinstance(row, dict) else row
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise UnusableRow("unknown layout")
    description = field_text(row, "description") if isinstance(row, dict) else ""
    messages = read_turns(plain_text(turn, "dialogue") for turn in turns)
    return _trimmed_chat(id_, _described(description.split("\n"), messages) if description else messages)


def _described(body: list[str], turns: list[Message]) -> list[Message]:
    """What the patient wrote before the talk, less what the first turn says again, then the turns.

    Of a form, only the entries that describe the case; without a form, all of the text.
    """
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


MEDDIALOG = Reader(
    _read_meddialog, _dialogue_list.fields, (".txt", ".jsonl", ".json", ".parquet"),
    lambda suffix, source: BLOCK.fullmatch if suffix == ".txt" else str,
)  # fmt: skip
