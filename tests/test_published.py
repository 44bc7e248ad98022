"""Files that other projects published, whole: they lie beside the repository on development machines."""

from collections import Counter

import pytest
import zstandard
from reading import read, records, same

from qilin_med.config.experiment import DataSource
from qilin_med.data.read.readers import read_chats, read_preferences
from qilin_med.records import Question, Skipped


@pytest.mark.parametrize(
    ("kind", "path", "rows", "skipped", "columns"),
    [
        ("exam", "cmexam/val.xlsx", 6811, {"no answer": 1}, {}),
        ("exam", "cmexam/cmexam_test.jsonl", 6811, {"answer is not among the options": 1}, {}),
        ("exam", "cmexam/cmexam_test_01_clinical_depart.csv", 606, {}, {}),
        ("exam", "cmexam/cmexam_test_01_difficulty_level.csv", 598, {}, {}),
        ("exam", "cmexam/test_10.csv", 9, {}, {}),
        ("exam", "cmexam/test_10.xlsx", 9, {}, {}),
        ("exam", "ceval/ceval.zip", 260 + 1346 + 12342, {}, {}),
        ("chat", "cmexam/train_CMExam_single_sft.json", 262, {}, {}),
        ("chat", "cmexam/CMExam_multiple_sft.json", 3, {}, {}),
        ("huatuo", "huatuo26m/huatuo26M_test.json", 6000, {}, {}),
        ("text", "kg_xywy/dict", 3353 + 37 + 54 + 8807 + 3828 + 4870 + 17201 + 5998, {}, {}),
        ("xywy_kg", "kg_xywy/medical1.json", 308, {}, {}),
        ("xywy_kg", "kg_xywy/medical_sample.json", 10, {}, {}),
        ("39health_kg", "kg_39health/disease.csv", 14336, {"more cells than columns": 11, "shifted cells": 4}, {}),
        ("department_qa", "dialogue_toyhom", 7644, {}, {}),
        ("meddialog", "dialogue_covid_ucsd/COVID-Dialogue-Dataset-Chinese.txt", 775,
         {"no dialogue": 33, "no answer": 18}, {}),
        ("meddialog", "dialogue_covid_ucsd/validate_data.json", 99, {}, {}),
        ("meddialog", "dialogue_covid_ucsd/test_data.json", 98, {}, {}),
        ("chat", "dialogue_bianque/cMedialog_example.csv", 128, {}, {}),
        ("chat", "dialogue_disc/cmd_samples.json", 120, {}, {"answer": "raw_anwser"}),
        ("chat", "dialogue_disc/cmid_samples.json", 120, {"unknown layout": 120}, {}),
        ("chat", "sft_general/Belle_open_source_1k.json", 1000, {}, {}),
        ("chat", "sft_general/sharegpt_zh_1K_format.jsonl", 993,
         {"ends with a question": 6, "no answer": 1, "empty question": 1}, {}),
        ("chat", "sft_general/medical_sft_1K_format.jsonl", 1000, {}, {}),
        ("chat", "sft_general/belle_zh_seed_tasks.json", 175, {"no answer": 175}, {}),
        ("chat", "sft_general/belle_eval_set.json", 1000, {"empty answer": 369}, {"answer": "std_answer"}),
        ("chat", "sft_general/belle_dev1K.json", 1000, {}, {}),
        ("chat", "sft_general/alpaca_zh_demo.json", 1000, {}, {}),
        ("chat", "sft_general/firefly_dummy_data.jsonl", 33, {}, {}),
        ("chat", "rag_cpt/bentsao_llama_data.json", 8658, {}, {}),
        ("instruct_chat", "sft_general/chinese_vicuna_instruct_data_sample.jsonl", 10, {}, {}),
        ("instruct_chat", "sft_general/chinese_vicuna_chat_data_sample.jsonl", 3, {}, {}),
        ("safety_prompts", "sft_general/safety_augmentation_prompts.json", 13, {"unknown layout": 13}, {}),
        ("multiturn_chat", "rag_cpt/liver_cancer.json", 1000, {}, {}),
        ("multiturn_chat", "rag_cpt/bentsao_infer.json", 5, {}, {}),
        ("preference", "preference/dpo_zh_500.jsonl", 498, {}, {}),
        ("preference", "preference/dpo_zh_demo.json", 300, {}, {}),
        ("preference", "preference/medical_reward_test.json", 100, {}, {}),
        ("preference", "preference/firefly_dummy_dpo.jsonl", 16, {}, {}),
        ("zhongjing", "preference/zhongjing_total_dataset.tsv", 1, {}, {}),
        ("zhongjing", "preference/rlhf_label_tool_output_result.tsv", 2, {}, {}),
        ("text", "rag_cpt/medical_corpus.txt", 87, {}, {}),
        ("text", "rag_cpt/fever.txt", 985, {}, {}),
        ("text", "rag_cpt/firefly_dummy_pretrain.jsonl", 45, {}, {}),
        ("text", "rag_cpt/nhc_guides", 4, {}, {"text": "content"}),
        ("text", "rag_cpt/tcm_ancient_books", 3576 + 1499, {}, {}),
    ],
)  # fmt: skip
def test_published_files_are_read_whole(shared, kind, path, rows, skipped, columns):
    pairs = read(kind, shared / "data" / path, **columns)
    found = [record for _, record in pairs]
    assert sum(count for count, _ in pairs) == rows
    assert Counter(record.reason for record in found if isinstance(record, Skipped)) == skipped
    assert len(found) == rows and len({record.id for record in found}) == rows


