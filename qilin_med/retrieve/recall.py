"""How well a retriever finds: question -> own answer, among the answers of a whole file."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qilin_med.artifact import commit, sha256_of, write_json
from qilin_med.config.experiment import DataSource, DecontaminationSettings, Experiment, Kind, RawFiles
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.data.shards import read_json_lines, write_json_lines
from qilin_med.errors import UserError
from qilin_med.records import Chat
from qilin_med.retrieve.index import CHUNKS, build
from qilin_med.retrieve.models import Encoder
from qilin_med.retrieve.retriever import Retriever

CUTS = (1, 5, 10)
DEPTH = 50  # chunks looked at, so that ten answers of several chunks each are among them


@dataclass(frozen=True)
class Recall:
    pairs: int
    without_answer: int
    """Further questions whose answer no index could hold (empty, or unusable text); they count nowhere else."""
    recall: dict[int, float]
    """Share of questions whose own answer is among the first 1, 5, 10 answers."""
    mrr: float
    """Mean of 1 / rank of the own answer, 0 from rank 11 on: MRR@10."""
    questions_per_second: float
    """Of searches as at inference: `passages` passages with their texts, all questions in one batch."""


def evaluate_retrieval(
    experiment: Experiment, file: Path, kind: Kind = "huatuo", encoder: Encoder | None = None
) -> Recall:
    """Index the answers of a file as the experiment would its corpus, ask the questions, and return a `Recall`; it is
    written to <output_dir>/eval/retrieval/<name of the file>.json. Of a conversation, first question and first answer.

    UserError: the file cannot be read, or holds no questions with answers.
    """
    files = RawFiles(name=file.name, kind=kind, paths=[str(file)])
    records = [record for path in raw_files(files) for _, record in read_raw(files, path)]
    chats = [record for record in records if isinstance(record, Chat)]
    turns = [{message.role: message.content for message in reversed(chat.messages)} for chat in chats]
    if not turns:
        raise UserError(f"{file}: no question with an answer among {len(records)} rows read as kind '{kind}'")
    folder = Path(experiment.output_dir) / "eval" / "retrieval"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        answers = Path(scratch) / "answers.jsonl"
        # An answer that several questions have is one: whichever copy is found, it is the own one.
        numbers = {text: number for number, text in enumerate(dict.fromkeys(turn["assistant"] for turn in turns))}
        write_json_lines(answers, ({"id": str(number), "text": text} for text, number in numbers.items()))
        changes = {
            "corpus": [DataSource(path=str(answers))],
            "index": str(answers.with_name("index")),
            "decontamination": DecontaminationSettings(),
            "exclude_sources": [],
        }
        changed = experiment.model_copy(update={"retrieval": experiment.retrieval.model_copy(update=changes)})
        build(changed, encoder=encoder)
        retriever = Retriever(changed, encoder)
        documents = np.array([int(chunk["document"]) for chunk in read_json_lines(changed.index_folder() / CHUNKS)])
        indexed = set(documents.tolist())
        asked = [turn for turn in turns if numbers[turn["assistant"]] in indexed]
        questions, own = [turn["user"] for turn in asked], [numbers[turn["assistant"]] for turn in asked]
        begin = time.perf_counter()
        retriever.search(questions)
        seconds = time.perf_counter() - begin
        ranks = ranks_of_own([documents[chunks] for chunks, _ in retriever.rank(questions, DEPTH)], own)
    shares = {cut: float((ranks <= cut).mean()) for cut in CUTS}
    mrr = float(np.where(ranks <= CUTS[-1], 1 / ranks, 0).mean())
    recall = Recall(len(ranks), len(turns) - len(ranks), shares, mrr, len(questions) / seconds)
    settings = experiment.retrieval.model_dump(mode="json", exclude={"corpus", "decontamination"})
    facts = {"file": str(file), "sha256": sha256_of(file), "kind": kind, "retrieval": settings, "commit": commit()}
    write_json(folder / f"{file.stem}.json", {**asdict(recall), **facts})
    return recall


def ranks_of_own(found: list[np.ndarray], own: list[int]) -> np.ndarray:
    """Rank from 1 of each question's own document among those found for it, inf where it is not; several chunks of a
    document count as one."""
    distinct = [list(dict.fromkeys(documents.tolist())) for documents in found]
    ranks = [order.index(mine) + 1 if mine in order else np.inf for order, mine in zip(distinct, own, strict=True)]
    return np.array(ranks, np.float64)
