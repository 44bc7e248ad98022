"""Look before you launch: every stage, evaluation and retrieval of an experiment, in one table and one list of problems."""

import sys
from dataclasses import dataclass, field

from qilin_med.check.findings import Findings
from qilin_med.check.heads import Data
from qilin_med.check.inference import SetCheck, check_evaluation, check_retrieval
from qilin_med.check.stages import (
    GIB,
    Models,
    StageCheck,
    check_disk,
    check_folder,
    check_stage,
    find_machine,
)
from qilin_med.config.experiment import STAGES, Experiment, StageName
from qilin_med.console.progress import progress
from qilin_med.launch.agent import find_place
from qilin_med.model.load import check_packages
from qilin_med.plan.duration import Rates, stage_duration
from qilin_med.plan.tables import format_table


@dataclass
class Report:
    findings: Findings
    stages: list[StageCheck] = field(default_factory=list)
    sets: list[SetCheck] = field(default_factory=list)


def check_experiment(
    experiment: Experiment,
    only: StageName | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    made_first: list[str] | tuple[str, ...] = (),
) -> Report:
    """Check all stages with what comes after them, or one stage alone (`only`). Writes nothing.

    `gpus` and `gpu`: the machine to plan for, in place of this one. `made_first`: paths that steps before the stages make.
    """
    findings = Findings(made_first)
    report = Report(findings)
    with progress("checking"):
        machine = find_machine(findings, experiment, find_place(), gpus, gpu)
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
            report.sets = check_evaluation(findings, experiment, models.base())
            report.sets += check_retrieval(findings, experiment)
    return report


def print_report(report: Report) -> None:
    """Tables and notes; problems on stderr, a line each, and then exit code 2."""
    more = [line for check in report.stages for line in _stage_lines(check)]
    for lines in (_stage_table(report.stages), more, report.sets and _set_table(report.sets), report.findings.notes):
        if lines:
            print(*lines, sep="\n", end="\n\n", flush=True)
    for problem in report.findings.problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if report.findings.problems:
        sys.exit(2)


# --------------------------------------------------------------------------------------------------------- tables


def _stage_table(checks: list[StageCheck]) -> list[str]:
    head = [
        "stage",
        "starts from",
        "records",
        "unusable",
        "cut",
        "updates",
        "tokens",
        "GiB/rank",
        "GiB disk",
        "hours",
    ]
    return format_table([head, *map(_stage_row, checks)])


def _stage_row(check: StageCheck) -> list[str]:
    data, plan = check.data, check.plan
    cells = [check.stage, _short(check.start), *_data_cells(data, has_limits=check.stage != "pretraining")]
    if plan is None:
        return [*cells, *["-"] * 5]
    work = plan.work()
    time = stage_duration(plan, Rates())
    hours = time and time.total / 3600
    return [
        *cells,
        _number(plan.updates) if plan.updates else "-",
        _number(work.tokens) if work else "-",
        f"{plan.memory.total / GIB:.1f}/{plan.machines.memory / GIB:.1f}",
        f"{plan.disk / GIB:,.1f}",
        "done" if check.is_finished else "-" if hours is None else f"{hours:,.{0 if hours >= 100 else 1}f}",
    ]


def _stage_lines(check: StageCheck) -> list[str]:
    """What the table has no room for: the size of the model, its attention, and where the amount of data is known from."""
    total, trainable = check.parameters or (0, 0)
    lines = [f"{total:,} parameters, {trainable:,} trainable ({trainable / total:.2%})"] if total else []
    lines.append(f"attention: {check.attention}")
    if amount := check.amount:
        lines.append(f"{amount.rows:,} rows, {amount.tokens:,.0f} tokens ({amount.source})")
    return [f"{check.stage}: {line}" for line in lines]


def _set_table(checks: list[SetCheck]) -> list[str]:
    return format_table([["evaluation and retrieval", "records", "unusable", "cut", ""], *map(_set_row, checks)])


def _set_row(check: SetCheck) -> list[str]:
    if check.data:
        return [check.name, *_data_cells(check.data), check.remark]
    if check.questions is None:
        return [check.name, "-", "-", "-", ""]
    return [check.name, _number(check.questions), f"{check.unusable:,}", "-", check.remark]


def _short(path: str) -> str:
    return path if len(path) <= 12 else f"...{path[-9:]}"


def _data_cells(data: Data, has_limits: bool = True) -> list[str]:
    """Records (marked where estimated), and the shares of those looked at that are unusable or cut."""
    if not data.looked_at:
        return ["-", "-", "-"]
    unusable, cut = (f"{number / data.looked_at:.1%}" for number in (len(data.unusable), data.cut))
    return [
        f"{'' if data.is_whole else '~'}{_number(data.records)}",
        unusable,
        cut if has_limits and data.measures else "-",
    ]


def _number(value: float) -> str:
    """At most nine characters."""
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e7, 1e6, "M")):
        if value >= least:
            return f"{value / size:,.2f}{unit}"
    return f"{value:,.0f}"
