"""Conversations: ShareGPT, messages, instructions, ChiMed, Huatuo-26M, department tables, safety prompts."""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from qilin_med.data.read.formats.reading import (
    Fields,
    UnusableRow,
    name_of,
    plain_text,
    row_reader,
    text_of,
    texts_of,
    unknown_layout,
)
from qilin_med.records import Chat, Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "output"), "assistant"),
}
SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("病人", "患者", "用户", "patient", "human", "user"), "user"),
    **dict.fromkeys(("医生", "医师", "大夫", "助手", "doctor", "assistant", "bot"), "assistant"),
}
SPEAKER = re.compile(rf"\s*({'|'.join(SPEAKERS)})\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL)
# Turns written into one text: "Human:...\nAssistant:..." (BELLE), "<user>: ... <bot>: ..." (literature dialogues).
MARK = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]|<(user|bot)>\s*[:：]")


# ------------------------------------------------------------------------------------------------------- messages


def read_messages(value: Any, field: str) -> list[Message]:
    """Messages written as {"from", "value"} or {"role", "content"}."""
    if not isinstance(value, list):
        raise UnusableRow(f"wrong type: '{field}' is {name_of(value)}, expected a list of messages")
    messages = []
    for entry in value:
        if not isinstance(entry, dict):
            raise UnusableRow(f"wrong type: '{field}' holds {name_of(entry)}, expected messages")
        role, content = ("from", "value") if "from" in entry else ("role", "content")
        name = entry.get(role)
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise UnusableRow(f"unknown role {json.dumps(name, ensure_ascii=False)}"[:80])
        messages.append(Message(ROLES[name.lower()], text_of(entry, content)))
    return messages


