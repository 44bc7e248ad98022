"""Chat asks and answers as evaluation does, in the terminal, from a pipe and on the page, with tiny random models."""

import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise, zip_longest
from pathlib import Path

import pytest
import torch
from reading import write_rows
from tiny_models import write_model
from transformers import AutoModelForCausalLM

from qilin_med.artifact import fingerprint_model
from qilin_med.chat.conversation import GREEDY, NOTICE, ChatModel, Manner, look_up
from qilin_med.chat.terminal import talk
from qilin_med.config.experiment import Experiment, TaskSettings, load_experiment
from qilin_med.errors import UserError
from qilin_med.evaluate.harness import ModelUnderTest, Retrieval, run_task
from qilin_med.evaluate.results import existing_models, read_samples
from qilin_med.prompt.wording import plain_dialogue
from qilin_med.retrieve.index import build
from qilin_med.retrieve.retriever import Prompt, Retriever

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
QUESTIONS = ["发热三天怎么办", "头痛伴呕吐", "血压偏高可以吃辛辣吗"]
CORPUS = ["发热三天应当先量体温，再决定是否用药。", "头痛伴呕吐请到神经内科就诊。", "血压偏高建议低盐饮食，忌辛辣。"]
LENGTH = 24
POSITIONS = {"base": 512, "sft": 8192}
TURNS = [("发热", "量体温。"), ("咳嗽", "多饮水，请到呼吸科就诊。"), ("头痛", "请休息。")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, small_tokenizer) -> tuple[str, list[str]]:
    """An experiment file and overrides: a base, an sft stage, a corpus; no dpo stage was run."""
    folder = tmp_path_factory.mktemp("chat")
    write_model(folder / "base", small_tokenizer, 3, POSITIONS["base"])  # seeds of long greedy answers
    write_model(folder / "run/sft/merged", small_tokenizer, 4, POSITIONS["sft"])
    rows = [{"text": text, "id": f"书{number}"} for number, text in enumerate(CORPUS)]
    corpus = write_rows(folder / "corpus.jsonl", rows)
    overrides = [f"model.path={folder / 'base'}", f"output_dir={folder / 'run'}", f'retrieval.corpus=["{corpus}"]']
    return str(ROOT / "configs/demo.json"), overrides


@pytest.fixture(scope="module")
def experiment(settings) -> Experiment:
    experiment = load_experiment(*settings)
    build(experiment)
    return experiment


@pytest.fixture(scope="module")
def folders(experiment) -> dict[str, Path]:
    return {"base": Path(experiment.model.path), "sft": experiment.stage_folder("sft") / "merged"}


@pytest.fixture(scope="module")
def retriever(experiment) -> Retriever:
    return Retriever(experiment)


