"""How a row becomes a prompt and a worked example. Every prompt ends its own line, so that an answer starts a new one;
in a chat template the line end is stripped off again."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from qilin_med.prompt.wording import exam_answer, exam_prompt

Row = dict[str, Any]


def lettered(row: Row) -> list[tuple[str, str]]:
    """The options as (letter, text)."""
    return list(zip(row["letters"], row["options"], strict=True))


def letters(row: Row) -> list[str]:
    return list(row["letters"])


def option_texts(row: Row) -> list[str]:
    return row["options"]


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


def answer(row: Row) -> str:
    return row["answer"]


def explanation(row: Row) -> str:
    return row["explanation"]


def ceval_question(row: Row) -> str:
    """A question as C-Eval's own code writes it (hkust-nlp/ceval)."""
    options = "\n".join(f"{letter}. {text}" for letter, text in lettered(row))
    return f"{row['context']}{row['stem']}\n{options}\n答案："


class SameSubject(ContextSampler):
    """The first worked examples of the question's own subject, as in C-Eval's own code."""

    def sample(self, n: int, eval_doc: Row | None = None, df: Any = None, **_: Any) -> Sequence[Row]:
        return [row for row in self.df if row["subject"] == eval_doc["subject"]][:n]
