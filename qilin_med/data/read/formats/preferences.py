"""Pairs of answers: reward data, Zhongjing's ranked answers."""

import ast
import json
from typing import Any

from qilin_med.data.read.files import UnusableRow
from qilin_med.data.read.formats.reading import row_reader, unknown_layout
from qilin_med.data.read.records import checked_pair, history_messages, plain_text, read_preference
from qilin_med.records import Message, Preference

Row = dict[str, Any]

PREFERENCE = row_reader(
    read_preference,
    ("question", "response_chosen", "response_rejected", "conversations", "prompt", "chosen", "rejected", "system",
     "history"),
)  # fmt: skip


def _zhongjing(id_: str, row: Row) -> Preference:
    """An instruction with two answers, the better one first, or a question with ranked answers: first against last."""
    if "rank1" in row:
        question, (chosen, rejected) = _text(row, "query"), _first_and_last(row)
    elif "instruction" in row and isinstance(row.get("output"), list) and len(row["output"]) == 2:
        question = "\n".join(text for field in ("instruction", "input") if (text := _text(row, field)))
        chosen, rejected = (plain_text(answer, "output") for answer in row["output"])
    else:
        raise unknown_layout()
    prompt = [*history_messages({"history": _history(row.get("history"))}), Message("user", question)]
    prompt, chosen, rejected = checked_pair(prompt, chosen, rejected)
    return Preference(id_, tuple(prompt), chosen, rejected)


def _text(row: Row, field: str) -> str:
    return plain_text(row.get(field), field)


def _first_and_last(row: Row) -> tuple[str, str]:
    """The best answer, and the worst that is another text."""
    first, *others = (_text(row, f"rank{number}") for number in range(1, 5))
    return first, next((answer for answer in reversed(others) if answer not in ("", first)), first)


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


ZHONGJING = row_reader(
    _zhongjing, ("instruction", "input", "output", "query", "history", "rank1", "rank2", "rank3", "rank4")
)
