"""Pairs of answers: reward data, Zhongjing's ranked answers."""

import ast
import json
from typing import Any

from qilin_med.data.read.formats.chats import checked_turns, history_messages, read_messages, system_message
from qilin_med.data.read.formats.reading import Fields, UnusableRow, field_text, plain_text, row_reader, unknown_layout
from qilin_med.records import Message, Preference


@row_reader("question", "response_chosen", "response_rejected", "conversations", "prompt", "chosen", "rejected", "system",
            "history")  # fmt: skip
def preference(id_: str, row: Fields) -> Preference:
    if {"question", "response_chosen", "response_rejected"} <= row.keys():
        question = Message("user", field_text(row, "question"))
        answers = (field_text(row, field) for field in ("response_chosen", "response_rejected"))
        return _checked_pair(id_, system_message(row) + history_messages(row) + [question], *answers)
    if not {"chosen", "rejected"} <= row.keys() or not row.keys() & {"conversations", "prompt"}:
        raise unknown_layout(
            row, "question/response_chosen/response_rejected, conversations/chosen/rejected or prompt/chosen/rejected"
        )
    if "conversations" in row:
        prompt = read_messages(row["conversations"], "conversations")
    elif isinstance(row["prompt"], list):
        prompt = read_messages(row["prompt"], "prompt")
    else:
        prompt = [*history_messages(row), Message("user", field_text(row, "prompt"))]
    prompt = system_message(row) + prompt
    (chosen_before, chosen), (rejected_before, rejected) = (_answer(row[f], f) for f in ("chosen", "rejected"))
    before = chosen_before or rejected_before
    for repeated in (chosen_before, rejected_before):
        if repeated and (repeated != before or repeated[-len(prompt) :] != prompt):
            raise UnusableRow("chosen and rejected answer different prompts")
    # A repeated prompt may say more than `prompt` does (a system text, earlier turns).
    return _checked_pair(id_, before or prompt, chosen, rejected)


def _answer(value: Any, field: str) -> tuple[list[Message], str]:
    """(prompt repeated before it, answer), which may be a text, a message, or a list of messages."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value or isinstance(value[0], str):
        return [], plain_text(value, field)
    *before, answer = read_messages(value, field) or [Message("assistant", "")]
    if answer.role != "assistant":
        raise UnusableRow(f"roles out of order: '{field}' is no answer")
    return [message for message in before if message.content or message.role != "system"], answer.content


def _checked_pair(id_: str, prompt: list[Message], chosen: str, rejected: str) -> Preference:
    if not any(message.content for message in prompt):
        raise UnusableRow("empty prompt")
    turns = checked_turns(prompt, "user", "the prompt does not end with a question")
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise UnusableRow(f"empty {field}")
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are the same")
    return Preference(id_, turns, chosen, rejected)


@row_reader("instruction", "input", "output", "query", "history", "rank1", "rank2", "rank3", "rank4")
def zhongjing(id_: str, row: Fields) -> Preference:
    """An instruction with two answers, the better one first, or a question with ranked answers: the best, and the worst
    that is another text."""
    if "rank1" in row:
        question = field_text(row, "query")
        chosen, *others = (field_text(row, f"rank{number}") for number in range(1, 5))
        rejected = next((answer for answer in reversed(others) if answer not in ("", chosen)), chosen)
    elif "instruction" in row and isinstance(row.get("output"), list) and len(row["output"]) == 2:
        question = "\n".join(text for field in ("instruction", "input") if (text := field_text(row, field)))
        chosen, rejected = (plain_text(answer, "output") for answer in row["output"])
    else:
        raise UnusableRow("unknown layout")
    prompt = [*history_messages({"history": _history(row.get("history"))}), Message("user", question)]
    return _checked_pair(id_, prompt, chosen, rejected)


def _history(value: Any) -> Any:
    """A list, also where it is written as JSON or as Python writes it."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    for parse in (json.loads, ast.literal_eval):
        try:
            return [list(turn) if isinstance(turn, tuple) else turn for turn in parse(value)]
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    raise UnusableRow("unreadable history")
