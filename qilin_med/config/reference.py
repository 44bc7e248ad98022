"""The tables of configs/README.md, written from the settings' own docstrings: `python -m qilin_med.config.reference`."""

import json
from pathlib import Path

from pydantic import BaseModel

from qilin_med.config import corpus, experiment
from qilin_med.config.experiment import Section

README = Path(__file__).parents[2] / "configs/README.md"
EXPERIMENT: dict[str, type[Section]] = {
    "(top level)": experiment.Experiment, "model": experiment.ModelConfig, "launch": experiment.LaunchConfig,
    "every stage": experiment.StageConfig, "pretraining": experiment.PretrainingConfig,
    "sft and dpo": experiment.InstructionConfig, "dpo": experiment.DpoConfig,
    "pretraining.lora, sft.lora, dpo.lora": experiment.LoraSettings, "evaluation": experiment.EvaluationConfig,
    "evaluation.tasks, by the task's name": experiment.TaskSettings,
    "further keys of evaluation.tasks, and `metadata` of configs/tasks": experiment.QuestionSettings,
    "evaluation.protocols, by a name of yours": experiment.ProtocolSettings,
    "an entry of averages": experiment.Average,
    "retrieval": experiment.RetrievalConfig, "retrieval.dense": experiment.DenseSettings,
    "retrieval.reranker": experiment.RerankerSettings,
    "an entry of data, documents, answers, preferences, corpus (or just its path)": experiment.DataSource,
}  # fmt: skip
CORPUS: dict[str, type[Section]] = {
    "(top level)": corpus.CorpusSettings, "an entry of sources": corpus.RawSource,
    "an entry of sources or of decontamination.files": experiment.RawFiles, "cleaning": corpus.CleaningSettings,
    "deduplication": corpus.DeduplicationSettings, "decontamination": experiment.DecontaminationSettings,
    "executor": corpus.ExecutorSettings,
}  # fmt: skip


def reference() -> str:
    """configs/README.md with every key of both kinds of file, its default and its meaning; the text above the tables stays."""
    lines = []
    for kind, sections in (("Experiment files", EXPERIMENT), ("Corpus files", CORPUS)):
        lines += [f"## {kind}", ""]
        for title, section in sections.items():
            lines += [f"### {title}", "", "| key | default | meaning |", "|---|---|---|"]
            parent = section.__mro__[1]
            for name in [name for name in section.model_fields if parent is Section or name not in parent.model_fields]:
                field = section.model_fields[name]
                default = "none" if isinstance(field.default, BaseModel) else json.dumps(field.default, default=str)
                default = "required" if field.is_required() else default
                lines.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
            lines.append("")
    return README.read_text(encoding="utf-8").partition(lines[0])[0] + "\n".join(lines)


if __name__ == "__main__":
    README.write_text(reference(), encoding="utf-8")