@pytest.fixture(scope="module", params=["base", "sft"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name, experiment, folders) -> ChatModel:
    return ChatModel(experiment, name, folders[name], LENGTH)


def whole(model: ChatModel, turns, asked: Prompt, manner: Manner = GREEDY) -> str:
    *_, answer = model.stream(model.prompt(turns, asked, manner.system), manner)
    return answer


def in_template(tokenizer, turns, question: str) -> list[int]:
    messages = [{"role": role, "content": text} for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids


@pytest.mark.parametrize("with_passages", [False, True])
def test_prompts_and_answers_are_evaluations(name, model, experiment, folders, retriever, with_passages, tmp_path):
    rows = [{"questions": [text], "answers": ["应当就诊。"]} for text in QUESTIONS]
    task = TaskSettings(test=[str(write_rows(tmp_path / "asked.jsonl", rows))], max_new_tokens=LENGTH)
    found = {text: retriever.contexts([text])[0] for text in QUESTIONS}
    retrieval = Retrieval(
        lambda asked, rooms: [(found[a.stem].text, found[a.stem].sources, found[a.stem].shortened) for a in asked],
        "index",
    )
    under_test = ModelUnderTest(experiment.model_copy(update={"output_dir": str(tmp_path)}), name, folders[name])
    run_task(under_test, "huatuo26m_generate", task, retrieval if with_passages else None)
    samples = list(read_samples(under_test.results / "huatuo26m_generate"))
    assert len(samples) == len(QUESTIONS)
    for sample, text in zip(samples, QUESTIONS, strict=True):
        asked = look_up(retriever if with_passages else None, text)
        assert bool(asked.passages) == with_passages and asked.sources == sample["sources"]
        assert model.prompt([], asked).ids == model.tokenizer(sample["prompt"]).input_ids
        assert whole(model, [], asked) == sample["output"] != ""


def test_an_answer_grows_to_what_the_model_generates_after_the_template(experiment, folders):
    chat = ChatModel(experiment, "sft", folders["sft"], 200)
    ids = in_template(chat.tokenizer, TURNS, QUESTIONS[0])
    prompt = chat.prompt(TURNS, Prompt(QUESTIONS[0], ()))
    assert (prompt.ids, prompt.note) == (ids, "")
    with torch.no_grad():
        generated = AutoModelForCausalLM.from_pretrained(folders["sft"]).generate(
            torch.tensor([ids]), max_new_tokens=200, do_sample=False
        )
    texts = list(chat.stream(prompt))
    assert texts[-1] == chat.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)
    assert len(set(texts)) > 10 and all(later.startswith(text) for text, later in pairwise(texts))


def test_plain_text_goes_on_after_a_blank_line_and_ends_at_one(experiment, folders):
    chat = ChatModel(experiment, "base", folders["base"], LENGTH)
    prompt = chat.prompt(TURNS[:1], Prompt("头痛", ()))
    assert prompt.ids == chat.tokenizer("发热\n量体温。\n\n头痛\n").input_ids
    assert prompt.until == "\n\n" and chat.prompt([], Prompt("头痛", ())).until is None


def test_the_system_text_stands_before_everything(name, model):
    prompt = model.prompt(TURNS[:1], Prompt("头痛", ()), " 你是医生。\n")
    if name == "base":
        assert prompt.ids == model.tokenizer("你是医生。\n\n发热\n量体温。\n\n头痛\n").input_ids
    else:
        written = "你是医生。<reserved_102>发热<reserved_103>量体温。</s><reserved_102>头痛<reserved_103>"
        assert model.tokenizer.decode(prompt.ids).replace(" ", "") == written
    assert model.prompt(TURNS[:1], Prompt("头痛", ()), " ") == model.prompt(TURNS[:1], Prompt("头痛", ()))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),  # squares
        (1.0, 0.9, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, expected):
    sampling = Manner(temperature=temperature, top_p=top_p).sampling(torch.device("cpu"))
    drawn = sampling(None, torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(40_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert shares.tolist() == pytest.approx(expected, abs=0.01)  # four standard errors of a share of a half
    assert expected[3] or not shares[3]


def test_a_seed_decides_an_answer_alone_or_beside_others(model):
    asked = Prompt("头痛", ())
    first, again, other = (whole(model, [], asked, Manner("", 1.0, 0.95, seed)) for seed in (1, 1, 2))
    assert first == again and len({first, other, whole(model, [], asked)}) == 3
    both = [model.stream(model.prompt([], asked), Manner("", 1.0, 0.95, seed)) for seed in (1, 2)]
    *_, last = zip_longest(*both)  # one may end earlier
    assert first in last or other in last
    assert whole(model, [], asked, Manner(seed=1)) == whole(model, [], asked, Manner(seed=2, top_p=0.5))
    for wrong in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UserError, match="expected 0 \\(greedy\\) or more"):
            Manner(**wrong)


def test_closing_an_answer_stops_the_model(experiment, folders):
    chat = ChatModel(experiment, "sft", folders["sft"], 8000)
    before = set(threading.enumerate())
    growing = chat.stream(chat.prompt([], Prompt("头痛", ())))
    next(growing)
    [generating] = set(threading.enumerate()) - before
    assert generating.is_alive()
    growing.close()
    assert not generating.is_alive()


def test_the_oldest_turns_go_first_and_it_is_said(name, experiment, folders, model):
    def own_prompt(turns) -> list[int]:
        if name == "base":
            return model.tokenizer(plain_dialogue(turns, question)).input_ids
        return in_template(model.tokenizer, turns, question)

    question = QUESTIONS[2] * 2
    for kept in range(3):
        expected = own_prompt(TURNS[3 - kept :])
        chat = ChatModel(experiment, name, folders[name], POSITIONS[name] - len(expected))
        prompt = chat.prompt(TURNS, Prompt(question, ()))
        assert (prompt.ids, prompt.note) == (expected, f"no room for the oldest turns, {3 - kept} left out")


def test_what_does_not_fit_is_said(experiment, folders, model):
    short = ChatModel(experiment, "sft", folders["sft"], 8192 - 20)
    cut = short.prompt([], Prompt("头痛" * 30, ()))
    assert len(cut.ids) == 20 and "was cut" in cut.note
    with pytest.raises(UserError, match="expected 1 to 8176"):
        ChatModel(experiment, "sft", folders["sft"], 8190)
    assert model.prompt([("发热", " ")], Prompt("头痛", ())).ids == model.prompt([], Prompt("头痛", ())).ids


def test_passages_make_room_for_a_question(name, experiment, folders, retriever):
    """Down from a window that holds both: the passage shrinks and goes, and the question stays whole."""
    question = QUESTIONS[0] * 3
    whole = ChatModel(experiment, name, folders[name], LENGTH)
    alone, both = (len(whole.prompt([], asked).ids) for asked in (Prompt(question, ()), look_up(retriever, question)))
    lengths = []
    for room in (both + 2, both, both - 2, alone):  # 2: tokens kept free for merges
        model = ChatModel(experiment, name, folders[name], POSITIONS[name] - room)
        asked = look_up(retriever, question, [model])
        prompt = model.prompt([], asked)
        assert len(prompt.ids) <= room and asked.text.endswith(question)
        assert prompt.note == ("no room for all passages that were found" if room <= both else "")
        lengths.append(sum(len(passage.text) for passage in asked.passages))
    assert lengths[0] > lengths[1] > lengths[2] > lengths[3] == 0


def test_models_that_cannot_be_asked_are_named(experiment, folders):
    assert existing_models(experiment, ["base", "sft"]) == folders
    with pytest.raises(UserError, match="unknown model 'dop'; this experiment has base, pretraining, sft, dpo"):
        existing_models(experiment, ["dop"])
    with pytest.raises(UserError, match="merged does not exist; run its stage first"):
        existing_models(experiment)


# ------------------------------------------------------------------------------------------------- terminal and pipe


def test_lines_are_one_conversation_until_it_starts_over(experiment, folders, monkeypatch, capsys):
    chat = ChatModel(experiment, "sft", folders["sft"], LENGTH)
    monkeypatch.setattr(sys, "stdin", io.StringIO("头痛\n\n再问\n<reserved_102>\n/new\n头痛\n/exit\n不问\n"))
    capsys.readouterr()  # what loading printed
    talk(chat, None)
    out, err = capsys.readouterr()
    first = whole(chat, [], Prompt("头痛", ()))
    second = whole(chat, [("头痛", first)], Prompt("再问", ()))
    assert out == f"{first}\n{second}\n{first}\n" and first != second
    assert err.splitlines() == [
        NOTICE, "error: this prompt cannot be used: contains a role mark", "(a new conversation)"
    ]  # fmt: skip


def command(settings, *arguments: str) -> list[str]:
    config, overrides = settings
    return [sys.executable, str(ROOT / "scripts/chat.py"), "--config", config, *arguments, *overrides]


def test_a_pipe_gets_the_answers_and_errors_are_one_line(settings, experiment, folders, retriever):
    manner = Manner("请简短回答。", 0.8, 0.9, 7)
    options = ["--system", manner.system, "--temperature", "0.8", "--top-p", "0.9", "--seed", "7"]
    arguments = command(settings, "--model", "sft", "--retrieval", "--max-new-tokens", str(LENGTH), *options)
    run = subprocess.run(arguments, input=QUESTIONS[0].encode(), capture_output=True, timeout=300)
    asked = look_up(retriever, QUESTIONS[0])
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode() == whole(ChatModel(experiment, "sft", folders["sft"], LENGTH), [], asked, manner) + "\n"
    # On a busy machine loading takes so long that the progress speaks up.
    told = [line for line in run.stderr.decode().splitlines() if not line.startswith("loading libraries")]
    assert told == [
        NOTICE, f"【1】{CORPUS[0]} (corpus.jsonl, 书0@0-{len(CORPUS[0])})",
        *(f"【{number}】{p.text} ({p.source}, {p.id})" for number, p in enumerate(asked.passages[1:], 2)),
    ]  # fmt: skip
    run = subprocess.run(command(settings), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stderr.startswith("error: dpo: ") and run.stderr.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(settings):
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        command(settings, "--model", "sft", "--max-new-tokens", "8000"), stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "dumb"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would inherit deafness
    )  # fmt: skip
    os.close(theirs)

    def read_until(is_enough, seconds: int = 200) -> str:
        read, deadline = b"", time.monotonic() + seconds
        while not is_enough(read.decode(errors="replace")):
            assert select.select([ours], [], [], max(deadline - time.monotonic(), 0))[0], read.decode(errors="replace")
            read += os.read(ours, 65536)
        return read.decode(errors="replace")

    try:
        started = read_until(lambda text: text.endswith("> "))
        assert NOTICE in started and "Ctrl-C stops an answer" in started
        os.write(ours, "头痛\n".encode())
        read_until(lambda text: len(text) > 40)
        run.send_signal(signal.SIGINT)
        read_until(lambda text: "(stopped)" in text and text.endswith("> "))
        os.write(ours, b"/new\n")
        read_until(lambda text: "(a new conversation)" in text and text.endswith("> "))
        os.write(ours, b"\x04")
        assert run.wait(120) == 0
    finally:
        run.kill()
        os.close(ours)


# -------------------------------------------------------------------------------------------------------------- page


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")
def test_the_page_keeps_two_answers_and_talks_to_no_one_else(experiment, folders, retriever):
    from playwright.sync_api import expect, sync_playwright

    from qilin_med.chat.page import EXAMPLES, Models, build_page, launch

    connected: set[str] = set()
    sys.addaudithook(lambda event, details: connected.add(str(details[1][0])) if event == "socket.connect" else None)
    asked = look_up(retriever, QUESTIONS[1])

    def answers(manner: Manner) -> list[str]:
        texts = (whole(ChatModel(experiment, name, folders[name], 12), [], asked, manner) for name in folders)
        return [" ".join(text.split()) for text in texts]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(Models(experiment, folders, 12, retriever), "sft")
    launch(page, "127.0.0.1", port)
    try:
        with pytest.raises(UserError, match="choose another --port"):
            launch(build_page(Models(experiment, folders, 12, None), "sft"), "127.0.0.1", port)
        with (
            sync_playwright() as playwright,
            playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
        ):
            shown = browser.new_page(viewport={"width": 390, "height": 700}, locale="en-GB")
            shown.set_default_timeout(60_000)
            expect.set_options(timeout=60_000)
            requests: list[str] = []
            shown.on("request", lambda request: requests.append(request.url))
            shown.goto(f"http://127.0.0.1:{port}")
            expect(shown.get_by_text(NOTICE)).to_be_visible()
            expect(shown).to_have_title(f"{experiment.name} · Qilin-Med")
            question, bots = shown.get_by_placeholder("Your question"), shown.locator(".bot.message")
            expect(question).to_be_in_viewport(ratio=1)
            shown.get_by_text(EXAMPLES[0]).click()
            expect(question).to_have_value(EXAMPLES[0])
            question.fill(QUESTIONS[1])
            question.press("Enter")
            expect(bots).to_have_text(answers(GREEDY))
            shown.get_by_text("System text and sampling").click()
            shown.get_by_label("System text").last.fill("请简短回答。")
            shown.get_by_label("number input for Temperature").fill("0.7")
            shown.get_by_label("number input for Temperature").press("Tab")
            shown.get_by_label("Retry").first.click()
            expect(bots).to_have_text(again := answers(Manner("请简短回答。", 0.7, 1.0, 43)))
            shown.reload()
            expect(bots).to_have_text(again)
            shown.get_by_text("System text and sampling").click()
            expect(shown.get_by_label("Seed")).to_have_value("43")
            shown.get_by_text(f"Passages ({len(asked.passages)})").click()
            expect(shown.get_by_text(CORPUS[1])).to_be_visible()
            with shown.expect_download() as download:
                shown.get_by_text("Export").click()
            shown.get_by_text("New conversation").click()
            expect(bots).to_have_count(0)
            chinese = browser.new_page(locale="zh-CN")
            chinese.goto(f"http://127.0.0.1:{port}")
            expect(chinese.get_by_placeholder("请输入问题")).to_be_visible()
            [made] = json.loads(download.value.path().read_text(encoding="utf-8"))
    finally:
        page.close()
    assert requests and all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url in requests)
    assert connected <= {"127.0.0.1", "/"}
    assert [" ".join(answer.pop("text").split()) for answer in made["answers"]] == again
    assert made["answers"] == [{"model": n, "fingerprint": fingerprint_model(folders[n])} for n in folders]
    assert [passage["id"] for passage in made["passages"]] == asked.sources
    facts = {"question": QUESTIONS[1], "system": "请简短回答。", "temperature": 0.7, "top_p": 1, "seed": 43,
             "max_new_tokens": 12, "run": experiment.name, "index": retriever.fingerprint, "note": ""}  # fmt: skip
    assert {key: made[key] for key in facts} == facts
