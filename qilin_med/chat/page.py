"""A page on which two models of an experiment answer the same question side by side. Nothing is loaded from or sent to
anywhere but this machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from qilin_med.chat.conversation import NOTICE, ChatModel, Turn, look_up, messages
from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError
from qilin_med.retrieve.retriever import Passage, Retriever

FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]  # of the reader's machine
CSS = """
#notice { border-left: 4px solid #d97706; padding: 2px 0 2px 12px; }
.passages li { margin: 0 0 10px 18px; list-style: decimal; }
.passages small { opacity: 0.65; overflow-wrap: anywhere; }
"""


class Models:
    """The models of the page's two columns, each loaded once; no third one is in memory."""

    def __init__(self, experiment: Experiment, folders: dict[str, Path], max_new_tokens: int):
        """`folders`: by the names that can be chosen."""
        self.experiment, self.folders, self.max_new_tokens = experiment, folders, max_new_tokens
        self._open: dict[str, ChatModel] = {}

    def open(self, names: Sequence[str]) -> list[ChatModel]:
        """UserError as `ChatModel`."""
        self._open = {name: model for name, model in self._open.items() if name in names}
        for name in names:
            if name not in self._open:
                self._open[name] = ChatModel(self.experiment, name, self.folders[name], self.max_new_tokens)
        return [self._open[name] for name in names]

    def answer(
        self, names: list[str], retriever: Retriever | None, question: str, turns: list[list[Turn]]
    ) -> Iterator[tuple[Sequence[Passage], str, list[list[Turn]]]]:
        """(passages, what did not fit, turns of both columns with the answers so far), again and again."""
        opened = self.open(names)
        asked = look_up(retriever, question, opened)
        prompts = [model.prompt(earlier, asked) for model, earlier in zip(opened, turns, strict=True)]
        note = "; ".join(f"{name}: {prompt.note}" for name, prompt in zip(names, prompts, strict=True) if prompt.note)
        answers = ["", ""]
        with ExitStack() as stack:
            streams = [model.stream(prompt) for model, prompt in zip(opened, prompts, strict=True)]
            for grown in zip_longest(*[stack.enter_context(closing(stream)) for stream in streams]):
                answers = [old if new is None else new for old, new in zip(answers, grown, strict=True)]
                both = [[*t, (question, answer)] for t, answer in zip(turns, answers, strict=True)]
                yield asked.passages, note, both


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Start serving in the background. UserError: the address is taken."""
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"the page cannot be served on {host}:{port} ({error}); choose another --port") from None


def build_page(models: Models, name: str, retriever: Retriever | None) -> gr.Blocks:
    """Starts with the model `name` on the right and the one before it on the left; both are loaded now.

    UserError: one of them cannot be loaded."""
    names = list(models.folders)
    shown = [names[max(names.index(name) - 1, 0)], name]
    models.open(shown)

    def update(passages: Sequence[Passage], note: str, turns: list[list[Turn]]) -> tuple[Any, ...]:
        """In the order of `outputs` below."""
        items = (f"<li>{escape(p.text)}<br><small>{escape(p.source)} · {escape(p.id)}</small></li>" for p in passages)
        label = f"Passages ({len(passages)})" if passages else "Passages"
        chats = [[asdict(message) for message in messages(column)] for column in turns]
        note = gr.Markdown(note, visible=bool(note))
        return *chats, turns, note, gr.Accordion(label), f"<ol class=passages>{''.join(items)}</ol>"

    def ask(question: str, left: str, right: str, turns: list[list[Turn]]) -> Iterator[tuple[Any, ...]]:
        try:
            for step in models.answer([left, right], retriever, question.strip(), turns) if question.strip() else ():
                yield "", *update(*step)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="Qilin-Med", analytics_enabled=False) as page:
        gr.Markdown("# Qilin-Med")
        gr.Markdown(NOTICE, elem_id="notice")
        turns, choices, chats = gr.State([[], []]), [], []
        with gr.Row():
            for chosen in shown:
                with gr.Column(min_width=320):
                    choices.append(gr.Dropdown(names, value=chosen, label="Model"))
                    chats.append(gr.Chatbot(show_label=False, height="min(420px, 40vh)", render_markdown=False,
                                            buttons=["copy"], placeholder="　"))  # fmt: skip
        note = gr.Markdown(visible=False)
        question = gr.Textbox(show_label=False, placeholder="问题 / question", submit_btn=True, autofocus=True)
        with gr.Row():
            stop, new = (gr.Button(label, size="sm", min_width=120) for label in ("Stop", "New conversation"))
        with gr.Accordion("Passages", open=False, visible=retriever is not None) as fold:
            passages = gr.HTML()
        outputs = [*chats, turns, note, fold, passages]
        hidden = {"api_visibility": "private", "show_progress": "minimal"}
        asking = question.submit(ask, [question, *choices, turns], [question, *outputs], **hidden)
        stop.click(None, cancels=[asking])
        anew = [new.click, *(chat.clear for chat in chats), *(choice.change for choice in choices)]
        gr.on(anew, lambda: update((), "", [[], []]), None, outputs, cancels=[asking], **hidden)
    return page
