"""Records -> what one stage trains on, and the rows in which the training files hold it."""

import json
import re
from dataclasses import fields
from hashlib import blake2b

from qilin_med.config.experiment import StageName
from qilin_med.data.read.formats.chats import ROLES
from qilin_med.data.read.formats.reading import UnusableRow
from qilin_med.data.shards import Row
from qilin_med.prompt.wording import exam_answer, exam_prompt, option_lines
from qilin_med.records import AnyRecord, Chat, Document, Message, Preference, Question, Role, TrainingRecord

TOLD = re.compile("^答案：([A-Z]+)$", re.MULTILINE)
OPTION_LINE = re.compile(r"^([A-Z]) (?=\S)", re.MULTILINE)
SPEAKER_NAMES: dict[Role, str] = {"user": "患者", "assistant": "医生"}
CHIMED_NAMES: dict[Role, str] = {"system": "system", "user": "input", "assistant": "output"}


def render(record: AnyRecord, stage: StageName) -> TrainingRecord:
    """The record as `stage` trains on it, under the same id: a Document, a Chat or a Preference.

    UnusableRow, with a reason that holds nothing of the record, if the record cannot serve the stage.
    """
    match stage, record:
        case ("pretraining", Document()) | ("sft", Chat()) | ("dpo", Preference()):
            return record
        case ("pretraining" | "sft", Question(answer="")):
            raise UnusableRow("no answer")
        case "pretraining", Chat(id_, messages):
            return Document(id_, transcript(messages))
        case "pretraining", Question(id_, stem, options, answer, explanation):
            parts = [stem, option_lines(options), f"答案：{answer}", f"解释：{explanation}" if explanation else ""]
            return Document(id_, "\n".join(part for part in parts if part))
        case "sft", Question(explanation=""):
            raise UnusableRow("no explanation")
        case "sft", Question(id_, stem, options, answer, explanation):
            prompt = Message("user", exam_prompt(stem, options))
            return Chat(id_, (prompt, Message("assistant", exam_answer(answer, explanation))))
        case "pretraining", _:
            raise UnusableRow("a pair of answers is no text for pretraining")
        case "sft", Document():
            raise UnusableRow("running text is no conversation for sft")
        case "sft", _:
            raise UnusableRow("a pair of answers is no conversation for sft")
    raise UnusableRow("no pair of answers for dpo")


def is_whole(text: str) -> bool:
    """Whether an exam question that `render` wrote, for either set, has its stem, options, and an answer among them."""
    told = TOLD.search(text)
    letters = OPTION_LINE.findall(text, 0, told.start()) if told else []
    begins_with_stem = bool(letters) and not OPTION_LINE.match(text)
    return begins_with_stem and set(told[1]) <= set(letters)


def transcript(messages: tuple[Message, ...]) -> str:
    """A conversation as running text: question and answer, or what patient and doctor say in turn."""
    system = [message.content for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    names = ("问", "答") if len(turns) == 2 else [SPEAKER_NAMES[turn.role] for turn in turns]
    return "\n".join([*system, *(f"{name}：{turn.content}" for name, turn in zip(names, turns, strict=True))])


# ---------------------------------------------------------------------------------------------------------- rows


def to_row(record: TrainingRecord) -> Row:
    """The record in ChiMed's layout, which `qilin_med.data.read.readers` reads."""

    def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        return [{"from": CHIMED_NAMES[message.role], "value": message.content} for message in messages]

    match record:
        case Document(id_, text):
            return {"id": id_, "text": text}
        case Chat(id_, messages):
            return {"id": id_, "conversations": turns(messages)}
        case Preference(id_, (Message("user", question),), chosen, rejected):
            return {"id": id_, "question": question, "response_chosen": chosen, "response_rejected": rejected}
        case Preference(id_, prompt, chosen, rejected):
            return {"id": id_, "conversations": turns(prompt), "chosen": chosen, "rejected": rejected}
    raise TypeError(f"{type(record).__name__} is no training record: render it first")


def from_row(stage: StageName, row: Row) -> TrainingRecord:
    """The record that `to_row` wrote. For rows of our own making: any other may raise KeyError."""
    if stage == "pretraining":
        return Document(row["id"], row["text"])
    if "question" in row:
        prompt = (Message("user", row["question"]),)
        return Preference(row["id"], prompt, row["response_chosen"], row["response_rejected"])
    messages = tuple(Message(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"])
    if stage == "sft":
        return Chat(row["id"], messages)
    return Preference(row["id"], messages, row["chosen"], row["rejected"])


# ------------------------------------------------------------------------------------------------------ contents


def text_of(record: AnyRecord) -> str:
    """All text of a record, part by part joined by newlines; deduplication compares it."""
    match record:
        case Document(_, text):
            return text
        case Chat(_, messages):
            return "\n".join(message.content for message in messages)
        case Preference(_, prompt, chosen, rejected):
            return "\n".join([*(message.content for message in prompt), chosen, rejected])
        case Question(_, stem, options, _, explanation):
            return "\n".join(part for part in (stem, option_lines(options), explanation) if part)


def stable_id(source_name: str, record: AnyRecord) -> str:
    """ "source-16 hex digits" from the contents alone, so that moving, splitting or reordering files changes no id."""
    contents = [getattr(record, field.name) for field in fields(record) if field.name != "id"]
    in_json = json.dumps(contents, default=lambda message: (message.role, message.content))
    return f"{source_name}-{blake2b(in_json.encode(), digest_size=8).hexdigest()}"
