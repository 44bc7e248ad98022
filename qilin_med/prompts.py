"""The exam prompt of the paper (CMExam), which training data and evaluation share."""

from collections.abc import Iterable

HEAD = "返回限制：只返回两行。假设你是一位医疗行业专家，请回答下列问题，注意是单选题，只需要返回一个最合适的选项。"
TAIL = (
    "注意，结果只有两行。第一行只需要返回答案的英文选项(注意只需要返回一个最合适的答案)，第二行进行简要的解释。"
    "输出格式限制为：“答案：”，“解释：”。\n"
    "注意，题目是单选题，若有多个合适的答案，只返回最准确的即可。"
)


def exam_prompt(stem: str, options: Iterable[tuple[str, str]]) -> str:
    """The question as the model is asked it; `options` are (letter, text)."""
    return f"{HEAD}\n{stem}\n{option_lines(options)}\n{TAIL}"


def exam_answer(letters: str, explanation: str) -> str:
    """The answer as the prompt demands it, in two parts."""
    return f"答案：{letters}\n解释：{explanation}"


def option_lines(options: Iterable[tuple[str, str]]) -> str:
    """Options one a line, "A 能补、能缓"."""
    return "\n".join(f"{letter} {text}" for letter, text in options)
