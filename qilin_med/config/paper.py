"""What the paper (arXiv:2310.09089) states and prints: its tables and its training settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import STAGES, StageName, flatten, load_experiment

Figures = tuple[str, str, str]
# Tables 1 to 3 by stage and data set: its type, and samples, tokens, MB as printed.
CORPUS: dict[StageName, dict[str, tuple[str, Figures]]] = {
    "pretraining": {
        "Huatuo-26M encyclopedias": ("QA", ("362K", "281M", "620.8")),
        "Huatuo-26M medical_knowledge": ("QA", ("796K", "68M", "151.0")),
        "CMExam": ("QA", ("61K", "23M", "49.3")),
        "MedQA textbooks": ("plain text", ("8K", "18M", "40.2")),
        "CPubMed-KG": ("knowledge graph", ("4384K", "132M", "268.4")),
        "Xywy-KG": ("knowledge graph", ("8K", "22M", "41.7")),
        "39Health-KG": ("knowledge graph", ("14K", "4M", "8.1")),
        "Chinese-medical-dialogue-data": ("dialogue", ("800K", "245M", "553.7")),
        "Medical-Dialogue-System": ("dialogue", ("2726K", "705M", "1500")),
        "CMD": ("dialogue", ("392K", "624M", "1286")),
    },
    "sft": {
        "Instruct_chat": ("general, single", ("51.6K", "40M", "117.4")),
        "School Math": ("general, single", ("248K", "57M", "151.5")),
        "HC3-Chinese": ("general, single", ("12.9K", "3M", "9")),
        "Alpaca_gpt4_data_zh": ("general, single", ("49K", "14M", "37.1")),
        "Safety-Prompts": ("general, single", ("100K", "27M", "84.1")),
        "Train_1M_CN": ("general, single", ("917K", "193M", "503.6")),
        "Train_2M_CN": ("general, multi", ("2000K", "749M", "1925")),
        "Train_3.5M_CN": ("general, multi", ("3606K", "1874M", "4551")),
        "Multiturn_chat": ("general, multi", ("831K", "264M", "705.6")),
        "CMExam-explanation": ("medical, single", ("46K", "21M", "45.2")),
        "Chinese-medical-dialogue-data": ("medical, single", ("800K", "245M", "553.7")),
        "Medical-Dialogue-System": ("medical, multi", ("2726K", "705M", "1500")),
        "CMD": ("medical, multi", ("392K", "624M", "1286")),
    },
    "dpo": {
        "Zhongjing_rlhf": ("medical", ("2K", "837K", "4.1")),
        "MedicalGPT": ("medical", ("4K", "687K", "3.1")),
    },
}


def _read(printed: str) -> list[dict[str, str]]:
    """Rows by column; a figure that is not printed is ""."""
    columns, *rows = [[cell.strip() for cell in line.split("|")] for line in printed.strip().splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows]


# Tables 4 to 6 by how the names of our tasks begin.
SCORES: dict[str, tuple[str, list[dict[str, str]]]] = {
    "ceval": ("Table 4: C-Eval, 5 examples", _read("""
        model              | average | clinical medicine | physician | basic medicine
        ChatGLM-6B         |    38.0 |              34.0 |      35.0 |           36.6
        Chinese-llama2-7B  |    36.7 |              40.0 |      36.6 |           37.7
        Chinese-alpaca2-7B |    37.1 |              31.5 |      38.8 |           36.6
        Baichuan-7B        |    42.8 |              43.0 |      46.7 |           45.1
        Zhongjing-LLaMA-7B |    34.3 |              33.0 |      32.9 |           33.1
        Qilin-Med CPT      |    36.2 |              41.0 |      44.9 |           34.3
        Qilin-Med SFT      |    40.1 |              48.5 |      55.5 |           43.4
    """)),
    "cmexam": ("Table 5: CMExam: answers and explanations", _read("""
        model           | accuracy | BLEU-1 | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L
        ChatGLM-6B      |     26.3 |  16.51 |   5.00 |   35.18 |   15.73 |   17.09
        Llama-7B        |      0.4 |  11.99 |   5.70 |   27.33 |   11.88 |   10.78
        Vicuna-7B       |      5.0 |  20.15 |   9.26 |   38.43 |   16.90 |   16.33
        Alpaca-7B       |      8.5 |   4.75 |   2.50 |   22.52 |    9.54 |    8.40
        Baichuan-7B     |     33.5 |   2.70 |   0.14 |   11.88 |    0.71 |    3.39
        Huatuo          |     12.9 |   0.21 |   0.12 |   25.11 |   11.56 |    9.73
        DoctorGLM       |          |   9.43 |   2.65 |   21.11 |    6.86 |    9.99
        Zhongjing-LLaMA |     22.0 |  13.01 |   0.39 |   16.23 |    1.01 |    5.31
        LLaMA-CMExam    |     18.3 |  29.25 |  16.46 |   45.88 |   26.57 |   23.31
        Alpaca-CMExam   |     21.1 |  29.57 |  16.40 |   45.48 |   25.53 |   22.97
        Vicuna-CMExam   |     27.3 |  29.82 |  17.30 |   44.98 |   26.25 |   22.44
        Qilin-Med CPT   |     38.4 |  13.98 |   4.43 |   23.51 |    8.68 |    7.41
        Qilin-Med SFT   |     40.0 |  40.31 |  25.05 |   53.56 |   36.39 |   34.17
        Qilin-Med RAG   |     42.8 |        |        |         |         |
    """)),
    "huatuo": ("Table 6: Huatuo-26M", _read("""
        model         | BLEU-1 | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L
        T5            |   0.33 |   0.07 |    0.67 |    0.19 |    0.63
        GPT2          |  10.04 |   1.62 |   14.26 |    3.42 |   12.07
        Baichuan-7B   |  10.43 |   1.16 |   18.68 |    3.68 |    7.19
        Qilin-Med CPT |  10.63 |   0.98 |   19.97 |    3.33 |    4.94
        Qilin-Med SFT |  12.69 |   2.07 |   24.21 |    6.34 |   11.56
        Qilin-Med DPO |  16.66 |   2.64 |   27.44 |    6.88 |    9.36
    """)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ settings

BASE_MODEL = "baichuan-7b"  # name of the base model's folder
HUB_BASE_MODEL = "baichuan-inc/Baichuan-7B"
EXPERIMENT_FILE = Path(__file__).parents[2] / "configs/qilin_med_7b.json"
_LENGTHS = {"max_source_length": 256, "max_target_length": 256}
_RATES = {"learning_rate": 2e-5, "warmup_ratio": 0.05, "weight_decay": 0.05}
STATED: dict[str, Any] = flatten({
    "model": {"path": BASE_MODEL}, "launch": {"device": "cuda"},
    "pretraining": {
        "parent": None, "lora": None, "block_size": 1024, "epochs": 3, "global_batch_size": 1 * 8, "learning_rate": 2e-4,
        "warmup_ratio": 0.05, "weight_decay": 0.01,
    },
    "sft": {
        "parent": None, **_LENGTHS, **_RATES, "global_batch_size": 64 * 8, "deepspeed": "configs/deepspeed/zero2.json",
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.05},
    },
    "dpo": {
        "parent": None, **_LENGTHS, **_RATES, "global_batch_size": 8 * 4,
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.05},
    },
    "retrieval": {"passages": 5},
})  # fmt: skip
"""Settings by key of the experiment file. `parent` null: each stage starts from the one before it. A global batch is the
paper's batch per GPU times its GPUs: 8 A100s for the first two stages, 4 RTX 3090s for DPO."""

