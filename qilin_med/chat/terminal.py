"""A conversation in the terminal, or with questions from a pipe. Answers go to stdout, everything else to stderr."""

import sys
from contextlib import closing

from qilin_med.chat.conversation import GREEDY, NOTICE, ChatModel, Manner, Turn, look_up
from qilin_med.errors import UserError
from qilin_med.retrieve.retriever import Retriever

HELP = "/new starts over, Ctrl-C stops an answer, Ctrl-D or /exit ends."


def talk(model: ChatModel, retriever: Retriever | None, manner: Manner = GREEDY) -> None:
    """Answer the lines of stdin until it ends or says /exit."""
    is_terminal = sys.stdin.isatty()
    say(NOTICE)
    if is_terminal:
        import readline  # noqa: F401 - lets input() edit lines and remember them

        say(HELP)
    turns: list[Turn] = []
    while True:
        try:
            question = input("\n> " if is_terminal else "").strip()
            if question == "/exit":
                return
            if question == "/new":
                turns.clear()
                say("(a new conversation)")
            elif question:
                turns.append((question, answer(model, retriever, turns, question, manner)))
        except EOFError:
            return
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            say(f"\n{HELP}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(model: ChatModel, retriever: Retriever | None, turns: list[Turn], question: str, manner: Manner) -> str:
    """Print the answer as it grows; return it, or what there is of it after Ctrl-C. UserError: the question cannot be asked."""
    asked = look_up(retriever, question, [model], manner.system)
    prompt = model.prompt(turns, asked, manner.system)
    if prompt.note:
        say(f"({prompt.note})")
    for number, passage in enumerate(asked.passages, 1):
        say(f"【{number}】{passage.text} ({passage.source}, {passage.id})")
    text = ""
    try:
        with closing(model.stream(prompt, manner)) as growing:
            for longer in growing:
                print(longer[len(text) :], end="", flush=True)
                text = longer
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        say("(stopped)")
    return text
