"""A page on which two models of an experiment answer the same question side by side. Nothing is loaded from or sent to
anywhere but this machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from qilin_med.chat.conversation import NOTICE, ChatModel, Turn, look_up
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


def serve(models: Models, name: str, retriever: Retriever | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. UserError: a model cannot be loaded, or the address is taken."""
    page = build_page(models, name, retriever)
    launch(page, host, port)
    print(f"http://{host}:{port} shows the page; Ctrl-C ends", flush=True)
    page.block_thread()


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Start serving in the background."""
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"the page cannot be served on {host}:{port} ({error}); choose another --port") from None


def build_page(models: Models, name: str, retriever: Retriever | None) -> gr.Blocks:
    """Starts with the model `name` on the right and the one before it on the left; both are loaded now."""
    names = list(models.folders)
    shown = [names[max(names.index(name) - 1, 0)], name]
    models.open(shown)

    def ask(question: str, left: str, right: str, turns: list[list[Turn]]) -> Iterator[tuple[Any, ...]]:
        try:
            for passages, note, told in _answer_both(models, retriever, question.strip(), [left, right], turns):
                yield "", *map(_messages, told), told, *_beside(passages, note)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def start_over() -> tuple[Any, ...]:
        return [], [], [[], []], *_beside((), "")

    with gr.Blocks(title="Qilin-Med", analytics_enabled=False) as page:
        gr.Markdown("# Qilin-Med")
        gr.Markdown(NOTICE, elem_id="notice")
        turns = gr.State([[], []])
        with gr.Row():
            (left, left_chat), (right, right_chat) = (_column(names, name) for name in shown)
        note = gr.Markdown(visible=False)
        question = gr.Textbox(show_label=False, placeholder="问题 / question", submit_btn=True, autofocus=True)
        with gr.Row():
            stop, new = (gr.Button(label, size="sm", min_width=120) for label in ("Stop", "New conversation"))
        with gr.Accordion("Passages", open=False, visible=retriever is not None) as fold:
            passages = gr.HTML()
        told = [left_chat, right_chat, turns, note, fold, passages]
        hidden = {"api_visibility": "private", "show_progress": "minimal"}
        asking = question.submit(ask, [question, left, right, turns], [question, *told], **hidden)
        stop.click(None, cancels=[asking])
        anew = [new.click, left_chat.clear, right_chat.clear, left.change, right.change]
        gr.on(anew, start_over, None, told, cancels=[asking], **hidden)
    return page


def _column(names: list[str], name: str) -> tuple[gr.Dropdown, gr.Chatbot]:
    with gr.Column(min_width=320):
        choice = gr.Dropdown(names, value=name, label="Model")
        chat = gr.Chatbot(
            show_label=False, height="min(420px, 40vh)", render_markdown=False, buttons=["copy"], placeholder="　"
        )
    return choice, chat


def _answer_both(
    models: Models, retriever: Retriever | None, question: str, names: list[str], turns: list[list[Turn]]
) -> Iterator[tuple[Sequence[Passage], str, list[list[Turn]]]]:
    """(passages, what did not fit, turns of both columns with the answers so far), again and again; nothing for no question."""
    if not question:
        return
    asked, opened = look_up(retriever, question), models.open(names)
    prompts = [model.prompt(earlier, asked) for model, earlier in zip(opened, turns, strict=True)]
    note = "; ".join(f"{name}: {prompt.note}" for name, prompt in zip(names, prompts, strict=True) if prompt.note)
    answers = ["", ""]
    with ExitStack() as stack:
        streams = (model.stream(prompt) for model, prompt in zip(opened, prompts, strict=True))
        for grown in zip_longest(*[stack.enter_context(closing(stream)) for stream in streams]):
            answers = [old if new is None else new for old, new in zip(answers, grown, strict=True)]
            yield (
                asked.passages,
                note,
                [[*earlier, (question, answer)] for earlier, answer in zip(turns, answers, strict=True)],
            )


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _beside(passages: Sequence[Passage], note: str) -> tuple[Any, ...]:
    """What stands below the columns: note, fold and its passages."""
    items = (f"<li>{escape(p.text)}<br><small>{escape(p.source)} · {escape(p.id)}</small></li>" for p in passages)
    label = f"Passages ({len(passages)})" if passages else "Passages"
    return gr.Markdown(note, visible=bool(note)), gr.Accordion(label), f"<ol class=passages>{''.join(items)}</ol>"