def system_message(row: Fields) -> list[Message]:
    text = text_of(row, "system")
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
    """Messages of lines or texts that begin with "病人：", "医生：", ...; what has no speaker goes on with the last turn.
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
    """Turns of one speaker in a row become one, a line each; empty ones go."""
    spoken = (turn for turn in turns if turn.content)
    return [
        Message(role, "\n".join(turn.content for turn in group))
        for role, group in groupby(spoken, lambda turn: turn.role)
    ]


def without_empty_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.role != "system" or message.content]


def checked_turns(messages: list[Message], last: Role, reason: str) -> tuple[Message, ...]:
    """An optional system text, then questions and answers in turn, none of them empty, up to one by `last` (else
    UnusableRow with the reason)."""
    messages = without_empty_system(messages)
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


def _chat(id_: str, row: Any) -> Chat:
    return checked_chat(id_, _messages(row))


def _messages(row: Any) -> list[Message]:
    match row:
        case list() if all(isinstance(turn, str) for turn in row):
            return read_turns(plain_text(turn, "turn") for turn in row)
        case {"conversation": [*turns]}:  # Firefly
            if not all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in turns):
                raise UnusableRow("unknown layout")
            return _alternating((turn[name] for turn in turns for name in ("human", "assistant")), "conversation")
        case {"conversations": turns}:
            return system_message(row) + read_messages(turns, "conversations")
        case {"messages": turns}:
            return system_message(row) + read_messages(turns, "messages")
        case {"instruction": _}:
            parts = (text_of(row, "instruction"), text_of(row, "input"))
            question = Message("user", "\n".join(part for part in parts if part))
            if row.get("output") is None:
                raise UnusableRow("no answer")
            answer = Message("assistant", text_of(row, "output"))
            return [*system_message(row), *history_messages(row), question, answer]
        case {"question": _, "answer": _}:
            return [Message("user", text_of(row, "question")), Message("assistant", text_of(row, "answer"))]
        case {"input": _, "target": _} | {"input": _, "output": _}:
            # A question, or earlier turns with the speakers' names, up to the name of the one who answers.
            text = text_of(row, "input")
            lines = text.replace("\\n", "\n").split("\n")
            turns = read_turns(lines) if SPEAKER.fullmatch(lines[0]) else [Message("user", text)]
            return [*turns, Message("assistant", text_of(row, "target" if "target" in row else "output"))]
    raise unknown_layout(
        row,
        "conversations, messages, instruction/input/output, question/answer, input/target, conversation or a list of turns",
    )


CHAT_FIELDS = ("conversations", "messages", "conversation", "system", "history", "instruction", "input", "output",
               "target", "question", "answer")  # fmt: skip
CHAT = row_reader(_chat, CHAT_FIELDS, objects=False)


def _one_turn(id_: str, question: str, answer: str) -> Chat:
    return checked_chat(id_, [Message("user", question), Message("assistant", answer)])


def _huatuo(id_: str, row: Fields) -> list[Chat]:
    """The first wording of the question with each of its answers."""
    if "instruction" in row:
        parts = [*texts_of(row["instruction"], "instruction")[:1], text_of(row, "input")]
        question, answers = "\n".join(part for part in parts if part), row.get("output")
    elif row.keys() & {"questions", "question"}:
        question = next(iter(texts_of(row.get("questions", row.get("question")), "questions")), "")
        answers = row.get("answers", row.get("answer"))
    else:
        raise UnusableRow("unknown layout")
    several = texts_of(answers, "answers") or [""]
    return [_one_turn(f"{id_}~{n}" if n > 1 else id_, question, answer) for n, answer in enumerate(several, 1)]


HUATUO = row_reader(_huatuo, ("questions", "answers", "instruction", "input", "output"))


def _department_qa(id_: str, row: Fields) -> Chat:
    """The title, then what the patient adds; neither says what the other says already."""
    if not {"title", "ask", "answer"} <= row.keys():
        raise UnusableRow("unknown layout")
    title, ask = text_of(row, "title"), text_of(row, "ask")
    if ask in ("", "无") or ask in title:
        ask = ""
    elif title.rstrip("？?。！!") in ask:
        title = ""
    return _one_turn(id_, "\n".join(text for text in (title, ask) if text), text_of(row, "answer"))


DEPARTMENT_QA = row_reader(_department_qa, ("department", "title", "ask", "answer"))


def _instruct_chat(id_: str, row: Fields) -> Chat:
    """An instruction, or parallel lists of questions and answers."""
    if "instruction" in row:
        return _chat(id_, row)
    questions, answers = row.get("input"), row.get("output")
    if not isinstance(questions, list) or not isinstance(answers, list):
        raise UnusableRow("unknown layout")
    if len(questions) != len(answers):
        raise UnusableRow("not as many answers as questions")
    turns = (text for pair in zip(questions, answers, strict=True) for text in pair)
    return checked_chat(id_, _alternating(turns, "turn"))


INSTRUCT_CHAT = row_reader(_instruct_chat, ("instruction", "input", "output", "history", "system"))


def _multiturn_chat(id_: str, row: Fields) -> Chat:
    """Turns inside `instruction`; `output` answers the last question."""
    if not {"instruction", "output"} <= row.keys():
        raise UnusableRow("unknown layout")
    text = text_of(row, "instruction")
    start, *pieces = MARK.split(text)
    if pieces and start.strip():
        raise UnusableRow("text before the first turn")
    turns = [] if pieces else [Message("user", text)]
    for human, user, said in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        turns.append(Message(SPEAKERS[(human or user).lower()], said.strip()))
    turns.append(Message("user", text_of(row, "input")))
    answer = Message("assistant", text_of(row, "output"))
    return checked_chat(id_, [*(turn for turn in turns if turn.content), answer])


MULTITURN_CHAT = row_reader(_multiturn_chat, ("instruction", "input", "output"))


def _hc3(id_: str, row: Fields) -> Chat:
    """ChatGPT's first answer; people's first where it gave none."""
    if "question" not in row or not row.keys() & {"chatgpt_answers", "human_answers"}:
        raise UnusableRow("unknown layout")
    answers = [text for name in ("chatgpt_answers", "human_answers") for text in texts_of(row.get(name), name)]
    return _one_turn(id_, text_of(row, "question"), next(iter(answers), ""))


HC3 = row_reader(_hc3, ("question", "human_answers", "chatgpt_answers"))


def _safety_prompt(id_: str, row: Fields) -> Chat:
    if not {"prompt", "response"} <= row.keys():
        raise UnusableRow("unknown layout")
    return _one_turn(id_, text_of(row, "prompt"), text_of(row, "response"))


SAFETY_PROMPTS = row_reader(_safety_prompt, ("prompt", "response", "type"), nested=True)
