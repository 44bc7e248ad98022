import copy
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qilin_med.config.experiment import DpoConfig, InstructionConfig, LoraSettings, PretrainingConfig
from qilin_med.data import rows as rows_module
from qilin_med.data.processes import in_order, run_all
from qilin_med.data.read.readers import read_chats
from qilin_med.data.rows import cut_into_blocks, open_rows, prepare_rows, row_costs
from qilin_med.errors import UserError
from qilin_med.prompt.template import IGNORED, ChatTemplate

COMMON = {"epochs": 1, "batch_size_per_device": 1, "learning_rate": 1e-4, "warmup_ratio": 0.0, "weight_decay": 0.0}
LORA = LoraSettings(rank=8, alpha=32, dropout=0.0)


def pretraining(path, block_size=16, **more) -> PretrainingConfig:
    return PretrainingConfig(data=[str(path)], block_size=block_size, **more, **COMMON)


def sft(path, source=32, target=32, **more) -> InstructionConfig:
    limits = {"max_source_length": source, "max_target_length": target}
    return InstructionConfig(data=[str(path)], lora=LORA, **limits, **more, **COMMON)


def dpo(path, source=32, target=32) -> DpoConfig:
    limits = {"max_source_length": source, "max_target_length": target}
    return DpoConfig(data=[str(path)], beta=0.1, lora=LORA, **limits, **COMMON)


def flat(column) -> list[int]:
    return [token for row in column for token in row]


@pytest.fixture
def chats(write_lines):
    """120 chats of many lengths, one without an answer, one with a role mark, one of many turns, one broken line."""
    rows = [{"instruction": "头痛" * (n % 11 + 1), "output": "休息" * (n * 7 % 13 + 1)} for n in range(120)]
    long = [{"from": ("input", "output")[n % 2], "value": "发热三天" * 3} for n in range(12)]
    bad = [{"instruction": "a"}, {"instruction": "<reserved_102>", "output": "b"}, '{"instruction']
    return write_lines(*rows, {"conversations": long}, *bad)


# --------------------------------------------------------------------------------------------------- pretraining


def test_blocks_by_hand():
    documents = [(id_, np.array(ids)) for id_, ids in (("a", [1, 2, 3, 4, 5, 0]), ("b", [6, 0]), ("c", [7, 8, 9, 0]))]
    blocks = cut_into_blocks(documents, 5, isolate=True)
    assert [{**block, "input_ids": block["input_ids"].tolist()} for block in blocks] == [
        {"ids": ["a"], "input_ids": [1, 2, 3, 4, 5], "lengths": [5]},
        {"ids": ["a", "b", "c"], "input_ids": [0, 6, 0, 7, 8], "lengths": [1, 2, 2]},
        {"ids": ["c"], "input_ids": [9, 0], "lengths": [2]},
    ]
    assert [row["lengths"] for row in cut_into_blocks(documents, 5, isolate=False)] == [[5], [5], [2]]


@pytest.mark.parametrize("isolate", [True, False])
def test_blocks_hold_every_token_of_every_document_in_order(small_tokenizer, plain, write_lines, tmp_path, isolate):
    texts = [f"第{n}位患者血压偏高，" * (n % 9 + 1) + "</s>" for n in range(1500)]
    path = write_lines(*({"text": text} for text in texts))
    section = pretraining(path, block_size=64, isolate_documents=isolate)
    rows = prepare_rows("pretraining", section, small_tokenizer, 64, tmp_path / "cache")
    expected = [token for text in texts for token in [*plain(text), small_tokenizer.eos_token_id]]
    assert flat(rows.dataset["input_ids"]) == expected
    assert [len(ids) for ids in rows.dataset["input_ids"][:-1]] == [64] * (len(rows.dataset) - 1)
    assert all(sum(row["lengths"]) == len(row["input_ids"]) for row in rows.dataset)
    segments = len(flat(rows.dataset["lengths"]))
    assert (segments == len(rows.dataset)) != isolate
    counts = rows.counts
    assert (counts["records"], counts["used"], counts["tokens"]) == (1500, 1500, len(expected))
    assert counts["trained_tokens"] == len(expected) - segments and counts["rows"] == len(rows.dataset)


def test_every_row_tells_which_documents_it_holds(small_tokenizer, write_lines, tmp_path):
    path = write_lines("发热", "头痛" * 40, "胃痛", name="text.txt")
    rows = prepare_rows("pretraining", pretraining(path), small_tokenizer, None, tmp_path / "cache").dataset
    assert rows[0]["ids"] == [f"{path}:1", f"{path}:2"] and rows[-1]["ids"] == [f"{path}:2", f"{path}:3"]
    assert all(len(row["ids"]) == len(row["lengths"]) for row in rows)


