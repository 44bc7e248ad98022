"""Two ways to find chunks, and how their rankings become one.

BM25 is built and stored by bm25s and searched as one sparse product for many questions (2,448 questions per CPU second,
where bm25s's own search answers 1,021):
score(q, d) = sum over the terms t of q of idf(t) * tf / (tf + K1 * (1 - B + B * |d| / mean |d|)),
idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)): Lucene's form and its constants (Kamphuis et al., ECIR 2020).

Embeddings are searched by FAISS (inner product of unit vectors, which is the cosine).
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qilin_med.data.shards import batched, load, save
from qilin_med.retrieve.models import Encoder

Ranking: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Numbers of chunks (int64) and their scores (float32), the best first."""

FUSION_CONSTANT = 60


def fuse(rankings: Iterable[Ranking], k: int) -> Ranking:
    """Reciprocal rank fusion (Cormack et al., SIGIR 2009): score(d) = sum over rankings of 1 / (60 + rank of d).

    Only ranks count, so scores of different kinds need no common scale. Ties go to the smaller number.
    """
    scores: dict[int, float] = defaultdict(float)
    for numbers, _ in rankings:
        for rank, number in enumerate(numbers.tolist(), 1):
            scores[number] += 1 / (FUSION_CONSTANT + rank)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    return np.array([number for number, _ in best], np.int64), np.array([score for _, score in best], np.float32)


# ----------------------------------------------------------------------------------------------------------------- BM25

K1, B = 1.2, 0.75
UNKNOWN = ""  # the first term of a vocabulary, which no text has
POSTINGS_AT_ONCE = 1 << 24  # bounds the memory of a product: 8 bytes for each
RUN = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]+")


def terms_of(text: str, unit: str) -> list[str]:
    """The terms that BM25 counts, in order; full width and half width, upper and lower case count alike.

    A run of Latin letters and digits is one term. Other letters are cut into pairs of neighbours ("bigram"; one alone
    is a term), or into words and the shorter words in them, as jieba does for search ("word").
    """
    runs = RUN.findall(unicodedata.normalize("NFKC", text).casefold())
    if unit == "word":
        import jieba

        jieba.setLogLevel("WARNING")  # it announces its dictionary on stderr
        return [word for run in runs for word in ([run] if run[0].isascii() else jieba.lcut_for_search(run))]
    terms: list[str] = []
    for run in runs:
        terms += [run] if len(run) == 1 or run[0].isascii() else map("".join, pairwise(run))
    return terms


class TermFile:
    """Term numbers of every chunk, in a file, handed out one chunk at a time as often as bm25s asks."""

    def __init__(self, path: Path, lengths: list[int]):
        self._path, self._ends = path, np.cumsum(lengths).tolist()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = np.memmap(self._path, np.uint32, "r") if self._path.stat().st_size else np.empty(0, np.uint32)
        return (numbers[start:end].tolist() for start, end in pairwise([0, *self._ends]))


def build_bm25(texts: Iterable[str], unit: str, folder: Path) -> None:
    """Index texts, streamed, into a folder (arrays as .npy, no pickles).

    Memory: the vocabulary, and what bm25s needs for each distinct pair of chunk and term, some 20 bytes (measured).
    No texts, and no lists of terms: those lie in a file while the index is made.
    """
    import bm25s
    from bm25s.tokenization import Tokenized

    folder.mkdir(parents=True, exist_ok=True)
    path, vocabulary, lengths = folder / "terms.bin", {UNKNOWN: 0}, []
    with path.open("wb") as file:
        for some in batched(texts, 1000):
            numbers = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms_of(text, unit)] for text in some]
            lengths += map(len, numbers)
            file.write(np.fromiter((n for text in numbers for n in text), np.uint32).tobytes())
    index = bm25s.BM25(k1=K1, b=B, method="lucene", csc_backend="scipy")
    index.index(Tokenized(ids=TermFile(path, lengths), vocab=vocabulary), show_progress=False)
    index.save(folder, show_progress=False)
    path.unlink()


