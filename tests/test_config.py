"""The experiment file: what is refused, in which words, and that the paper's file is the paper."""

import json
from pathlib import Path

import pytest

from qilin_med.config.corpus import load_corpus_settings
from qilin_med.config.experiment import load_experiment
from qilin_med.config.paper import CORPUS as PAPER_TABLES
from qilin_med.config.reference import reference
from qilin_med.config.schedule import check_batch_size
from qilin_med.errors import UserError
from qilin_med.launch.agent import count_ranks

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "configs" / "qilin_med_7b.json"


def experiments() -> list[Path]:
    return sorted(path for path in (ROOT / "configs").glob("*.json") if "chimed" not in path.name)


@pytest.mark.parametrize("path", experiments(), ids=lambda path: path.name)
def test_every_shipped_experiment_loads(path):
    experiment = load_experiment(path)
    for stage in ("pretraining", "sft", "dpo"):
        section = getattr(experiment, stage)
        if section and section.deepspeed:
            json.loads((ROOT / section.deepspeed).read_text())


def test_shipped_corpus_files_load_and_chimed_has_every_data_set_of_the_paper():
    chimed = load_corpus_settings(ROOT / "configs" / "chimed.json")
    named = {stage: {s.name for s in chimed.sources if s.stage == stage} for stage in PAPER_TABLES}
    assert named == {stage: set(table) for stage, table in PAPER_TABLES.items()}
    load_corpus_settings(ROOT / "configs" / "demo_chimed.json")


def test_the_papers_file_states_the_papers_table():
    paper = load_experiment(PAPER)
    cpt, sft, dpo = paper.pretraining, paper.sft, paper.dpo
    assert (cpt.epochs, cpt.learning_rate, cpt.block_size) == (3, 2e-4, 1024)
    assert (cpt.warmup_ratio, cpt.weight_decay) == (0.05, 0.01)
    assert [s.global_batch_size for s in (cpt, sft, dpo)] == [1 * 8, 64 * 8, 8 * 4]
    assert (sft.learning_rate, sft.warmup_ratio, sft.weight_decay) == (2e-5, 0.05, 0.05)
    assert (sft.lora.rank, sft.lora.alpha, sft.lora.dropout) == (8, 32, 0.05)
    assert (dpo.lora.rank, dpo.lora.alpha, dpo.lora.dropout) == (8, 16, 0.05)
    assert (dpo.learning_rate, dpo.warmup_ratio, dpo.weight_decay, dpo.beta) == (2e-5, 0.05, 0.05, 0.1)
    assert {s.max_source_length for s in (sft, dpo)} == {s.max_target_length for s in (sft, dpo)} == {256}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.learning_rat=1", ["sft.learning_rat", "did you mean 'learning_rate'"]),
        ("sfft.epochs=1", ["'sfft'", "did you mean 'sft'"]),
        ("sft.epochs=two", ["sft.epochs", "valid number", '"two"']),
        ("sft.epochs=-1", ["sft.epochs", "greater than 0"]),
        ("sft.packing=1", ["sft.packing", "boolean"]),
        ("model.dtype=float16", ["model.dtype", "bfloat16"]),
        ('sft.lora={"rank": 8}', ["sft.lora.alpha", "missing"]),
        ("epochs", ["key.path=value"]),
        ("name.x=1", ["'name' is a value"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(override, words):
    with pytest.raises(UserError) as error:
        load_experiment(PAPER, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "pretraining.block_size",
        "pretraining.epochs",
        "sft.learning_rate",
        "sft.lora.rank",
        "sft.warmup_ratio",
        "dpo.beta",
    ],
)
def test_a_paper_number_left_out_is_refused(tmp_path, key):
    raw = json.loads(PAPER.read_text())
    *sections, last = key.split(".")
    section = raw
    for name in sections:
        section = section[name]
    del section[last]
    (tmp_path / "c.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        load_experiment(tmp_path / "c.json")


def test_overrides_and_extends(tmp_path):
    (tmp_path / "base.json").write_text(PAPER.read_text())
    (tmp_path / "mine.json").write_text(json.dumps({"extends": "base.json", "seed": 7, "sft": {"epochs": 2}}))
    mine = load_experiment(tmp_path / "mine.json", ['sft.data=["a.jsonl"]', "output_dir=runs/x"])
    assert (mine.seed, mine.sft.epochs, mine.sft.learning_rate, mine.output_dir) == (7, 2, 2e-5, "runs/x")
    assert mine.sft.data[0].path == "a.jsonl"
    copy = mine.model_copy(update={"seed": 8})
    assert copy.overrides == mine.overrides == ('sft.data=["a.jsonl"]', "output_dir=runs/x")
    assert "overrides" not in mine.model_dump_json()
    (tmp_path / "third.json").write_text(json.dumps({"extends": "mine.json"}))
    with pytest.raises(UserError, match="only one level"):
        load_experiment(tmp_path / "third.json")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such"), ("{", "line 1"), ("[]", "JSON object"), (b"\xff", "UTF-8")]
)
def test_unreadable_files(tmp_path, content, words):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load_experiment(path)


def test_impossible_combinations():
    cpu = load_experiment(PAPER, ["launch.device=cpu", "launch.processes=2", "sft.global_batch_size=130"])
    assert count_ranks(cpu.launch, gpus=0) == 2
    with pytest.raises(UserError, match=r"130, which does not divide by 2 ranks x .* 64 = 128"):
        check_batch_size("sft", cpu.stage("sft"), ranks=2)
    paper = load_experiment(PAPER)
    assert count_ranks(paper.launch, gpus=8) == 8
    for stage in ("pretraining", "sft", "dpo"):
        check_batch_size(stage, paper.stage(stage), ranks=8)  # the machine that README names
    check_batch_size("dpo", load_experiment(ROOT / "configs/qilin_med_7b_3090x4.json").stage("dpo"), ranks=4)
    with pytest.raises(UserError, match="no GPU is visible"):
        count_ranks(paper.launch, gpus=0)
    with pytest.raises(UserError, match="16 but 8 GPUs"):
        count_ranks(load_experiment(PAPER, ["launch.processes=16"]).launch, gpus=8)


def test_the_reference_of_keys_is_current():
    assert (ROOT / "configs" / "README.md").read_text() == reference(), "run python -m qilin_med.config.reference"
