"""One stage before it is launched: the model that it starts from, its data, its settings, and what it needs."""

from dataclasses import dataclass, replace
from pathlib import Path

from qilin_med.artifact import MANIFEST
from qilin_med.check.findings import Findings
from qilin_med.check.heads import Data, Model, check_data
from qilin_med.config.experiment import STAGES, Experiment, StageName
from qilin_med.config.schedule import check_rows, make_schedule
from qilin_med.errors import UserError
from qilin_med.launch.agent import count_ranks, find_cluster
from qilin_med.model.folder import check_model_folder, count_parameters, max_positions
from qilin_med.model.load import attention_path, check_trackers, load_tokenizer
from qilin_med.plan.data import find_amount
from qilin_med.plan.machines import GIB, GPUS, Machines, local_machine
from qilin_med.plan.measure import Unmeasured
from qilin_med.plan.plan import MARGIN, StagePlan, plan_stage
from qilin_med.plan.preflight import check_memory, free_bytes
from qilin_med.train.job import Job


@dataclass(frozen=True)
class Machine:
    planned: Machines
    is_here: bool
    """Whether the run is to be on this machine, so that its disk and packages matter."""


def find_machine(findings: Findings, experiment: Experiment, gpus: int | None, gpu: str | None) -> Machine | None:
    """This machine and its like, or where it has no GPU (or `gpus` or `gpu` name others), those that are planned for.
    None, and a problem, where the device asked for is not enough."""
    import torch

    cluster, dtype = find_cluster(), experiment.model.dtype
    launch = experiment.launch.model_copy(update={"processes": cluster.slots} if cluster.slots else {})
    experiment = experiment.model_copy(update={"launch": launch})
    if launch.device == "cpu":
        return Machine(replace(local_machine(experiment), nodes=cluster.nodes), True)
    here = torch.cuda.device_count()
    with findings.collecting():
        if here and not (gpus or gpu):
            ranks, properties = count_ranks(launch, here), torch.cuda.get_device_properties(0)
            memory = properties.total_memory
            family = [known for known in GPUS.values() if known.name.split("-")[0] in properties.name.lower()]
            figures = min(family, key=lambda known: abs(known.memory - memory), default=None)
        else:
            figures = GPUS[gpu or "a100-80g"]
            ranks, memory = gpus or (8 if launch.processes == "auto" else launch.processes), figures.memory
            findings.note(f"{'' if here else 'no GPU here: '}planned for {ranks} x {figures.name} (--gpus and --gpu of"
                          " scripts/check.py set others)")  # fmt: skip
        bandwidth = figures.bandwidth if figures and cluster.nodes == 1 else None
        machines = Machines(cluster.nodes, ranks, memory, figures.peak(dtype) if figures else None, bandwidth)
        return Machine(machines, bool(here) and not (gpus or gpu))
    return None


class Models:
    """The model folders that stages and evaluation are checked with, each looked at once."""

    def __init__(self, findings: Findings, experiment: Experiment):
        self._findings, self._experiment = findings, experiment
        self._opened: dict[Path, Model | None] = {}

    def open(self, folder: str | Path) -> Model | None:
        """None, and a problem, if the folder holds no model that can be trained."""
        folder = Path(folder)
        if folder not in self._opened:
            self._opened[folder] = None
            with self._findings.collecting():
                if not folder.exists() and not self._findings.is_awaited(folder):
                    raise UserError(f"model.path: {folder} does not exist; README.md tells how to get and convert the base"
                                    " model")  # fmt: skip
                if folder.exists():
                    model = check_model_folder(folder)
                    tokenizer = load_tokenizer(folder, self._experiment.model.template)
                    self._opened[folder] = Model(folder, model, tokenizer, max_positions(folder))
        return self._opened[folder]

    def of_stage(self, stage: StageName) -> tuple[str, Model | None]:
        """What a stage starts from, in a word or as a path (with a star where that is not made yet), and that model; before
        it is made, the nearest one that is there."""
        experiment, base = self._experiment, Path(self._experiment.model.path)
        parent = folder = experiment.parent_folder(stage)
        word, heir = "base" if parent == base else str(parent), stage
        for earlier in reversed([name for name in STAGES[: STAGES.index(stage)] if getattr(experiment, name)]):
            made = (experiment.stage_folder(earlier) / "merged").absolute()
            if made == parent.absolute():
                word = earlier
            if made == folder.absolute() and not folder.exists():
                folder, heir = experiment.parent_folder(earlier), earlier
        if not folder.exists() and folder != base and not self._findings.is_awaited(folder):
            self._findings.problem(f"{heir} starts from {folder}, which does not exist, and no earlier stage makes it")
            folder = base
        elif folder != parent and folder.exists():
            self._findings.note(f"* {parent} is not made yet: {stage} is checked with {folder}")
        return word if parent.exists() else f"{word}*", self.open(folder)


