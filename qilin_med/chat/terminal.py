"""A conversation in the terminal, or with questions from a pipe. Answers go to stdout, everything else to stderr."""

import sys
from contextlib import closing

from qilin_med.chat.conversation import NOTICE, ChatModel, Turn, look_up
from qilin_med.errors import UserError
from qilin_med.retrieve.retriever import Passage, Retriever

HELP = "/new starts over, Ctrl-C stops an answer, Ctrl-D or /exit ends."


def talk(model: ChatModel, retriever: Retriever | None) -> None:
    """Answer the lines of stdin until it ends or says /exit."""
    is_terminal = sys.stdin.isatty()
    _tell(NOTICE)
    if is_terminal:
        import readline  # noqa: F401 - lets input() edit lines and remember them

        _tell(HELP)
    turns: list[Turn] = []
    while (question := _read(is_terminal)) != "/exit":
        if question == "/new":
            turns.clear()
            _tell("(a new conversation)")
        elif question:
            turns += _take_turn(model, retriever, turns, question)


def _read(is_terminal: bool) -> str:
    """The next line; "/exit" at the end of the input."""
    try:
        return input("\n> " if is_terminal else "").strip()
    except EOFError:
        return "/exit"
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        _tell(f"\n{HELP}")
        return ""


def _take_turn(model: ChatModel, retriever: Retriever | None, turns: list[Turn], question: str) -> list[Turn]:
    """The turn, as far as it was answered; none if the question cannot be asked."""
    try:
        asked = look_up(retriever, question)
        prompt = model.prompt(turns, asked)
    except UserError as error:
        _tell(f"error: {error}")
        return []
    if prompt.note:
        _tell(f"({prompt.note})")
    for number, passage in enumerate(asked.passages, 1):
        _tell(_passage_line(number, passage))
    answer = ""
    try:
        with closing(model.stream(prompt)) as growing:
            for text in growing:
                print(text[len(answer) :], end="", flush=True)
                answer = text
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _tell("(stopped)")
    return [(question, answer)]


def _passage_line(number: int, passage: Passage) -> str:
    return f"【{number}】{passage.text} ({passage.source}, {passage.id})"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
