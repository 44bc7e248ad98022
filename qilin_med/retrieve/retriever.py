"""Questions -> passages of the experiment's index, and prompts with them."""

from collections.abc import Iterable, Sequence

from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError
from qilin_med.retrieve.bm25 import Bm25
from qilin_med.retrieve.chunks import Chunks
from qilin_med.retrieve.cutting import load_tokenizer
from qilin_med.retrieve.dense import INDEX, Dense, Encoder, load_encoder
from qilin_med.retrieve.fusion import Ranking, fuse
from qilin_med.retrieve.index import IndexPlan, plan_index, verify_index
from qilin_med.retrieve.prompting import Passage, Prompt, exam_query, fill_prompt

POOL = 100  # chunks of each ranking that are fused


def open_retriever(experiment: Experiment, encoder: Encoder | None = None) -> "Retriever":
    """The retriever over the experiment's index. `encoder`: instead of the model that retrieval.dense names.

    UserError: the index is missing, damaged, or made from another corpus or with other settings.
    """
    plan = plan_index(experiment)
    return Retriever(plan, verify_index(plan)["fingerprint"], encoder)


class Retriever:
    """Finds passages for questions, many at a time."""

    def __init__(self, plan: IndexPlan, fingerprint: str, encoder: Encoder | None = None):
        """UserError: exclude_sources names a source that the index does not have."""
        settings = plan.settings
        self.settings = settings
        self.fingerprint = fingerprint
        """Of the index, for result files."""
        self.chunks = Chunks(plan.folder)
        if unknown := set(settings.exclude_sources) - set(self.chunks.sources):
            raise UserError(f"retrieval.exclude_sources names '{min(unknown)}', which the index does not have; it has: "
                            + ", ".join(self.chunks.sources))  # fmt: skip
        self._allowed = self.chunks.allowed(settings.exclude_sources)
        self._tokenizer = load_tokenizer(plan.tokenizer)
        self._indexes: list[Bm25 | Dense] = [Bm25(plan.folder / "bm25", settings.bm25_unit)] if plan.has_bm25 else []
        if plan.has_dense:
            encoder = encoder or load_encoder(settings.dense)
            self._indexes.append(Dense(plan.folder / "dense" / INDEX, encoder, settings.dense.query_prefix))

    def search(self, questions: list[str], k: int | None = None) -> list[list[Passage]]:
        """The k (None: `passages` of the config) best passages of each question, the best first. Scores are BM25's,
        cosines, or sums of reciprocal ranks, by the retriever. With BM25, fewer than k if fewer share a term."""
        return [self._passages(ranking) for ranking in self.rank(questions, k or self.settings.passages)]

    def fill_prompt(self, question: str, passages: Sequence[Passage]) -> Prompt:
        """The question after those passages that `max_context_tokens` hold, as `prompting.fill_prompt`."""
        return fill_prompt(question, passages, self.settings.max_context_tokens, self._count_tokens)

    def contexts(self, questions: list[str]) -> list[tuple[str, list[str]]]:
        """For each question what goes before it, and before the exam prompt that holds it, in the words of
        `prompts.with_passages` ("" if nothing was found); and the ids of the passages in it."""
        prompts = [self.fill_prompt("", passages) for passages in self.search(questions)]
        return [(prompt.text, prompt.sources) for prompt in prompts]

    def query(self, stem: str, options: Iterable[tuple[str, str]]) -> str:
        """What to look up for an exam question, by `query_with_options`; `options` are (letter, text)."""
        return exam_query(stem, options, self.settings.query_with_options)

    def rank(self, questions: list[str], k: int) -> list[Ranking]:
        """As `search`, the numbers of the chunks alone."""
        if not questions:
            return []
        if len(self._indexes) == 1:
            return self._indexes[0].search(questions, k, self._allowed)
        rankings = [index.search(questions, max(k, POOL), self._allowed) for index in self._indexes]
        return [fuse(both, k) for both in zip(*rankings, strict=True)]

    def _passages(self, ranking: Ranking) -> list[Passage]:
        found = ((self.chunks[number], score) for number, score in zip(*map(list, ranking), strict=True))
        return [Passage(chunk.id, chunk.document, chunk.source, chunk.text, float(score)) for chunk, score in found]

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
