"""A page on which two models of an experiment answer the same question side by side. Nothing is loaded from or sent to
anywhere but this machine; the conversation is kept by the browser."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from qilin_med.artifact import fingerprint_model
from qilin_med.chat.conversation import GREEDY, NOTICE, ChatModel, Manner, Turn, look_up, messages
from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError
from qilin_med.retrieve.retriever import Retriever

FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]  # of the reader's machine
CSS = """
#notice { border-left: 4px solid #d97706; padding: 2px 0 2px 12px; }
.gradio-container { overflow: clip !important; }
.form:has(#ask) { position: sticky; bottom: 0; z-index: 10; }
.passages li { margin: 0 0 10px 18px; list-style: decimal; }
.passages small { opacity: 0.65; overflow-wrap: anywhere; }
"""
# By the browser's language; zh serves zh-CN and zh-TW.
LABELS = gr.I18n(
    en={"model": "Model", "ask": "Your question", "stop_answer": "Stop", "anew": "New conversation", "export": "Export (JSON)",
        "examples": "Example questions", "manner": "System text and sampling", "system": "System text", "seed": "Seed",
        "temperature": "Temperature (0: greedy)", "top_p": "Top-p", "passages": "Passages"},
    zh={"model": "模型", "ask": "请输入问题", "stop_answer": "停止", "anew": "新对话", "export": "导出（JSON）",
        "examples": "示例问题", "manner": "系统提示与采样", "system": "系统提示", "seed": "随机种子",
        "temperature": "温度（0 为贪心解码）", "top_p": "Top-p", "passages": "检索到的资料"},
)  # fmt: skip
EXAMPLES = ["头痛、发热三天，应该怎么办？", "高血压患者饮食要注意什么？", "What are the symptoms of anaemia?"]
# In the browser, so that no copy of the conversation is left on this machine.
EXPORT = """(rounds) => {
    const file = new Blob([JSON.stringify(rounds, null, 2)], {type: "application/json"});
    Object.assign(document.createElement("a"), {href: URL.createObjectURL(file), download: "conversation.json"}).click();
}"""

Round: TypeAlias = dict[str, Any]
"""A question, both answers, and all that decided them; JSON, as the browser keeps and exports it."""


class Models:
    """The models of the page's two columns, each loaded once; no third one is in memory."""

    def __init__(
        self, experiment: Experiment, folders: dict[str, Path], max_new_tokens: int, retriever: Retriever | None
    ):
        """`folders`: by the names that can be chosen."""
        self.experiment, self.folders, self.max_new_tokens = experiment, folders, max_new_tokens
        self.retriever = retriever
        self._open: dict[str, ChatModel] = {}
        self.fingerprints: dict[str, str] = {}

    def open(self, names: Sequence[str]) -> list[ChatModel]:
        """UserError as `ChatModel`."""
        self._open = {name: model for name, model in self._open.items() if name in names}
        for name in names:
            if name not in self._open:
                self._open[name] = ChatModel(self.experiment, name, self.folders[name], self.max_new_tokens)
                self.fingerprints[name] = fingerprint_model(self.folders[name])
        return [self._open[name] for name in names]

    def ask(self, question: str, left: str, right: str, rounds: list[Round], *manner: Any) -> Iterator[tuple[Any, ...]]:
        """An empty box, and `update` with the answers so far, again and again."""
        try:
            if question := question.strip():
                for longer in self.answer([left, right], question, rounds, Manner(*manner)):
                    yield "", *update(longer)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def answer(self, names: list[str], question: str, rounds: list[Round], manner: Manner) -> Iterator[list[Round]]:
        """The rounds and one of this question with the answers so far, again and again."""
        opened = self.open(names)
        asked = look_up(self.retriever, question, opened, manner.system)
        prompts = [model.prompt(turns(rounds, side), asked, manner.system) for side, model in enumerate(opened)]
        this = {
            "run": self.experiment.name,
            "question": question,
            "answers": [{"model": name, "fingerprint": self.fingerprints[name], "text": ""} for name in names],
            **asdict(manner),
            "max_new_tokens": self.max_new_tokens,
            "note": "; ".join(f"{name}: {p.note}" for name, p in zip(names, prompts, strict=True) if p.note),
            "index": self.retriever and self.retriever.fingerprint,
            "passages": [{"text": p.text, "source": p.source, "id": p.id} for p in asked.passages],
        }
        with ExitStack() as stack:
            streams = [model.stream(prompt, manner) for model, prompt in zip(opened, prompts, strict=True)]
            for grown in zip_longest(*[stack.enter_context(closing(stream)) for stream in streams]):
                both = zip(this["answers"], grown, strict=True)
                this = {**this, "answers": [old if text is None else {**old, "text": text} for old, text in both]}
                yield [*rounds, this]


def turns(rounds: list[Round], side: int) -> list[Turn]:
    """What one of the two models was asked and has answered."""
    return [(made["question"], made["answers"][side]["text"]) for made in rounds]


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Start serving in the background. UserError: the address is taken."""
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], theme=theme, css=CSS, i18n=LABELS,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"the page cannot be served on {host}:{port} ({error}); choose another --port") from None


def update(rounds: list[Round]) -> tuple[Any, ...]:
    """What the page shows of them, in the order of its `outputs`."""
    note, found = (rounds[-1]["note"], rounds[-1]["passages"]) if rounds else ("", [])
    shown = ({key: escape(text) for key, text in passage.items()} for passage in found)
    items = ("<li>{text}<br><small>{source} · {id}</small></li>".format(**passage) for passage in shown)
    chats = [[asdict(message) for message in messages(turns(rounds, side))] for side in range(2)]
    told, fold = gr.Markdown(note, visible=bool(note)), gr.Accordion(f"{LABELS('passages')} ({len(found)})")
    return *chats, rounds, told, fold, f"<ol class=passages>{''.join(items)}</ol>"


def take_back(rounds: list[Round], temperature: float, seed: int) -> tuple[Any, ...]:
    """The last question is back in its box; the next seed."""
    return rounds[-1]["question"], seed + bool(temperature), *update(rounds[:-1])


def add_controls(manner: Manner) -> list[gr.components.Component]:
    """What `Manner` holds, in its order."""
    with gr.Accordion(LABELS("manner"), open=manner != GREEDY), gr.Row():
        return [
            gr.Textbox(manner.system, label=LABELS("system")),
            gr.Slider(0, 2, manner.temperature, step=0.05, label=LABELS("temperature")),
            gr.Slider(0.05, 1, manner.top_p, step=0.05, label=LABELS("top_p")),
            gr.Number(manner.seed, precision=0, label=LABELS("seed")),
        ]


def build_page(models: Models, name: str, manner: Manner = GREEDY) -> gr.Blocks:
    """Starts with the model `name` on the right and the one before it on the left, both loaded now, and with `manner`.

    UserError: one of them cannot be loaded."""
    names, run = list(models.folders), models.experiment.name
    shown = [names[max(names.index(name) - 1, 0)], name]
    models.open(shown)

    def restore(rounds: list[Round]) -> tuple[Any, ...]:
        """The last conversation of this browser, if its models are still there, with its settings."""
        kept = rounds if rounds and all(answer["model"] in names for answer in rounds[-1]["answers"]) else []
        last = kept[-1] if kept else {"answers": [{"model": name} for name in shown], **asdict(manner)}
        return *(answer["model"] for answer in last["answers"]), *(last[key] for key in asdict(manner)), *update(kept)

    with gr.Blocks(title=f"{run} · Qilin-Med", analytics_enabled=False) as page:
        gr.Markdown(f"# Qilin-Med · {escape(run)}")
        gr.Markdown(NOTICE, elem_id="notice")
        # With the library's random secret no conversation would outlive the server.
        place = Path(models.experiment.output_dir).resolve()
        kept = gr.BrowserState([], storage_key=f"Qilin-Med 1 {place}", secret="Qilin-Med")
        choices, chats = [], []
        with gr.Row():
            for chosen in shown:
                with gr.Column(min_width=320):
                    choices.append(gr.Dropdown(names, value=chosen, label=LABELS("model")))
                    chats.append(gr.Chatbot(show_label=False, height="min(420px, 40vh)", render_markdown=False,
                                            buttons=["copy"], placeholder="　"))  # fmt: skip
        note = gr.Markdown(visible=False)
        question = gr.Textbox(label=LABELS("ask"), placeholder=LABELS("ask"), show_label=False, submit_btn=True,
                              autofocus=True, elem_id="ask")  # fmt: skip
        with gr.Row():
            labels = map(LABELS, ("stop_answer", "anew", "export"))
            stop, new, export = (gr.Button(label, size="sm", min_width=90) for label in labels)
        gr.Examples(EXAMPLES, question, label=LABELS("examples"))
        controls = add_controls(manner)
        with gr.Accordion(LABELS("passages"), open=False, visible=models.retriever is not None) as fold:
            passages = gr.HTML()
        outputs = [*chats, kept, note, fold, passages]
        hidden = {"api_visibility": "private", "show_progress": "minimal"}
        page.load(restore, kept, [*choices, *controls, *outputs], **hidden)
        inputs = [question, *choices, kept, *controls]
        asking = question.submit(models.ask, inputs, [question, *outputs], **hidden)
        retries, (_, temperature, _, seed) = [chat.retry for chat in chats], controls
        back = gr.on(retries, take_back, [kept, temperature, seed], [question, seed, *outputs], **hidden)
        asking_again = back.then(models.ask, inputs, [question, *outputs], **hidden)
        stop.click(None, cancels=(running := [asking, asking_again]))
        export.click(None, kept, js=EXPORT, **hidden)
        anew = [new.click, *(chat.clear for chat in chats), *(choice.input for choice in choices)]
        gr.on(anew, lambda: update([]), None, outputs, cancels=running, **hidden)
    return page
