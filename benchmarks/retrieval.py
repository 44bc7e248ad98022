"""How well each retriever finds: the answer of every question of a file, among all answers of the file.

    python scripts/benchmark.py retrieval huatuo26M_test.json model.path=models/baichuan-7b
    python scripts/benchmark.py retrieval pairs.jsonl --kind chat 'retrieval.dense={"model": "models/bge-base-zh"}' \\
        'retrieval.reranker={"model": "models/bge-reranker-base"}'

Answers are cut, indexed and searched as a corpus is. R@k: share of questions whose own answer is among the first k; several
chunks of an answer count as one, and so do equal answers. MRR@10: mean of 1 / rank, 0 from rank 11 on. Dense search needs
retrieval.dense, the last row retrieval.reranker. Every text is embedded once; questions per second are those of the rest.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.common import add_shared_arguments, describe_moment, write_result
from qilin_med.config.experiment import KINDS, DataSource, Experiment, RawFiles, RetrievalConfig, load_experiment
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.data.shards import read_json_lines, write_json_lines
from qilin_med.errors import UserError
from qilin_med.records import Chat
from qilin_med.report.tables import markdown_table
from qilin_med.retrieve.index import CHUNKS, build
from qilin_med.retrieve.models import Encoder
from qilin_med.retrieve.retriever import Retriever

DEPTH = 50  # chunks looked at, so that ten answers of several chunks each are among them
Pairs = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, help="file of questions and answers")
    parser.add_argument("--kind", choices=KINDS, default="huatuo", help="its format (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of retrieval.json")
    add_shared_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    import faiss
    import torch

    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    experiment = load_experiment(Path(__file__).with_suffix(".json"), arguments.overrides)
    pairs, encoder = read_pairs(arguments.pairs, arguments.kind), None
    if experiment.retrieval.dense:
        encoder = Encoder(experiment.retrieval.dense)
        encoder.questions, encoder.passages = remember(encoder.questions), remember(encoder.passages)
    rows, first = [], {}
    for way, settings in ways(experiment.retrieval).items():
        with progress(way), tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
            cells, first[way] = measure(experiment, settings, pairs, encoder, Path(folder))
        rows.append({"retriever": way, **cells})
    asked = len(first[way])
    notes = [
        f"{asked} questions; {len(pairs) - asked} left out, whose answers the index does not hold",
        describe_moment(),
    ]
    if encoder:
        both = zip(first["dense, flat"], first["dense, hnsw"], strict=True)
        notes.insert(1, f"HNSW finds {np.mean([np.isin(a, b).mean() for a, b in both]):.1%} of flat's first 5 chunks")
    print(f"{markdown_table(rows)}\n\n{'; '.join(notes)}")
    write_result(arguments, rows=rows, notes=notes)


def remember(encode: Callable[[list[str]], np.ndarray]) -> Callable[[list[str]], np.ndarray]:
    known = cache(lambda texts: encode(list(texts)))
    return lambda texts: known(tuple(texts))


def read_pairs(file: Path, kind: str) -> Pairs:
    """First question and first answer of each conversation. UserError: the file cannot be read, or holds none."""
    files = RawFiles(name=file.name, kind=kind, paths=[str(file)])
    records = [record for path in raw_files(files) for _, record in read_raw(files, path)]
    turns = [{m.role: m.content for m in reversed(chat.messages)} for chat in records if isinstance(chat, Chat)]
    if not turns:
        raise UserError(f"{file}: no question with an answer among {len(records)} rows read as kind '{kind}'")
    return [(turn["user"], turn["assistant"]) for turn in turns]


def ways(settings: RetrievalConfig) -> dict[str, RetrievalConfig]:
    """What is compared, by its name in the table."""
    plain = settings.model_copy(update={"retriever": "bm25", "bm25_unit": "bigram", "reranker": None})
    found = {"BM25, words": plain.model_copy(update={"bm25_unit": "word"}), "BM25, pairs of characters": plain}
    if dense := settings.dense:
        for kind in ("hnsw", "flat"):
            changed = {"retriever": "dense", "dense": dense.model_copy(update={"index": kind})}
            found[f"dense, {kind}"] = plain.model_copy(update=changed)
        found["hybrid"] = plain.model_copy(update={"retriever": "hybrid"})
    if settings.reranker:
        best, settings_of_best = list(found.items())[-1]
        found[f"{best}, reranked"] = settings_of_best.model_copy(update={"reranker": settings.reranker})
    return found


def measure(
    experiment: Experiment, settings: RetrievalConfig, pairs: Pairs, encoder: Encoder | None, folder: Path
) -> tuple[dict[str, str], list[np.ndarray]]:
    """The row of one way, and the first 5 chunks of each question whose answer the index holds; it lies below a folder."""
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(answer for _, answer in pairs))}
    answers, index = folder / "answers.jsonl", folder / "index"
    write_json_lines(answers, ({"id": str(number), "text": text} for text, number in numbers.items()))
    settings = settings.model_copy(update={"corpus": [DataSource(path=str(answers))], "index": str(index)})
    experiment = experiment.model_copy(update={"retrieval": settings})
    build(experiment, encoder=encoder)
    documents = np.array([int(chunk["document"]) for chunk in read_json_lines(index / CHUNKS)])
    held = set(documents.tolist())
    asked = [(question, numbers[answer]) for question, answer in pairs if numbers[answer] in held]
    retriever, questions = Retriever(experiment, encoder), [question for question, _ in asked]
    if encoder:
        encoder.questions(questions)  # remembered, so that it counts in no row's time
    begin = time.perf_counter()
    found = [chunks for chunks, _ in retriever.rank(questions, DEPTH)]
    rate = len(asked) / (time.perf_counter() - begin)
    ranks = np.array([rank_of(own, documents[chunks]) for (_, own), chunks in zip(asked, found, strict=True)])
    cells = {f"R@{cut}": f"{(ranks <= cut).mean():.1%}" for cut in (1, 5, 10)}
    mrr = np.where(ranks <= 10, 1 / ranks, 0).mean()
    return {**cells, "MRR@10": f"{mrr:.3f}", "questions/s": f"{rate:,.0f}"}, [chunks[:5] for chunks in found]


def rank_of(own: int, documents: np.ndarray) -> float:
    """From 1; inf if it is not found. Several chunks of a document count as one."""
    distinct = list(dict.fromkeys(documents.tolist()))
    return distinct.index(own) + 1 if own in distinct else np.inf
