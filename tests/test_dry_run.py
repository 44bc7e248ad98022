"""Dry runs of the paper's own configuration over fake files: what they count, and every kind of fault that they find."""

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from reading import write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from qilin_med.check.report import print_report
from qilin_med.check.stages import Check
from qilin_med.config.experiment import load_experiment
from qilin_med.config.schedule import make_schedule
from qilin_med.train.job import Job

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/qilin_med_7b.json"
GIB = 2**30


def write_base(folder: str, tokenizer) -> None:
    """Baichuan-7B's configuration and, as a file without contents, its weights."""
    Path(folder).mkdir(parents=True)
    shutil.copy(ROOT / "configs/architectures/baichuan-7b.json", Path(folder) / "config.json")
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    entries, end = {}, 0
    for name, weight in model.state_dict().items():
        size = 2 * weight.numel()
        entries[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (Path(folder) / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)  # a sparse file, which takes no room


def write_exams() -> None:
    exam = {"Options": "A 甲\nB 乙", "Answer": "A", "Explanation": "因为甲"}
    for name, count in (("val", 3), ("test_with_annotations", 5)):
        write_rows(Path(f"data/raw/CMExam/{name}.csv"), [{"Question": f"第{i}题", **exam} for i in range(count)])
    Path("data/raw/ceval").mkdir()
    with zipfile.ZipFile("data/raw/ceval/ceval-exam.zip", "w") as archive:
        for split, count in (("dev", 5), ("val", 4)):
            rows = (f"{i},医师资格{split}{i},甲,乙,丙,丁,A" for i in range(count))
            archive.writestr(f"{split}/physician_{split}.csv", "\n".join(["id,question,A,B,C,D,answer", *rows]))
    consultations = [{"questions": ["发热怎么办"], "answers": ["应当就诊。"]}] * 6
    write_rows(Path("data/raw/Huatuo-26M/test_datasets.jsonl"), consultations)


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_tokenizer) -> Path:
    """A checkout's folder with the paper's configuration and fake files at every path that it names."""
    folder = tmp_path_factory.mktemp("paper")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_base("models/baichuan-7b", small_tokenizer)
        text = [{"text": "发热三天，伴咳嗽。" * 40}] * 300
        chats = [{"instruction": f"头痛{i}怎么办？", "output": "请休息。"} for i in range(600)]
        pairs = [{"prompt": f"头痛{i}？", "chosen": "请休息。", "rejected": "不知道。"} for i in range(100)]
        for stage, rows in (("pretraining", text), ("sft", chats), ("dpo", pairs)):
            write_rows(Path(f"data/processed/{stage}/train-00000.jsonl"), rows)
            write_rows(Path(f"data/processed/{stage}/dev-00000.jsonl"), rows[:7])
        write_exams()
    return folder


