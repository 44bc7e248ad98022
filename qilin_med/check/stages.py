"""An experiment before it is launched: every stage's model, data, settings and needs, the evaluation and retrieval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qilin_med.artifact import MANIFEST
from qilin_med.check.findings import Findings
from qilin_med.check.heads import FILE_RECORDS, Data, Model, check_data, short_number
from qilin_med.config.experiment import STAGES, Experiment, StageName
from qilin_med.config.schedule import check_rows, make_schedule
from qilin_med.console.progress import progress
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.harness import check_backend, check_room, describe_task, load_task
from qilin_med.evaluate.held_out import held_out_sets
from qilin_med.launch.agent import count_ranks, find_cluster
from qilin_med.model.folder import check_model_folder, count_parameters, max_positions
from qilin_med.model.load import attention_path, check_packages, check_trackers, load_tokenizer
from qilin_med.plan.data import find_amount
from qilin_med.plan.machines import GIB, GPUS, Machines, local_machine
from qilin_med.plan.measure import Unmeasured
from qilin_med.plan.plan import MARGIN, StagePlan, plan_stage
from qilin_med.plan.preflight import check_memory, free_bytes
from qilin_med.records import Skipped
from qilin_med.retrieve.models import check_models
from qilin_med.train.job import Job


@dataclass(frozen=True)
class StageCheck:
    stage: StageName
    start: str
    """As `Check.parent` calls it."""
    data: Data
    plan: StagePlan | None
    is_finished: bool
    remarks: list[str]
    """What a table has no room for: the size of the model, its attention, and where the amount of data is known from."""


class Check:
    """All stages with what comes after them, or one stage alone (`only`). Writes nothing.

    `gpus` and `gpu`: the machine to plan for, in place of this one. `made_first`: paths that steps before the stages make.
    """

    def __init__(
        self, experiment: Experiment, only: StageName | None = None, gpus: int | None = None, gpu: str | None = None,
        made_first: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.experiment, self.findings = experiment, Findings(made_first)
        self.machines: Machines | None = None
        """None, and a problem, where the device asked for is not enough."""
        self.is_here = False
        """Whether the run is to be on this machine, so that its disk and packages matter."""
        self._opened: dict[Path, Model | None] = {}
        self.stages: list[StageCheck] = []
        self.sets: list[list[str]] = []
        """Rows of the second table: held-out data, the tasks' questions, the corpus of retrieval."""
        with progress("checking"):
            with self.findings.collecting():
                self.find_machine(gpus, gpu)
            with self.findings.collecting(matters=self.is_here):
                check_packages(experiment.model, training=True)
            for stage in [only] if only else [stage for stage in STAGES if getattr(experiment, stage)]:
                self.stages.append(self.check_stage(stage))
            if self.machines:
                self.check_disk()
            if only is None:
                for check in self.stages if self.machines else []:
                    self.check_folder(check.stage)
                self.sets = [*self.check_evaluation(), *self.check_retrieval()]

    def find_machine(self, gpus: int | None, gpu: str | None) -> None:
        """This machine and its like, or where it has no GPU (or `gpus` or `gpu` name others), those that are planned for."""
        import torch

        cluster, dtype = find_cluster(), self.experiment.model.dtype
        launch = self.experiment.launch.model_copy(update={"processes": cluster.slots} if cluster.slots else {})
        if launch.device == "cpu":
            local = local_machine(self.experiment.model_copy(update={"launch": launch}))
            self.machines, self.is_here = replace(local, nodes=cluster.nodes), True
            return
        here = torch.cuda.device_count()
        if here and not (gpus or gpu):
            ranks, properties = count_ranks(launch, here), torch.cuda.get_device_properties(0)
            memory = properties.total_memory
            family = [known for known in GPUS.values() if known.name.split("-")[0] in properties.name.lower()]
            figures = min(family, key=lambda known: abs(known.memory - memory), default=None)
        else:
            figures = GPUS[gpu or "a100-80g"]
            ranks, memory = gpus or (8 if launch.processes == "auto" else launch.processes), figures.memory
            self.findings.note(f"{'' if here else 'no GPU here: '}planned for {ranks} x {figures.name} (--gpus and --gpu of"
                               " scripts/check.py set others)")  # fmt: skip
        bandwidth = figures.bandwidth if figures and cluster.nodes == 1 else None
        self.machines = Machines(cluster.nodes, ranks, memory, figures.peak(dtype) if figures else None, bandwidth)
        self.is_here = bool(here) and not (gpus or gpu)

    # ------------------------------------------------------------------------------------------------------ models

    def open(self, folder: Path) -> Model | None:
        """A folder's model, looked at once; None, and a problem, if it holds none that can be trained."""
        if folder not in self._opened:
            self._opened[folder] = None
            with self.findings.collecting():
                if not folder.exists() and not self.findings.is_awaited(folder):
                    raise UserError(f"model.path: {folder} does not exist; README.md tells how to get and convert the base"
                                    " model")  # fmt: skip
                if folder.exists():
                    model = check_model_folder(folder)
                    tokenizer = load_tokenizer(folder, self.experiment.model.template)
                    self._opened[folder] = Model(folder, model, tokenizer, max_positions(folder))
        return self._opened[folder]

    def parent(self, stage: StageName) -> tuple[str, Model | None]:
        """What a stage starts from, in a word or as a path (with a star where that is not made yet), and that model; before
        it is made, the nearest one that is there."""
        experiment, base = self.experiment, Path(self.experiment.model.path)
        parent = folder = experiment.parent_folder(stage)
        word, heir = "base" if parent == base else str(parent), stage
        for earlier in reversed([name for name in STAGES[: STAGES.index(stage)] if getattr(experiment, name)]):
            made = (experiment.stage_folder(earlier) / "merged").absolute()
            if made == parent.absolute():
                word = earlier
            if made == folder.absolute() and not folder.exists():
                folder, heir = experiment.parent_folder(earlier), earlier
        if not folder.exists() and folder != base and not self.findings.is_awaited(folder):
            self.findings.problem(f"{heir} starts from {folder}, which does not exist, and no earlier stage makes it")
            folder = base
        elif folder != parent and folder.exists():
            self.findings.note(f"* {parent} is not made yet: {stage} is checked with {folder}")
        return word if parent.exists() else f"{word}*", self.open(folder)

    # ---------------------------------------------------------------------------------------------- stages

    def check_stage(self, stage: StageName) -> StageCheck:
        experiment, findings, machines = self.experiment, self.findings, self.machines
        section, remarks, plan = experiment.stage(stage), [], None
        start, model = self.parent(stage)
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
                    plan = machines and plan_stage(experiment, stage, model.folder, machines, amount)
                except Unmeasured as error:
                    findings.note(f"memory, disk and time not checked: {error}")
                if plan and not is_finished:
                    check_memory(plan)
        if machines:
            with findings.collecting():
                schedule = make_schedule(stage, section, amount.rows if amount else 0, machines.ranks)
                if amount:
                    check_rows(stage, schedule)
            with findings.collecting():
                job.check_engine()
        remarks.append(f"attention: {attention_path(experiment.model, job.keeps_sequences_apart)}")
        if amount:
            remarks.append(f"{amount.rows:,} rows, {amount.tokens:,.0f} tokens ({amount.source})")
        return StageCheck(stage, start, data, plan, is_finished, remarks)

    def check_folder(self, stage: StageName) -> None:
        """A problem if the stage was begun with other settings, so that it would be refused once its turn comes."""
        with self.findings.collecting():
            schedule = make_schedule(stage, self.experiment.stage(stage), 0, self.machines.ranks)
            job = Job(self.experiment, stage, Path(), "", Path(), schedule)
            job.check_begun(unknown=("parent fingerprint", "rows"))

    def check_disk(self) -> None:
        """A problem if what all unfinished stages write does not fit on the disk together."""
        needed = {check.stage: check.plan.disk for check in self.stages if check.plan and not check.is_finished}
        free = free_bytes(Path(self.experiment.output_dir))
        if free < sum(needed.values()) * (1 - MARGIN):
            parts = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in needed.items())
            (self.findings.problem if self.is_here else self.findings.note)(
                f"{self.experiment.output_dir}: {sum(needed.values()) / GIB:.1f} GiB needed ({parts}), {free / GIB:.1f} GiB free;"
                " free the disk, lower keep_checkpoints or set output_dir"
            )

    # -------------------------------------------------------------------------------- evaluation and retrieval

    def check_evaluation(self) -> Iterator[list[str]]:
        experiment, findings, base = self.experiment, self.findings, self.open(Path(self.experiment.model.path))
        for held_out in held_out_sets(experiment):
            data = check_data(findings, held_out.key, held_out.stage, held_out.section.data, held_out.section, base)
            yield [held_out.name, *data.cells(), ""]
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
                    asked, skipped = len(task.eval_docs), sum(task.dataset["skipped"].values())
                    cells = [short_number(min(asked, settings.limit or asked)), f"{skipped:,}"]
            yield [name, *cells, "-", ""]

    def check_retrieval(self) -> Iterator[list[str]]:
        findings, settings = self.findings, self.experiment.retrieval
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
        with findings.collecting():
            check_models(settings)
        is_built = (self.experiment.index_folder() / MANIFEST).is_file()
        yield ["retrieval corpus", *data.cells(), "index built" if is_built else "index not built yet"]
