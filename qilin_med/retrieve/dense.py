"""Similarity of embeddings over chunks: encoded by a sentence-transformers model, searched by FAISS (inner product of
unit vectors, which is the cosine)."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qilin_med.config.experiment import DenseSettings
from qilin_med.data.shards import chunks as in_chunks
from qilin_med.data.shards import load, save
from qilin_med.errors import UserError
from qilin_med.retrieve.bm25 import Ranking

Encoder: TypeAlias = Callable[[list[str]], np.ndarray]
"""Texts -> vectors, [texts, dimensions]; their lengths do not matter."""

INDEX = "index.faiss"
ENCODED_TOGETHER = 4096  # chunks in a part: what an interrupted build loses at most
NEIGHBOURS, BUILD_EFFORT, SEARCH_EFFORT = 32, 200, 128  # HNSW (Malkov & Yashunin 2018): M, efConstruction, efSearch
CELL_SAMPLE = 64  # IVF: training vectors for each cell (FAISS warns below 39)


def check_encoder_folder(settings: DenseSettings) -> None:
    if not Path(settings.model).is_dir():
        raise UserError(
            f"{settings.model}: no such folder; retrieval.dense.model must name a sentence-transformers one"
        )


def check_encoder_package() -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "dense retrieval needs sentence-transformers, which is not installed; install it with: pip install"
            ' sentence-transformers, or set retrieval.retriever to "bm25"'
        )


def load_encoder(settings: DenseSettings) -> Encoder:
    """The model of a folder. UserError: sentence-transformers is not installed."""
    check_encoder_package()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(settings.model, local_files_only=True, trust_remote_code=False)
    return lambda texts: model.encode(texts, batch_size=settings.batch_size, show_progress_bar=False)


def unit_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Unit vectors, float32 [texts, dimensions]."""
    vectors = np.asarray(encoder(texts), np.float32)
    return np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def build_dense(texts: Iterable[str], encoder: Encoder, kind: str, parts: Path, folder: Path) -> None:
    """Index texts, streamed, into a folder. Vectors lie in files of `ENCODED_TOGETHER` below `parts`; those that are
    there already are kept. Memory: the index itself, which holds every vector (4 bytes a dimension)."""
    import faiss

    files = []
    for number, some in enumerate(in_chunks(texts, ENCODED_TOGETHER)):
        files.append(parts / f"{number:06d}.npy")
        if not files[-1].exists():
            save(files[-1], unit_vectors(encoder, some))
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

    def __init__(self, folder: Path, encoder: Encoder, query_prefix: str = ""):
        import faiss

        self._index = faiss.read_index(str(folder / INDEX))
        self._encoder, self._prefix = encoder, query_prefix

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
        vectors = unit_vectors(self._encoder, [self._prefix + question for question in questions])
        scores, numbers = self._index.search(vectors, k, params=parameters)
        found = numbers >= 0  # FAISS fills up with -1
        return [(numbers[row][found[row]], scores[row][found[row]]) for row in range(len(questions))]