def test_published_dialogues_keep_their_turns(shared):
    """Turns counted by their marks in the files themselves."""
    liver = records("multiturn_chat", shared / "data/rag_cpt/liver_cancer.json")
    assert Counter(len(record.messages) // 2 for record in liver) == {1: 292, 2: 285, 3: 272, 4: 126, 5: 22, 6: 3}
    firefly = records("chat", shared / "data/sft_general/firefly_dummy_data.jsonl")
    assert sum(len(record.messages) for record in firefly) == 2 * 154


def test_published_exams_are_read_exactly(shared):
    folder = shared / "data/cmexam"
    questions = [record for record in records("exam", folder / "cmexam_test.jsonl") if isinstance(record, Question)]
    answers = Counter(len(question.answer) for question in questions)
    assert answers == {1: 6607, 2: 40, 3: 70, 4: 69, 5: 24}
    table, book = (records("exam", folder / f"test_10.{suffix}") for suffix in ("csv", "xlsx"))
    assert [same(question) for question in table] == [same(question) for question in book]
    assert all(len(question.options) == 5 and len(question.facets) == 5 for question in table)
    ceval = records("exam", shared / "data/ceval/ceval.zip")
    parts = Counter((record.id.split("!")[1].split("/")[0], bool(record.answer)) for record in ceval)
    assert parts == {("dev", True): 260, ("val", True): 1346, ("test", False): 12342}
    assert Counter(q.answer for q in ceval if "!val/" in q.id) == {"A": 310, "B": 338, "C": 344, "D": 354}


def test_a_published_table_reads_alike_in_another_encoding_and_packed(shared, tmp_path):
    [path] = (shared / "data/dialogue_toyhom").glob("*.csv")
    packed = tmp_path / "rows.csv.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes().decode("gb18030").encode()))
    assert [same(record) for record in records("department_qa", packed)] == [
        same(record) for record in records("department_qa", path)
    ]


@pytest.mark.parametrize(
    ("name", "used", "skipped"),
    [
        ("sft_general/Belle_open_source_1k.json", 1000, {}),
        ("sft_general/alpaca_zh_demo.json", 1000, {}),
        ("sft_general/belle_dev1K.json", 1000, {}),
        ("sft_general/chinese_vicuna_instruct_data_sample.jsonl", 10, {}),
        ("sft_general/medical_sft_1K_format.jsonl", 1000, {}),
        ("sft_general/sharegpt_zh_1K_format.jsonl", 985,
         {"ends with a question": 6, "no answer": 1, "empty question": 1}),
        ("huatuo26m/huatuo26M_test.json", 6000, {}),
        ("preference/dpo_zh_500.jsonl", 498, {}),
        ("preference/dpo_zh_demo.json", 300, {}),
        ("preference/firefly_dummy_dpo.jsonl", 16, {}),
        ("preference/medical_reward_test.json", 100, {}),
    ],
)  # fmt: skip
def test_published_files_train_a_stage(shared, name, used, skipped):
    read_stage = read_preferences if name.startswith("preference") else read_chats
    found = list(read_stage([DataSource(path=str(shared / "data" / name))]))
    assert Counter(record.reason for record in found if isinstance(record, Skipped)) == skipped
    assert len(found) == used + sum(skipped.values())
    assert len({record.id for record in found}) == len(found)
