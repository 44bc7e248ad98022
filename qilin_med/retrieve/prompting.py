"""Passages -> what stands before a question, within a limit of tokens."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from qilin_med.prompt.wording import option_lines, with_passages


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk. `id` is "document@first-last": the characters of the document that `text` is."""

    id: str
    document: str
    source: str
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with the passages that found room before it."""

    text: str
    passages: tuple[Passage, ...]

    @property
    def sources(self) -> list[str]:
        """Ids of the passages, in order."""
        return [passage.id for passage in self.passages]


def fill_prompt(question: str, passages: Sequence[Passage], limit: int, count: Callable[[str], int]) -> Prompt:
    """The question after as many passages as `limit` tokens hold (`count` tells a text's tokens; the wording around the
    passages counts, the question does not).

    Passages come in the order given, the most relevant first, and stay whole: one that does not fit is passed over.
    Only if none fits is the first one cut at its end.
    """
    kept: list[Passage] = []
    for passage in passages:
        if count(_context([*kept, passage])) <= limit:
            kept.append(passage)
    if not kept and passages:
        kept = _cut_to_fit(passages[0], limit, count)
    return Prompt(with_passages(question, [passage.text for passage in kept]), tuple(kept))


def _context(passages: Iterable[Passage]) -> str:
    return with_passages("", [passage.text for passage in passages])


def _cut_to_fit(passage: Passage, limit: int, count: Callable[[str], int]) -> list[Passage]:
    """The longest beginning that fits, if any."""

    def tokens_of(length: int) -> int:
        return count(_context([replace(passage, text=passage.text[:length])]))

    length = bisect_right(range(1, len(passage.text) + 1), limit, key=tokens_of)
    return [replace(passage, text=passage.text[:length])] if length else []


def exam_query(stem: str, options: Iterable[tuple[str, str]], with_options: bool) -> str:
    """What an exam question is looked up by; `options` are (letter, text)."""
    return f"{stem}\n{option_lines(options)}" if with_options else stem
