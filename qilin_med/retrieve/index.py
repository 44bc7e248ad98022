"""The index of an experiment: planned from its inputs, built in steps, opened only if it is the one that the experiment
describes. An interrupted build continues after its last whole step (embeddings: after the last whole part)."""

import json
import shutil
from pathlib import Path
from typing import Any

from qilin_med.artifact import Artifact, fingerprint_model, hash_files, sha256_of, versions
from qilin_med.config.experiment import Experiment
from qilin_med.console.progress import counted, progress
from qilin_med.data.read.readers import raw_files
from qilin_med.data.read.records import find_files
from qilin_med.data.shards import save_json
from qilin_med.errors import UserError
from qilin_med.retrieve.bm25 import build_bm25
from qilin_med.retrieve.chunks import Chunks, cut_corpus
from qilin_med.retrieve.cutting import load_tokenizer
from qilin_med.retrieve.dense import Encoder, build_dense, check_encoder_folder, load_encoder

INDEX_FORMAT = 1  # raise it whenever the same inputs and settings give another index
KINDS = {"bm25": ("bm25",), "dense": ("dense",), "hybrid": ("bm25", "dense")}
"""Folders of an index, by retriever."""
PROGRESS = {"bm25": "indexing terms", "dense": "embedding"}
# Settings that matter to a search alone: free to change without a new index. The encoder counts by its contents.
ONLY_FOR_SEARCH = {"index", "exclude_sources", "exam_sources", "passages", "max_context_tokens", "query_with_options"}
OF_ENCODER = {"batch_size": True, "query_prefix": True, "model": True}
REMEDY = "build it anew with scripts/build_index.py --restart, which moves this one aside, or set retrieval.index"


def plan_index(experiment: Experiment) -> Artifact:
    """The index's place and everything that it depends on. UserError: no corpus is named, or something is missing."""
    settings = experiment.retrieval
    if not settings.corpus:
        raise UserError(
            "retrieval.corpus names nothing: set it to the files or folders to retrieve from, for example"
            """ 'retrieval.corpus=["data/processed/pretraining"]'"""
        )
    kinds, tokenizer = KINDS[settings.retriever], tokenizer_file(experiment)
    load_tokenizer(tokenizer)
    excluded = dict.fromkeys(ONLY_FOR_SEARCH if "bm25" in kinds else {*ONLY_FOR_SEARCH, "bm25_unit"}, True)
    excluded["dense"] = OF_ENCODER if "dense" in kinds else True
    evaluation = [file for files in settings.decontamination.files for file in raw_files(files)]
    inputs = {
        "format": INDEX_FORMAT,
        "settings": settings.model_dump(mode="json", exclude=excluded),
        "tokenizer": sha256_of(tokenizer)[:16],
        "corpus": _fingerprints([file for file, _ in find_files(settings.corpus)]),
        "evaluation": _fingerprints(evaluation),
    }
    if "dense" in kinds:
        check_encoder_folder(settings.dense)
        inputs["model"] = fingerprint_model(Path(settings.dense.model))[:16]
    return Artifact(experiment.index_folder(), inputs)


def tokenizer_file(experiment: Experiment) -> Path:
    return Path(experiment.model.path) / "tokenizer.json"


def _fingerprints(files: list[Path]) -> dict[str, str]:
    """Half a sha256 is enough to tell files apart, and to be read in a refusal."""
    return {str(file): found[:16] for file, found in zip(files, hash_files(files, "hashing"), strict=True)}


def build(experiment: Experiment, restart: bool = False, encoder: Encoder | None = None) -> bool:
    """Build the index, or continue where an earlier call was interrupted; False if it was built before. `encoder`: in
    place of the model that retrieval.dense names.

    UserError: the folder holds another index (`restart` moves it aside), or the disk is full.
    """
    index, settings = plan_index(experiment), experiment.retrieval
    if index.finished(restart, REMEDY):
        return False

    with index.building(resume=True) as out:
        written = index.work / "counts.json"  # written last, so that it tells that the chunks are whole
        if not written.exists():
            with progress("cutting the corpus", unit="documents") as advance:
                counts = cut_corpus(settings, tokenizer_file(experiment), index.work, out, advance)
            save_json(written, counts)
        index.facts = json.loads(written.read_text(encoding="utf-8"))
        for kind in KINDS[settings.retriever]:
            if (out / kind).exists():
                continue
            unfinished = index.work / kind
            shutil.rmtree(unfinished, ignore_errors=True)
            with progress(PROGRESS[kind], index.facts["chunks"], "chunks") as advance:
                texts = counted((chunk["text"] for chunk in Chunks(out)), advance)
                if kind == "bm25":
                    build_bm25(texts, settings.bm25_unit, unfinished)
                else:
                    model = encoder or load_encoder(settings.dense)
                    build_dense(texts, model, settings.dense.index, index.work / "vectors", unfinished)
            unfinished.rename(out / kind)
        index.facts["versions"] = versions("bm25s", "faiss-cpu", "jieba")
    return True


def verify_index(experiment: Experiment) -> dict[str, Any]:
    """The manifest of a whole index made from exactly this corpus with these settings; UserError names what differs."""
    index = plan_index(experiment)
    state = index.state()
    if state.name != "done":
        missing = f"{index.folder}: no index here; build it with scripts/build_index.py"
        raise UserError(f"{state.why}; {REMEDY}" if state.why else missing)
    return state.manifest
