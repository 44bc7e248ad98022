"""Keep evaluation questions out of training data: by the question itself, and by the share of its n-grams in a record.

The index of all evaluation files is built once and lies in one folder, from which every task of the build loads it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qilin_med.config.corpus import DecontaminationSettings
from qilin_med.data import matching
from qilin_med.data.read.readers import read_raw
from qilin_med.data.shards import read_json_lines, save, write_json_lines
from qilin_med.records import AnyRecord, Chat, Document, Preference, Question, Skipped

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


def question_keys(record: AnyRecord) -> list[str]:
    """What makes two questions the same: the stem with its options in any order, or the words of a turn."""
    match record:
        case Question(_, stem, options):
            return [bare(stem) + "|" + "|".join(sorted(bare(text) for _, text in options))]
        case Chat(_, messages) | Preference(_, messages):
            return [bare(message.content) for message in messages if message.role == "user"]
    return []


def written_down(record: AnyRecord) -> list[str]:
    """An evaluation item in all its forms: stem and options with and without letters (which break every n-gram that
    spans a short option), or question and answer."""
    match record:
        case Question(_, stem, options):
            return [bare(stem + "".join(texts)) for texts in ([t for _, t in options], map("".join, options))]
        case Chat(_, messages):
            return [bare("".join(message.content for message in messages if message.role != "system"))]
        case Preference(_, prompt):
            return [bare(prompt[-1].content)]
        case Document(_, text):
            return [bare(text)]


def build_index(settings: DecontaminationSettings, folder: Path, files: dict[str, list[Path]]) -> None:
    """Write the index of all evaluation questions. `files`: the files of each entry, by its name."""
    items, texts, items_of_texts = [], [], []
    for source in settings.files:
        records = (record for file in files[source.name] for _, record in read_raw(source, file))
        for record in records:
            if isinstance(record, Skipped):
                continue
            long_enough = [text for text in written_down(record) if len(text) >= settings.ngram]
            texts += long_enough
            items_of_texts += [len(items)] * len(long_enough)
            keys = question_keys(record)[:1]
            stem = bare(record.stem) if isinstance(record, Question) else "".join(keys)
            items.append({"item": record.id, "file": source.name, "stem": stem, "keys": keys})
    hashes, starts = matching.shingle(texts, settings.ngram)
    owners = np.repeat(np.arange(len(texts)), np.diff(starts)).astype(np.uint64)
    hashes, owners = np.unique(np.stack([hashes, owners], axis=1), axis=0).T.copy()
    save(folder / "hashes.npy", hashes)
    save(folder / "owners.npy", owners.astype(np.int64))
    save(folder / "totals.npy", np.bincount(owners.astype(np.int64), minlength=len(texts)))
    save(folder / "items.npy", np.array(items_of_texts, np.int64))
    write_json_lines(folder / ITEMS, items)


class Index:
    """A searchable index of evaluation questions. `near_miss`: the least coverage that is reported."""

    def __init__(self, folder: Path, ngram: int, near_miss: float):
        self._ngram, self._near_miss = ngram, near_miss
        names = ("hashes", "owners", "totals", "items")
        self._hashes, self._owners, self._totals, self._items_of_texts = (np.load(folder / f"{n}.npy") for n in names)
        # Most n-grams of a corpus are in no question: this table saves searching for them.
        self._known = np.zeros(1 << KNOWN_BITS, bool)
        self._known[self._hashes >> np.uint64(64 - KNOWN_BITS)] = True
        self._items = list(read_json_lines(folder / ITEMS))
        # Shorter ones ("谢谢", "怎么治疗") are no question in particular.
        self._by_key = {key: i for i in reversed(self._items) for key in i["keys"] if len(key) >= ngram}

    def find(self, records: Sequence[AnyRecord], texts: Iterable[str]) -> Iterator[Hit | None]:
        """The evaluation question that each record repeats most, or None. `texts`: the full text of each record."""
        hits: list[Hit | None] = [None] * len(records)
        if len(self._hashes):
            hashes, starts = matching.shingle([bare(text) for text in texts], self._ngram)
            known = np.flatnonzero(self._known[hashes >> np.uint64(64 - KNOWN_BITS)])
            first = np.searchsorted(self._hashes, hashes[known])
            known = known[self._hashes[np.minimum(first, len(self._hashes) - 1)] == hashes[known]]
            owners = np.searchsorted(starts, known, side="right") - 1
            for index, count in zip(*np.unique(owners, return_counts=True), strict=True):
                if count >= FEWEST_NGRAMS * self._near_miss:
                    hits[index] = self._most_covered(np.unique(hashes[known[owners == index]]))
        for record, hit in zip(records, hits, strict=True):
            same = next((self._by_key[key] for key in question_keys(record) if key in self._by_key), None)
            yield Hit(same["item"], same["file"], 1.0) if same else hit

    def _most_covered(self, hashes: np.ndarray) -> Hit | None:
        """Of the questions that have some of these n-grams, the one with the largest share of its own among them."""
        first, last = (np.searchsorted(self._hashes, hashes, side=side) for side in ("left", "right"))
        owners = np.concatenate([self._owners[a:b] for a, b in zip(first, last, strict=True)])
        texts, counts = np.unique(owners[self._totals[owners] >= FEWEST_NGRAMS], return_counts=True)
        if not len(texts):
            return None
        coverage = counts / self._totals[texts]
        best = int(np.argmax(coverage))
        if coverage[best] < self._near_miss:
            return None
        item = self._items[self._items_of_texts[texts[best]]]
        return Hit(item["item"], item["file"], round(float(coverage[best]), 4))
