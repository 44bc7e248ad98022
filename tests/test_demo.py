"""The README's commands, in a copy of the repository as a new user has it: the demo whole, and what it must show."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qilin_med.artifact import verify_folder

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretraining", "sft", "dpo")


def shell(command: str, folder: Path, code: int = 0, **environment: str) -> str:
    run = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},  # the clone's package, not the installed one
        timeout=3600,
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


def commands_of(readme: Path) -> list[str]:
    """Lines of the README's bash blocks, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = (line.split(" # ")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The tracked files alone, with the environment that setup.sh already made."""
    folder = tmp_path_factory.mktemp("clone") / "qilin-med"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    # The same environment by its own path.
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy2(ROOT / ".venv/installed", folder / ".venv/installed")
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{ROOT}/.venv/bin/python" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def demo(clone) -> str:
    """What `bash run_all.sh` prints."""
    return shell("bash run_all.sh", clone)


def measures(clone: Path) -> dict[str, dict[str, float]]:
    results = {}
    for model in ("base", *STAGES):
        result = json.loads((clone / "runs/demo/eval" / model / "heldout/result.json").read_text())
        results[model] = {name: measure["value"] for name, measure in result["measures"].items()}
    return results


def test_each_stage_helps(clone, demo):
    found = measures(clone)
    base, cpt, sft, dpo = (found[model] for model in ("base", *STAGES))
    assert cpt["perplexity medical"] * 4 < base["perplexity medical"]
    assert sft["answer loss"] < 0.8 * cpt["answer loss"]
    assert dpo["preference accuracy"] > sft["preference accuracy"] + 0.05
    first = json.loads((clone / "runs/demo/dpo/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - 0.693147) < 1e-5


def compared(clone: Path, task: str, first: str, second: str, metric: str) -> dict[str, float]:
    entries = json.loads((clone / "runs/demo/eval/comparisons.json").read_text())
    (entry,) = [e for e in entries if (e["task"], e["first"], e["second"]) == (task, first, second)]
    return entry["metrics"][metric]


def is_gain(test: dict[str, float]) -> bool:
    return test["difference"] > 0 and test["p"] < 0.01


def test_the_staircase(clone, demo):
    """docs/demo.md: exam answers about facts that were read but never asked, base < pretraining < sft."""
    assert is_gain(compared(clone, "cmexam_options", "base", "pretraining", "accuracy"))
    assert is_gain(compared(clone, "cmexam_options", "pretraining", "sft", "accuracy"))
    results = (clone / "runs/demo/eval" / model / "cmexam_options/result.json" for model in ("base", "sft"))
    base, sft = (json.loads(file.read_text())["metrics"]["accuracy"] for file in results)
    assert base["high"] < sft["low"] and base["low"] < 0.2 < base["high"]


def test_preference_training_helps_on_pairs_and_consultations(clone, demo):
    assert is_gain(compared(clone, "heldout", "sft", "dpo", "preference accuracy"))
    assert is_gain(compared(clone, "consultations", "sft", "dpo", "bleu1_char"))


def test_retrieval_helps_on_facts_that_no_stage_read(clone, demo):
    for ending in ("retrieval", "retrieval_without_exams"):
        assert is_gain(compared(clone, f"unseen_{ending}", "sft", "sft with retrieval", "accuracy"))


def built(clone: Path) -> dict:
    return json.loads((clone / "data/demo/processed/manifest.json").read_text())


def test_the_builder_finds_every_planted_fault_and_nothing_else(clone, demo):
    planted = json.loads((clone / "data/demo/manifest.json").read_text())["planted"]
    found = {}
    for source in built(clone)["sources"]:
        counts = {"passages cut": source["cut"]} if source["cut"] else {}
        for kind in ("rows_skipped", "rejected", "duplicates", "changed"):
            counts |= source[kind]
        found[f"{source['stage']}/{source['name']}"] = counts
    assert found == planted


def test_stages_train_on_all_that_was_built(clone, demo):
    for stage in STAGES:
        counts = verify_folder(clone / "runs/demo" / stage / "merged")["data"]["counts"]
        assert counts["used"] == counts["records"] == built(clone)["totals"][stage]["train"]
        assert not counts["skipped"]


def test_no_held_out_disease_is_in_fine_tuning_or_preferences(clone, demo):
    facts = [json.loads(line) for line in (clone / "data/demo/facts.jsonl").read_text().splitlines()]
    never_asked = {fact["subject"] for fact in facts if fact["seen"] != "cpt+sft"}
    for file in [file for stage in ("sft", "dpo") for file in (clone / "data/demo/processed" / stage).iterdir()]:
        text = file.read_text(encoding="utf-8")
        assert not [name for name in never_asked if name in text], file.name


def test_the_report_holds_the_table_and_how_it_was_made(clone, demo):
    report = (clone / "runs/demo/report.md").read_text(encoding="utf-8")
    measured = re.findall(r"^\| (?:base|CPT|SFT|DPO) .*$", demo, flags=re.MULTILINE)
    values = [cell.split("±")[0].strip() for line in measured for cell in line.split("|")[2:-1]]
    assert len(measured) >= 4 and all(value in report for value in values)
    page = (clone / "runs/demo/report.html").read_text(encoding="utf-8")
    for words in ("bash run_sft.sh", "learning_rate", "fingerprint", "skipped", "Invented: ", "Against base, DPO is "):
        assert words in report and words in page
    assert "pipeline_tag: text-generation" in (clone / "runs/demo/dpo/merged/README.md").read_text(encoding="utf-8")


def test_running_it_again_does_nothing_twice(clone, demo):
    """The steps before the stages, and one stage; tests/test_training.py has the others."""
    data = "scripts/make_demo.py && .venv/bin/python scripts/build_chimed.py configs/demo_chimed.json"
    again = shell(f".venv/bin/python {data} && bash run_pt.sh", clone)
    assert again.count("already") >= 5, again


NOT_RUN_HERE = {
    "bash run_all.sh": "runs in the fixture above",
    "bash run_all.sh --dry-run": "has a test of its own below",
    "bash run_tests.sh": "runs these tests",
    "export CONFIG=configs/qilin_med_7b.json": "used below",
    "bash run_pt.sh && bash run_sft.sh && bash run_dpo.sh": "needs eight GPUs",
    "python scripts/chat.py --config configs/demo.json --web": "tests/test_chat.py opens the page",
    "python scripts/compare.py runs/demo runs/demo_without_cpt": "tests/test_report.py compares runs",
    "python scripts/benchmark.py train": "takes minutes of both cores",
}
# Part of a command -> (what of it is replaced, by what, what is printed)
RUN_HERE = {
    "--dry-run": ("", "", ""),
    "convert_baichuan.py": ("path/to/Baichuan-7B", "{shared}/baichuan7b-tiny-original", ""),
    # The published files are not here, the demo's are of the same formats.
    "build_chimed.py configs/chimed.json --inspect": ("chimed.json", "demo_chimed.json", ""),
    "build_chimed.py configs/chimed.json": ("chimed.json", "demo_chimed.json", "data/demo/processed: built"),
    "evaluate.py": ("", "", "cmexam_options: 312 questions"),
    "report.py": ("", "", "report: runs/demo/report.html"),
    "paper_diff.py": ("", "", "| pretraining.block_size "),
    "plan.py": ("", "", "8 x a100-80g, ZeRO-2, bfloat16"),
    "build_index.py": ("", "", "built"),
    "chat.py": (".venv/bin/python", "echo 头痛怎么办？ | .venv/bin/python", "For research only"),
}


def test_the_readmes_commands_run(clone, demo, shared):
    """Every command of both READMEs: the same ones, each run here or named above with the reason why not."""
    commands = commands_of(clone / "README.md")
    assert commands == commands_of(clone / "README.zh.md")
    for command in (command for command in commands if command not in NOT_RUN_HERE):
        part = next((part for part in RUN_HERE if part in command), None)
        assert part, f"not under test: {command}"
        old, new, printed = RUN_HERE[part]
        command = re.sub("^python ", ".venv/bin/python ", command)
        assert printed in shell(command.replace(old, new.format(shared=shared)) if old else command, clone)


def test_the_dry_run_of_the_paper_misses_only_the_published_exams(clone, demo):
    for stage in STAGES:
        shutil.copytree(clone / "data/demo/processed" / stage, clone / "data/processed" / stage)
    told = shell("bash run_all.sh --dry-run", clone, code=2, CONFIG="configs/qilin_med_7b.json").splitlines()
    errors = [line for line in told if line.startswith("error: ")]
    assert errors and all(": data/raw/" in line for line in errors), errors


def test_the_docs_commands_run(clone, demo):
    """Commands of docs/ that the READMEs do not have, with the demo's settings in place of the paper's."""
    # Under test in test_nodes.py, test_training.py, test_chat.py, or above:
    elsewhere = ("NODES=", "HOSTFILE=", "--nnodes", "srun ", "--hostfile", "build_chimed", "convert_baichuan", "chat.")
    not_here = ("accelerate launch", "scripts/setup.sh", "bash run_pt.sh &&", "export ")
    of_others = ("pip install", "transformers serve", "curl ", "vllm serve", "convert_hf_to_gguf.py")
    lines = [command for page in sorted((clone / "docs").glob("*.md")) for command in commands_of(page)]
    lines = [line.replace("configs/qilin_med_7b.json", "configs/demo.json") for line in dict.fromkeys(lines)]
    known = (*commands_of(clone / "README.md"), "bash run_all.sh --dry-run")
    left_out = (*elsewhere, *not_here, *of_others)
    commands = [line for line in lines if line not in known and not any(word in line for word in left_out)]
    assert len(commands) >= 3
    for command in commands:
        command = re.sub("^python ", ".venv/bin/python ", command)
        shell(command.replace("cmexam_generate,cmexam_letters", "unseen"), clone)
