"""What the task files of configs/tasks ask: raw files -> rows -> prompts and worked examples.

A loader's arguments come from the metadata of its task file, or stand in for it. Every prompt ends its own line, so that
an answer starts a new one; in a chat template the line end is stripped off again.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from qilin_med.config.experiment import Kind, RawFiles
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.tasks.subjects import SUBJECTS
from qilin_med.prompt.wording import exam_answer, exam_prompt
from qilin_med.records import Question, Skipped

Row = dict[str, Any]
Options = list[tuple[str, str]]
Retrieve = Callable[[list[tuple[str, Options]]], list[tuple[str, list[str]]]]
"""Questions as (stem, options as (letter, text)) -> for each (text to set before it, ids of the text's sources)."""

ROW_NUMBER = re.compile(r"[:#][0-9]+(?:~[0-9]+)?$")
SUBJECT_FILE = re.compile(r"(\w+)_(dev|val|test)\.csv")


def load_questions(
    test: str | list[str], fewshot: str | list[str] = (), kind: Kind = "exam", columns: dict[str, str] | None = None,
    retrieve: Retrieve | None = None, explained: bool = False, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """Exam files or consultations as splits "test" and "fewshot", and the number of unusable rows by reason as "skipped".

    `explained`: only questions with a reference explanation. Of a consultation's answers the first counts. A missing file
    of worked examples is passed over: a task may ask for none. UserError: a test file is missing or has no usable question.
    """
    asked, skipped = _read(kind, test, columns)
    shots, _ = _read(kind, [path for path in _listed(fewshot) if Path(path).exists()], columns)
    if not asked:
        raise UserError(f"{_listed(test)}: no usable question; look at the files, or map their columns")
    if explained:
        kept = [row for row in asked if row["explanation"]]
        if not kept:
            raise UserError(f"{_listed(test)}: no question has an explanation; name a file that has explanations")
        skipped |= {"no explanation": len(asked) - len(kept)} if len(kept) < len(asked) else {}
        asked = kept
    return {"test": _dataset(asked, retrieve), "fewshot": Dataset.from_list(shots), "skipped": skipped}


def load_ceval(
    test: str | list[str], split: str = "val", columns: dict[str, str] | None = None, retrieve: Retrieve | None = None,
    **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """C-Eval's archive or folder as one split "all": the questions of `split`, and dev's as worked examples.

    `role` tells them apart; `number` is the official id, a question's place in its subject's file.
    """
    rows, skipped = _read("exam", test, columns)
    asked, shots = [], []
    for row in rows:
        match = SUBJECT_FILE.search(row["place"])
        if match and match[1] in SUBJECTS and match[2] in ("dev", split):
            name, category = SUBJECTS[match[1]]
            row |= {"subject": match[1], "subject_name": name, "role": "shot" if match[2] == "dev" else "asked"}
            row["facets"] = [["subject", match[1]], ["category", category]]
            (shots if match[2] == "dev" else asked).append(row)
    if not asked:
        raise UserError(f"{_listed(test)}: no C-Eval questions; expected files such as {split}/physician_{split}.csv")
    return {"all": _dataset(asked, retrieve, shots), "skipped": skipped}


def _read(kind: Kind, paths: str | Iterable[str], columns: dict[str, str] | None) -> tuple[list[Row], dict[str, int]]:
    """The usable rows of all files, and how many were skipped for which reason."""
    if not (paths := _listed(paths)):
        return [], {}
    source = RawFiles(name=kind, kind=kind, paths=paths, columns=columns or {})
    rows, skipped, size_of = [], Counter(), Counter()
    for size, record in (counted for file in raw_files(source) for counted in read_raw(source, file)):
        place = ROW_NUMBER.split(record.id)[0]  # a file, or member of an archive
        size_of[place] += size
        if isinstance(record, Skipped):
            skipped[record.reason] += size
        elif size:  # a further record of the same row has none
            row = {"id": record.id, "place": place, "number": size_of[place] - 1, "context": "", "sources": []}
            if isinstance(record, Question):
                letters, texts = map(list, zip(*record.options, strict=True))
                row |= {"stem": record.stem, "letters": letters, "options": texts, "answer": record.answer}
                row |= {"explanation": record.explanation, "facets": [list(facet) for facet in record.facets]}
            else:
                question, answer = record.messages[-2:]
                row |= {"stem": question.content, "answer": answer.content, "facets": []}
            rows.append(row)
    return rows, dict(skipped)


def _listed(paths: str | Iterable[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _dataset(asked: list[Row], retrieve: Retrieve | None, further: Sequence[Row] = ()) -> Dataset:
    """The questions after what is retrieved for them, and rows that are no questions."""
    if retrieve:
        found = retrieve([(row["stem"], lettered(row)) for row in asked])
        asked = [{**row, "context": text, "sources": ids} for row, (text, ids) in zip(asked, found, strict=True)]
    return Dataset.from_list([*asked, *further])


def asked_questions(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "asked"])


def worked_examples(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "shot"])


class SameSubject(ContextSampler):
    """The first worked examples of the question's own subject, as in C-Eval's own code."""

    def sample(self, n: int, eval_doc: Row | None = None, df: Any = None, **_: Any) -> Sequence[Row]:
        return [row for row in self.df if row["subject"] == eval_doc["subject"]][:n]


# ------------------------------------------------------------------------------------------------------- wording


def lettered(row: Row) -> Options:
    """The options as (letter, text); none of a consultation."""
    return list(zip(row.get("letters", ()), row.get("options", ()), strict=True))


def exam_question(row: Row) -> str:
    """The paper's prompt, after what was retrieved (`context`, "" without retrieval)."""
    return f"{row['context']}{exam_prompt(row['stem'], lettered(row))}\n"


def exam_solution(row: Row) -> str:
    """A worked example's answer in the form that the prompt demands."""
    return exam_answer(row["answer"], row["explanation"])


def bare_question(row: Row) -> str:
    """The stem alone, for the likelihood of each option's text after it, and consultations."""
    return f"{row['context']}{row['stem']}\n"


def right_texts(row: Row) -> str:
    return "，".join(text for letter, text in lettered(row) if letter in row["answer"])


def ceval_question(row: Row) -> str:
    """A question as C-Eval's own code writes it (hkust-nlp/ceval)."""
    options = "\n".join(f"{letter}. {text}" for letter, text in lettered(row))
    return f"{row['context']}{row['stem']}\n{options}\n答案："
