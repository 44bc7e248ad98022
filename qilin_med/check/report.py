"""Look before you launch: every stage, evaluation and retrieval of an experiment, in one table and one list of problems."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from qilin_med.artifact import MANIFEST
from qilin_med.check.findings import Findings
from qilin_med.check.heads import FILE_RECORDS, Data, Model, check_data
from qilin_med.check.stages import Models, StageCheck, check_disk, check_folder, check_stage, find_machine
from qilin_med.config.experiment import STAGES, Experiment, StageName
from qilin_med.console.progress import progress
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.harness import check_backend, check_room, describe_task, load_task
from qilin_med.evaluate.held_out import held_out_sets
from qilin_med.model.load import check_packages
from qilin_med.plan.duration import Rates, stage_duration
from qilin_med.plan.machines import GIB
from qilin_med.plan.tables import format_table
from qilin_med.records import Skipped
from qilin_med.retrieve.search import check_encoder_folder, check_encoder_package

STAGE_COLUMNS = ["stage", "starts from", "records", "unusable", "cut", "steps", "tokens", "GiB/rank", "GiB disk",
                 "hours"]  # fmt: skip
SET_COLUMNS = ["evaluation and retrieval", "records", "unusable", "cut", ""]


@dataclass
class Report:
    findings: Findings
    stages: list[StageCheck] = field(default_factory=list)
    sets: list[list[str]] = field(default_factory=list)
    """Rows of the second table: held-out data, the tasks' questions, the corpus of retrieval."""


def check_experiment(
    experiment: Experiment,
    only: StageName | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    made_first: Sequence[str] = (),
) -> Report:
    """Check all stages with what comes after them, or one stage alone (`only`). Writes nothing.

    `gpus` and `gpu`: the machine to plan for, in place of this one. `made_first`: paths that steps before the stages make.
    """
    findings = Findings(made_first)
    report = Report(findings)
    with progress("checking"):
        machine = find_machine(findings, experiment, gpus, gpu)
        with findings.collecting(matters=machine is not None and machine.is_here):
            check_packages(experiment.model, training=True)
        models = Models(findings, experiment)
        for stage in [only] if only else [stage for stage in STAGES if getattr(experiment, stage)]:
            report.stages.append(check_stage(findings, experiment, stage, models, machine))
        if machine:
            check_disk(findings, experiment, report.stages, machine)
        if only is None:
            for check in report.stages if machine else []:
                check_folder(findings, experiment, check.stage, machine)
            report.sets += check_evaluation(findings, experiment, models.open(experiment.model.path))
            report.sets += check_retrieval(findings, experiment)
    return report


def check_evaluation(findings: Findings, experiment: Experiment, base: Model | None) -> Iterator[list[str]]:
    for held_out in held_out_sets(experiment):
        data = check_data(findings, held_out.key, held_out.stage, held_out.section.data, held_out.section, base)
        yield [held_out.name, *data_cells(data), ""]
    with findings.collecting():
        check_backend(experiment)
    for name, settings in experiment.evaluation.tasks.items():
        cells = ["-", "-"]
        if not any([findings.is_awaited(path) for path in (*settings.test, *settings.fewshot)]):
            with findings.collecting(f"evaluation.tasks.{name}"):
                inputs = describe_task(name, settings)
                if base and base.positions:
                    check_room(name, inputs, base.positions, base.folder)
                task = load_task(name, inputs)
                questions = len(task.eval_docs)
                cells = [short_number(min(questions, settings.limit or questions)),
                         f"{sum(task.dataset['skipped'].values()):,}"]  # fmt: skip
        yield [name, *cells, "-", ""]


def check_retrieval(findings: Findings, experiment: Experiment) -> Iterator[list[str]]:
    settings = experiment.retrieval
    if not settings.corpus:
        return
    data = check_data(findings, "retrieval.corpus", "pretraining", settings.corpus)
    for source in settings.decontamination.files:
        if any([findings.is_awaited(path) for path in source.paths]):
            continue
        with findings.collecting("retrieval.decontamination.files"):
            heads = (islice(read_raw(source, file), FILE_RECORDS) for file in raw_files(source))
            if all(isinstance(record, Skipped) for head in heads for _, record in head):
                raise UserError(f"{source.name}: no usable record in {', '.join(source.paths)}; look at the files, or map"
                                " their columns")  # fmt: skip
    if settings.dense and settings.retriever != "bm25":
        with findings.collecting():
            check_encoder_folder(settings.dense)
        with findings.collecting():
            check_encoder_package()
    is_built = (experiment.index_folder() / MANIFEST).is_file()
    yield ["retrieval corpus", *data_cells(data), "index built" if is_built else "index not built yet"]


# --------------------------------------------------------------------------------------------------------------- tables


def print_report(report: Report) -> None:
    """Tables and notes; problems on stderr, a line each, and then exit code 2."""
    stages = format_table([STAGE_COLUMNS, *map(stage_row, report.stages)])
    remarks = [f"{check.stage}: {remark}" for check in report.stages for remark in check.remarks]
    sets = format_table([SET_COLUMNS, *report.sets]) if report.sets else []
    for lines in (stages, remarks, sets, report.findings.notes):
        if lines:
            print(*lines, sep="\n", end="\n\n", flush=True)
    for problem in report.findings.problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if report.findings.problems:
        sys.exit(2)


def stage_row(check: StageCheck) -> list[str]:
    records, unusable, cut = data_cells(check.data)
    start = check.start if len(check.start) <= 12 else f"...{check.start[-9:]}"
    cells = [check.stage, start, records, unusable, cut if check.stage != "pretraining" else "-"]
    if (plan := check.plan) is None:
        return [*cells, *["-"] * 5]
    work, time = plan.work(), stage_duration(plan, Rates())
    hours = time and time.total / 3600
    return [
        *cells,
        short_number(plan.schedule.steps) if plan.schedule.steps else "-",
        short_number(work.tokens) if work else "-",
        f"{plan.memory.total / GIB:.1f}/{plan.machines.memory / GIB:.1f}",
        f"{plan.disk / GIB:,.1f}",
        "done" if check.is_finished else "-" if hours is None else f"{hours:,.{0 if hours >= 100 else 1}f}",
    ]


def data_cells(data: Data) -> list[str]:
    """Records (marked where estimated), and the shares of those looked at that are unusable or cut."""
    if not data.looked_at:
        return ["-", "-", "-"]
    records = f"{'' if data.is_whole else '~'}{short_number(data.records)}"
    unusable = f"{len(data.unusable) / data.looked_at:.1%}"
    return [records, unusable, f"{data.cut / data.looked_at:.1%}" if data.lengths else "-"]


def short_number(value: float) -> str:
    """At most nine characters."""
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e7, 1e6, "M")):
        if value >= least:
            return f"{value / size:,.2f}{unit}"
    return f"{value:,.0f}"
