"""The tasks of configs/tasks on a tiny random model: scores by hand, counts, traces, kill and resume."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from copy import deepcopy
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reading import write_rows
from tiny_models import write_model
from tokenizers.processors import TemplateProcessing

from qilin_med.artifact import Artifact
from qilin_med.config.experiment import Experiment, ProtocolSettings, TaskSettings
from qilin_med.data.rows import prepare_rows
from qilin_med.errors import UserError
from qilin_med.evaluate import held_out as held_out_module
from qilin_med.evaluate.comparison import compare_models
from qilin_med.evaluate.harness import (
    ModelUnderTest,
    Retrieval,
    configure_task,
    describe_task,
    run_task,
    task_configs,
    write_submission,
)
from qilin_med.evaluate.held_out import held_out_sets, measure_held_out
from qilin_med.evaluate.lm import SharedPrefixLM
from qilin_med.evaluate.protocols import folder_name, protocols_of, run_protocols, summarise_protocols
from qilin_med.evaluate.results import read_samples, write_result
from qilin_med.evaluate.tasks.questions import load_questions
from qilin_med.evaluate.tasks.scoring import favourite
from qilin_med.model.load import load_for_inference
from qilin_med.prompt.wording import HEAD, exam_prompt

ROOT = Path(__file__).resolve().parents[1]
CEVAL = task_configs()["ceval_letters"]["dataset_kwargs"]
SUBJECTS = CEVAL["subjects"]
DEPARTMENTS = ("内科", "外科", "儿科")
SYMPTOMS = ("发热", "头痛", "咳嗽", "腹泻", "胃痛", "胸闷", "心慌", "呕吐", "咽痛", "血压偏高")


def exam_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Made-up questions in CMExam's columns; every fifth has two right answers, every seventh no explanation."""
    rows = []
    for number in range(start, start + count):
        options = [
            f"{SYMPTOMS[(number + shift) % 10]}{'、' + SYMPTOMS[shift] if shift % 2 else ''}" for shift in range(5)
        ]
        rows.append({
            "Question": f"第{number}位患者{SYMPTOMS[number % 10]}{number % 4}天，应当先考虑",
            "Options": "\n".join(f"{letter} {text}" for letter, text in zip("ABCDE", options, strict=True)),
            "Answer": "AC" if number % 5 == 0 else "ABCDE"[number % 5],
            "Explanation": "" if number % 7 == 0 else f"因为{options[number % 5]}。",
            "Clinical Department": DEPARTMENTS[number % 3],
        })  # fmt: skip
    return rows


