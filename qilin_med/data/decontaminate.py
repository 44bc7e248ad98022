"""Keep evaluation questions out of training data: by the question itself, and by the share of its n-grams in a record.

The index of all evaluation files is built once and lies in one folder; every task of the build maps it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from qilin_med.config.corpus import DecontaminationSettings
from qilin_med.data import matching
from qilin_med.data.read.readers import read_raw
from qilin_med.data.render import AnyRecord
from qilin_med.data.shards import read_lines, save, write_lines
from qilin_med.records import Chat, Document, Preference, Question, Skipped

NOT_WORDS = re.compile(r"[\W_]+")
ITEMS = "items.jsonl"
KNOWN_BITS = 24
FEWEST_NGRAMS = 4  # shorter questions are found by the question itself alone


@dataclass(frozen=True, slots=True)
class Hit:
    """An evaluation question that a record repeats. `coverage`: share of its n-grams, 1 for an equal question."""

    item: str
    file: str
    coverage: float


def bare(text: str) -> str:
    """Letters and digits alone, so that punctuation and layout do not hide a question."""
    # Punctuation first: what is left is mostly normal already, and normalising that is quick.
    return matching.normalise(NOT_WORDS.sub("", text))


def whole_questions(record: AnyRecord) -> list[str]:
    """Everything of an evaluation item, in the ways in which it is written down: stem and options with and without
    letters (which break every n-gram that reaches over a short option), or question and answer."""
    if isinstance(record, Question):
        texts = [text for _, text in record.options]
        lettered = [letter + text for letter, text in record.options]
        return [bare(record.stem + "".join(options)) for options in (texts, lettered)]
    if isinstance(record, Chat):
        return [bare("".join(message.content for message in record.messages if message.role != "system"))]
    return [bare(record.text if isinstance(record, Document) else record.prompt[-1].content)]


def stem_of(record: AnyRecord) -> str:
    """The question alone."""
    return bare(record.stem) if isinstance(record, Question) else next(iter(question_keys(record)), "")


def question_keys(record: AnyRecord) -> list[str]:
    """What makes two questions the same: stem with options in any order, or the words of a turn."""
    if isinstance(record, Question):
        return [bare(record.stem) + "|" + "|".join(sorted(bare(text) for _, text in record.options))]
    messages = record.messages if isinstance(record, Chat) else record.prompt if isinstance(record, Preference) else ()
    return [bare(message.content) for message in messages if message.role == "user"]


# --------------------------------------------------------------------------------------------------------- index


def build_index(settings: DecontaminationSettings, folder: Path, files: dict[str, list[Path]]) -> None:
    """Write the index of all evaluation questions. `files`: the files of each entry, by its name."""
    items, texts, items_of_texts = [], [], []
    for source in settings.files:
        for file in files[source.name]:
            for _, record in read_raw(source, file):
                if not isinstance(record, Skipped):
                    about = {"item": record.id, "file": source.name, "stem": stem_of(record)}
                    written = whole_questions(record)
                    items_of_texts += [len(items)] * len(written)
                    texts += written
                    items.append({**about, "keys": question_keys(record)[:1]})
    hashes, starts = matching.shingle(texts, settings.ngram)
    owners = np.repeat(np.arange(len(texts)), np.diff(starts))
    distinct = np.unique(np.stack([hashes, owners.astype(np.uint64)], axis=1), axis=0)
    long_enough = np.array([len(text) >= settings.ngram for text in texts], bool)
    distinct = distinct[long_enough[distinct[:, 1].astype(np.int64)]] if len(texts) else distinct
    save(folder / "hashes.npy", distinct[:, 0].copy())
    save(folder / "owners.npy", distinct[:, 1].astype(np.int64))
    save(folder / "totals.npy", np.bincount(distinct[:, 1].astype(np.int64), minlength=len(texts)))
    save(folder / "items.npy", np.array(items_of_texts, np.int64))
    write_lines(folder / ITEMS, items)


@lru_cache(maxsize=1)  # a worker has many tasks
def load_index(folder: Path, ngram: int, near_miss: float) -> "Index":
    return Index(folder, ngram, near_miss)


class Index:
    """Evaluation questions, ready to be looked for. `near_miss`: the least coverage that is told."""

    def __init__(self, folder: Path, ngram: int, near_miss: float):
        self._ngram, self._near_miss = ngram, near_miss
        self._hashes = np.load(folder / "hashes.npy")
        self._owners = np.load(folder / "owners.npy")
        self._totals = np.load(folder / "totals.npy")
        self._items_of_texts = np.load(folder / "items.npy")
        # Most n-grams of a corpus are in no question: a look into this table spares the search for them.
        self._known = np.zeros(1 << KNOWN_BITS, bool)
        self._known[self._hashes >> np.uint64(64 - KNOWN_BITS)] = True
        self._items = list(read_lines(folder / ITEMS))
        # Shorter ones ("谢谢", "怎么治疗") are nobody's question in particular.
        self._by_key = {key: i for i in reversed(self._items) for key in i["keys"] if len(key) >= ngram}

    def find(self, records: Sequence[AnyRecord], texts: Iterable[str]) -> Iterator[Hit | None]:
        """The evaluation question that each record repeats most, if at all. `texts`: all words of each record."""
        hits = self._find_by_ngrams([bare(text) for text in texts])
        for record, hit in zip(records, hits, strict=True):
            same = next((self._by_key[key] for key in question_keys(record) if key in self._by_key), None)
            yield Hit(same["item"], same["file"], 1.0) if same else hit

    def _find_by_ngrams(self, texts: list[str]) -> list[Hit | None]:
        found: list[Hit | None] = [None] * len(texts)
        if not len(self._hashes):
            return found
        hashes, starts = matching.shingle(texts, self._ngram)
        known = np.flatnonzero(self._known[hashes >> np.uint64(64 - KNOWN_BITS)])
        first = np.searchsorted(self._hashes, hashes[known], side="left")
        known = known[self._hashes[np.minimum(first, len(self._hashes) - 1)] == hashes[known]]
        owners = np.searchsorted(starts, known, side="right") - 1
        for index, count in zip(*np.unique(owners, return_counts=True), strict=True):
            if count >= FEWEST_NGRAMS * self._near_miss:
                found[index] = self._most_covered(np.unique(hashes[known[owners == index]]))
        return found

    def _most_covered(self, hashes: np.ndarray) -> Hit | None:
        first = np.searchsorted(self._hashes, hashes, side="left")
        last = np.searchsorted(self._hashes, hashes, side="right")
        owners = np.concatenate([self._owners[a:b] for a, b in zip(first, last, strict=True)])
        owners = owners[self._totals[owners] >= FEWEST_NGRAMS]
        if not len(owners):
            return None
        texts, counts = np.unique(owners, return_counts=True)
        coverage = counts / self._totals[texts]
        best = int(np.argmax(coverage))
        if coverage[best] < self._near_miss:
            return None
        item = self._items[self._items_of_texts[texts[best]]]
        return Hit(item["item"], item["file"], round(float(coverage[best]), 4))
