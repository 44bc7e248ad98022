"""Which copies of evaluation questions does decontamination find, and what does it take for one wrongly?

    python scripts/benchmark.py decontamination
    python scripts/benchmark.py decontamination --corpus configs/demo_chimed.json --questions 50

Questions of the corpus file's evaluation files are planted as records: as they are, with the edits that copies on the web
have, and as look-alikes, which are other questions of the same files with a near stem and another answer, and must stay.
Beside ours, on jieba's words of folded text: a shared 13-gram (Brown et al. 2020, appendix C) and 80% of the words in shared
10-grams (Touvron et al. 2023b, appendix A.6). LMSYS's llm-decontaminator asks a language model about each pair and is not
run here.
"""

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jieba
import jieba.posseg
import numpy as np
from opencc import OpenCC
from rapidfuzz import fuzz
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.common import describe_moment, write_result
from qilin_med.config.corpus import CorpusSettings, DecontaminationSettings, load_corpus_settings
from qilin_med.config.experiment import RawFiles, count
from qilin_med.data.decontaminate import Index, write_index
from qilin_med.data.folding import fold
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.data.render import text_of
from qilin_med.errors import UserError
from qilin_med.prompt.wording import option_lines
from qilin_med.records import LETTERS, AnyRecord, Chat, Document, Message, Question, Skipped
from qilin_med.report.tables import markdown_table

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
OTHER_MARKS = str.maketrans("，。；：？（）", ",.;:?()")
ALIKE = 0.6  # cosine of character n-grams from which two stems look alike
OTHER_ANSWER = 60  # per cent of similarity below which two answers are different ones
Find = Callable[[Sequence[AnyRecord]], list[bool]]
"""Whether each record of a corpus repeats an evaluation item."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", default="configs/chimed.json", help="corpus file (default: %(default)s)")
    parser.add_argument("--questions", type=count, default=200, help="planted of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all draws (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    settings = load_corpus_settings(arguments.corpus)
    exams, chats = read_questions(settings)
    edit = Editor(arguments.seed, [text_of(record) for record in exams + chats])
    asked, consulted = (edit.sample(some, arguments.questions) for some in (exams, chats))
    first = islice(read_all(settings.sources[0]), 1000)  # texts to plant questions in
    around = [text_of(record)[:300] for record in first if not isinstance(record, Skipped)]
    planted = {f"exam: {kind}": list(map(make, asked)) for kind, make in exam_leaks(edit, around).items()}
    planted |= {f"dialogue: {kind}": list(map(make, consulted)) for kind, make in dialogue_leaks(edit, chats).items()}
    table = measure(exams + chats, planted)
    kept, others = look_alikes(exams)
    table += measure(kept, {"look-alikes": others, "look-alikes in dialogues": list(map(ask_whole, others))})
    print(markdown_table(table))
    print(f"\nFound, of those planted. Look-alikes are found wrongly. {describe_moment()}")
    write_result(arguments, table=table)


def measure(items: Sequence[AnyRecord], planted: dict[str, list[AnyRecord]]) -> list[dict[str, str]]:
    finders = {name: prepare(items) for name, prepare in CONTENDERS.items()}
    return [{"planted": kind, **{name: f"{sum(find(records))} of {len(records)}" for name, find in finders.items()}}
            for kind, records in planted.items() if records]  # fmt: skip


def read_all(source: RawFiles) -> Iterator[AnyRecord | Skipped]:
    return (record for file in raw_files(source) for _, record in read_raw(source, file))


def read_questions(settings: CorpusSettings) -> tuple[list[Question], list[Chat]]:
    """The exam questions with a known answer and a wrong option, and the consultations, of all evaluation files."""
    records = [record for source in settings.decontamination.files for record in read_all(source)]
    exams = [r for r in records if isinstance(r, Question) and r.answer and len(r.options) > len(r.answer)]
    if len(exams) < 2:
        raise UserError(
            "decontamination.files of this corpus file hold no exam questions with answers; name another: --corpus"
        )
    return exams, [r for r in records if isinstance(r, Chat)]


# -------------------------------------------------------------------------------------------------------- leaks


class Editor(random.Random):
    """Edits of questions, drawn from one seed. A word is exchanged for another of its kind from the same texts."""

    def __init__(self, seed: int, texts: Sequence[str]):
        super().__init__(seed)
        self._words = defaultdict(set)
        for text in self.sample(texts, 1000):
            for word, kind in jieba.posseg.cut(text):
                self._words[kind].add(word)

    def sample(self, population: Sequence[Any], k: int) -> list[Any]:
        return super().sample(population, min(k, len(population)))

    def change_word(self, text: str, nouns: bool = True) -> str:
        """`nouns`: also what the text may be about."""
        words = [tuple(pair) for pair in jieba.posseg.cut(text)]
        places = [place for place, (word, kind) in enumerate(words)
                  if len(fold(word)) > 1 and self._words[kind] - {word} and (nouns or kind[0] != "n")]  # fmt: skip
        if not places:
            return text
        place = self.choice(places)
        word, kind = words[place]
        words[place] = self.choice(sorted(self._words[kind] - {word})), kind
        return "".join(word for word, _ in words)

    def change_question(self, question: Question) -> Question:
        """One word of the stem or of an option."""
        texts = [question.stem, *(text for _, text in question.options)]
        [place] = self.choices(range(len(texts)), list(map(len, texts)))
        texts[place] = self.change_word(texts[place])
        options = zip((letter for letter, _ in question.options), texts[1:], strict=True)
        return replace(question, stem=texts[0], options=tuple(options))

    def reorder(self, question: Question) -> Question:
        return letter_anew(question, self.sample(question.options, len(question.options)))

    def drop_wrong(self, question: Question) -> Question:
        dropped = self.choice([option for option in question.options if option[0] not in question.answer])
        return letter_anew(question, [option for option in question.options if option != dropped])


def letter_anew(question: Question, options: Sequence[tuple[str, str]]) -> Question:
    """The question with these options under the letters A, B, ..., and its answer moved along."""
    lettered = [(letter, *option) for letter, option in zip(LETTERS, options, strict=False)]
    answer = "".join(new for new, old, _ in lettered if old in question.answer)
    return replace(question, options=tuple((new, text) for new, _, text in lettered), answer=answer)


def change_texts(question: Question, change: Callable[[str], str]) -> Question:
    options = tuple((letter, change(text)) for letter, text in question.options)
    return replace(question, stem=change(question.stem), options=options)


def answer_of(question: Question) -> str:
    return "".join(text for letter, text in question.options if letter in question.answer)


def consult(question: str, answer: str) -> Chat:
    return Chat("planted", (Message("user", question), Message("assistant", answer)))


def ask_whole(question: Question) -> Chat:
    return consult(f"请问这道题选什么？{question.stem}\n{option_lines(question.options)}", f"答案：{question.answer}")


def exam_leaks(edit: Editor, around: list[str]) -> dict[str, Callable[[Question], AnyRecord]]:
    def in_a_text(passage: str) -> Document:
        return Document("planted", f"{edit.choice(around)}\n{passage}。{edit.choice(around)}")

    return {
        "verbatim": lambda q: q,
        "other punctuation": lambda q: change_texts(q, lambda text: f"{text.translate(OTHER_MARKS)} "),
        "options in another order": edit.reorder,
        "full width": lambda q: change_texts(q, lambda text: text.translate(FULL_WIDTH)),
        "traditional characters": lambda q: change_texts(q, OpenCC("s2t").convert),
        "in a dialogue": ask_whole,
        "one word changed": edit.change_question,
        "a wrong option dropped": edit.drop_wrong,
        "other order, one word changed": lambda q: edit.reorder(edit.change_question(q)),
        "stem asked, answer's text replied": lambda q: consult(q.stem, f"{answer_of(q)}。"),
        "stem and answer in a text": lambda q: in_a_text(q.stem + answer_of(q)),
        "stem alone in a text": lambda q: in_a_text(q.stem),
    }


def dialogue_leaks(edit: Editor, chats: list[Chat]) -> dict[str, Callable[[Chat], AnyRecord]]:
    """Questions with the answer to another one."""

    def ask(question: str) -> Chat:
        return consult(question, edit.choice(chats).messages[-1].content)

    return {
        "question alone": lambda c: ask(c.messages[0].content),
        "with a greeting": lambda c: ask(f"医生您好，想咨询一下，{c.messages[0].content}谢谢！"),
        "one word changed, no noun": lambda c: ask(edit.change_word(c.messages[0].content, nouns=False)),
        "any word changed": lambda c: ask(edit.change_word(c.messages[0].content)),
    }


def look_alikes(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Pairs of different questions: stems alike, neither in the other or the same, and other answers."""
    stems, answers = ([fold(text) for text in map(of, questions)] for of in (lambda q: q.stem, answer_of))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(2, 3)).fit_transform(stems)
    near, twins = [], set()
    for start in range(0, len(stems), 1000):
        found = (vectors[start : start + 1000] @ vectors.T).tocoo()
        places = np.flatnonzero((found.data >= ALIKE) & (found.row + start < found.col))
        for a, b in zip((found.row[places] + start).tolist(), found.col[places].tolist(), strict=True):
            same = stems[a] in stems[b] or stems[b] in stems[a] or fuzz.ratio(answers[a], answers[b]) >= OTHER_ANSWER
            twins.update((a, b) if same else ())
            near.append((a, b))
    # A question that stands twice would be found rightly; each question is in one pair.
    pairs = {a: b for a, b in reversed(near) if not {a, b} & twins}
    pairs = {b: a for a, b in pairs.items() if b not in pairs}
    return [questions[a] for a in pairs.values()], [questions[b] for b in pairs]


