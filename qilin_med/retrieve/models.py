"""The two models that retrieval may have: one embeds questions and passages apart, the other reads them together to
reorder what was found.

Both are folders of sentence-transformers with safetensors weights. No code of theirs is run, no pickle is read.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qilin_med.artifact import fingerprint_model
from qilin_med.config.experiment import DenseSettings, RerankerSettings, RetrievalConfig
from qilin_med.errors import UserError, in_one_line


def check_models(settings: RetrievalConfig) -> None:
    """UserError unless the folders that the settings name hold the files of such models."""
    dense = settings.dense if settings.retriever != "bm25" else None
    # Without modules.json any model would be loaded, with a pooling that it was not trained for.
    for key, model, needed in (("dense", dense, "modules.json"), ("reranker", settings.reranker, "config.json")):
        folder = Path(model.model) if model else None
        if folder and not ((folder / needed).is_file() and any(folder.rglob("*.safetensors"))):
            raise UserError(
                f"{folder}: expected {needed} and .safetensors weights (pickled ones are not loaded); set"
                f" retrieval.{key}.model to the folder of a sentence-transformers model"
            )


def _load(kind: type, folder: str) -> Any:
    try:
        return kind(folder, local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded ({in_one_line(error)}); get the folder again") from None


class Encoder:
    """An embedding model: texts -> unit vectors, float32 [texts, dimensions]. UserError: it cannot be loaded."""

    def __init__(self, settings: DenseSettings):
        from sentence_transformers import SentenceTransformer

        self._model, self._settings = _load(SentenceTransformer, settings.model), settings
        self.most_tokens = self._model.max_seq_length or math.inf

    def questions(self, texts: list[str]) -> np.ndarray:
        return self._encode(self._model.encode_query, texts, self._settings.query_prefix)

    def passages(self, texts: list[str]) -> np.ndarray:
        return self._encode(self._model.encode_document, texts, self._settings.passage_prefix)

    def _encode(self, encode: Any, texts: list[str], prefix: str | None) -> np.ndarray:
        options = {"batch_size": self._settings.batch_size, "normalize_embeddings": True, "show_progress_bar": False}
        return np.asarray(encode(texts, prompt=prefix, **options), np.float32)

    def count_cut(self, passages: list[str]) -> int:
        """How many are longer than the model reads."""
        if math.isinf(self.most_tokens):
            return 0
        return sum(len(ids) > self.most_tokens for ids in self._model.tokenizer(passages, verbose=False).input_ids)


class Reranker:
    """A cross-encoder: how well a passage answers a question."""

    def __init__(self, settings: RerankerSettings):
        """UserError: it cannot be loaded, or was not trained to give one score."""
        from sentence_transformers import CrossEncoder

        self._model, self._batch_size = _load(CrossEncoder, settings.model), settings.batch_size
        trained, loaded = self._model.config.architectures or [], type(self._model.model).__name__
        if loaded not in trained or self._model.num_labels != 1:
            raise UserError(
                f"{settings.model}: {', '.join(trained)} with {self._model.num_labels} outputs; set"
                " retrieval.reranker.model to a cross-encoder with one score (ForSequenceClassification)"
            )
        self.fingerprint = fingerprint_model(Path(settings.model))

    def score(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """Logits, float32 [passages]."""
        from torch.nn import Identity  # a sigmoid would make the best ones equal

        pairs = [(question, passage) for passage in passages]
        options = {"batch_size": self._batch_size, "activation_fn": Identity(), "show_progress_bar": False}
        return np.asarray(self._model.predict(pairs, **options), np.float32)
