"""Documents -> spans of whole sentences, within a limit of tokens and with an overlap; nothing of a text is lost."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from qilin_med.errors import UserError

Span: TypeAlias = tuple[int, int]
"""First and past-the-last character."""

SENTENCE_END = re.compile(r"(?:[。！？!?；;…]+[”’」』）】)\"']*|\.(?=\s)|\n)\s*")
CLAUSE_END = re.compile(r"[，、：,:]\s*|\s+")


class Cutter:
    """Cuts texts into chunks of at most `size` tokens that begin and end at sentence borders. A chunk repeats the last
    sentences of the one before, as many as `overlap` tokens hold.

    Sentences are counted one by one; counted as a whole, a chunk may have a token or two more or less.
    """

    def __init__(self, tokenizer_file: Path, size: int, overlap: int):
        """UserError: no such tokenizer."""
        self._tokenizer = load_tokenizer(tokenizer_file)
        self._size, self._overlap = size, overlap

    def cut(self, texts: Sequence[str]) -> list[list[Span]]:
        """The chunks of each text, in order; their union is the text."""
        return [
            group_sentences([span for span, _ in parts], [tokens for _, tokens in parts], self._size, self._overlap)
            for parts in self._measure(texts)
        ]

    def _measure(self, texts: Sequence[str]) -> list[list[tuple[Span, int]]]:
        """The sentences of each text with their tokens; one that is longer than a chunk comes in pieces that are not."""
        measured: list[list[tuple[Span, int]]] = [[] for _ in texts]
        pending = [(number, span) for number, text in enumerate(texts) for span in split_sentences(text)]
        while pending:
            tokens = self._count([texts[number][start:end] for number, (start, end) in pending])
            halves = []
            for (number, span), count in zip(pending, tokens, strict=True):
                if count <= self._size or span[1] - span[0] == 1:
                    measured[number].append((span, count))
                else:
                    middle = find_middle(texts[number], span)
                    halves += [(number, (span[0], middle)), (number, (middle, span[1]))]
            pending = halves
        return [sorted(parts) for parts in measured]

    def _count(self, texts: list[str]) -> list[int]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # SentencePiece drops blanks at an end, which are a token where another sentence follows.
        return [len(e.ids) + text[-1].isspace() for e, text in zip(encoded, texts, strict=True)]


def load_tokenizer(file: Path):
    """A `tokenizers.Tokenizer` (no torch, no transformers). UserError: no such file."""
    from tokenizers import Tokenizer

    if not file.is_file():
        raise UserError(f"{file}: not found; retrieval counts tokens with the base model's tokenizer: set model.path to"
                        " a complete model folder")  # fmt: skip
    return Tokenizer.from_file(str(file))


def split_sentences(text: str) -> list[Span]:
    """Sentences with the white space behind them."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    borders = [0, *(end for end in ends if end < len(text)), len(text)]
    return [(start, end) for start, end in pairwise(borders) if start < end]


def find_middle(text: str, span: Span) -> int:
    """The end of a clause nearest to the middle, within the middle half, else the middle."""
    start, end = span
    middle, quarter = (start + end) // 2, (end - start) // 4
    ends = (match.end() for match in CLAUSE_END.finditer(text, start + quarter, end - quarter))
    return min((place for place in ends if place < end), key=lambda place: abs(place - middle), default=middle)


def group_sentences(sentences: Sequence[Span], tokens: Sequence[int], size: int, overlap: int) -> list[Span]:
    """Greedy: each chunk takes as many sentences as fit, and the next begins with the last of them."""
    chunks: list[Span] = []
    first = 0
    while first < len(sentences):
        last, total = first + 1, tokens[first]
        while last < len(sentences) and total + tokens[last] <= size:
            last, total = last + 1, total + tokens[last]
        chunks.append((sentences[first][0], sentences[last - 1][1]))
        if last == len(sentences):
            break
        first = _step_back(tokens, first, last, size, overlap)
    return chunks


def _step_back(tokens: Sequence[int], first: int, last: int, size: int, overlap: int) -> int:
    """Where the chunk after sentences[first:last] begins."""
    # A new sentence must fit beside the repeated ones, or the next chunk would say nothing new.
    room, back = min(overlap, size - tokens[last]), last
    while back - 1 > first and tokens[back - 1] <= room:
        back -= 1
        room -= tokens[back]
    return back