# -------------------------------------------------------------------------------------------------- ways to find them


def prepare_ours(items: Sequence[AnyRecord]) -> Find:
    settings = DecontaminationSettings()
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
        write_index((("evaluation", item) for item in items), settings.ngram, Path(folder))
        index = Index(Path(folder), settings.ngram, settings.near_miss)
    return lambda records: [hit is not None and hit.same for hit in index.find(records)]


def ngrams(record: AnyRecord, width: int) -> list[tuple[str, ...]]:
    words = jieba.lcut(fold(text_of(record)))
    return [tuple(words[place : place + width]) for place in range(len(words) - width + 1)]


def prepare_13grams(items: Sequence[AnyRecord]) -> Find:
    known = {gram for item in items for gram in ngrams(item, 13)}
    return lambda records: [not known.isdisjoint(ngrams(record, 13)) for record in records]


def prepare_covered(items: Sequence[AnyRecord]) -> Find:
    """80% of an item's words lie in 10-grams that the record has too."""
    grams_of = [ngrams(item, 10) for item in items]
    owners = defaultdict(set)
    for number, grams in enumerate(grams_of):
        for gram in grams:
            owners[gram].add(number)

    def is_covered(own: list[tuple[str, ...]], grams: set[tuple[str, ...]]) -> bool:
        places = {place + step for place, gram in enumerate(own) if gram in grams for step in range(10)}
        return len(places) >= 0.8 * (len(own) + 9)

    def find(records: Sequence[AnyRecord]) -> list[bool]:
        batch = [set(ngrams(record, 10)) for record in records]
        return [any(is_covered(grams_of[number], grams) for number in set().union(*map(owners.get, grams & owners.keys())))
                for grams in batch]  # fmt: skip

    return find


CONTENDERS: dict[str, Callable[[Sequence[AnyRecord]], Find]] = {
    "ours": prepare_ours,
    "13-grams": prepare_13grams,
    "80% in 10-grams": prepare_covered,
}