class Bm25:
    """An index of `build_bm25`, memory-mapped: only the postings of the terms asked for are read."""

    def __init__(self, folder: Path, unit: str):
        import bm25s
        from scipy.sparse import csr_array

        index = bm25s.BM25.load(folder, mmap=True)
        self._vocabulary, self._unit = index.vocab_dict, unit
        # asarray: views of the maps, without the price that np.memmap puts on each slice.
        data, chunks, starts = (np.asarray(index.scores[name]) for name in ("data", "indices", "indptr"))
        self._postings = np.diff(starts)
        # bm25s keeps [chunks, terms] by columns, which is [terms, chunks] by rows.
        self._scores = csr_array((data, chunks, starts), shape=(len(starts) - 1, index.scores["num_docs"]))

    def search(self, questions: list[str], k: int, allowed: np.ndarray | None = None) -> list[Ranking]:
        """The k best chunks of each question, of those `allowed` (bool for each chunk); only such as share a term. Ties
        go to the smaller number."""
        from scipy.sparse import csr_array

        known = [[self._vocabulary.get(term, 0) for term in terms_of(question, self._unit)] for question in questions]
        terms = [np.array([number for number in numbers if number], np.int32) for numbers in known]
        costs = np.cumsum([self._postings[numbers].sum() for numbers in terms]) // POSTINGS_AT_ONCE
        rankings: list[Ranking] = []
        for _, batch in groupby(zip(costs, terms, strict=True), key=lambda pair: pair[0]):
            asked = [numbers for _, numbers in batch]
            columns, starts = np.concatenate(asked), np.cumsum([0, *map(len, asked)])
            asks = csr_array((np.ones(len(columns), np.float32), columns, starts), (len(asked), len(self._postings)))
            product = asks @ self._scores
            for start, end in pairwise(product.indptr):
                numbers, scores = product.indices[start:end], product.data[start:end]
                if allowed is not None:
                    numbers, scores = numbers[allowed[numbers]], scores[allowed[numbers]]
                if len(numbers) > k:
                    best = np.argpartition(scores, -k)[-k:]
                    numbers, scores = numbers[best], scores[best]
                order = np.lexsort((numbers, -scores))
                rankings.append((numbers[order].astype(np.int64), scores[order]))
        return rankings


# ----------------------------------------------------------------------------------------------------------- embeddings

INDEX = "index.faiss"
ENCODED_TOGETHER = 512  # chunks in a part: what an interrupted build loses at most
NEIGHBOURS, BUILD_EFFORT, SEARCH_EFFORT = 32, 200, 128  # HNSW (Malkov & Yashunin 2018): M, efConstruction, efSearch
CELL_SAMPLE = 64  # IVF: training vectors for each cell (FAISS warns below 39)


def build_dense(
    texts: Iterable[str], encoder: Encoder, kind: str, parts: Path, folder: Path, advance: Callable[[int], None]
) -> None:
    """Index texts, streamed, into a folder; `advance` counts them. Vectors lie in files of `ENCODED_TOGETHER` below `parts`;
    those that are there already are kept. Memory: the index itself, which holds every vector (4 bytes a dimension)."""
    import faiss

    files = []
    for number, some in enumerate(batched(texts, ENCODED_TOGETHER)):
        files.append(parts / f"{number:06d}.npy")
        if not files[-1].exists():
            save(files[-1], encoder.passages(some))
        advance(len(some))
    count, dimensions = sum(len(load(file)) for file in files), load(files[0]).shape[1]
    cells = max(1, min(int(4 * math.sqrt(count)), count // CELL_SAMPLE))
    factory = {"flat": "Flat", "hnsw": f"HNSW{NEIGHBOURS}", "ivf": f"IVF{cells},Flat"}[kind]
    index = faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = BUILD_EFFORT
    if not index.is_trained:
        step = max(1, count // (cells * CELL_SAMPLE))  # a sample evenly from all parts
        index.train(np.concatenate([load(file)[::step] for file in files]))
    for file in files:
        index.add(np.array(load(file)))
    folder.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(folder / INDEX))


class Dense:
    """An index of `build_dense`, in memory, and the model that made its vectors."""

    def __init__(self, folder: Path, encoder: Encoder):
        import faiss

        self._index, self._encoder = faiss.read_index(str(folder / INDEX)), encoder

    def search(self, questions: list[str], k: int, allowed: np.ndarray | None = None) -> list[Ranking]:
        """The k most similar chunks of each question, of those `allowed` (bool for each chunk)."""
        import faiss

        chosen = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))}
        if isinstance(self._index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(SEARCH_EFFORT, k), **chosen)
        elif isinstance(self._index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=max(8, self._index.nlist // 16), **chosen)
        else:
            parameters = faiss.SearchParameters(**chosen)
        scores, numbers = self._index.search(self._encoder.questions(questions), k, params=parameters)
        found = numbers >= 0  # FAISS fills up with -1
        return [(numbers[row][found[row]], scores[row][found[row]]) for row in range(len(questions))]
