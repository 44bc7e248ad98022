"""A corpus file over every file of the shared data that a reader fits."""

from pathlib import Path
from typing import Any


def shared_corpus(shared: Path, tokenizer: Path, output: Path) -> dict[str, Any]:
    data = shared / "data"

    def source(stage: str, name: str, kind: str, *paths: str, **more: Any) -> dict[str, Any]:
        place = {"paths": [str(data / path) for path in paths], "licence": "see MANIFEST"}
        return {"stage": stage, "name": name, "kind": kind, **place, **more}

    def evaluation(name: str, kind: str, path: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "kind": kind, "paths": [str(data / path)], **more}

    exam_columns = {"question": "problem_text", "options": "choices"}
    sources = [
        source("pretraining", "MedQA textbooks", "text", "rag_cpt/tcm_ancient_books", join_lines=400),
        source("pretraining", "articles", "text", "rag_cpt/fever.txt", "rag_cpt/medical_corpus.txt"),
        source("pretraining", "firefly", "text", "rag_cpt/firefly_dummy_pretrain.jsonl"),
        source("pretraining", "guidelines", "text", "rag_cpt/nhc_guides", columns={"text": "content"}),
        source("pretraining", "Xywy-KG", "xywy_kg", "kg_xywy/medical1.json", "kg_xywy/medical_sample.json"),
        source("pretraining", "39Health-KG", "39health_kg", "kg_39health/disease.csv"),
        source("pretraining", "Chinese-medical-dialogue-data", "department_qa", "dialogue_toyhom"),
        source("pretraining", "Medical-Dialogue-System", "meddialog", "dialogue_covid_ucsd"),
        source("pretraining", "Huatuo-26M encyclopedias", "huatuo", "huatuo26m"),
        source("pretraining", "CMExam", "exam", "cmexam/cmexam_test_01_clinical_depart.csv", "cmexam/test_10.csv"),
        source("sft", "Alpaca_gpt4_data_zh", "chat", "sft_general/alpaca_zh_demo.json"),
        source("sft", "Train_1M_CN", "chat", "sft_general/Belle_open_source_1k.json", "sft_general/belle_dev1K.json"),
        source("sft", "Multiturn_chat", "chat", "sft_general/sharegpt_zh_1K_format.jsonl"),
        source("sft", "medical", "chat", "sft_general/medical_sft_1K_format.jsonl"),
        source("sft", "vicuna", "chat", "sft_general/chinese_vicuna_instruct_data_sample.jsonl"),
        source("sft", "Instruct_chat", "instruct_chat", "sft_general/chinese_vicuna_chat_data_sample.jsonl"),
        source("sft", "firefly", "chat", "sft_general/firefly_dummy_data.jsonl"),
        source("sft", "BenTsao", "chat", "rag_cpt/bentsao_llama_data.json", "rag_cpt/bentsao_infer.json"),
        source("sft", "liver cancer", "multiturn_chat", "rag_cpt/liver_cancer.json"),
        source("sft", "CMExam", "chat", "cmexam/train_CMExam_single_sft.json", "cmexam/CMExam_multiple_sft.json"),
        source("sft", "CMExam-explanation", "exam", "cmexam/cmexam_test_01_difficulty_level.csv"),
        source("sft", "Chinese-medical-dialogue-data", "department_qa", "dialogue_toyhom"),
        source("sft", "Medical-Dialogue-System", "meddialog", "dialogue_covid_ucsd"),
        source("sft", "CMD", "chat", "dialogue_disc/cmd_samples.json", columns={"answer": "raw_anwser"}),
        source("dpo", "MedicalGPT", "preference", "preference/dpo_zh_500.jsonl", "preference/medical_reward_test.json"),
        source("dpo", "general", "preference", "preference/dpo_zh_demo.json", "preference/firefly_dummy_dpo.jsonl"),
        source("dpo", "Zhongjing_rlhf", "zhongjing", "preference/zhongjing_total_dataset.tsv",
               "preference/rlhf_label_tool_output_result.tsv"),
    ]  # fmt: skip
    return {
        "name": "shared",
        "output_dir": str(output),
        "tokenizer": str(tokenizer),
        "sources": sources,
        "decontamination": {
            "files": [
                evaluation("CMExam test", "exam", "cmexam/cmexam_test.jsonl", columns=exam_columns),
                evaluation("CMExam val", "exam", "cmexam/val.xlsx"),
                evaluation("C-Eval", "exam", "ceval/ceval.zip"),
                evaluation("Huatuo-26M test", "huatuo", "huatuo26m/huatuo26M_test.json"),
            ]
        },
    }
