"""The report and the model cards of a small run with numbers known by hand."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import ModelCard

from qilin_med.artifact import MANIFEST, Artifact, commit_folder, fingerprint_model, verify_folder
from qilin_med.config.experiment import Experiment, load_experiment
from qilin_med.config.paper import EXPERIMENT_FILE, SCORES, STATED, differences
from qilin_med.evaluate.results import model_folders
from qilin_med.evaluate.results import write_result as publish_result
from qilin_med.report import samples, tables
from qilin_med.report.collect import Run, collect_run
from qilin_med.report.figures import BUCKETS, draw_curves, gather
from qilin_med.report.pages import write_cards, write_report
from qilin_med.report.samples import draw_questions
from qilin_med.report.tables import (
    markdown_table,
    notes,
    panels,
    paper_dots,
    paper_tables,
    score_table,
    verdict,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = '<script>alert("1")</script>|`*_[x](y)\n# 甲'


def write(path: Path, contents: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")


def measure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def write_result(run: Path, model: str, name: str, metrics: dict, fingerprint: str, **changes: object) -> None:
    inputs = {
        "task": "cmexam_options", "shots": 0, "chat": model == "sft", "retrieval": None,
        "model": {"name": model, "fingerprint": fingerprint},
    } | changes  # fmt: skip
    scores = {
        "counts": {"questions": 434, "without_gold": 2}, "metrics": metrics,
        "by_facet": {"Difficulty level": {HOSTILE: {**measure(0.5), "questions": 7}}},
    }  # fmt: skip
    sample = {
        "id": "a:1", "question": HOSTILE, "prompt": HOSTILE, "output": [["甲", -1.0], [HOSTILE, -0.5]], "answer": "B",
        "gold": "B", "score": {"accuracy": 1}, "sources": ["corpus#7@0-9"] if "retrieval" in changes else [],
        "facets": {"Difficulty level": HOSTILE},
    }  # fmt: skip
    other = {"id": "a:2", "answer": "A", "score": {"accuracy": 0}, "facets": {}} if model == "base" else {"id": "a:2"}
    publish_result(Artifact(run / "eval" / model / name, inputs), scores, [sample, sample | other])


def compared(task: str, first: str, second: str, metric: str, **values: object) -> dict:
    return {"task": task, "first": first, "second": second, "questions": 432, "metrics": {metric: values}}


@pytest.fixture
def run(tmp_path) -> Run:
    """Base, CPT, and SFT with and without retrieval; DPO was not run."""
    folder = tmp_path / "run"
    overrides = [f"output_dir={folder}", f"model.path={tmp_path / 'base'}"]
    experiment = load_experiment(ROOT / "configs/demo.json", overrides)
    prints = {"base": "f" * 64} | {stage: publish(experiment, stage) for stage in ("pretraining", "sft")}
    for model, accuracy in (("base", 0.24), ("pretraining", 0.489), ("sft", 0.581)):
        write_result(folder, model, "exam", {"accuracy": measure(accuracy)}, prints[model])
    write_result(folder, "sft", "exam_retrieval", {"accuracy": measure(0.6)}, prints["sft"], retrieval="r" * 64)
    subjects = {"average": measure(0.25), "physician": measure(0.5), "accuracy": measure(0.3)}
    for name, known in (("ceval", "C-Eval test"), ("ceval_val", "C-Eval val"), ("ceval_letters", None)):
        write_result(folder, "sft", name, subjects, prints["sft"], task="ceval_letters", shots=5, known_as=known)
    names = ("bleu1", "bleu4", "rouge1", "rouge2", "rougeL")
    texts = {f"{name}_{unit}": measure(1.5) for name in names for unit in ("char", "word")}
    texts |= {f"{name}_published": measure(2.5) for name in names}
    write_result(
        folder, "sft", "told", texts, prints["sft"], task="cmexam_reasoning", answers="text", known_as="CMExam test"
    )
    for model, perplexity, share in (("base", 3.0, 0.54), ("pretraining", 12.5, 0.32)):
        measures = {
            "perplexity general": {"value": perplexity},
            "preference accuracy": {"value": share, "standard_error": 0.035},
        }
        inputs = {"model": {"fingerprint": prints[model]}}
        publish_result(Artifact(folder / "eval" / model / "heldout", inputs), {"measures": measures})
    mcnemar = {"test": "McNemar, exact", "gained": 60, "lost": 20}
    asked = {"unparsed": 0, "favourite": {}}
    ways = {
        "letters, plain": {"accuracy": measure(0.5), "flips": 0.0, "ece": 0.125, "bins": [], **asked},
        "generate, plain": {"accuracy": measure(0.3), "flips": 0.4, **asked},
    }  # fmt: skip
    places = {"A": {"right": 0.2, "chosen": 0.7}, "B": {"right": 0.8, "chosen": 0.3}}
    write(
        folder / "eval/sft/protocols/ways.json",
        {"questions": 200, "ways": ways, "spread": 0.2, "flips": 0.4, "places": places},
    )
    write(folder / "eval/comparisons.json", [
        compared("exam", "pretraining", "sft", "accuracy", difference=0.092, p=0.0004, **mcnemar),
        compared("exam_retrieval", "sft", "sft with retrieval", "accuracy", difference=0.019, p=0.31, **mcnemar),
        compared("heldout", "base", "pretraining", "preference accuracy", difference=-0.22, p=0.00001, **mcnemar),
    ])  # fmt: skip
    return collect_run(experiment)


def rows_of(page: Path) -> list[list[str]]:
    """Cells of all tables of the report."""
    lines = page.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def publish(experiment: Experiment, stage: str) -> str:
    """A merged folder with what a stage says of itself; returns its fingerprint."""
    folder = model_folders(experiment)[stage]
    temporary = folder.with_name(".part")
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(stage.encode())
    read = {"records": 1200, "used": 1195}
    # The words of an earlier version are still read.
    skipped, steps = ("skipped", "optimizer_steps") if stage == "sft" else ("set_aside", "updates")
    counts = {
        **read, skipped: {HOSTILE: 5}, "rows": 300, "tokens": 9000, "trained_tokens": 8000,
        "files": [{**read, "path": "a.jsonl", skipped: 5, "sha256": "ab" * 32}],
    }  # fmt: skip
    manifest = {
        "experiment": experiment.model_dump(mode="json"), "parent": {"folder": "base", "fingerprint": "f" * 64},
        "data": {"fingerprint": "d" * 64, "counts": counts}, "ranks": 2, steps: 10, "versions": {"torch": "2"},
        "created": "2026-11-22 10:00:00 +0000", "commit": "c" * 40,
    }  # fmt: skip
    if stage == "sft":
        manifest["trained"] = {"samples": 80, "tokens": 2400, "loss_tokens": 2100, "epochs": 80 / 300}
        manifest["overrides"] = ["sft.max_steps=10"]
    metrics = [{"step": n, "loss": 1 / n, "learning_rate": 1e-4, "tokens": 100, "seconds": 0.5} for n in range(1, 11)]
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    fingerprint = commit_folder(temporary, MANIFEST, manifest)["fingerprint"]
    temporary.rename(folder)
    return fingerprint


# ------------------------------------------------------------------------------------------------------ contents


def test_what_the_way_of_asking_decides(run):
    [told] = tables.protocol_notes(run.protocols["ways"])
    assert told.startswith(
        "SFT: 20.0 points from the lowest to the highest score on the same 200 questions; 40% of the answers"
    )
    assert told.endswith("A is chosen in 70% of the answers and right in 20%")
    assert [list(row.values()) for row in tables.protocol_table(run.protocols["ways"])] == [
        ["letters, plain", "50.0 [45.0, 55.0]", "0.0", "0.125"], ["generate, plain", "30.0 [25.0, 35.0]", "40.0", ""],
    ]  # fmt: skip


def test_the_picture_and_the_verdict_say_what_changed_by_how_much_and_how_sure(run):
    shown = {panel.title: panel for panel in panels(run)}
    exam, preferences = shown["exam by options"], shown["preference accuracy"]
    assert exam.words == "432 questions; not known as a published set"
    assert [(dot.label, *(round(number, 9) for number in dot[1:4]), *dot[4:]) for dot in exam.dots] == [
        ("base", 24.0, 19.0, 29.0, "", 0), ("CPT", 48.9, 43.9, 53.9, "", 0), ("SFT", 58.1, 53.1, 63.1, "+9.2, p = 0.0004", 0),
        ("SFT + retrieval", 60.0, 55.0, 65.0, "+1.9, p = 0.31", 1),
    ]  # fmt: skip
    assert preferences.dots[1] == ("CPT", 0.32, 0.32 - 1.96 * 0.035, 0.32 + 1.96 * 0.035, "-0.220, p < 0.0001", 0)
    assert verdict(run) == "Against base, SFT is better on exam by options (24.0 → 58.1 % right)."
    exam_of_sft = next(r for r in run.results if (r.model, r.name) == ("sft", "exam"))
    exam_of_sft.contents["metrics"]["accuracy"]["low"] = 0.28  # base reaches up to 29
    assert verdict(run) == "Against base, SFT is not clearly different on exam by options (24.0 → 58.1 % right)."
    for perplexity, side in ((12.5, "worse"), (3.1, "not clearly different"), (2.8, "better")):
        run.held_out["sft"] = {"measures": {"perplexity general": {"value": perplexity}}}
        assert f"{side} on perplexity general (3.00 → {perplexity:.2f})" in verdict(run).replace(
            "exam by options (24.0 → 58.1 % right), ", ""
        )


def test_what_changed_is_a_table_of_the_headlines(run):
    rows = rows_of(write_report(run, "c.json", []))
    exact = ["60 / 20", "McNemar, exact"]
    assert rows.count(["exam by options", "accuracy", "CPT → SFT", "+9.2", *exact, "0.0004", "432"]) == 1
    assert ["exam by options", "accuracy", "SFT → SFT + retrieval", "+1.9", *exact, "0.31", "432"] in rows
    assert ["held out", "preference accuracy", "base → CPT", "-22.0", *exact, "1e-05", "432"] in rows


def test_what_was_skipped_cut_or_unread_stands_beside_the_score(run):
    base, cpt, sft = (result for result in run.results if result.name == "exam")
    base.contents["counts"] |= {"questions": 1, "without_gold": 0, "skipped": {"no answer": 1412}, "unparsed": 7}
    sft.contents["counts"]["favourite"] = {"letter": "A", "share": 0.93}
    cpt.contents["counts"]["favourite"] = {"letter": "A", "share": 0.89}
    assert notes([base, cpt, sft]) == [
        "base: 1,412 of 1,413 questions skipped: no answer", "base: 7 answers name no option and count as wrong",
        "CPT, SFT: 2 questions without a known answer left out", "SFT: answers A to 93% of the questions",
    ]  # fmt: skip
    assert notes([cpt]) == ["2 questions without a known answer left out"]
    page = write_report(run, "c.json", []).read_text(encoding="utf-8")
    assert "<p>base: 1,412 of 1,413 questions skipped: no answer</p>" in page


def test_only_published_sets_stand_beside_the_papers_figures(run):
    tables = dict(paper_tables(run))
    titles = [f"The paper's {title}" for title, _ in (SCORES["ceval"], SCORES["cmexam"])]
    assert list(tables) == [*titles, "C-Eval val, of which the paper reports nothing"]  # none for Huatuo-26M
    ceval, cmexam, val = tables.values()
    for (_, published), rows in zip((SCORES["ceval"], SCORES["cmexam"]), (ceval, cmexam), strict=True):
        assert rows[:-1] == [{**row, "protocol": "published"} for row in published]
    assert [row["model"] for row in ceval if row["average"] == "25.0 [20.0, 30.0]"] == ["ours: SFT"]
    assert (ceval[-1]["physician"], ceval[-1]["basic medicine"]) == ("50.0 [45.0, 55.0]", "")
    assert ceval[-1]["protocol"].startswith("C-Eval test by letters; 432 questions; 5 examples; chat template")
    assert cmexam[-1]["BLEU-1"] == "2.5 [2.5, 2.5]" and not cmexam[-1]["accuracy"]  # as published, not on characters
    assert len(val) == 1 and val[0]["protocol"].startswith("C-Eval val by letters")
    columns = dict(paper_dots(ceval))
    assert list(columns) == ["average", "physician"] and columns["average"][-1][:4] == ("SFT", 25.0, 20.0, 30.0)
    assert (columns["average"][0].label, columns["average"][0].value) == ("ChatGLM-6B", 38.0)
    run.results[:] = [result for result in run.results if result.name.startswith("exam")]
    assert "None of this run's sets" in write_report(run, "c.json", []).with_suffix(".md").read_text(encoding="utf-8")


def test_sets_have_human_names_and_the_demos_are_called_invented(run, tmp_path):
    named = {result.name: (result.title, result.origin) for result in run.results if result.model == "sft"}
    assert named["ceval_letters"] == ("exam in subjects by letters", "not known as a published set")
    assert named["told"] == ("CMExam test as text", "CMExam test")
    columns = list(score_table(panels(run))[2])  # of SFT
    assert columns[:3] == ["model", "exam by options, % right", "C-Eval test by letters, % right, mean of subjects"]
    write(tmp_path / "demo/manifest.json", {"planted": {}})
    files = {"test": {str(tmp_path / "demo/raw/exams/test.csv"): "0" * 64}}
    write_result(tmp_path / "run", "base", "world", {"accuracy": measure(0.2)}, "f" * 64, files=files)
    again = collect_run(run.experiment)
    assert not run.is_invented and again.is_invented
    page = write_report(again, "c.json", [])
    assert "432 questions; invented" in page.read_text(encoding="utf-8")
    assert "**Invented: " in page.with_suffix(".md").read_text(encoding="utf-8")


def test_paper_settings_are_those_of_the_papers_experiment_file():
    paper = load_experiment(EXPERIMENT_FILE)
    assert differences(paper.model_dump(mode="json")) == []
    changed = load_experiment(EXPERIMENT_FILE, ["sft.lora.rank=16", "dpo.beta=0.2", "pretraining=null", "name=x"])
    assert differences(changed.model_dump(mode="json")) == [
        ("pretraining", "trained", "left out", True),
        ("sft.lora.rank", 8, 16, True),
        ("dpo.beta", 0.1, 0.2, False),
    ]
    alone = load_experiment(EXPERIMENT_FILE, ["dpo.global_batch_size=null", "sft.packing=true"]).model_dump(mode="json")
    key = "dpo.global_batch_size"
    assert differences(alone, {"dpo": 8}) == []  # 4 pairs a GPU
    assert differences(alone, {"dpo": 16}) == [(key, 32, 64, True)]
    assert differences(alone) == [(key, 32, "4 x GPUs", True)]
    assert [STATED[f"{stage}.global_batch_size"] for stage in ("pretraining", "sft", "dpo")] == [8, 512, 32]
    assert STATED["pretraining.learning_rate"] == 2e-4 and STATED["dpo.lora.alpha"] == 16
    other = load_experiment(ROOT / "configs/demo.json", ["pretraining.block_size=128", "dpo.epochs=3"])
    stated = {key: (ours, says) for key, _, ours, says in differences(other.model_dump(mode="json"))}
    assert stated["pretraining.block_size"] == (128, True) and stated["dpo.epochs"] == (3.0, False)


def test_a_corpus_is_set_beside_the_papers_tables(run):
    source = {
        "stage": "pretraining", "name": "CMExam", "rows": 70000, "rows_skipped": {"x": 3}, "rejected": {},
        "duplicates": {}, "train": 60000, "dev": 1000, "tokens": 5, "bytes": 2_500_000,
    }  # fmt: skip
    rows = rows_of(write_report(replace(run, corpus={"name": "ChiMed", "sources": [source]}), "c.json", []))
    assert ["CMExam", "70,000", "3", "0", "0", "61,000", "5", "2.5", "61K", "23M", "49.3"] in rows


def test_the_report_says_what_each_stage_read(run):
    rows = rows_of(write_report(run, "c.json", []))
    trained = {"CPT": ["", "", ""], "SFT": ["2,400", "2,100", "0.267"]}  # an earlier version did not say
    for stage in ("CPT", "SFT"):
        assert [stage, "1,200", "1,195", "5", "300", "9,000", "0", "0", "10", *trained[stage], "2"] in rows
        assert [stage, "a.jsonl", "1,200", "1,195", "5", "abababababab"] in rows


def test_curves_keep_every_value_within_their_bounds():
    rows = [{"step": n, "loss": float(n % 2)} for n in range(1, 1001)]
    line = gather(rows, "loss")
    assert len(line) <= BUCKETS and math.isclose(line[0][1], 5 / 9) and line[0][2:] == (0.0, 1.0)
    assert [title for title, _ in draw_curves(rows)] == ["Loss, nats per token"]
    assert draw_curves([{"step": 1, "loss": math.nan}]) == []
    [(_, svg)] = draw_curves([{"step": n, "loss": 2 + 1 / n} for n in range(1, 100)])
    assert svg == draw_curves([{"step": n, "loss": 2 + 1 / n} for n in range(1, 100)])[0][1] and "var(--line0)" in svg
    assert ">2.00<" not in svg and ">0<" not in svg.split("optimizer step")[1]  # the loss axis begins near its values


def test_questions_are_drawn_by_their_ids_alone():
    answered = [{str(n): None for n in range(20)}, {str(n): None for n in range(5, 25)}]
    drawn = draw_questions(answered)
    assert drawn == draw_questions(answered[::-1]) and all(5 <= int(question) < 20 for question in drawn)
    assert draw_questions([]) == []


def test_a_result_of_an_older_model_is_named(run):
    assert run.outdated == []
    run.manifests["sft"]["fingerprint"] = "0" * 64
    assert run.outdated == [
        f"sft {name}" for name in ("ceval", "ceval_letters", "ceval_val", "exam", "told", "exam_retrieval")
    ]


# --------------------------------------------------------------------------------------------------------- pages


def test_text_from_data_stays_text(run):
    run.results[0].contents["by_facet"] = {HOSTILE: {"## b": {**measure(0.5), "questions": 7}}}
    page = write_report(run, "c.json", ["name=```"])
    html, markdown = page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")
    ours = ['<script type="text/plain" class="samples"', "<script>\n//"]
    assert (
        html.count("<script") == sum(map(html.count, ours))
        and "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;|`*_[x](y)<br># 甲" in html
    )
    assert "<script" not in markdown and "\n# 甲" not in markdown and html.count("<h2") == 9
    read = html.partition("<script")[0].replace("|`*_[x](y)", "")
    assert "### " not in read and "**" not in read and "| " not in read  # all of it was read
    links = [link.split('"')[0] for link in html.split('<a href="')[1:]]
    files = [page.parent / unquote(link) for link in links if link.startswith("report/tables/")]
    assert len(files) + html.count("<h2") + 1 == len(links) and all(file.is_file() for file in files)
    row = markdown_table([{"a": "x|y\nz<b>", "n": 1234}]).splitlines()[2]
    assert row == "| x\\|y<br>z&lt;b> | 1,234 |"
    assert markdown_table([{"a": "x\u2028y\r\n\\|"}]).splitlines()[2] == "| x<br>y<br>\\\\\\| |"


def test_a_card_says_what_the_run_says(run, tmp_path):
    """Base, data, language and training: of the run; names of data sets from its corpus, if it was built."""
    texts = {
        "cpt.txt": "高血压患者应当低盐饮食。",
        "sft.jsonl": json.dumps({"question": "what is it", "answer": "the flu of this year"}),
    }
    for (name, text), stage in zip(texts.items(), run.manifests, strict=True):
        (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")
        run.settings[stage] |= {"data": [{"path": str(tmp_path / name)}]}
    list(write_cards(replace(run, corpus=None)))  # that of a demo built here, if any
    data = {stage: ModelCard.load(run.models[stage] / "README.md").data for stage in run.manifests}
    assert (data["pretraining"].language, data["pretraining"].datasets) == (["zh"], ["cpt"])
    assert (data["sft"].language, data["sft"].datasets, data["sft"].base_model) == (
        ["zh", "en"],
        ["cpt", "sft"],
        "base",
    )
    assert data["sft"].model_name == "demo-sft"
    text = (run.models["sft"] / "README.md").read_text(encoding="utf-8")
    assert "base, trained further for medicine by continued pre-training of all parameters, then supervised" in text
    row = ["SFT", "1,200", "1,195", "9,000", "10", "2,400", "2,100", "0.267"]
    assert row in rows_of(run.models["sft"] / "README.md")
    assert ["overrides on the command line", "sft.max_steps=10"] in rows_of(run.models["sft"] / "README.md")
    run.manifests["pretraining"]["parent"]["folder"] = "models/Baichuan-7B"
    other = replace(run, corpus={"sources": [{"name": "CMExam", "stage": "sft"}, {"name": "x", "stage": "dpo"}]})
    list(write_cards(other))
    data = ModelCard.load(run.models["sft"] / "README.md").data
    assert (data.base_model, data.datasets) == ("baichuan-inc/Baichuan-7B", ["CMExam"])


def test_cards_leave_manifest_and_fingerprint_alone(run):
    before = {stage: fingerprint_model(run.models[stage]) for stage in run.manifests}
    assert len(list(write_cards(run))) == 2
    card = run.models["sft"] / "README.md"
    data = ModelCard.load(card).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} >= {("exam", "accuracy", 58.1)}
    assert before["sft"] in card.read_text(encoding="utf-8") and "58.1 [53.1, 63.1]" in card.read_text(encoding="utf-8")
    assert {stage: fingerprint_model(run.models[stage]) for stage in run.manifests} == before
    assert verify_folder(run.models["sft"])["fingerprint"] == before["sft"]
    card.write_text("mine")
    assert any("kept" in line for line in write_cards(run)) and card.read_text() == "mine"


def test_tables_are_there_as_csv_and_latex(run):
    folder = write_report(run, "c.json", []).parent / "report/tables"
    with (folder / "exam-by-options-all-metrics-to-100.csv").open(encoding="utf-8") as file:
        accuracy, questions, _ = csv.DictReader(file)
    assert (accuracy["base"], accuracy["base low"], accuracy["base high"]) == ("24.0", "19.0", "29.0")
    assert questions["SFT"] == "432"
    latex = (folder / "exam-by-options-accuracy-by-difficulty-level.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex and r"\_[x](y)" in latex and "50.0 [45.0, 55.0]" in latex
    with (folder / "what-each-stage-read.csv").open(encoding="utf-8") as file:
        assert next(csv.DictReader(file))["records"] == "1200"


@pytest.fixture
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        yield playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)


def test_the_page_opens_alone_and_fits_a_phone_and_paper(run, browser):
    page = write_report(run, "c.json", [])
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    messages, requests = [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    folded = tab.locator("details table").first
    assert not folded.evaluate("table => table.checkVisibility()")
    tab.emulate_media(media="print")
    assert folded.evaluate("table => table.checkVisibility()")
    tab.emulate_media(media="screen")
    tab.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    wide, shown = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    smallest = tab.evaluate("""Math.min(...[...document.querySelectorAll("body *")].map(element => {
        const picture = element.closest("svg"), scale = picture ? picture.getBoundingClientRect().width / 350 : 1;
        return parseFloat(getComputedStyle(element).fontSize) * scale }))""")
    assert requests == [page.as_uri()] and not messages
    assert wide <= shown == 390 and smallest >= 12
    assert tab.locator("table").count() >= 12 and tab.locator("svg").count() >= 12


@pytest.mark.parametrize("in_one_file", [20_000, 3])
def test_the_browser_of_samples_filters_and_shows_text_as_text(run, browser, monkeypatch, in_one_file):
    monkeypatch.setattr(samples, "IN_ONE_FILE", in_one_file)
    page = write_report(run, "c.json", [])
    tab = browser.new_page()
    tab.goto(page.as_uri())
    choose = {
        label: tab.get_by_label(label, exact=True)
        for label in ("set", "model", "answer", "against another model", "facet")
    }
    count = tab.get_by_role("status")
    sets = choose["set"].locator("option").all_text_contents()
    if in_one_file == 3:  # four answers a question: each question has a file of its own
        assert sets[:2] == ["exam by options, questions 1 to 1", "exam by options, questions 2 to 2"]
        assert len(list((page.parent / "report/samples").iterdir())) == len(sets)
        choose["set"].select_option(sets[1])
    whole = 2 if in_one_file > 3 else 1
    count.filter(has_text=f"{whole} of {whole} questions").wait_for()
    choose["model"].select_option("base")
    choose["answer"].select_option("wrong")
    count.filter(has_text=f"1 of {whole} questions").wait_for()
    choose["answer"].select_option("any")
    choose["model"].select_option("SFT + retrieval")
    choose["against another model"].select_option("right where base is wrong")
    count.filter(has_text=f"1 of {whole} questions").wait_for()
    tab.locator(".browser summary").first.click()
    shown = tab.locator(".browser details").first
    assert HOSTILE in shown.locator(".text").first.inner_text() and "passages: corpus#7@0-9" in shown.inner_text()
    assert shown.locator("td.number").nth(1).inner_text() == "37.8%" == f"{1 / (1 + 2.718281828**0.5):.1%}"
    choose["against another model"].select_option("wrong where base is right")
    count.filter(has_text=f"0 of {whole} questions").wait_for()


def test_scripts_tell_what_is_missing_and_print_differences(tmp_path):
    command = [sys.executable, "scripts/report.py", "--config", "configs/demo.json", f"output_dir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode != 0 and "no finished stage and no results" in ended.stderr
    assert "Traceback" not in ended.stderr
    command = [sys.executable, "scripts/paper_diff.py", "configs/qilin_med_7b.json", "--gpus", "8"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "no setting differs from the paper's\n"
    overrides = ["dpo.global_batch_size=null", "dpo.batch_size_per_device=8"]
    said = subprocess.check_output([*command, *overrides], cwd=ROOT, text=True).splitlines()
    assert [cell.strip() for cell in said[2].split("|")[1:5]] == ["dpo.global_batch_size", "32", "64", "the paper"]
    assert len(said) == 3


# ---------------------------------------------------------------------------------------------------- several runs


def test_runs_are_compared_with_the_first_and_seeds_have_their_spread(tmp_path):
    def make(name: str, right: int, *overrides: str, asked: range = range(20)) -> None:
        folder = tmp_path / name
        experiment = load_experiment(
            ROOT / "configs/demo.json", [f"output_dir={folder}", "model.path=base", *overrides]
        )
        write(folder / "config.json", experiment.model_dump(mode="json"))
        stages = [stage for stage in ("pretraining", "sft") if getattr(experiment, stage)]
        prints = {"base": "f" * 64} | {stage: publish(experiment, stage) for stage in stages}
        inputs = {"task": "exam_options", "shots": 0, "chat": False, "retrieval": None}
        for model, known in (("base", 1), ("sft", right)):
            samples = [{"id": str(n), "gold": "A", "answer": "AB"[n >= known], "score": {"accuracy": int(n < known)},
                        "prompt": "", "output": "", "sources": []} for n in asked]  # fmt: skip
            scores = {"counts": {"questions": 20, "without_gold": 0, "unparsed": known}, "by_facet": {},
                      "metrics": {"accuracy": measure(known / 20)}}  # fmt: skip
            made_of = inputs | {"model": {"name": model, "fingerprint": prints[model] if model == "base" else name}}
            publish_result(Artifact(folder / "eval" / model / "exam", made_of), scores, samples)

    make("whole", 12)
    make("seed2", 14, "seed=2")
    make("without_cpt", 3, "pretraining=null", asked=range(2, 20))
    command = [sys.executable, "scripts/compare.py", *(str(tmp_path / n) for n in ("whole", "seed2", "without_cpt"))]
    subprocess.run([*command, "--out", str(tmp_path / "all")], cwd=ROOT, check=True, capture_output=True)
    rows = rows_of(tmp_path / "all/report.html")
    scores = ["60.0 [55.0, 65.0]", "70.0 [65.0, 75.0]", "15.0 [10.0, 20.0]"]
    assert rows[0] == ["set and model", "whole", "seed2", "without_cpt"]
    assert ["exam by options, SFT, % right", *scores] in rows
    assert ["exam by options, SFT", "+10.0, p = 0.5", "-50.0, p = 0.0039"] in rows
    assert ["exam by options, SFT", "whole, seed2", "2", "65.0", "7.1", "60.0", "70.0"] in rows  # (70 - 60) / sqrt(2)
    html = (tmp_path / "all/report.html").read_text(encoding="utf-8")
    assert "<p>without_cpt: compared on 18 questions that the first run was asked, too</p>" in html
    assert not any("base" in row for row in rows)  # one and the same model in all
    assert ["seed2", "seed", "42 -> 2"] in rows and ["without_cpt", "pretraining", "trained -> left out"] in rows
    (tmp_path / "none").mkdir()
    ended = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "config.json: not found" in ended.stderr
