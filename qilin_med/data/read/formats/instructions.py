"""Questions and answers: Huatuo-26M, department CSVs, ChatGPT-made instructions, safety prompts."""

import re
from typing import Any

from qilin_med.data.read.files import UnusableRow
from qilin_med.data.read.formats.dialogues import SPEAKER, read_turns
from qilin_med.data.read.formats.reading import row_reader, texts_of, unknown_layout
from qilin_med.data.read.records import chat_messages, checked_chat, plain_text
from qilin_med.records import Chat, Message

Row = dict[str, Any]
# Turns written into one text: "Human:...\nAssistant:..." (BELLE), "<user>: ... <bot>: ..." (literature dialogues).
MARK = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]|<(user|bot)>\s*[:：]")
MARKED = {"Human": "user", "user": "user", "Assistant": "assistant", "bot": "assistant"}


def one_turn(id_: str, question: str, answer: str) -> Chat:
    """A chat of one question and one answer. UnusableRow: one of them is empty."""
    return Chat(id_, checked_chat([Message("user", question), Message("assistant", answer)]))


# ---------------------------------------------------------------------------------------------------------- chats


def _chat(id_: str, row: Any) -> Chat:
    return Chat(id_, checked_chat(_messages(row)))


def _messages(row: Any) -> list[Message]:
    if isinstance(row, list):
        return _prefixed(row)
    if not isinstance(row, dict):
        raise unknown_layout()
    if isinstance(row.get("conversation"), list):
        return [message for turn in row["conversation"] for message in _firefly_turn(turn)]
    if row.keys() & {"conversations", "messages", "instruction"}:
        return chat_messages(row)
    if {"question", "answer"} <= row.keys():
        return [Message("user", _text(row, "question")), Message("assistant", _text(row, "answer"))]
    if "input" in row and row.keys() & {"target", "output"}:
        return [
            *_spoken(_text(row, "input")),
            Message("assistant", _text(row, "target" if "target" in row else "output")),
        ]
    raise unknown_layout()


def _text(row: Row, field: str) -> str:
    return plain_text(row.get(field), field)


def _prefixed(turns: list[Any]) -> list[Message]:
    if not all(isinstance(turn, str) for turn in turns):
        raise unknown_layout()
    return read_turns(plain_text(turn, "turn") for turn in turns)


def _firefly_turn(turn: Any) -> list[Message]:
    if not isinstance(turn, dict) or not {"human", "assistant"} <= turn.keys():
        raise unknown_layout()
    return [Message("user", _text(turn, "human")), Message("assistant", _text(turn, "assistant"))]


def _spoken(text: str) -> list[Message]:
    """A question, or earlier turns with the speakers' names, up to the name of the one who answers."""
    lines = text.replace("\\n", "\n").split("\n")
    return read_turns(lines) if SPEAKER.fullmatch(lines[0]) else [Message("user", text)]


CHAT_FIELDS = ("conversations", "messages", "conversation", "system", "history", "instruction", "input", "output",
               "target", "question", "answer")  # fmt: skip
CHAT = row_reader(_chat, CHAT_FIELDS, objects=False)


# ---------------------------------------------------------------------------------------------- one turn or several


def _huatuo(id_: str, row: Row) -> list[Chat]:
    """The first wording of the question with each of its answers."""
    if "instruction" in row:
        parts = [*texts_of(row["instruction"], "instruction")[:1], _text(row, "input")]
        question, answers = "\n".join(part for part in parts if part), row.get("output")
    elif row.keys() & {"questions", "question"}:
        question = next(iter(texts_of(row.get("questions", row.get("question")), "questions")), "")
        answers = row.get("answers", row.get("answer"))
    else:
        raise unknown_layout()
    several = texts_of(answers, "answers") or [""]
    return [one_turn(f"{id_}~{n}" if n > 1 else id_, question, answer) for n, answer in enumerate(several, 1)]


HUATUO = row_reader(_huatuo, ("questions", "answers", "instruction", "input", "output"))


def _department_qa(id_: str, row: Row) -> Chat:
    if not {"title", "ask", "answer"} <= row.keys():
        raise unknown_layout()
    return one_turn(id_, _asked(_text(row, "title"), _text(row, "ask")), _text(row, "answer"))


def _asked(title: str, ask: str) -> str:
    """The title, then what the patient adds; neither says what the other says already."""
    if ask in ("", "无") or ask in title:
        return title
    return ask if title.rstrip("？?。！!") in ask else f"{title}\n{ask}"


DEPARTMENT_QA = row_reader(_department_qa, ("department", "title", "ask", "answer"))


def _instruct_chat(id_: str, row: Row) -> Chat:
    """An instruction, or parallel lists of questions and answers."""
    if "instruction" in row:
        return _chat(id_, row)
    questions, answers = row.get("input"), row.get("output")
    if not isinstance(questions, list) or not isinstance(answers, list):
        raise unknown_layout()
    if len(questions) != len(answers):
        raise UnusableRow("not as many answers as questions")
    pairs = zip(questions, answers, strict=True)
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return Chat(id_, checked_chat([Message(role, plain_text(text, "turn")) for role, text in turns]))


INSTRUCT_CHAT = row_reader(_instruct_chat, ("instruction", "input", "output", "history", "system"))


def _multiturn_chat(id_: str, row: Row) -> Chat:
    """Turns inside `instruction`; `output` answers the last question."""
    if not {"instruction", "output"} <= row.keys():
        raise unknown_layout()
    turns = [*_marked_turns(_text(row, "instruction")), Message("user", _text(row, "input"))]
    spoken = [turn for turn in turns if turn.content]
    return Chat(id_, checked_chat([*spoken, Message("assistant", _text(row, "output"))]))


def _marked_turns(text: str) -> list[Message]:
    start, *pieces = MARK.split(text)
    if not pieces:
        return [Message("user", text)]
    if start.strip():
        raise UnusableRow("text before the first turn")
    names = (first or second for first, second in zip(pieces[::3], pieces[1::3], strict=True))
    return [Message(MARKED[name], said.strip()) for name, said in zip(names, pieces[2::3], strict=True)]


MULTITURN_CHAT = row_reader(_multiturn_chat, ("instruction", "input", "output"))


def _hc3(id_: str, row: Row) -> Chat:
    """ChatGPT's first answer; people's first where it gave none."""
    if "question" not in row or not row.keys() & {"chatgpt_answers", "human_answers"}:
        raise unknown_layout()
    answers = [text for name in ("chatgpt_answers", "human_answers") for text in texts_of(row.get(name), name)]
    return one_turn(id_, _text(row, "question"), next(iter(answers), ""))


HC3 = row_reader(_hc3, ("question", "human_answers", "chatgpt_answers"))


def _safety_prompt(id_: str, row: Row) -> Chat:
    if not {"prompt", "response"} <= row.keys():
        raise unknown_layout()
    return one_turn(id_, _text(row, "prompt"), _text(row, "response"))


SAFETY_PROMPTS = row_reader(_safety_prompt, ("prompt", "response", "type"), nested=True)