# What a run is called, reads and writes, how it is watched and how memory is spared are no part of the method; nor is how
# an optimizer step is divided among GPUs and laid out in memory, as long as it has the same number of samples.
_NOT_COMPARED = {
    "name", "output_dir", "evaluation", "data", "processes", "threads_per_process", "activation_checkpointing",
    "checkpoint_minutes", "checkpoint_every", "keep_checkpoints", "report_to", "fused_kernels", "attention", "corpus",
    "index", "decontamination", "exam_sources", "dense", "batch_size_per_device", "packing",
}  # fmt: skip


def differences(settings: dict[str, Any], ranks: Mapping[str, int] | None = None) -> list[tuple[str, Any, Any, bool]]:
    """(key, the paper's value, ours, whether the paper states it) of every setting that differs.

    `settings` is a whole experiment as a dictionary, `ranks` the number that trains each stage (default:
    launch.processes). Where the paper is silent, its value is configs/qilin_med_7b.json's. A stage that the experiment
    leaves out is one difference; without a corpus, retrieval is not compared.
    """
    whole = _comparable(load_experiment(EXPERIMENT_FILE).model_dump(mode="json"), {}) | STATED
    ours = _comparable(settings, ranks or {})
    left_out = [stage for stage in STAGES if not settings[stage]]
    found = [(stage, "trained", "left out", True) for stage in left_out]
    if not settings["retrieval"]["corpus"]:
        left_out.append("retrieval")
    for key in dict.fromkeys([*whole, *ours]):
        if key.split(".")[0] not in left_out and whole.get(key) != ours.get(key):
            found.append((key, whole.get(key), ours.get(key), key in STATED))
    return found


def _comparable(settings: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    flat = {key: value for key, value in flatten(settings).items() if not _NOT_COMPARED & set(key.split("."))}
    for stage in filter(settings.get, STAGES):
        batch, processes = settings[stage]["batch_size_per_device"], ranks.get(stage) or settings["launch"]["processes"]
        together = f"{batch} x GPUs" if processes == "auto" else batch * processes
        flat[f"{stage}.global_batch_size"] = settings[stage]["global_batch_size"] or together
    if Path(flat["model.path"]).name.lower() == BASE_MODEL:
        flat["model.path"] = BASE_MODEL
    return flat
