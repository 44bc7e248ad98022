"""What data can be: every raw format ends at one of these records, or is skipped with the reason."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]

RAW_CHARACTERS = 2000
LETTERS = "ABCDEFGHIJ"
"""Of the options of an exam question."""
LETTER, MARK = "[A-JＡ-Ｊ]", "[.．、:：)）]"
"""As regular expressions: a letter as it may be written, and what may stand between it and its option."""


@dataclass(frozen=True, slots=True)
class Document:
    """Running text for continued pre-training. `id` is "path:line" (line formats) or "path#index" (JSON arrays)."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """An optional system text, then questions and answers in turn; the last message is an answer."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt (an optional system text, whole earlier turns, the last question) and two answers to it."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Question:
    """An exam question: a stem, lettered options, the letters of the right ones ("A", "BD"; "" if not told)."""

    id: str
    stem: str
    options: tuple[tuple[str, str], ...]
    """(letter, text), in the order given."""
    answer: str
    explanation: str = ""
    facets: tuple[tuple[str, str], ...] = ()
    """(name, value) of what else the file tells, for example ("Clinical Department", "儿科")."""


AnyRecord = Document | Chat | Preference | Question
TrainingRecord = Document | Chat | Preference


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be used. `raw` is its original text, shortened to `RAW_CHARACTERS`."""

    id: str
    reason: str
    raw: str
