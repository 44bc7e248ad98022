"""The report and the model cards of a small run with numbers known by hand."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from qilin_med.artifact import MANIFEST, Artifact, commit_folder, fingerprint_model, verify_folder
from qilin_med.config.experiment import Experiment, load_experiment
from qilin_med.config.paper import EXPERIMENT_FILE, SCORES, STATED, differences
from qilin_med.evaluate.results import model_folders
from qilin_med.evaluate.results import write_result as publish_result
from qilin_med.report.collect import Run, collect_run
from qilin_med.report.curves import BUCKETS, draw_curves, gather, ticks
from qilin_med.report.pages import write_cards, write_report
from qilin_med.report.tables import describe_held_out, describe_result, draw_questions, markdown_table, paper_tables

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
        "id": "a:1", "question": HOSTILE, "prompt": "", "output": [["甲", -1.0], [HOSTILE, -0.5]], "answer": "B",
        "gold": "B", "score": {"accuracy": 1}, "sources": ["corpus#7@0-9"] if "retrieval" in changes else [],
    }  # fmt: skip
    publish_result(Artifact(run / "eval" / model / name, inputs), scores, [sample])


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
    write_result(folder, "sft", "ceval", subjects, prints["sft"], task="ceval_letters", shots=5)
    names = ("bleu1", "bleu4", "rouge1", "rouge2", "rougeL")
    texts = {f"{name}_{unit}": measure(1.5) for name in names for unit in ("char", "word")}
    write_result(folder, "sft", "told", texts, prints["sft"], task="cmexam_reasoning")
    for model, perplexity, share in (("base", 3.0, 0.54), ("pretraining", 12.5, 0.32)):
        measures = {
            "perplexity general": {"value": perplexity},
            "preference accuracy": {"value": share, "standard_error": 0.035},
        }
        inputs = {"model": {"fingerprint": prints[model]}}
        publish_result(Artifact(folder / "eval" / model / "heldout", inputs), {"measures": measures})
    mcnemar = {"test": "McNemar, exact", "gained": 60, "lost": 20}
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
    metrics = [{"step": n, "loss": 1 / n, "learning_rate": 1e-4, "tokens": 100, "seconds": 0.5} for n in range(1, 11)]
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    fingerprint = commit_folder(temporary, MANIFEST, manifest)["fingerprint"]
    temporary.rename(folder)
    return fingerprint


# ------------------------------------------------------------------------------------------------------ contents


def test_sentences_say_what_changed_by_how_much_and_how_sure(run):
    said = {(r.model, r.name): describe_result(run, r) for r in run.results}
    assert said["sft", "exam"] == (
        "SFT answers 58.1% of 432 questions of exam right [53.1, 63.1], 9.2 points more than CPT (McNemar p = 0.0004)."
    )
    assert said["sft", "exam_retrieval"] == (
        "SFT with retrieval answers 60.0% of 432 questions of exam right [55.0, 65.0], 1.9 points more than without"
        " retrieval, which may be chance (McNemar p = 0.31)."
    )
    assert said["base", "exam"] == "base answers 24.0% of 432 questions of exam right [19.0, 29.0]."
    run.results[0].contents["counts"]["unparsed"] = 7
    assert describe_result(run, run.results[0]) == (
        "base answers 24.0% of 432 questions of exam right [19.0, 29.0] (7 answers name no option and count as wrong)."
    )
    assert "25.0% on average over the subjects of ceval" in said["sft", "ceval"]
    assert describe_held_out(run, "pretraining") == [
        "The price, on held-out data worse than base: perplexity general 12.50 (was 3.00);"
        " preference accuracy 0.320 ± 0.035 (was 0.540 ± 0.035; McNemar p < 0.0001)."
    ]


def test_our_rows_stand_below_the_published_ones_and_may_be_empty(run):
    tables = dict(zip(SCORES, (rows for _, rows in paper_tables(run)), strict=True))
    published = {task: [row for row in rows if row["protocol"] == "published"] for task, rows in tables.items()}
    assert published == {task: [{**row, "protocol": "published"} for row in rows] for task, (_, rows) in SCORES.items()}
    ours = {task: rows[len(published[task]) :] for task, rows in tables.items()}
    assert list(published["ceval"][6].values())[:5] == ["Qilin-Med SFT", "40.1", "48.5", "55.5", "43.4"]
    assert list(published["cmexam"][13].values())[:7] == ["Qilin-Med RAG", "42.8", "", "", "", "", ""]
    [row] = [row for row in ours["ceval"] if row.get("average") == "25.0 [20.0, 30.0]"]
    assert row["model"] == "ours: SFT" and row["physician"] == "50.0 [45.0, 55.0]"
    assert not row["clinical medicine"] and not row["basic medicine"]
    assert row["protocol"].startswith("ceval (ceval_letters); 432 questions; 5 examples; chat")
    told = [row for row in ours["cmexam"] if "told" in row["protocol"]]
    assert [[row[c] for c in list(SCORES["huatuo"][1][0])[1:]] for row in told] == [["1.50"] * 5] * 2
    assert not any(row.get("accuracy") for row in told)
    assert "characters" in told[0]["protocol"] and "jieba words" in told[1]["protocol"]
    names = [f"ours: {name}" for name in ("base", "CPT", "SFT", "DPO")]
    assert ours["huatuo"] == [{"model": name, "protocol": "not run"} for name in names]


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
    for stage in ("CPT", "SFT"):
        assert [stage, "1,200", "1,195", "5", "300", "9,000", "8,000", "0", "0", "10", "2"] in rows
        assert [stage, "a.jsonl", "1,200", "1,195", "5", "abababababab"] in rows


def test_curves_keep_every_value_within_their_bounds():
    rows = [{"step": n, "loss": float(n % 2)} for n in range(1, 1001)]
    line = gather(rows, lambda row: row["loss"])
    assert len(line) <= BUCKETS and math.isclose(line[0][1], 5 / 9) and line[0][2:] == (0.0, 1.0)
    assert [title for title, _, _ in draw_curves(rows)] == ["Loss, nats per token"]
    assert ticks(0, 9.3) == [0, 2, 4, 6, 8] and ticks(-8, 0) == [-8, -6, -4, -2, 0]
    assert list(draw_curves([{"step": 1, "loss": math.nan}])) == []


def test_questions_are_drawn_by_their_ids_alone():
    answered = [{str(n): None for n in range(20)}, {str(n): None for n in range(5, 25)}]
    drawn = draw_questions(answered)
    assert drawn == draw_questions(answered[::-1]) and all(5 <= int(question) < 20 for question in drawn)
    assert draw_questions([]) == []


def test_a_result_of_an_older_model_is_named(run):
    assert run.outdated == []
    run.manifests["sft"]["fingerprint"] = "0" * 64
    assert run.outdated == ["sft ceval", "sft exam", "sft exam_retrieval", "sft told"]


# --------------------------------------------------------------------------------------------------------- pages


def test_text_from_data_stays_text(run):
    run.results[0].contents["by_facet"] = {HOSTILE: {"## b": {**measure(0.5), "questions": 7}}}
    page = write_report(run, "c.json", ["name=```"])
    html, markdown = page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;|`*_[x](y)<br># 甲" in html
    assert "<script" not in markdown and "\n# 甲" not in markdown and html.count("<h2") == 8
    assert "### " not in html and "**" not in html and "| " not in html.replace("|`*_[x](y)", "")  # all of it was read
    assert html.count("<a ") == html.count("<h2")  # those of the contents
    row = markdown_table([{"a": "x|y\nz<b>", "n": 1234}]).splitlines()[2]
    assert row == "| x\\|y<br>z&lt;b> | 1,234 |"
    assert markdown_table([{"a": "x\u2028y\r\n\\|"}]).splitlines()[2] == "| x<br>y<br>\\\\\\| |"


def test_cards_leave_manifest_and_fingerprint_alone(run):
    before = {stage: fingerprint_model(run.models[stage]) for stage in run.manifests}
    assert len(list(write_cards(run))) == 2
    card = run.models["sft"] / "README.md"
    data = ModelCard.load(card).data
    assert (data.language, data.library_name, data.pipeline_tag) == ("zh", "transformers", "text-generation")
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} >= {("exam", "accuracy", 58.1)}
    assert before["sft"] in card.read_text(encoding="utf-8") and "58.1 [53.1, 63.1]" in card.read_text(encoding="utf-8")
    assert {stage: fingerprint_model(run.models[stage]) for stage in run.manifests} == before
    assert verify_folder(run.models["sft"])["fingerprint"] == before["sft"]
    card.write_text("mine")
    assert any("kept" in line for line in write_cards(run)) and card.read_text() == "mine"


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}")
def test_the_page_opens_alone_and_fits_a_phone(run):
    page = write_report(run, "c.json", [])
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright()
    with playwright as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        messages, requests = [], []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        wide, shown = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        tables, charts = tab.locator("table").count(), tab.locator("svg polyline").count()
        browser.close()
    assert requests == [page.as_uri()] and not messages
    assert wide <= shown == 390
    assert tables >= 12 and charts == 6


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
