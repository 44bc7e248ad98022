"""The exam prompt of the paper (CMExam) and the wording around retrieved passages, which training data, evaluation and
chat share."""

from collections.abc import Iterable, Sequence

HEAD = "返回限制：只返回两行。假设你是一位医疗行业专家，请回答下列问题，注意是单选题，只需要返回一个最合适的选项。"
TAIL = (
    "注意，结果只有两行。第一行只需要返回答案的英文选项(注意只需要返回一个最合适的答案)，第二行进行简要的解释。"
    "输出格式限制为：“答案：”，“解释：”。\n"
    "注意，题目是单选题，若有多个合适的答案，只返回最准确的即可。"
)


def exam_prompt(stem: str, options: Iterable[tuple[str, str]]) -> str:
    """The question as the model is asked it; `options` are (letter, text)."""
    return f"{HEAD}\n{stem}\n{option_lines(options)}\n{TAIL}"


def without_frame(text: str) -> str:
    """Only the question of an exam prompt: the frame around it is in every one, and would make unrelated ones look similar."""
    return text.replace(f"{HEAD}\n", "").replace(f"\n{TAIL}", "")


def exam_answer(letters: str, explanation: str) -> str:
    """The answer as the prompt demands it, in two parts."""
    return f"答案：{letters}\n解释：{explanation}"


def option_lines(options: Iterable[tuple[str, str]]) -> str:
    """Options, one per line: "A 能补、能缓"."""
    return "\n".join(f"{letter} {text}" for letter, text in options)


def plain_dialogue(turns: Iterable[tuple[str, str]], question: str) -> str:
    """What a model that reads plain text answers from: earlier (question, answer) turns as worked examples stand in an
    evaluation, a blank line after each, and the question on a line of its own."""
    return "".join(f"{asked}\n{answer}\n\n" for asked, answer in turns) + f"{question}\n"


def with_passages(question: str, passages: Sequence[str]) -> str:
    """The question after numbered passages, the most relevant first; without passages the question as it is.

    What stands before the question does not depend on it. The paper does not state its wording; this one is ours.
    """
    if not passages:
        return question
    numbered = "\n".join(f"【{number}】{passage.strip()}" for number, passage in enumerate(passages, 1))
    return f"参考资料：\n{numbered}\n请参考以上资料，回答下面的问题。\n{question}"