def write_ceval(path: Path) -> str:
    """An archive like C-Eval's with three subjects: 5 worked examples, 4 questions of val and of test."""
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("physician", "advanced_mathematics", "law"):
            for split, count in (("dev", 5), ("val", 4), ("test", 4)):
                lines = ["id,question,A,B,C,D" + ("" if split == "test" else ",answer")]
                for number in range(count):
                    answer = "" if split == "test" else f",{'ABCD'[number % 4]}"
                    lines.append(f"{number},{SUBJECTS[subject][0]}{split}{number}____。,甲,乙,丙,丁{answer}")
                archive.writestr(f"{split}/{subject}_{split}.csv", "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_tokenizer) -> Experiment:
    """Files, two models and the experiment that names them."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = folder / "data"
    consultations = [{"questions": [f"{symptom}怎么办"], "answers": [f"{symptom}应当就诊。"]} for symptom in SYMPTOMS]
    rows = {"test.csv": exam_rows(23), "val.csv": exam_rows(6, start=100), "huatuo.jsonl": consultations}
    test, val, huatuo = (str(write_rows(data / name, contents)) for name, contents in rows.items())
    write_model(folder / "base", small_tokenizer, seed=0)
    write_model(folder / "run/sft/merged", small_tokenizer, seed=1)
    exam = TaskSettings(test=[test], fewshot=[val], max_new_tokens=12)
    likely = exam.model_copy(update={"max_new_tokens": None})
    ceval = TaskSettings(test=[write_ceval(data / "ceval.zip")], shots=2)
    tasks = {
        "cmexam_generate": exam, "cmexam_reasoning": exam, "cmexam_letters": likely, "cmexam_options": likely,
        "ceval_generate": ceval, "ceval_letters": ceval,
        "huatuo26m_generate": TaskSettings(test=[huatuo], max_new_tokens=12),
    }  # fmt: skip
    sft = {
        "data": ["none"], "epochs": 1, "batch_size_per_device": 1, "learning_rate": 1e-4, "warmup_ratio": 0.0,
        "weight_decay": 0.0, "max_source_length": 64, "max_target_length": 64, "packing": False,
        "lora": {"rank": 2, "alpha": 2, "dropout": 0.0},
    }  # fmt: skip
    return Experiment(
        name="evaluation", seed=1, output_dir=str(folder / "run"), launch={"device": "cpu"}, sft=sft,
        model={"path": str(folder / "base"), "template": "qilin", "dtype": "float32"},
        evaluation={"batch_size": 4, "tasks": {name: task.model_dump() for name, task in tasks.items()}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(world) -> dict[str, ModelUnderTest]:
    folders = {"base": Path(world.model.path), "sft": world.stage_folder("sft") / "merged"}
    return {name: ModelUnderTest(world, name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def results(world, models) -> dict[tuple[str, str], dict]:
    """(model, task) -> result of every task on both models."""
    return {(m, t): run_task(models[m], t, s) for m in models for t, s in world.evaluation.tasks.items()}


def samples_of(model: ModelUnderTest, task: str) -> list[dict]:
    return list(read_samples(model.results / task))


# ------------------------------------------------------------------------------------------------------ likelihood


@pytest.mark.parametrize("task", ["cmexam_letters", "cmexam_options", "ceval_letters"])
@pytest.mark.parametrize("name", ["base", "sft"])
def test_likelihoods_are_sums_of_log_probabilities(results, models, name, task):
    model = models[name]
    lm, tokenizer = model.lm.lm.model, model.tokenizer
    for sample in samples_of(model, task):
        prompt = tokenizer.encode(sample["prompt"])
        for choice, found in sample["output"]:
            ids = prompt + tokenizer.encode(sample["prompt"] + choice)[len(prompt) :]
            with torch.no_grad():
                log_probs = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
            assert found == pytest.approx(expected, abs=2e-4)
        best = max(range(len(sample["output"])), key=lambda i: sample["output"][i][1])
        assert sample["answer"] == "ABCDE"[best]


@pytest.mark.parametrize("task", ["cmexam_generate", "ceval_generate", "huatuo26m_generate"])
def test_generated_answers_are_those_of_one_question_at_a_time(results, models, task):
    model = models["sft"]
    for sample in samples_of(model, task):
        inputs = model.tokenizer(sample["prompt"], return_tensors="pt", return_token_type_ids=False)
        longest = results["sft", task]["max_new_tokens"]
        output = model.lm.lm.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        answer = model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["output"] == answer


def test_inference_needs_no_flash_attention(world):
    """Its kernels take no masks, and choices of a question are told apart by one."""
    flash = world.model.model_copy(update={"attention": "flash_attention_2"})
    assert load_for_inference(Path(flash.path), flash, "cpu").config._attn_implementation == "sdpa"


def test_prompts_are_the_papers(results, models):
    generate, letters, options = (
        next(s["prompt"] for s in samples_of(models["sft"], f"cmexam_{protocol}") if "第1位" in s["prompt"])
        for protocol in ("generate", "letters", "options")
    )
    user, assistant = "<reserved_102>", "<reserved_103>"
    assert generate.startswith(f"{user}{HEAD}\n第1位患者头痛1天") and generate.endswith(f"即可。{assistant}")
    assert letters == f"{generate}答案："
    assert options == f"{user}第1位患者头痛1天，应当先考虑{assistant}"
    plain = samples_of(models["base"], "cmexam_letters")[0]["prompt"]
    assert plain == letters.replace(user, "").replace(assistant, "\n")


def test_worked_examples_come_from_their_file(world, models):
    settings = world.evaluation.tasks["cmexam_letters"].model_copy(update={"shots": 2, "limit": 3})
    result = run_task(models["sft"], "cmexam_letters", settings, suffix="_2shot")
    assert result["shots"] == 2 and len(result["files"]["fewshot"]) == 1
    turns = samples_of(models["sft"], "cmexam_letters_2shot")[2]["prompt"].split("<reserved_102>")
    assert len(turns) == 4
    assert "第100位" in turns[1] and turns[1].endswith("<reserved_103>答案：AC\n解释：因为发热。</s>")
    assert "第3位" in turns[3] and turns[3].endswith("<reserved_103>答案：")


# ---------------------------------------------------------------------------------------------------------- counts


def test_counts_and_metrics_are_those_of_the_samples(results, models):
    for (name, task), result in results.items():
        samples = samples_of(models[name], task)
        assert result["counts"]["questions"] == len(samples)
        assert len({sample["id"] for sample in samples}) == len(samples)
        if "accuracy" in result["metrics"]:
            right = sum(sample["answer"] == sample["gold"] for sample in samples)
            assert result["metrics"]["accuracy"]["value"] == pytest.approx(right / len(samples))
            assert right == sum(sample["score"]["accuracy"] for sample in samples)
        assert all(
            m["low"] - 1e-9 <= m["value"] <= m["high"] + 1e-9 or m["value"] > 0 for m in result["metrics"].values()
        )


def test_questions_are_all_asked(results):
    asked = {task: result["counts"]["questions"] for (name, task), result in results.items() if name == "base"}
    assert asked == {
        "cmexam_generate": 23, "cmexam_letters": 18, "cmexam_options": 18, "cmexam_reasoning": 19, "ceval_generate": 12,
        "ceval_letters": 12, "huatuo26m_generate": 10,
    }  # fmt: skip
    assert results["base", "cmexam_reasoning"]["counts"]["skipped"] == {"no explanation": 4}
    several = {task: result["counts"]["several_answers"] for (name, task), result in results.items() if name == "base"}
    assert {task for task, count in several.items() if count} == {"cmexam_letters", "cmexam_options"}
    assert several["cmexam_letters"] == several["cmexam_options"] == 5


def test_single_and_multiple_answers_and_departments_apart(results, models):
    result, samples = results["base", "cmexam_generate"], samples_of(models["base"], "cmexam_generate")
    single = [sample["score"]["accuracy"] for sample in samples if len(sample["gold"]) == 1]
    assert len(single) == 18
    assert result["metrics"]["accuracy_single"]["value"] == pytest.approx(sum(single) / 18)
    assert "accuracy_multiple" in result["metrics"]
    departments = result["by_facet"]["Clinical Department"]
    assert {name: group["questions"] for name, group in departments.items()} == {"内科": 8, "外科": 8, "儿科": 7}


def test_answers_that_cannot_be_parsed_are_wrong_and_counted(results, models):
    result, samples = results["sft", "cmexam_generate"], samples_of(models["sft"], "cmexam_generate")
    unparsed = [sample for sample in samples if not sample["answer"]]
    assert result["counts"]["unparsed"] == len(unparsed) > 0
    assert not any(sample["score"]["accuracy"] for sample in unparsed)


def test_ceval_averages_over_subjects(results, models):
    metrics, means = (
        results["base", "ceval_letters"]["metrics"],
        dict.fromkeys(("physician", "advanced_mathematics", "law"), 0),
    )
    for sample in samples_of(models["base"], "ceval_letters"):
        means[sample["facets"]["subject"]] += sample["score"]["accuracy"] / 4
    assert metrics["average"]["value"] == pytest.approx(sum(means.values()) / 3)
    assert metrics["physician"]["value"] == means["physician"]
    assert metrics["average_humanities"]["value"] == means["law"]
    assert metrics["average_stem"]["value"] == metrics["average_hard"]["value"] == means["advanced_mathematics"]


def test_ceval_shows_worked_examples_of_the_same_subject(results, models):
    for sample in samples_of(models["base"], "ceval_letters"):
        name = SUBJECTS[sample["facets"]["subject"]][0]
        assert sample["prompt"].startswith(
            f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n\n{name}dev0____。"
        )
        assert sample["prompt"].count("答案：") == 3 and sample["prompt"].endswith("D. 丁\n答案：")


def test_the_subject_table():
    assert len(SUBJECTS) == 52
    hard = CEVAL["averages"]["average_hard"]["of"]["subject"]
    categories = [name for average in CEVAL["averages"].values() for name in average.get("of", {}).get("category", [])]
    assert {category for _, category in SUBJECTS.values()} == set(categories)
    assert len(hard) == 8 and {*hard, "physician", "clinical_medicine", "basic_medicine"} < set(SUBJECTS)


def test_results_name_what_made_them(results, world, models):
    result = results["sft", "cmexam_letters"]
    assert result["model"]["fingerprint"] == models["sft"].facts["model"]["fingerprint"]
    assert result["chat"] and not results["base", "cmexam_letters"]["chat"]
    assert (result["version"], result["shots"], result["experiment"]["name"]) == (2, 0, "evaluation")
    assert {"lm_eval", "sacrebleu", "torch"} <= set(result["versions"]) and result["overrides"] == []


@pytest.mark.parametrize("adds", [True, False], ids=["tokenizer adds BOS", "it does not"])
@pytest.mark.parametrize("writes", [True, False], ids=["template writes BOS", "it does not"])
def test_a_model_reads_bos_once(models, small_tokenizer, monkeypatch, adds, writes):
    tokenizer = deepcopy(small_tokenizer)
    one = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = one if adds else None
    tokenizer.chat_template = f"{'{{ bos_token }}' * writes}{{{{ messages[0]['content'] }}}}\n"
    lm, read = SharedPrefixLM(models["base"].lm.lm.model, tokenizer, batch_size=2), {}
    score, generate = lm._score, lm._model_generate

    def scored(batch, shared):
        read["scored"] = batch[0].context
        return score(batch, shared)

    def continued(context, **settings):
        read["continued"] = tuple(context[0].tolist())
        return generate(context, **settings)

    monkeypatch.setattr(lm, "_score", scored)
    monkeypatch.setattr(lm, "_model_generate", continued)
    for chat in (False, True):
        prompt = lm.apply_chat_template([{"role": "user", "content": "头痛怎么办"}]) if chat else "头痛怎么办\n"
        lm.loglikelihood([Instance("loglikelihood", {}, (prompt, "就诊"), 0)])
        lm.generate_until([Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 2}), 0)])
        begins = [tokenizer.bos_token_id] * (adds or (chat and writes))
        assert read["scored"] == read["continued"] == (*begins, *small_tokenizer("头痛怎么办\n").input_ids)


# -------------------------------------------------------------------------------------------------- held-out sets


def test_held_out_measures_are_those_of_each_row_alone(world, models, tmp_path, monkeypatch):
    pairs = [{"prompt": f"{s}怎么办", "chosen": f"{s}应当就诊。", "rejected": f"{s}不必就诊。"} for s in SYMPTOMS]
    chats = [{"instruction": pair["prompt"], "input": "", "output": pair["chosen"]} for pair in pairs]
    files = {"texts": [{"text": pair["chosen"] * 9} for pair in pairs], "chats": chats, "pairs": pairs}
    files = {name: [str(write_rows(tmp_path / f"{name}.jsonl", rows))] for name, rows in files.items()}
    held_out = {"documents": {"notes": files["texts"]}, "answers": files["chats"], "preferences": files["pairs"]}
    settings = world.model_dump(mode="json")
    stage = {key: settings["sft"][key] for key in ("data", "epochs", "batch_size_per_device", "learning_rate")}
    stage |= {"warmup_ratio": 0.0, "weight_decay": 0.0}
    dpo = {"beta": 0.1, "lora": settings["sft"]["lora"], "max_source_length": 64, "max_target_length": 64}
    experiment = Experiment.model_validate(settings | {
        "output_dir": str(tmp_path / "run"), "pretraining": {**stage, "block_size": 32}, "dpo": {**stage, **dpo},
        "evaluation": {"batch_size": 4, **held_out},
    })  # fmt: skip
    result = measure_held_out(experiment, "base", models["base"].folder)

    model, tokenizer = models["base"].lm.lm.model, models["base"].tokenizer
    ids = {stage: held_out_rows(experiment, stage, tokenizer) for stage in ("pretraining", "sft", "dpo")}
    segments = [
        ([-100, *row["input_ids"][end - length + 1 : end]], row["input_ids"][end - length : end])
        for row in ids["pretraining"]
        for length, end in zip(row["lengths"], accumulate(row["lengths"]), strict=True)
    ]
    log_probs = [value for labels, read in segments for value in label_log_probs(model, read, labels)]
    measures = result["measures"]
    assert measures["perplexity notes"]["value"] == pytest.approx(math.exp(-sum(log_probs) / len(log_probs)), rel=1e-4)
    log_probs = [v for row in ids["sft"] for v in label_log_probs(model, row["input_ids"], row["labels"])]
    assert measures["answer loss"] == {
        "value": pytest.approx(-sum(log_probs) / len(log_probs), rel=1e-4), "tokens": len(log_probs),
    }  # fmt: skip
    margins = []
    for row in ids["dpo"]:
        prompt, answers = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
        chosen, rejected = (
            sum(label_log_probs(model, prompt + answer, [-100] * len(prompt) + answer)) for answer in answers
        )
        margins.append(chosen - rejected)
    assert measures["preference accuracy"]["margins"] == pytest.approx(margins, abs=2e-4)
    assert measures["preference accuracy"]["value"] == sum(margin > 0 for margin in margins) / len(margins)

    monkeypatch.setattr(held_out_module, "load_for_inference", lambda *_: pytest.fail("the model was loaded"))
    assert measure_held_out(experiment, "base", models["base"].folder) == result


def held_out_rows(experiment: Experiment, stage: str, tokenizer) -> list[dict]:
    [found] = [held_out for held_out in held_out_sets(experiment) if held_out.stage == stage]
    cache = Path(experiment.output_dir) / "cache"
    return list(prepare_rows(stage, found.section, tokenizer, 512, cache).dataset)


@torch.no_grad()
def label_log_probs(model, ids: list[int], labels: list[int]) -> list[float]:
    """Log-probability of every label that is one, given the ids before it."""
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [log_probs[at - 1, label].item() for at, label in enumerate(labels) if at and label != -100]


# -------------------------------------------------------------------------------------------------- once and again


def test_a_finished_task_is_not_run_again(results, world, models, monkeypatch):
    fresh = ModelUnderTest(world, "base", models["base"].folder)
    monkeypatch.setattr(ModelUnderTest, "lm", property(lambda _: pytest.fail("the model was loaded")))
    again = run_task(fresh, "cmexam_letters", world.evaluation.tasks["cmexam_letters"])
    assert again == results["base", "cmexam_letters"]


def test_reasoning_reuses_the_answers_of_prediction(results, world, models, monkeypatch):
    model = models["sft"]
    shutil.rmtree(model.results / "cmexam_reasoning")
    monkeypatch.setattr(model.lm.lm, "_model_generate", lambda *_, **__: pytest.fail("a question was asked again"))
    run_task(model, "cmexam_reasoning", world.evaluation.tasks["cmexam_reasoning"])


KILLED = """
import sys
from pathlib import Path
import qilin_med.evaluate.lm, qilin_med.evaluate.harness as harness
from qilin_med.config.experiment import Experiment

config, folder, log = sys.argv[1:]
original, done = qilin_med.evaluate.lm.SharedPrefixLM._model_generate, 0

def logged(self, context, *arguments, **settings):
    global done
    self._write_cache()
    with open(log, "a") as file:
        print(done, file=file)
    output = original(self, context, *arguments, **settings)
    done += len(context)
    return output

qilin_med.evaluate.lm.SharedPrefixLM._model_generate = logged
experiment = Experiment.model_validate_json(Path(config).read_text())
task = experiment.evaluation.tasks["cmexam_generate"]
harness.run_task(harness.ModelUnderTest(experiment, "base", Path(folder)), "cmexam_generate", task)
"""


def test_a_killed_run_asks_no_question_twice(results, world, tmp_path, monkeypatch):
    slow = world.evaluation.tasks["cmexam_generate"].model_copy(update={"max_new_tokens": 100, "batch_size": 2})
    evaluation = world.evaluation.model_copy(update={"tasks": {"cmexam_generate": slow}})
    experiment = world.model_copy(update={"output_dir": str(tmp_path / "run"), "evaluation": evaluation})
    config, log = tmp_path / "config.json", tmp_path / "log"
    config.write_text(experiment.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-c", KILLED, str(config), world.model.path, str(log)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while run.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    finished = int(log.read_text().splitlines()[-1])
    model = ModelUnderTest(experiment, "base", Path(world.model.path))
    [database] = (model.results / "answers").glob("*.db")
    with sqlite3.connect(database) as connection:
        [cached] = connection.execute("select count(*) from answers").fetchone()
    assert 6 <= finished <= cached < 23

    asked, generate = [], model.lm.lm._model_generate

    def counted(context, **settings):
        asked.append(len(context))
        return generate(context, **settings)

    monkeypatch.setattr(model.lm.lm, "_model_generate", counted)
    result = run_task(model, "cmexam_generate", slow)
    assert sum(asked) == 23 - cached
    assert result["counts"]["questions"] == 23


# ------------------------------------------------------------------------------------------------ files and users


def test_the_submission_has_cevals_form(world, models):
    settings = world.evaluation.tasks["ceval_letters"].model_copy(update={"split": "test"})
    result = run_task(models["base"], "ceval_letters", settings, suffix="_test")
    assert (result["metrics"], result["counts"]["without_gold"]) == ({}, 12)
    written = json.loads(write_submission(models["base"], "ceval_letters_test").read_text(encoding="utf-8"))
    assert list(written) == ["advanced_mathematics", "law", "physician"]
    assert all(list(answers) == ["0", "1", "2", "3"] for answers in written.values())
    assert {letter for answers in written.values() for letter in answers.values()} <= set("ABCD")


def test_models_are_compared_on_the_same_questions(results, world):
    found = {entry["task"]: entry for entry in compare_models(world)}
    entry = found["cmexam_letters"]
    assert (entry["first"], entry["second"], entry["questions"]) == ("base", "sft", 18)
    change = results["sft", "cmexam_letters"]["metrics"]["accuracy"]["value"]
    change -= results["base", "cmexam_letters"]["metrics"]["accuracy"]["value"]
    test = entry["metrics"]["accuracy"]
    assert test["test"] == "McNemar, exact" and test["difference"] == pytest.approx(change)
    assert test["gained"] - test["lost"] == round(18 * change)
    assert found["huatuo26m_generate"]["metrics"]["rougeL_char"]["test"] == "paired bootstrap"
    assert json.loads((Path(world.output_dir) / "eval/comparisons.json").read_text(encoding="utf-8"))


def test_one_task_asks_several_sets_of_questions(world, models, results, tmp_path):
    other = {"task": "cmexam_letters", "test": [str(write_rows(tmp_path / "more.csv", exam_rows(3)))]}
    settings = world.evaluation.tasks["cmexam_letters"].model_copy(update=other)
    result = run_task(models["base"], "children", settings)
    assert (result["task"], result["counts"]["questions"]) == ("cmexam_letters", 2)
    here, there = (samples_of(models["base"], name) for name in ("children", "cmexam_letters"))
    assert [sample["output"] for sample in here] == [sample["output"] for sample in there[:2]]


def test_preference_pairs_are_compared(world, tmp_path):
    """Margins 1 -1 1 1 -1 against 1 1 1 1 1: two gained, none lost, exact p = 2 / 2^2."""
    experiment = world.model_copy(update={"output_dir": str(tmp_path)})
    for model, margins in (("base", [1, -1, 1, 1, -1]), ("sft", [1] * 5)):
        measures = {"preference accuracy": {"value": 0, "margins": margins}}
        inputs = {"rows": {"preference accuracy": "the same"}}
        write_result(Artifact(tmp_path / "eval" / model / "heldout", inputs), {"measures": measures})
    [found] = compare_models(experiment)
    test = found["metrics"]["preference accuracy"]
    assert (found["task"], found["first"], found["second"], found["questions"]) == ("heldout", "base", "sft", 5)
    assert (test["gained"], test["lost"], test["difference"], test["p"]) == (2, 0, 0.4, 0.5)


def test_retrieved_text_stands_before_the_question_and_is_recorded(world, models):
    told = {}

    def find(asked, rooms):
        told.update((question.stem, room) for question, room in zip(asked, rooms, strict=True))
        return [(f"资料：{a.stem[:3]}{len(a.options)}\n", [f"source {n}"], n == 1) for n, a in enumerate(asked)]

    settings = world.evaluation.tasks["cmexam_letters"].model_copy(update={"limit": 2, "shots": 1})
    result = run_task(models["sft"], "cmexam_letters", settings, Retrieval(find, "an index"), "_retrieval")
    sample = samples_of(models["sft"], "cmexam_letters_retrieval")[1]
    assert result["retrieval"] == "an index"
    assert sample["sources"] == ["source 1"]
    assert sample["prompt"].count("资料：") == 1 and f"资料：第2位5\n{HEAD}" in sample["prompt"]
    # What the window of 512 leaves beside the rest of the prompt, the longest option and 16 spare tokens.
    longest = max(sample["question"].splitlines()[1:], key=len)[2:]
    rest = models["sft"].tokenizer(sample["prompt"].replace("资料：第2位5\n", "") + longest).input_ids
    assert told[sample["question"].splitlines()[0]] == 512 - 16 - len(rest)
    assert result["counts"]["shortened_passages"] == 1


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("cmexam", {}, "unknown task 'cmexam'; expected one of .*cmexam_generate"),
        ("children", {"task": "cmexam"}, "unknown task 'cmexam'; expected one of .*cmexam_generate"),
        ("cmexam_letters", {"test": ["nowhere.csv"]}, "nowhere.csv: no such file"),
        ("huatuo26m_generate", {"shots": 1}, "1 worked examples asked for, 0 found"),
        ("huatuo26m_generate", {"answers": "letters"}, "asks for texts"),
        ("cmexam_letters", {"prompt": "{{ nothing }}"}, "'nothing' is undefined; it may use .*stem"),
        ("ceval_letters", {"test": ["tests/conftest.py"]}, "unknown kind of file"),
        ("cmexam_generate", {"max_new_tokens": 512}, "leaves no room for a question in the 512 positions"),
    ],
)
def test_mistakes_are_told(world, models, task, settings, message):
    settings = world.evaluation.tasks.get(task, TaskSettings()).model_copy(update=settings)
    with pytest.raises(UserError, match=message):
        run_task(models["base"], task, settings)


def test_the_tasks_run_without_our_command(world, models, results, monkeypatch, tmp_path):
    """From another folder, with the harness's own model class, as `lm_eval --include_path configs/tasks` runs them."""
    monkeypatch.chdir(tmp_path)
    metadata = {"test": world.evaluation.tasks["cmexam_letters"].test[0], "fewshot": []}
    tasks = TaskManager(include_path=str(ROOT / "configs/tasks"), include_defaults=False, metadata=metadata)
    lm = HFLM(pretrained=models["base"].lm.lm.model, tokenizer=models["base"].tokenizer, batch_size=4)
    found = simple_evaluate(lm, tasks=["cmexam_letters"], task_manager=tasks, bootstrap_iters=0)["results"]
    expected = results["base", "cmexam_letters"]["metrics"]["accuracy"]["value"]
    assert found["cmexam_letters"]["accuracy,none"] == pytest.approx(expected)


def test_the_command(world, results, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(world.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "scripts/evaluate.py", "--config", str(config)]
    command += ["--tasks", "cmexam_letters", "--models", "base"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].startswith("base cmexam_letters: 18 questions; accuracy ")  # behind progress
    assert "; 5 questions with several" in run.stdout.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ exams by config


def load(task: str, **settings) -> dict:
    config = configure_task(task, TaskSettings(**settings))
    return load_questions(config["answers"], config["shots"], **config["questions"])


def test_the_scripts_of_the_paper_are_asked_as_they_ask(tmp_path):
    archive = write_ceval(tmp_path / "ceval.zip")
    rows = load("ceval_paper_script", test=archive, shots=2)["all"]
    examples = [r for r in rows if r["role"] == "example" and r["subject"] == "law"]
    asked = next(r for r in rows if r["role"] == "asked" and r["subject"] == "law")
    options = "\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    intro = "以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n"
    assert examples[0]["prompt"] == f"[Round 1]\n\n问：{intro}{SUBJECTS['law'][0]}dev0____。{options}\n\n答："
    assert examples[1]["prompt"] == f"[Round 2]\n\n问：{SUBJECTS['law'][0]}dev1____。{options}\n\n答："
    assert asked["prompt"].startswith("[Round 3]\n\n问：法学val0") and examples[1]["solution"] == "B"
    test = str(write_rows(tmp_path / "test.csv", exam_rows(2)))
    [several, single] = load("cmexam_paper_script", test=test)["all"]
    lines = "A 头痛\nB 咳嗽、头痛\nC 腹泻\nD 胃痛、腹泻\nE 胸闷"
    assert single["prompt"] == f"第1位患者头痛1天，应当先考虑\n{lines}\n答案：" and single["rule"] == "first_capitals"
    [several, single] = load("cmexam_published_prompts", test=test)["all"]
    assert several["prompt"].startswith("假设你是一位医疗行业专家，请回答下列问题。注意，该问题是多选题\n第0位")
    assert (
        single["prompt"].replace(f":\n{lines}", f"\n{lines}").replace("只有两行，第", "只有两行。第")
        == exam_prompt("第1位患者头痛1天，应当先考虑", [(line[0], line[2:]) for line in lines.splitlines()]) + "\n"
    )


@pytest.mark.parametrize(
    ("task", "file", "prompt", "answers", "facets"),
    [
        ("cmb_exam", "cmb_exam/CMB/CMB-Exam/CMB-train/CMB-train-merge.json",
         "以下是中国医师考试中规培结业考试的一道单项选择题，不需要做任何分析和解释，直接输出答案选项。\n甲病的表现不包括\n"
         "A. 发热\nB. 咳嗽\nC. 头痛\nD. 飞行\n", ["D", "AC"], {"exam_class": "规培结业"}),
        ("medqa_mainland", "medqa/MedQA/questions/Mainland/train.jsonl", None, None, {}),
        ("medqa_taiwan", "medqa/MedQA/questions/Taiwan/train.jsonl", None, None, {}),
        ("explaincpe", "explaincpe/ExplainCPE/train.json", None, None, {}),
    ],
)  # fmt: skip
def test_published_exams_by_their_names(task, file, prompt, answers, facets):
    rows = load(task, test=str(ROOT / "tests/fixtures" / file))["all"]
    assert rows and all(row["answer"] and row["stem"] in row["prompt"] for row in rows)
    if prompt:
        assert (rows[0]["prompt"], rows["answer"]) == (prompt, answers) and facets.items() <= dict(
            rows[0]["facets"]
        ).items()


def test_cmmlus_medical_subjects_alone(tmp_path):
    for split, subject, count in (("dev", "anatomy", 5), ("test", "anatomy", 3), ("test", "law", 2), ("dev", "law", 5)):
        lines = [f"{n},{subject}{split}{n},甲,乙,丙,丁,{'ABCD'[n % 4]}" for n in range(count)]
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{subject}.csv").write_text(
            "\n".join([",Question,A,B,C,D,Answer", *lines]), encoding="utf-8"
        )
    rows = load("cmmlu_medical", test=str(tmp_path))["all"]
    assert [(row["stem"], row["role"]) for row in rows if row["round"] in (3, 6)][-1] == ("anatomydev2", "example")
    assert [row["stem"] for row in rows if row["role"] == "asked"] == [f"anatomytest{n}" for n in range(3)]
    assert rows[0]["prompt"] == "题目：anatomytest0\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案是："
    assert rows[0]["system"] == "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"


def test_any_exam_by_the_settings_alone(results, models, tmp_path):
    """Right are 2 of 2 in 内科, 0 of 1 in 外科: 2/3 of the questions, 1/2 on average over departments."""
    best = {s["question"].splitlines()[0]: s["answer"] for s in samples_of(models["base"], "cmexam_letters")}
    rows = [
        {"题": row["Question"], "选项": row["Options"], "键": best[row["Question"]], "科": "内科"}
        for row in exam_rows(5)[1:4]
    ]
    rows[2] |= {"科": "外科", "键": next(letter for letter in "ABCDE" if letter != rows[2]["键"])}
    settings = {
        "task": "exam_letters", "test": [str(write_rows(tmp_path / "own.csv", rows))],
        "columns": {"question": "题", "options": "选项", "answer": "键", "科室": "科"},
        "prompt": "{{ exam_prompt }}\n", "prefix": "答案：", "averages": {"average": {"over": "科室"}},
    }  # fmt: skip
    with pytest.raises(UserError, match=r'fields 题, .*; this may help: columns \{"options": "选项"'):
        load("exam_letters", test=settings["test"])
    result = run_task(models["base"], "own", TaskSettings(**settings))
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert result["metrics"]["average"]["value"] == 0.5
    assert {value: group["value"] for value, group in result["by_facet"]["科室"].items()} == {"内科": 1, "外科": 0}


def test_options_in_another_order_have_their_letters_with_them(tmp_path):
    test = str(write_rows(tmp_path / "test.csv", exam_rows(9)))
    plain = load("cmexam_generate", test=test)["all"]
    rotated, shuffled = (
        load("cmexam_generate", test=test, **order)["all"] for order in ({"rotate": 2}, {"shuffle": 7})
    )
    for before, *after in zip(plain, rotated, shuffled, strict=True):
        right = {before["options"]["ABCDE".index(letter)] for letter in before["answer"]}
        for row in after:
            assert {row["options"]["ABCDE".index(letter)] for letter in row["answer"]} == right
            assert [before["options"][first] for first in row["order"]] == row["options"]
        assert after[0]["order"] == [2, 3, 4, 0, 1]
    assert len({tuple(row["order"]) for row in shuffled}) > 5
    assert shuffled["order"] == load("cmexam_generate", test=test, shuffle=7)["all"]["order"]


def test_a_favourite_letter_is_told():
    samples = [{"answer": letter, "score": {"accuracy": 0}} for letter in "AAAAAAAAAB"]
    assert favourite(samples) == {"letter": "A", "share": 0.9} and favourite(samples[1:]) == {}


# ------------------------------------------------------------------------------------------------------- protocols


def test_one_exam_in_several_ways(results, world, models):
    questions = world.evaluation.tasks["cmexam_letters"].model_copy(update={"max_new_tokens": 12})
    settings = ProtocolSettings(
        questions=questions, answers=["letters", "options", "generate"], shots=[0, 1], prompts={"ours": "{{ exam_prompt }}\n",
        "bare": "{{ stem }}\n{{ options_text }}\n"}, rotate=[0, 1], shuffle=[3], chat=[True, False], combine="one_at_a_time",
    )  # fmt: skip
    ways = list(protocols_of("cmexam_letters", settings))
    assert len(ways) == 8 and ways[0] == "letters, chat, 0 examples, ours"
    assert len(protocols_of("x", settings.model_copy(update={"combine": "all"}))) == 3 * 2 * 2 * 2 * 3
    found = run_protocols(models["sft"], "cmexam_letters", settings)
    assert (
        list(found["ways"]) == sorted(ways, key=ways.index) and found["questions"] == 18
    )  # those with one right letter
    plain = {sample["id"]: sample for sample in samples_of(models["sft"], "cmexam_letters")}
    first = found["ways"][ways[0]]
    assert (
        first["accuracy"]["value"] == sum(s["score"]["accuracy"] for s in plain.values()) / 18 and first["flips"] == 0
    )
    [rotated] = [way for way in ways if "rotate 1" in way]
    folder = f"protocols/cmexam_letters/{folder_name(rotated)}"
    flips = 0
    for sample in samples_of(models["sft"], folder):
        texts = dict(line.split(" ", 1) for line in sample["question"].splitlines()[1:])
        before = dict(line.split(" ", 1) for line in plain[sample["id"]]["question"].splitlines()[1:])
        flips += texts[sample["answer"]] != before[plain[sample["id"]]["answer"]]
    assert found["ways"][rotated]["flips"] == flips / 18
    assert json.loads((models["sft"].results / "protocols/cmexam_letters.json").read_text(encoding="utf-8")) == found


def test_what_protocols_say_together():
    """Options 0, 1, 2; the second way shows them as 1, 2, 0. Right are option 0, option 1; A is chosen always."""

    def samples(order, *gold):
        told = {"answer": "A", "order": order, "output": ""}
        return {n: {**told, "gold": g, "score": {"accuracy": int(g == "A")}} for n, g in enumerate(gold)}

    ways = {"as it is": samples({"A": 0, "B": 1, "C": 2}, *"AB"), "rotated": samples({"A": 1, "B": 2, "C": 0}, *"CA")}
    found = summarise_protocols(ways)
    assert [way["accuracy"]["value"] for way in found["ways"].values()] == [0.5, 0.5]
    assert (found["spread"], found["flips"], found["ways"]["rotated"]["flips"]) == (0, 1, 1)
    assert found["places"] == {
        "A": {"right": 0.5, "chosen": 1}, "B": {"right": 0.25, "chosen": 0}, "C": {"right": 0.25, "chosen": 0},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- real files


def test_real_ceval_has_all_questions(shared):
    found = load("ceval_letters", test=[str(shared / "data/ceval/ceval.zip")])
    rows = found["all"]
    # Its copy of test has no answers, so val is taken.
    assert (found["split"], found["known_as"]) == ("val", "C-Eval val")
    assert rows["role"].count("asked") == 1346 and rows["role"].count("example") == 260
    assert set(rows["subject"]) == set(SUBJECTS)
    physician = [row["number"] for row in rows if row["subject"] == "physician" and row["role"] == "asked"]
    assert physician == list(range(49))


def test_real_cmexam_has_all_questions(shared):
    found = load("cmexam_generate", test=[str(shared / "data/cmexam/cmexam_test.jsonl")])
    assert found["known_as"] == "CMExam test"
    assert len(found["all"]) + sum(found["skipped"].values()) == 6811
    found = load("cmexam_generate", test=[str(shared / "data/cmexam/cmexam_test_01_clinical_depart.csv")])
    assert found["known_as"] is None  # a tenth of it
    assert {name for name, _ in found["all"][0]["facets"]} >= {"Clinical Department", "Difficulty level"}


def test_real_questions_are_asked_within_the_limit(shared, world, models):
    settings = TaskSettings(test=[str(shared / "data/cmexam/cmexam_test_01_clinical_depart.csv")], limit=4)
    result = run_task(models["base"], "cmexam_options", settings, suffix="_real")
    assert result["counts"]["questions"] == 4
    assert describe_task("cmexam_options", settings).items() <= result.items()
