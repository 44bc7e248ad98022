"""Likeness of embeddings over chunks: encoded by a sentence-transformers model, searched by FAISS (inner product of
unit vectors, which is the cosine)."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qilin_med.artifact import fingerprint_model
from qilin_med.config.experiment import DenseSettings
from qilin_med.data.shards import chunks as in_chunks
from qilin_med.data.shards import load, save
from qilin_med.errors import UserError
from qilin_med.retrieve.fusion import Ranking

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


def fingerprint_encoder(settings: DenseSettings) -> str:
    """As `fingerprint_model`. UserError: no such folder."""
    check_encoder_folder(settings)
    return fingerprint_model(Path(settings.model))


def load_encoder(settings: DenseSettings) -> Encoder:
    """The model of a folder. UserError: sentence-transformers is not installed."""
    check_encoder_package()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(settings.model, local_files_only=True, trust_remote_code=False)
    return lambda texts: model.encode(texts, batch_size=settings.batch_size, show_progress_bar=False)


def encode_parts(texts: Iterable[str], encoder: Encoder, folder: Path) -> list[Path]:
    """Unit vectors of all texts, in files of `ENCODED_TOGETHER`; parts that are there already are kept."""
    parts = []
    for number, some in enumerate(in_chunks(texts, ENCODED_TOGETHER)):
        parts.append(folder / f"{number:06d}.npy")
        if not parts[-1].exists():
            save(parts[-1], _unit(encoder(some)))
    return parts


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def build_dense(parts: list[Path], kind: str, path: Path) -> None:
    """One FAISS index of all parts. Memory: the index itself, which holds every vector (4 bytes a dimension)."""
    import faiss

    index = _empty_index(parts, kind)
    for part in parts:
        index.add(np.array(load(part)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    faiss.write_index(index, str(temporary))
    temporary.rename(path)


def _empty_index(parts: list[Path], kind: str) -> Any:
    import faiss

    count, dimensions = sum(len(load(part)) for part in parts), load(parts[0]).shape[1]
    if kind == "flat":
        return faiss.IndexFlatIP(dimensions)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
        return index
    cells = max(1, min(int(4 * math.sqrt(count)), count // CELL_SAMPLE))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, cells, faiss.METRIC_INNER_PRODUCT)
    index.own_fields = False
    index.train(_sample(parts, count, cells * CELL_SAMPLE))
    return index


def _sample(parts: list[Path], count: int, wanted: int) -> np.ndarray:
    """Vectors evenly from all parts."""
    step = max(1, count // wanted)
    return np.concatenate([load(part)[::step] for part in parts])


class Dense:
    """An index of `build_dense`, in memory, and the model that made its vectors."""

    def __init__(self, path: Path, encoder: Encoder, query_prefix: str = ""):
        import faiss

        self._index = faiss.read_index(str(path))
        self._encoder, self._prefix = encoder, query_prefix

    def search(self, questions: list[str], k: int, allowed: np.ndarray | None = None) -> list[Ranking]:
        """The k most similar chunks of each question, of those `allowed` (bool for each chunk)."""
        vectors = _unit(self._encoder([self._prefix + question for question in questions]))
        scores, numbers = self._index.search(vectors, k, params=self._parameters(k, allowed))
        found = numbers >= 0  # FAISS fills up with -1
        return [(numbers[row][found[row]], scores[row][found[row]]) for row in range(len(questions))]

    def _parameters(self, k: int, allowed: np.ndarray | None) -> Any:
        import faiss

        chosen = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))}
        if isinstance(self._index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(SEARCH_EFFORT, k), **chosen)
        if isinstance(self._index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=max(8, self._index.nlist // 16), **chosen)
        return faiss.SearchParameters(**chosen)