@pytest.fixture
def checked(world, monkeypatch, capsys):
    """Checks the experiment with overrides on a disk of so many GiB: (table lines by first word, notes, problems)."""
    monkeypatch.chdir(world)

    def check(*overrides: str, only=None, disk: float = 2000, **options):
        usage = namedtuple("Usage", "total used free")(0, 0, disk * GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        experiment = load_experiment(CONFIG, overrides)
        report = Check(experiment, only, **{"gpus": 8, "gpu": "a100-80g", **options})
        try:
            print_report(report)
            assert not report.findings.problems
        except SystemExit as end:
            assert end.code == 2 and report.findings.problems
        printed = capsys.readouterr()
        told = [line for line in printed.err.splitlines() if line.startswith("error: ")]  # among bars of libraries
        assert told == [f"error: {problem}" for problem in report.findings.problems]
        assert all(len(line) <= 100 for line in printed.out.split("\n\n")[0].splitlines())
        return printed.out, report.findings

    return check


def cells(out: str, name: str) -> list[str]:
    [line] = [line for line in out.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split()


def test_the_papers_run_is_counted_and_nothing_is_written(checked, world, small_tokenizer):
    before = sorted(world.rglob("*"))
    out, findings = checked()
    assert not findings.problems
    tokens = 300 * (len(small_tokenizer("发热三天，伴咳嗽。" * 40, add_special_tokens=False).input_ids) + 1)
    updates = 3 * math.ceil(math.ceil(tokens / 1024) / 8)
    assert cells(out, "pretraining")[:6] == ["base", "300", "0.0%", "-", str(updates), f"{tokens * 3:,}"]
    assert cells(out, "sft")[:5] == ["pretraining*", "600", "0.0%", "0.0%", "2"]
    assert cells(out, "dpo")[:5] == ["sft*", "100", "0.0%", "0.0%", "4"]
    assert "sft: 7,020,548,096 parameters, 19,988,480 trainable (0.28%)" in out
    for name, questions in (("cmexam_generate", "5"), ("ceval_letters", "4"), ("huatuo26m_generate", "6")):
        assert cells(out, name)[:2] == [questions, "0"]
    for name in ("perplexity medical", "answer loss", "preference accuracy"):
        assert cells(out, name)[:2] == ["7", "0.0%"]
    assert cells(out, "retrieval corpus")[:2] == ["300", "0.0%"]
    assert sorted(world.rglob("*")) == before


def test_a_stage_is_checked_before_its_parent_is_made(checked):
    out, findings = checked(only="dpo")
    assert cells(out, "dpo")[:2] == ["sft*", "100"]
    assert "* runs/qilin-med-7b/sft/merged is not made yet: dpo is checked with models/baichuan-7b" in out
    assert "cmexam" not in out and not findings.problems


FAULTS = {
    "data, batch, tracker, questions": {
        'sft.data=["bad.jsonl"]': "sft.data: 50 of the first 50 records of bad.jsonl cannot be used (50 x unknown layout: "
        "fields question, reply; expected conversations, messages, instruction/input/output, question/answer, "
        "input/target, conversation or a list of turns; in a corpus file this may help: columns "
        '{"answer": "reply"}; the first: bad.jsonl:1)',
        'dpo.data=["nowhere.jsonl"]': "dpo.data: nowhere.jsonl: no such data file",
        "pretraining.global_batch_size=7": "pretraining.global_batch_size is 7, which does not divide by 8 ranks",
        'dpo.report_to=["wandb"]': "dpo.report_to names 'wandb', which is not installed: pip install wandb",
        'evaluation.tasks={"cmexam_letters":{"test":["no.csv"]}}': "evaluation.tasks.cmexam_letters: no.csv: no such file",
        'evaluation.answers=["no.jsonl"]': "evaluation.answers: no.jsonl: no such data file",
    },
    "parent, engine, lengths, retrieval": {
        "sft.parent=runs/other/merged": "sft starts from runs/other/merged, which does not exist, and no earlier stage makes",
        "sft.deepspeed=no.json": "deepspeed configuration no.json cannot be read",
        'dpo.report_to=["wandbb"]': "dpo.report_to names 'wandbb', which transformers does not know",
        'dpo.lora.target_modules=["nothing"]': "lora.target_modules = ['nothing'] does not fit",
        # 14 blocks are full; of 300 documents of 240 tokens 8 lie whole in the last, of 2,000.
        "pretraining.block_size=5000 pretraining.isolate_documents=false": "pretraining.data: 292 of 300 records looked at"
        " give rows of up to 5,000 tokens, the model has 4,096 positions: lower block_size",
        'dpo.data=["long.jsonl"] dpo.max_source_length=4500 dpo.batch_size_per_device=1': "dpo.data: 8 of 8 records",
        "evaluation.tasks.cmexam_generate.max_new_tokens=4096": "leaves no room for a question in the 4096 positions",
        'retrieval.corpus=["no"]': "retrieval.corpus: no: no such data file",
        'retrieval.decontamination.files=[{"name":"x","kind":"exam","paths":["no.csv"]}]': "files: no.csv: no such data file",
    },
    "template": {"model.template=own model.path=models/plain": "models/plain: this tokenizer has no chat template"},
    "base": {"model.path=models/nowhere": "model.path: models/nowhere does not exist"},
}


@pytest.mark.parametrize("faults", FAULTS)
def test_all_faults_are_told_at_once(checked, faults):
    write_rows(Path("bad.jsonl"), [{"question": "头痛怎么办？", "reply": "请休息。"}] * 50)
    write_rows(Path("long.jsonl"), [{"prompt": "发热三天" * 3000, "chosen": "请休息。", "rejected": "不知道。"}] * 8)
    if faults == "template":
        shutil.copytree("models/baichuan-7b", "models/plain", symlinks=True, copy_function=os.link)
        Path("models/plain/chat_template.jinja").unlink()
    overrides = " ".join(FAULTS[faults]).split(" ")
    _, findings = checked(*overrides)
    for words in FAULTS[faults].values():
        assert sum(words in problem for problem in findings.problems) == 1, findings.problems
    assert len(findings.problems) == len(FAULTS[faults]), findings.problems


def test_too_little_memory_and_disk_are_told(checked):
    _, findings = checked(gpu="3090-24g")
    assert [p.split(" needs about")[0] for p in findings.problems] == ["pretraining"], findings.problems
    # 326.0, 14.0 and 14.0 GiB; a tenth less might do
    _, findings = checked(disk=315)
    assert not findings.problems and any(
        "353.9 GiB needed (pretraining 326.0, sft 14.0, dpo" in n for n in findings.notes
    )
    _, findings = checked(disk=320)
    assert not any("GiB needed" in note for note in findings.notes)


def test_a_disk_that_is_too_small_ends_a_run_here(checked):
    cpu = ("launch.device=cpu", "launch.processes=1")  # whose memory is too small as well
    _, findings = checked(*cpu, disk=100)
    assert [problem.split(" needed")[0][-9:] for problem in findings.problems if "free;" in problem] == ["353.9 GiB"]


def test_a_stage_that_was_begun_with_other_settings_is_told_before_its_turn(checked):
    overrides = ["output_dir=runs/begun", "sft.learning_rate=1e-4"]
    experiment = load_experiment(CONFIG, overrides)
    schedule = make_schedule("sft", experiment.sft, 600, 8)
    job = Job(experiment, "sft", Path("parent"), "fingerprint", Path("rows"), schedule)
    job.folder.mkdir(parents=True)
    job.save(job.folder / "job.json")
    _, findings = checked("output_dir=runs/begun")
    assert len(findings.problems) == 1
    assert "sft was made with other settings (sft.learning_rate: 0.0001 -> 2e-05). Use" in findings.problems[0]
    shutil.rmtree("runs")


def test_large_data_are_estimated_from_their_heads(checked):
    """3,000 rows, of which the first 1,000 are looked at; all are alike, so the estimate is exact."""
    rows = [{"instruction": f"头痛{i:04}怎么办？", "output": "请休息。"} for i in range(3000)]
    for file in ("large.jsonl", "large.json"):
        write_rows(Path(file), rows)
        out, _ = checked(f'sft.data=["{file}"]', only="sft")
        assert cells(out, "sft")[1:5] == ["~3,000", "0.0%", "0.0%", "6"]
        assert "estimated from 1,000 records" in out


def test_what_is_made_first_may_be_missing(checked):
    out, findings = checked('sft.data=["made/sft"]', 'evaluation.answers=["made/answers.jsonl"]', made_first=["made"])
    assert not findings.problems and cells(out, "sft")[:4] == ["pretraining*", "-", "-", "-"]
    assert "made first by this run: made; 2 of the experiment's paths" in out


def test_the_command_ends_with_every_problem_on_a_line(world):
    command = [sys.executable, str(ROOT / "scripts/check.py"), "--config", CONFIG, "--gpu", "3090-24g", "--dry-run",
               'sft.report_to=["wandb"]']  # fmt: skip
    done = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines) and any("wandb" in line for line in lines)
    assert "planned for 8 x 3090-24g" in done.stdout and "Traceback" not in done.stderr