@dataclass(frozen=True)
class StageCheck:
    stage: StageName
    start: str
    """As `Models.of_stage` calls it."""
    data: Data
    plan: StagePlan | None
    is_finished: bool
    remarks: list[str]
    """What a table has no room for: the size of the model, its attention, and where the amount of data is known from."""


def check_stage(
    findings: Findings, experiment: Experiment, stage: StageName, models: Models, machine: Machine | None
) -> StageCheck:
    section, remarks, plan = experiment.stage(stage), [], None
    start, model = models.of_stage(stage)
    with findings.collecting():
        check_trackers(stage, section.report_to)
    data = check_data(findings, f"{stage}.data", stage, section.data, section, model)
    amount = data.amount(section)
    if amount and not data.is_whole:
        with findings.collecting(f"{stage}.data"):
            amount = find_amount(experiment, stage) or amount
    job = Job(experiment, stage, Path(), "", Path(), None)  # without a schedule, which may not come about
    is_finished = (experiment.stage_folder(stage) / "merged" / MANIFEST).is_file()
    if model:
        with findings.collecting():
            total, trainable = count_parameters(model.without_weights, section.lora)
            remarks.append(f"{total:,} parameters, {trainable:,} trainable ({trainable / total:.2%})")
            try:
                plan = machine and plan_stage(experiment, stage, model.folder, machine.planned, amount)
            except Unmeasured as error:
                findings.note(f"memory, disk and time not checked: {error}")
            if plan and not is_finished:
                check_memory(plan)
    if machine:
        with findings.collecting():
            schedule = make_schedule(stage, section, amount.rows if amount else 0, machine.planned.ranks)
            if amount:
                check_rows(stage, schedule)
        with findings.collecting():
            job.check_engine()
    remarks.append(f"attention: {attention_path(experiment.model, job.keeps_sequences_apart)}")
    if amount:
        remarks.append(f"{amount.rows:,} rows, {amount.tokens:,.0f} tokens ({amount.source})")
    return StageCheck(stage, start, data, plan, is_finished, remarks)


def check_folder(findings: Findings, experiment: Experiment, stage: StageName, machine: Machine) -> None:
    """A problem if the stage was begun with other settings, so that it would be refused once its turn comes."""
    with findings.collecting():
        schedule = make_schedule(stage, experiment.stage(stage), 0, machine.planned.ranks)
        Job(experiment, stage, Path(), "", Path(), schedule).check_begun(unknown=("parent fingerprint", "rows"))


def check_disk(findings: Findings, experiment: Experiment, checks: list[StageCheck], machine: Machine) -> None:
    """A problem if what all unfinished stages write does not fit on the disk together."""
    needed = {check.stage: check.plan.disk for check in checks if check.plan and not check.is_finished}
    free = free_bytes(Path(experiment.output_dir))
    if free < sum(needed.values()) * (1 - MARGIN):
        parts = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in needed.items())
        (findings.problem if machine.is_here else findings.note)(
            f"{experiment.output_dir}: {sum(needed.values()) / GIB:.1f} GiB needed ({parts}), {free / GIB:.1f} GiB free;"
            " free the disk, lower keep_checkpoints or set output_dir"
        )
