"""Records -> what one stage trains on, and the rows in which the training files hold it."""

import json
from dataclasses import fields
from hashlib import blake2b
from typing import Any

from qilin_med.config.experiment import StageName
from qilin_med.data.read.records import ROLES, UnusableRow
from qilin_med.prompt.wording import exam_answer, exam_prompt, option_lines
from qilin_med.records import Chat, Document, Message, Preference, Question, Role

Row = dict[str, Any]
AnyRecord = Document | Chat | Preference | Question
TrainingRecord = Document | Chat | Preference

SPEAKERS: dict[Role, str] = {"user": "患者", "assistant": "医生"}
CHIMED_NAMES: dict[Role, str] = {"system": "system", "user": "input", "assistant": "output"}


# -------------------------------------------------------------------------------------------------------- stages


def render(record: AnyRecord, stage: StageName) -> TrainingRecord:
    """The record as `stage` trains on it, under the same id: a Document, a Chat or a Preference.

    UnusableRow, with a reason that holds nothing of the record, if the record cannot serve the stage.
    """
    return {"pretraining": _as_document, "sft": _as_chat, "dpo": _as_preference}[stage](record)


def _as_document(record: AnyRecord) -> Document:
    match record:
        case Document():
            return record
        case Chat():
            return Document(record.id, _transcript(record.messages))
        case Question():
            return Document(record.id, _exam_text(record))
    raise UnusableRow("a pair of answers is no text for pretraining")


def _transcript(messages: tuple[Message, ...]) -> str:
    system = [message.content for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 2:
        question, answer = (turn.content for turn in turns)
        return "\n".join([*system, f"问：{question}", f"答：{answer}"])
    return "\n".join(system + [f"{SPEAKERS[turn.role]}：{turn.content}" for turn in turns])


def _exam_text(question: Question) -> str:
    parts = [question.stem, option_lines(question.options), f"答案：{_told_answer(question)}"]
    parts += [f"解释：{question.explanation}"] if question.explanation else []
    return "\n".join(part for part in parts if part)


def _told_answer(question: Question) -> str:
    if not question.answer:
        raise UnusableRow("no answer")
    return question.answer


def _as_chat(record: AnyRecord) -> Chat:
    match record:
        case Chat():
            return record
        case Question():
            return Chat(record.id, _exam_messages(record))
        case Document():
            raise UnusableRow("running text is no conversation for sft")
    raise UnusableRow("a pair of answers is no conversation for sft")


def _exam_messages(question: Question) -> tuple[Message, Message]:
    letters = _told_answer(question)
    if not question.explanation:
        raise UnusableRow("no explanation")
    return (
        Message("user", exam_prompt(question.stem, question.options)),
        Message("assistant", exam_answer(letters, question.explanation)),
    )


def _as_preference(record: AnyRecord) -> Preference:
    if not isinstance(record, Preference):
        raise UnusableRow("no pair of answers for dpo")
    return record


# ---------------------------------------------------------------------------------------------------------- rows


def to_row(record: TrainingRecord) -> Row:
    """The record in ChiMed's layout, which `qilin_med.data.read.records` reads."""
    match record:
        case Document():
            return {"id": record.id, "text": record.text}
        case Chat():
            return {"id": record.id, "conversations": _turns(record.messages)}
        case Preference(prompt=(Message(role="user", content=question),)):
            answers = {"response_chosen": record.chosen, "response_rejected": record.rejected}
            return {"id": record.id, "question": question, **answers}
        case Preference():
            answers = {"chosen": record.chosen, "rejected": record.rejected}
            return {"id": record.id, "conversations": _turns(record.prompt), **answers}
    raise TypeError(f"{type(record).__name__} is no training record: render it first")


def _turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"from": CHIMED_NAMES[message.role], "value": message.content} for message in messages]


def from_row(stage: StageName, row: Row) -> TrainingRecord:
    """The record that `to_row` wrote. For rows of our own making: any other may raise KeyError."""
    if stage == "pretraining":
        return Document(row["id"], row["text"])
    if stage == "sft":
        return Chat(row["id"], _messages(row["conversations"]))
    if "question" in row:
        return Preference(
            row["id"], (Message("user", row["question"]),), row["response_chosen"], row["response_rejected"]
        )
    return Preference(row["id"], _messages(row["conversations"]), row["chosen"], row["rejected"])


def _messages(turns: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(ROLES[turn["from"]], turn["value"]) for turn in turns)


# ------------------------------------------------------------------------------------------------------ contents


def text_of(record: AnyRecord) -> str:
    """All text of a record, part by part joined by newlines; deduplication compares it."""
    match record:
        case Document():
            return record.text
        case Chat():
            return "\n".join(message.content for message in record.messages)
        case Preference():
            return "\n".join([*(message.content for message in record.prompt), record.chosen, record.rejected])
        case Question():
            parts = (record.stem, option_lines(record.options), record.explanation)
            return "\n".join(part for part in parts if part)
    raise TypeError(f"{type(record).__name__} is no record")


def stable_id(source_name: str, record: AnyRecord) -> str:
    """ "source-16 hex digits" from the contents alone, so that moving, splitting or reordering files changes no id."""
    contents = [getattr(record, field.name) for field in fields(record) if field.name != "id"]
    digest = blake2b(json.dumps(contents, default=_role_and_content).encode(), digest_size=8)
    return f"{source_name}-{digest.hexdigest()}"


def _role_and_content(message: Message) -> tuple[str, str]:
    return message.role, message.content
