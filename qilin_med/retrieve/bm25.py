"""BM25 over chunks: built and stored by bm25s, searched as one sparse product for many questions.

score(q, d) = sum over the terms t of q of idf(t) * tf / (tf + K1 * (1 - B + B * |d| / mean |d|)),
idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)): Lucene's form and its constants (Kamphuis et al., ECIR 2020).
"""

from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from qilin_med.data.shards import chunks as in_chunks
from qilin_med.retrieve.fusion import Ranking, best_of
from qilin_med.retrieve.terms import terms_of

K1, B = 1.2, 0.75
UNKNOWN = ""  # the first term of a vocabulary, which no text has
POSTINGS_AT_ONCE = 1 << 24  # bounds the memory of a product: 8 bytes for each


class TermFile:
    """Term numbers of every chunk, in a file, handed out one chunk at a time as often as bm25s asks."""

    def __init__(self, path: Path, lengths: np.ndarray):
        self._path, self._ends = path, np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = np.memmap(self._path, np.uint32, "r") if self._path.stat().st_size else np.empty(0, np.uint32)
        start = 0
        for end in self._ends.tolist():
            yield numbers[start:end].tolist()
            start = end


def build_bm25(texts: Iterable[str], unit: str, folder: Path) -> None:
    """Index texts, streamed, into a folder (arrays as .npy, no pickles).

    Memory: the vocabulary, and what bm25s needs for each distinct pair of chunk and term, some 20 bytes (measured).
    No texts, and no lists of terms: those lie in a file while the index is made.
    """
    import bm25s
    from bm25s.tokenization import Tokenized

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "terms.bin"
    vocabulary, lengths = _write_terms(texts, unit, path)
    index = bm25s.BM25(k1=K1, b=B, method="lucene", csc_backend="scipy")
    index.index(Tokenized(ids=TermFile(path, lengths), vocab=vocabulary), show_progress=False)
    index.save(folder, show_progress=False)
    path.unlink()


def _write_terms(texts: Iterable[str], unit: str, path: Path) -> tuple[dict[str, int], np.ndarray]:
    terms_in = terms_of(unit)
    vocabulary, lengths = {UNKNOWN: 0}, []
    with path.open("wb") as file:
        for some in in_chunks(texts, 1000):
            numbers = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms_in(text)] for text in some]
            lengths += map(len, numbers)
            file.write(np.fromiter((n for text in numbers for n in text), np.uint32).tobytes())
    return vocabulary, np.array(lengths, np.int64)


class Bm25:
    """An index of `build_bm25`, memory-mapped: only the postings of the terms asked for are read."""

    def __init__(self, folder: Path, unit: str):
        import bm25s
        from scipy.sparse import csr_array

        index = bm25s.BM25.load(folder, mmap=True)
        self._vocabulary = index.vocab_dict
        self._terms_in = terms_of(unit)
        # asarray: views of the maps, without the price that np.memmap puts on each slice.
        data, chunks, starts = (np.asarray(index.scores[name]) for name in ("data", "indices", "indptr"))
        self._postings = np.diff(starts)
        # bm25s keeps [chunks, terms] by columns, which is [terms, chunks] by rows.
        self._scores = csr_array((data, chunks, starts), shape=(len(starts) - 1, index.scores["num_docs"]))

    def search(self, questions: list[str], k: int, allowed: np.ndarray | None = None) -> list[Ranking]:
        """The k best chunks of each question, of those `allowed` (bool for each chunk); only such as share a term."""
        terms = [self._known_terms(question) for question in questions]
        return [ranking for some in self._batches(terms) for ranking in self._search_batch(some, k, allowed)]

    def _known_terms(self, question: str) -> np.ndarray:
        known = (self._vocabulary.get(term, 0) for term in self._terms_in(question))
        return np.array([number for number in known if number], np.int32)

    def _batches(self, terms: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        costs = np.cumsum([self._postings[numbers].sum() for numbers in terms])
        for _, group in groupby(zip(terms, costs // POSTINGS_AT_ONCE, strict=True), key=lambda pair: pair[1]):
            yield [numbers for numbers, _ in group]

    def _search_batch(self, terms: list[np.ndarray], k: int, allowed: np.ndarray | None) -> Iterator[Ranking]:
        from scipy.sparse import csr_array

        columns = np.concatenate(terms)
        starts = np.concatenate(([0], np.cumsum([len(numbers) for numbers in terms])))
        ones = np.ones(len(columns), np.float32)
        product = csr_array((ones, columns, starts), shape=(len(terms), len(self._postings))) @ self._scores
        for start, end in pairwise(product.indptr):
            numbers, scores = product.indices[start:end], product.data[start:end]
            if allowed is not None:
                kept = allowed[numbers]
                numbers, scores = numbers[kept], scores[kept]
            yield best_of(numbers, scores, k)
