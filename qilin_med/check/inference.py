"""What comes after training, before it begins: held-out sets, the tasks' questions, the corpus of retrieval."""

from dataclasses import dataclass
from itertools import islice

from qilin_med.artifact import MANIFEST
from qilin_med.check.findings import Findings
from qilin_med.check.heads import FILE_RECORDS, Data, Encoded, judge_format, read_heads
from qilin_med.check.stages import OpenModel, check_data
from qilin_med.config.experiment import Experiment, RawFiles, TaskSettings
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.harness import check_backend, check_room, describe_task, load_task, quiet_harness
from qilin_med.evaluate.held_out import held_out_sets
from qilin_med.records import Skipped
from qilin_med.retrieve.search import check_encoder_folder, check_encoder_package


@dataclass(frozen=True)
class SetCheck:
    """Questions, held-out records or documents to retrieve from."""

    name: str
    data: Data | None = None
    questions: int | None = None
    unusable: int | None = None
    remark: str = ""


def check_evaluation(findings: Findings, experiment: Experiment, base: OpenModel | None) -> list[SetCheck]:
    checks = [
        SetCheck(held_out.name, check_data(findings, held_out.key, held_out.stage, held_out.section, base))
        for held_out in held_out_sets(experiment)
    ]
    with findings.collecting():
        check_backend(experiment)
    quiet_harness()
    return checks + [_check_task(findings, *task, base) for task in experiment.evaluation.tasks.items()]


def _check_task(findings: Findings, name: str, settings: TaskSettings, base: OpenModel | None) -> SetCheck:
    if any([findings.is_awaited(path) for path in (*settings.test, *settings.fewshot)]):
        return SetCheck(name)
    with findings.collecting(f"evaluation.tasks.{name}"):
        inputs = describe_task(name, settings)
        if base and base.positions:
            check_room(name, inputs, base.positions, base.folder)
        task = load_task(name, inputs)
        questions, unusable = len(task.eval_docs), sum(task.dataset["skipped"].values())
        return SetCheck(name, None, min(questions, settings.limit or questions), unusable)
    return SetCheck(name)


def check_retrieval(findings: Findings, experiment: Experiment) -> list[SetCheck]:
    """One for the corpus, or none where the experiment retrieves nothing."""
    settings, key = experiment.retrieval, "retrieval.corpus"
    if not settings.corpus:
        return []
    heads = read_heads(findings, key, "pretraining", settings.corpus)
    data = Data([Encoded(head, [], head.unusable) for head in heads])
    judge_format(findings, key, data)
    for files in settings.decontamination.files:
        if not any([findings.is_awaited(path) for path in files.paths]):
            with findings.collecting("retrieval.decontamination.files"):
                _check_raw(files)
    if settings.dense and settings.retriever != "bm25":
        for check in (lambda: check_encoder_folder(settings.dense), check_encoder_package):
            with findings.collecting():
                check()
    is_built = (experiment.index_folder() / MANIFEST).is_file()
    return [SetCheck("retrieval corpus", data, remark="index built" if is_built else "index not built yet")]


def _check_raw(files: RawFiles) -> None:
    """UserError if no record at the start of any of the files can be used."""
    for file in raw_files(files):
        records = (record for _, record in islice(read_raw(files, file), FILE_RECORDS))
        if any(not isinstance(record, Skipped) for record in records):
            return
    raise UserError(
        f"{files.name}: no usable record in {', '.join(files.paths)}; look at the files, or map their columns"
    )