# ----------------------------------------------------------------------------------------------------------- sft


def test_rows_are_the_encoded_chats_in_order(small_tokenizer, chats, tmp_path):
    section = sft(chats)
    rows = prepare_rows("sft", section, small_tokenizer, 64, tmp_path / "cache")
    template = ChatTemplate(small_tokenizer)
    good = [record for record in read_chats(section.data) if not hasattr(record, "reason")]
    expected = [row for encoded in template.encode_chats(good, 32, 32) if isinstance(encoded, list) for row in encoded]
    assert rows.dataset["input_ids"] == [row.input_ids for row in expected]
    assert rows.dataset["labels"] == [row.labels for row in expected]
    assert row_costs(rows.dataset).tolist() == [len(row.input_ids) for row in expected]
    assert rows.counts["rows"] == len(expected) and rows.counts["tokens"] == sum(row_costs(rows.dataset))
    assert str(rows.dataset.features["labels"]) == "List(Value('int32'))"


def test_counts_add_up(small_tokenizer, chats, tmp_path):
    rows = prepare_rows("sft", sft(chats), small_tokenizer, None, tmp_path / "cache")
    counts = rows.counts
    assert counts["skipped"] == {
        "no answer": 1, "contains a role mark": 1, "broken JSON: Unterminated string starting at": 1
    }  # fmt: skip
    assert (counts["records"], counts["used"]) == (124, 121)
    [file] = counts["files"]
    assert (file["records"], file["used"], file["skipped"]) == (124, 121, 3)
    assert counts["continued"] == counts["rows"] - 121 > 0
    assert counts["trained_tokens"] == sum(label != IGNORED for label in flat(rows.dataset["labels"]))
    notes = [json.loads(line) for line in (rows.folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(note["id"] for note in notes) == [f"{chats}:{number}" for number in (122, 123, 124)]
    assert all(note["raw"] for note in notes)


# ----------------------------------------------------------------------------------------------------------- dpo


def test_preferences_lie_in_order_of_length(small_tokenizer, write_lines, plain, tmp_path):
    texts = [("头痛" * (n * 7 % 11 + 1), "休息" * (n * 5 % 7 + 1), "不知道") for n in range(60)]
    names = ("question", "response_chosen", "response_rejected")
    path = write_lines(
        *(dict(zip(names, text, strict=True)) for text in texts),
        {"question": "a", "response_chosen": "休息" * 50, "response_rejected": "休息" * 51},
    )
    rows = prepare_rows("dpo", dpo(path), small_tokenizer, None, tmp_path / "cache")
    pairs = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows.dataset]
    assert rows.counts["longest"] == max(prompt + max(answers) for prompt, *answers in pairs)
    assert row_costs(rows.dataset).tolist() == [2 * prompt + sum(answers) for prompt, *answers in pairs]
    for row in rows.dataset:
        _, chosen, rejected = texts[int(row["ids"][0].rpartition(":")[2]) - 1]
        assert row["chosen_ids"] == [*plain(chosen), small_tokenizer.eos_token_id]
        assert row["rejected_ids"] == [*plain(rejected), small_tokenizer.eos_token_id]
    assert rows.counts["skipped"] == {"chosen and rejected are the same after cutting": 1}
    assert (rows.counts["records"], rows.counts["used"], rows.counts["rows"]) == (61, 60, 60)


# --------------------------------------------------------------------------------------------------------- cache


def test_whole_rows_are_used_again_and_damaged_ones_made_again(small_tokenizer, chats, tmp_path, capsys):
    first = prepare_rows("sft", sft(chats), small_tokenizer, None, tmp_path / "cache")
    made = (first.folder / "rows.arrow").stat().st_mtime_ns
    again = prepare_rows("sft", sft(chats), small_tokenizer, None, tmp_path / "cache")
    assert again.folder == first.folder and (first.folder / "rows.arrow").stat().st_mtime_ns == made
    assert again.counts == first.counts == open_rows(first.folder).counts
    expected = (first.folder / "rows.arrow").read_bytes()
    (first.folder / "rows.arrow").write_bytes(expected[:-8] + b"damaged!")
    assert capsys.readouterr().err == ""
    repaired = prepare_rows("sft", sft(chats), small_tokenizer, None, tmp_path / "cache")
    assert "damaged" in capsys.readouterr().err
    assert (repaired.folder / "rows.arrow").read_bytes() == expected
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_rows_are_made_again_exactly_when_something_that_matters_changes(small_tokenizer, chats, write_lines, tmp_path):
    def folder(section, stage="sft"):
        return prepare_rows(stage, section, small_tokenizer, None, tmp_path / "cache").folder.name

    same = {folder(sft(chats)), folder(sft(chats).model_copy(update={"learning_rate": 5.0, "packing": False}))}
    copy = chats.rename(chats.with_name("renamed.jsonl"))
    assert len(same | {folder(sft(copy))}) == 1
    changed = {folder(sft(copy, target=31)), folder(sft(copy, source=31))}
    twice = sft(copy).model_copy(update={"data": sft(copy).data * 2})
    edited = write_lines({"instruction": "发热", "output": "休息"}, name="edited.jsonl")
    assert len(same | changed | {folder(twice), folder(sft(edited))}) == 5


def test_packed_rows_are_made_again_when_their_name_says_another_format(small_tokenizer, tmp_path):
    packed = tmp_path / "rows.txt.gz"
    packed.write_bytes(gzip.compress('{"text": "发热"}'.encode(), mtime=0))
    renamed = shutil.copy(packed, tmp_path / "rows.jsonl.gz")
    rows = [
        prepare_rows("pretraining", pretraining(path), small_tokenizer, None, tmp_path) for path in (packed, renamed)
    ]
    assert rows[0].counts["tokens"] > rows[1].counts["tokens"] > 0


def test_another_tokenizer_or_template_makes_other_rows(small_tokenizer, chats, tmp_path):
    other, template = copy.deepcopy(small_tokenizer), copy.deepcopy(small_tokenizer)
    other.add_tokens("头痛")
    template.chat_template = template.chat_template.replace("% for", "%- for", 1)
    tokenizers = (small_tokenizer, copy.deepcopy(small_tokenizer), other, template)
    names = [prepare_rows("sft", sft(chats), each, None, tmp_path / "cache").folder.name for each in tokenizers]
    assert names[0] == names[1] and len(set(names)) == 3


def test_a_failed_run_leaves_nothing_behind(small_tokenizer, write_lines, tmp_path):
    path = write_lines({"instruction": "a"}, {"instruction": "b"}, {"ask": "c"})
    with pytest.raises(
        UserError, match=r"no usable record among 3 in .*data\.jsonl: 2 x no answer; 1 x unknown layout"
    ):
        prepare_rows("sft", sft(path), small_tokenizer, None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_impossible_lengths_are_refused(small_tokenizer, chats, tmp_path):
    with pytest.raises(UserError, match=r"57 tokens in sequence, the model has 16 positions: lower sft's max_source_"):
        prepare_rows("sft", sft(chats), small_tokenizer, 16, tmp_path / "cache")
    text = chats.with_name("text.txt")
    text.write_text("发热" * 100, encoding="utf-8")
    with pytest.raises(
        UserError, match="24 tokens in sequence, the model has 16 positions: lower pretraining's block_"
    ):
        prepare_rows("pretraining", pretraining(text, block_size=24), small_tokenizer, 16, tmp_path / "cache")


# ----------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("stage", ["pretraining", "sft"])
def test_any_number_of_processes_makes_the_same_bytes(small_tokenizer, chats, tmp_path, monkeypatch, stage):
    data, section = chats, sft(chats)
    if stage == "pretraining":
        data = chats.with_name("text.txt.gz")  # cannot be cut: read by this process, tokenised by the others
        data.write_bytes(gzip.compress("".join(f"第{n}位患者" * (n % 5 + 1) + "\n" for n in range(3000)).encode()))
        section = pretraining(data)
    monkeypatch.setattr(rows_module, "JOB_BYTES", 500)
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(rows_module, "PARALLEL_BYTES", 0)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        made.append(prepare_rows(stage, section, small_tokenizer, None, tmp_path / f"cache{cores}"))
    assert made[0].counts == made[1].counts
    assert made[0].counts["records"] == (124 if stage == "sft" else 3000)
    for name in ("rows.arrow", "skipped.jsonl"):
        assert (made[0].folder / name).read_bytes() == (made[1].folder / name).read_bytes()


def test_results_come_in_order_and_ctrl_c_ends_all_processes():
    code = """
import time
from qilin_med.data.processes import in_order
from qilin_med.errors import user_errors_end_with_one_line
def work(job):
    time.sleep(0.001 * (job * 7 % 13))
    return job * job
assert [result for _, result in in_order(work, range(100), 4)] == [n * n for n in range(100)]
with user_errors_end_with_one_line():
    for job, _ in in_order(work, iter(int, 1), 4):
        print("begun", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)  # until no process holds the pipe any more
    assert (process.returncode, errors) == (130, "\nstopped by the user; run the same command to continue\n")


@pytest.mark.parametrize("run", [run_all, lambda *work: list(in_order(*work))])
def test_a_killed_worker_ends_the_work(run):
    def work(job):
        if job == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0 if job < 3 else 60)

    start = time.monotonic()
    with pytest.raises(UserError, match="was killed"):
        run(work, range(8), 2)
    assert time.monotonic() - start < 30
