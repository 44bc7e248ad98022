"""What a dry run says: every stage, evaluation and retrieval of an experiment, in two tables and one list of problems."""

import sys

from qilin_med.check.heads import short_number
from qilin_med.check.stages import Check, StageCheck
from qilin_med.plan.duration import Rates, stage_duration
from qilin_med.plan.machines import GIB
from qilin_med.plan.tables import format_table

STAGE_COLUMNS = ["stage", "starts from", "records", "unusable", "cut", "steps", "tokens", "GiB/rank", "GiB disk",
                 "hours"]  # fmt: skip
SET_COLUMNS = ["evaluation and retrieval", "records", "unusable", "cut", ""]


def print_report(report: Check) -> None:
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
    records, unusable, cut = check.data.cells()
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
