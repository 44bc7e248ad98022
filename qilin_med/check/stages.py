"""One stage before it is launched: the model that it starts from, its data, its settings, and what it needs."""

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qilin_med.artifact import MANIFEST
from qilin_med.check.findings import Findings
from qilin_med.check.heads import Data, encode_heads, judge_format, judge_lengths, read_heads
from qilin_med.config.experiment import STAGES, Experiment, StageName
from qilin_med.config.schedule import check_rows, make_schedule
from qilin_med.errors import UserError
from qilin_med.launch.agent import Place, count_ranks
from qilin_med.model.folder import check_model_folder, count_parameters, max_positions
from qilin_med.model.load import attention_path, check_trackers, load_tokenizer
from qilin_med.plan.architecture import read_architecture
from qilin_med.plan.data import Amount, find_amount
from qilin_med.plan.gpus import GPUS, Gpu
from qilin_med.plan.plan import MARGIN, Machines, StagePlan, plan_stage
from qilin_med.plan.preflight import check_memory, local_machine
from qilin_med.prompt.template import ChatTemplate
from qilin_med.train.job import Job

GIB = 2**30


@dataclass(frozen=True)
class StageCheck:
    stage: StageName
    start: str
    """What the stage starts from, in a word or as a path; a star where that is not made yet."""
    data: Data
    amount: Amount | None
    plan: StagePlan | None
    parameters: tuple[int, int] | None
    """All, and trainable ones."""
    is_finished: bool
    attention: str
    """Which attention kernel computes a batch."""


# ------------------------------------------------------------------------------------------------------- machines


@dataclass(frozen=True)
class Machine:
    planned: Machines
    is_here: bool
    """Whether the run is to be on this machine, so that its disk and packages matter."""


def find_machine(
    findings: Findings, experiment: Experiment, place: Place, gpus: int | None = None, gpu: str | None = None
) -> Machine | None:
    """This machine and its like, or where it has no GPU (or `gpus` or `gpu` name others), those that are planned for.
    None, and a problem, where the device asked for is not enough."""
    launch, dtype = experiment.launch, experiment.model.dtype
    if place.slots:
        launch = launch.model_copy(update={"processes": place.slots})
        experiment = experiment.model_copy(update={"launch": launch})
    if launch.device == "cpu":
        return Machine(replace(local_machine(experiment), nodes=place.nodes), True)
    import torch

    here = torch.cuda.device_count()
    with findings.collecting():
        if here and not (gpus or gpu):
            ranks, properties = count_ranks(launch, here), torch.cuda.get_device_properties(0)
            known = _alike(properties.name, properties.total_memory)
            speed = (known.peak(dtype), known.bandwidth if place.nodes == 1 else None) if known else (None, None)
            return Machine(Machines(place.nodes, ranks, properties.total_memory, *speed), True)
        planned = GPUS[gpu or "a100-80g"]
        ranks = gpus or (8 if launch.processes == "auto" else launch.processes)
        findings.note(f"{'' if here else 'no GPU here: '}planned for {ranks} x {planned.name} (--gpus and --gpu of"
                      " scripts/check.py set others)")  # fmt: skip
        bandwidth = planned.bandwidth if place.nodes == 1 else None
        return Machine(Machines(place.nodes, ranks, planned.memory, planned.peak(dtype), bandwidth), False)
    return None


def _alike(name: str, memory: int) -> Gpu | None:
    """The planner's figures of a GPU by the name that its driver gives."""
    family = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name.lower()]
    return min(family, key=lambda gpu: abs(gpu.memory - memory), default=None)


# --------------------------------------------------------------------------------------------------------- models


class Models:
    """The model folders that stages and evaluation are checked with, each looked at once."""

    def __init__(self, findings: Findings, experiment: Experiment):
        self._findings, self._experiment = findings, experiment
        self._opened: dict[Path, OpenModel | None] = {}

    def of_stage(self, stage: StageName) -> tuple[str, "OpenModel | None"]:
        """What a stage starts from, and that model; before it is made, the nearest one that is there."""
        base = Path(self._experiment.model.path)
        parent = self._experiment.parent_folder(stage)
        folder, heir = parent, stage
        while not folder.exists() and (maker := self._maker(folder, heir)):
            folder, heir = self._experiment.parent_folder(maker), maker
        word = "base" if parent == base else self._maker(parent, stage) or str(parent)
        if not folder.exists() and folder != base and not self._findings.is_awaited(folder):
            self._findings.problem(f"{heir} starts from {folder}, which does not exist, and no earlier stage makes it")
            folder = base
        elif folder != parent and folder.exists():
            self._findings.note(f"* {parent} is not made yet: {stage} is checked with {folder}")
        return word if parent.exists() else f"{word}*", self.open(folder)

    def _maker(self, folder: Path, stage: StageName) -> StageName | None:
        """The earlier stage whose result a folder will be."""
        earlier = [name for name in STAGES[: STAGES.index(stage)] if getattr(self._experiment, name)]
        made = {(self._experiment.stage_folder(name) / "merged").absolute(): name for name in earlier}
        return made.get(folder.absolute())

    def base(self) -> "OpenModel | None":
        return self.open(Path(self._experiment.model.path))

    def open(self, folder: Path) -> "OpenModel | None":
        """None, and a problem, if the folder holds no model that can be trained."""
        if folder not in self._opened:
            self._opened[folder] = None
            with self._findings.collecting():
                self._opened[folder] = self._open(folder)
        return self._opened[folder]

    def _open(self, folder: Path) -> "OpenModel | None":
        if self._findings.is_awaited(folder):
            return None
        if not folder.exists():
            raise UserError(
                f"model.path: {folder} does not exist; README.md tells how to get and convert the base model"
            )
        model = check_model_folder(folder)
        tokenizer = load_tokenizer(folder, self._experiment.model.template)
        return OpenModel(self._findings, folder, model, tokenizer, max_positions(folder))


