"""Questions -> passages of the experiment's index, and prompts with them."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from qilin_med.artifact import digest
from qilin_med.config.experiment import Experiment
from qilin_med.console.progress import counted, progress
from qilin_med.data.shards import JsonLines, load
from qilin_med.errors import UserError
from qilin_med.prompt.wording import option_lines, with_passages
from qilin_med.retrieve.index import CHUNKS, KINDS, OFFSETS, SOURCES, tokenizer_file, verify_index
from qilin_med.retrieve.models import Encoder, Reranker
from qilin_med.retrieve.search import Bm25, Dense, Ranking, fuse

POOL = 100  # chunks of each ranking that are fused


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk: characters `start` to `end` of a document. `score`: BM25's, a cosine, or a sum of reciprocal
    ranks, by the retriever; or the reranker's."""

    document: str
    source: str
    start: int
    end: int
    text: str
    score: float

    @property
    def id(self) -> str:
        return f"{self.document}@{self.start}-{self.end}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with the passages that found room before it."""

    text: str
    passages: tuple[Passage, ...]
    shortened: bool = False
    """Whether a passage that was found is left out or cut for want of room."""

    @property
    def sources(self) -> list[str]:
        """Ids of the passages, in order."""
        return [passage.id for passage in self.passages]


class Retriever:
    """Finds passages for questions in the experiment's index, many questions at a time."""

    def __init__(self, experiment: Experiment, encoder: Encoder | None = None):
        """`encoder`: in place of the model that retrieval.dense names.

        UserError: the index is missing, damaged, or made from another corpus or with other settings; or exclude_sources
        names a source that it does not have.
        """
        self.settings = settings = experiment.retrieval
        manifest, folder = verify_index(experiment), experiment.index_folder()
        self.fingerprint: str = manifest["fingerprint"]
        """Of the index and the reranker, for result files."""
        self.chunks, sources = JsonLines(folder / CHUNKS, folder / OFFSETS), manifest["sources"]
        if unknown := set(settings.exclude_sources) - set(sources):
            raise UserError(f"retrieval.exclude_sources names '{min(unknown)}', which the index does not have; it has: "
                            + ", ".join(sources))  # fmt: skip
        excluded = [number for number, name in enumerate(sources) if name in settings.exclude_sources]
        self._allowed = ~np.isin(load(folder / SOURCES), excluded) if excluded else None
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file(experiment)))
        self._indexes: list[Bm25 | Dense] = []
        for kind in KINDS[settings.retriever]:
            if kind == "bm25":
                self._indexes.append(Bm25(folder / kind, settings.bm25_unit))
            else:
                self._indexes.append(Dense(folder / kind, encoder or Encoder(settings.dense)))
        self._reranker = Reranker(settings.reranker) if settings.reranker else None
        if self._reranker:
            self.fingerprint = digest([self.fingerprint, self._reranker.fingerprint])

    def rank(self, questions: list[str], k: int) -> list[Ranking]:
        """As `search`, the numbers of the chunks alone. With a reranker at most its candidates."""
        if not questions:
            return []
        wanted = self.settings.reranker.candidates if self._reranker else k
        if len(self._indexes) == 1:
            found = self._indexes[0].search(questions, wanted, self._allowed)
        else:
            rankings = [index.search(questions, max(wanted, POOL), self._allowed) for index in self._indexes]
            found = [fuse(both, wanted) for both in zip(*rankings, strict=True)]
        return self._rerank(questions, found, k) if self._reranker else found

    def _rerank(self, questions: list[str], found: list[Ranking], k: int) -> list[Ranking]:
        reranked = []
        with progress("reranking", len(questions), "questions") as advance:
            for question, (numbers, _) in zip(counted(questions, advance), found, strict=True):
                scores = self._reranker.score(question, [self.chunks[number]["text"] for number in numbers])
                best = np.argsort(-scores, kind="stable")[:k]
                reranked.append((numbers[best], scores[best]))
        return reranked

    def search(self, questions: list[str], k: int | None = None) -> list[list[Passage]]:
        """The k (None: `passages` of the config) best passages of each question, the best first. With BM25, fewer than
        k if fewer share a term."""
        rankings = self.rank(questions, k or self.settings.passages)
        pairs = [zip(numbers, scores.tolist(), strict=True) for numbers, scores in rankings]
        return [[Passage(**self.chunks[number], score=score) for number, score in found] for found in pairs]

    def query(self, stem: str, options: Iterable[tuple[str, str]]) -> str:
        """What to look up for an exam question, by `query_with_options`; `options` are (letter, text)."""
        return f"{stem}\n{option_lines(options)}" if self.settings.query_with_options else stem

    def fill_prompt(self, question: str, passages: Sequence[Passage], budget: int | None = None) -> Prompt:
        """The question after those passages that `max_context_tokens`, and `budget` tokens if that is less, hold."""

        def count(text: str) -> int:
            return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

        most = self.settings.max_context_tokens
        return fill_prompt(question, passages, most if budget is None else min(budget, most), count)

    def contexts(self, questions: list[str], budgets: Sequence[int] | None = None) -> list[Prompt]:
        """For each question what goes before it, and before the exam prompt that holds it, in the words of
        `with_passages` ("" if nothing was found). `budgets`: the tokens that a model has left beside each question; 0 or
        less leaves no passage."""
        found, budgets = self.search(questions), budgets or [None] * len(questions)
        return [self.fill_prompt("", passages, budget) for passages, budget in zip(found, budgets, strict=True)]


def fill_prompt(question: str, passages: Sequence[Passage], limit: int, count: Callable[[str], int]) -> Prompt:
    """The question after as many passages as `limit` tokens hold (`count` tells a text's tokens; the wording around the
    passages counts, the question does not).

    Passages come in the order given, the most relevant first, and stay whole: one that does not fit is passed over.
    Only if none fits is the first one cut at its end.
    """

    def fits(texts: list[str]) -> bool:
        return count(with_passages("", texts)) <= limit

    kept: list[Passage] = []
    for passage in passages:
        if fits([each.text for each in (*kept, passage)]):
            kept.append(passage)
    shortened = len(kept) < len(passages)
    if passages and not kept:
        text = passages[0].text
        length = bisect_right(range(1, len(text) + 1), False, key=lambda length: not fits([text[:length]]))
        kept = [replace(passages[0], text=text[:length])] if length else []
    return Prompt(with_passages(question, [passage.text for passage in kept]), tuple(kept), shortened)
