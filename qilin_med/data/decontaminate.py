"""Keep evaluation questions out of training data: n-grams find the candidates, `qilin_med.data.questions` decides.

The index of all evaluation files is built once and lies in one folder, from which every task of the build loads it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qilin_med.config.corpus import DecontaminationSettings
from qilin_med.data import matching
from qilin_med.data.folding import fold_all
from qilin_med.data.questions import NEARBY, Asked, Verdict, asked_in, compare_exams, compare_text, exam_in
from qilin_med.data.read.readers import read_raw
from qilin_med.data.render import text_of
from qilin_med.data.shards import read_json_lines, save, write_json_lines
from qilin_med.records import AnyRecord, Document, Question, Skipped

ITEMS = "items.jsonl"
ARRAYS = ("hashes", "firsts", "owners", "fewest", "weights")
KNOWN_BITS = 24
COMMON = 32
"""Items that may share an n-gram of the index; one that more have (下列关于) tells none of them."""
NEEDED_OF_STEM, NEEDED_OF_OPTIONS = 0.35, 0.5
"""Share of the n-grams of a stem, or of its options, that make an item a candidate."""
MOST_NEEDED = 64
WINDOW = 128
"""Folded characters. N-grams of an item are counted within two neighbouring windows of a record."""
SHOWN = 400
"""Characters of the record that are shown beside a question."""
CANDIDATES = 12
"""Items compared with a record: those with the most n-grams in it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """The evaluation question that a record repeats (`same`), or comes nearest to. `similarity`: see `Verdict`."""

    item: str
    file: str
    question: str
    passage: str
    """The record from where the question is in it."""
    similarity: float
    same: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item that may be in folded characters `begin` to `end` of a batch, all of one record."""

    item: int
    begin: int
    end: int


def build_index(settings: DecontaminationSettings, folder: Path, files: dict[str, list[Path]]) -> None:
    """Write the index of all evaluation questions. `files`: the files of each entry, by its name."""
    records = (
        (source.name, record)
        for source in settings.files
        for file in files[source.name]
        for _, record in read_raw(source, file)
        if not isinstance(record, Skipped)
    )
    write_index(records, settings.ngram, folder)


def write_index(records: Iterable[tuple[str, AnyRecord]], ngram: int, folder: Path) -> None:
    """Write the index of evaluation questions, each with the name of its file."""
    items = [{"item": record.id, "file": file, "question": text_of(record), **asdict(asked_in(record))}
             for file, record in records]  # fmt: skip
    # Two owners of n-grams an item: number 2i is its stem, 2i + 1 its options.
    texts = [text for item in items for text in (item["stem"], *item["options"])]
    owners = [2 * i + (place > 0) for i, item in enumerate(items) for place in range(1 + len(item["options"]))]
    hashes, starts = grams(texts, ngram)
    owners = np.repeat(np.array(owners, np.int64), np.diff(starts))
    distinct, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    tells = counts[place] <= COMMON
    pairs = np.unique(np.stack([place[tells], owners[tells]], axis=1), axis=0)
    totals = np.bincount(pairs[:, 1], minlength=2 * len(items))
    kept, firsts = np.unique(pairs[:, 0], return_index=True)
    save(folder / "hashes.npy", distinct[kept])
    save(folder / "firsts.npy", np.append(firsts, len(pairs)))
    save(folder / "owners.npy", pairs[:, 1])
    fewest = np.ceil(totals.reshape(-1, 2) * (NEEDED_OF_STEM, NEEDED_OF_OPTIONS)).astype(np.int64)
    save(folder / "fewest.npy", np.clip(fewest, (1, 2), MOST_NEEDED).ravel())
    save(folder / "weights.npy", weigh_characters([len(text) for text in texts], 1 / counts[place], starts, ngram))
    write_json_lines(folder / ITEMS, items)


def grams(texts: Sequence[str], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of folded texts, and where each text's begin (with the end appended)."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    lengths = np.array([len(text) for text in texts], np.int64)
    hashes = matching.hash_windows(codes, width)[matching.within(np.cumsum(lengths), width)]
    return hashes, np.concatenate(([0], np.cumsum(np.maximum(lengths - width + 1, 0))))


def weigh_characters(lengths: Sequence[int], of_grams: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """The mean weight of the n-grams that cover each character of the texts, end to end; 1 in texts too short for one."""
    weights = [np.ones(0)]
    for length, first, last in zip(lengths, starts, starts[1:], strict=False):
        if last == first:
            weights.append(np.ones(length))
            continue
        covered, sums = np.ones(width), np.convolve(of_grams[first:last], np.ones(width))
        weights.append(sums / np.convolve(np.ones(last - first), covered))
    return np.concatenate(weights).astype(np.float32)


class Index:
    """A searchable index of evaluation questions. `near_miss`: the least similarity that is reported."""

    def __init__(self, folder: Path, ngram: int, near_miss: float):
        self._ngram, self._near_miss = ngram, near_miss
        self._hashes, self._firsts, self._owners, self._fewest, weights = (
            np.load(folder / f"{name}.npy") for name in ARRAYS
        )
        # Most n-grams of a corpus are in no question: this table saves searching for them.
        self._known = np.zeros(1 << KNOWN_BITS, bool)
        self._known[self._hashes >> np.uint64(64 - KNOWN_BITS)] = True
        self._items = list(read_json_lines(folder / ITEMS))
        self._asked = [Asked(item["stem"], tuple(item["options"]), item["answer"]) for item in self._items]
        ends = np.cumsum([len(asked.stem) + sum(map(len, asked.options)) for asked in self._asked], dtype=np.int64)
        firsts = np.concatenate(([0], ends[:-1]))
        self._weights = [weights[a : a + len(asked.stem)] for a, asked in zip(firsts, self._asked, strict=False)]

    def find(self, records: Sequence[AnyRecord]) -> Iterator[Hit | None]:
        """The evaluation question that each record repeats, else the one that it comes nearest to, or None."""
        texts = list(map(text_of, records))
        folded, places = fold_all(texts)
        starts = np.cumsum([0, *map(len, texts)])
        candidates = self._candidates(folded, np.searchsorted(places, starts))
        for number, (record, text) in enumerate(zip(records, texts, strict=True)):
            best, item, shown = Verdict(False, 0.0), -1, ""
            asked = asked_in(record) if isinstance(record, Question) and candidates[number] else None
            for candidate in candidates[number]:
                begin, end = candidate.begin, candidate.end
                passage = text[places[begin] - starts[number] : places[end - 1] + 1 - starts[number]]
                verdict = self._compare(candidate.item, record, asked, passage, folded[begin:end])
                if (verdict.same, verdict.similarity) > (best.same, best.similarity):
                    place = places[begin + max(verdict.begin - 1, 0)] - starts[number]
                    best, item, shown = verdict, candidate.item, text[place : place + SHOWN]
                if best.same:
                    break
            if best.same or best.similarity >= self._near_miss:
                about = self._items[item]
                yield Hit(about["item"], about["file"], about["question"], shown, round(best.similarity, 4), best.same)
            else:
                yield None

    def _compare(self, item: int, record: AnyRecord, asked: Asked | None, text: str, codes: np.ndarray) -> Verdict:
        wanted, weights = self._asked[item], self._weights[item]
        if wanted.options and (found := asked or exam_in(text)):
            return compare_exams(wanted, weights, found)
        folded = codes.tobytes().decode("utf-32-le", "replace")
        return compare_text(wanted, weights, text, folded, isinstance(record, Document))

    def _candidates(self, folded: np.ndarray, bounds: np.ndarray) -> defaultdict[int, list[Candidate]]:
        """The items that share enough n-grams with each record of a batch. `bounds`: of the records in `folded`."""
        hashes = matching.hash_windows(folded, self._ngram)
        known = np.flatnonzero(self._known[hashes >> np.uint64(64 - KNOWN_BITS)])
        places = np.minimum(np.searchsorted(self._hashes, hashes[known]), len(self._hashes) - 1)
        owned = self._hashes[places] == hashes[known]
        known, places = known[owned], places[owned]
        first, sizes = self._firsts[places], np.diff(self._firsts)[places]
        steps = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        owners, positions = self._owners[np.repeat(first, sizes) + steps], np.repeat(known, sizes)
        records = np.searchsorted(bounds, positions, side="right") - 1
        # Record (20 bits), owner (24) and window (20) in one number.
        keys = records << 44 | owners << 20 | (positions - bounds[records]) // WINDOW
        keys, counts = np.unique(keys, return_counts=True)
        counts[:-1] += np.where(np.diff(keys) == 1, counts[1:], 0)
        shares = counts / self._fewest[keys >> 20 & 0xFFFFFF]
        enough = np.flatnonzero(shares >= 1)
        enough = enough[np.argsort(-shares[enough], kind="stable")]
        found: defaultdict[int, list[Candidate]] = defaultdict(list)
        for key in keys[enough].tolist():
            record, item, window = key >> 44, (key >> 20 & 0xFFFFFF) // 2, key & 0xFFFFF
            if len(found[record]) < CANDIDATES and all(item != other.item for other in found[record]):
                length = len(self._asked[item].stem)
                begin = bounds[record] + window * WINDOW - length
                end = bounds[record] + (window + 2) * WINDOW + length + NEARBY
                found[record].append(Candidate(item, max(begin, bounds[record]), min(end, bounds[record + 1])))
        return found