@dataclass(frozen=True)
class OpenModel:
    findings: Findings
    folder: Path
    without_weights: Any
    """The model on the meta device."""
    tokenizer: Any
    positions: int | None

    @cached_property
    def template(self) -> ChatTemplate | None:
        """None, and a problem, if the tokenizer has none or it does not write a question and its answer."""
        with self.findings.collecting(str(self.folder)):
            template = ChatTemplate(self.tokenizer)
            assert template.end_id is not None
            return template
        return None


# ---------------------------------------------------------------------------------------------------------- check


def check_stage(
    findings: Findings, experiment: Experiment, stage: StageName, models: Models, machine: Machine | None
) -> StageCheck:
    section, key = experiment.stage(stage), f"{stage}.data"
    start, model = models.of_stage(stage)
    with findings.collecting():
        check_trackers(stage, section.report_to)
    data = check_data(findings, key, stage, section, model)
    amount = data.amount()
    if amount and not data.is_whole:
        with findings.collecting(key):
            amount = find_amount(experiment, stage) or amount
    merged = experiment.stage_folder(stage) / "merged"
    is_finished = (merged / MANIFEST).is_file()
    parameters = plan = None
    if model:
        with findings.collecting():
            parameters = count_parameters(model.without_weights, section.lora)
    if machine:
        _check_settings(findings, experiment, stage, machine.planned, amount)
        plan = _plan(findings, experiment, stage, model.folder, machine.planned, amount) if parameters else None
    if plan and not is_finished:
        with findings.collecting():
            check_memory(plan)
    attention = attention_path(experiment.model, Job(experiment, stage, Path(), "", Path(), 0, 1).keeps_sequences_apart)
    return StageCheck(stage, start, data, amount, plan, parameters, is_finished, attention)


def check_data(findings: Findings, key: str, stage: StageName, section: Any, model: OpenModel | None) -> Data:
    """The data of a section as its stage would take them; `key` is the setting that names them."""
    heads = read_heads(findings, key, stage, section.data)
    template = model.template if model and stage != "pretraining" else None
    data = encode_heads(findings, key, section, model and model.tokenizer, template, heads)
    judge_format(findings, key, data)
    judge_lengths(findings, key, section, data, model and model.positions)
    return data


def _check_settings(
    findings: Findings, experiment: Experiment, stage: StageName, machines: Machines, amount: Amount | None
) -> None:
    """Batch sizes, DeepSpeed file, rows enough for one batch."""
    with findings.collecting():
        schedule = make_schedule(stage, experiment.stage(stage), amount.rows if amount else 0, machines.ranks)
        with findings.collecting():
            Job(experiment, stage, Path(), "", Path(), schedule).check_engine()
        if amount:
            check_rows(stage, schedule)


def check_folder(findings: Findings, experiment: Experiment, stage: StageName, machine: Machine) -> None:
    """A problem if the stage was begun with other settings, so that it would be refused once its turn comes."""
    with findings.collecting():
        schedule = make_schedule(stage, experiment.stage(stage), 0, machine.planned.ranks)
        Job(experiment, stage, Path(), "", Path(), schedule).check_begun(unknown=("parent fingerprint", "rows"))


def _plan(
    findings: Findings,
    experiment: Experiment,
    stage: StageName,
    folder: Path,
    machines: Machines,
    amount: Amount | None,
) -> StagePlan | None:
    try:
        architecture = read_architecture(folder)
    except UserError as error:
        findings.note(f"memory, disk and time not checked: {error}")
        return None
    with findings.collecting():
        return plan_stage(experiment, stage, architecture, machines, amount)
    return None


def check_disk(findings: Findings, experiment: Experiment, checks: list[StageCheck], machine: Machine) -> None:
    """A problem if what all unfinished stages write does not fit on the disk together."""
    needed = {check.stage: check.plan.disk for check in checks if check.plan and not check.is_finished}
    output = Path(experiment.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free
    free += sum(file.stat().st_size for file in output.glob("*/checkpoints/**/*") if file.is_file())
    if free < sum(needed.values()) * (1 - MARGIN):
        parts = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in needed.items())
        with findings.collecting(matters=machine.is_here):
            raise UserError(
                f"{experiment.output_dir}: {sum(needed.values()) / GIB:.1f} GiB needed ({parts}), {free / GIB:.1f} GiB free;"
                " free the disk, lower keep_checkpoints or set output_dir"
            )
