"""What the three stage scripts share: a stage is prepared by rank 0, trained by all ranks, merged and published by rank 0.

Every step can be killed and the same command run again: what is finished is skipped, an interrupted training continues
from its newest complete checkpoint, and a folder begun with other settings is refused.
"""

import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qilin_med import artifact
from qilin_med.config.experiment import EXAMPLES, Experiment, StageName, experiment_parser, parse_experiment
from qilin_med.config.schedule import check_batch_size, check_rows, make_schedule
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.data.rows import prepare_rows, read_counts
from qilin_med.errors import UserError, user_errors_end_with_one_line
from qilin_med.launch.agent import LAUNCHED_HERE, STOPPED, find_cluster, launch_ranks
from qilin_med.launch.rank import Ranks, begin_rank, end_rank, errors_handed_on, is_rank
from qilin_med.train.checkpoints import COMPLETE, convert_checkpoint, find_checkpoints, newest_complete, step_of
from qilin_med.train.job import Job
from qilin_med.train.metrics import checkpoint_cost, read_metrics, trained_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

# Settings that are the library's own, by its names.
_SAME_NAMES = {
    "learning_rate", "weight_decay", "max_grad_norm", "activation_checkpointing", "deepspeed", "report_to",
}  # fmt: skip
_DELAY = 60.0  # seconds that a shared file system gets to show one node what another wrote


@contextmanager
def stage_script(name: StageName, description: str) -> Iterator["Stage"]:
    """The frame of a stage script. Started by hand, the block is never entered: the ranks are started, and the process ends
    when they do. In a rank the block is the work; every rank ends with it."""
    quiet_libraries()
    parser = experiment_parser(description)
    parser.add_argument("--dry-run", action="store_true", help="check what the stage needs, and stop")
    parser.add_argument("--force", action="store_true", help="start even if memory or disk seem too small")
    parser.add_argument("--restart", action="store_true", help="move what this stage made before aside and start anew")
    parser.add_argument("--local_rank", help="ignored: DeepSpeed's launcher adds it")
    if not is_rank():
        with user_errors_end_with_one_line():
            options, experiment = parse_experiment(parser)
            experiment.stage(name)
            if options.dry_run:
                _check(name, options)
            sys.exit(_launch(name, experiment))
    begin_rank()
    with errors_handed_on():
        options, experiment = parse_experiment(parser)
        if not options.dry_run:
            with artifact.disk_errors_explained(experiment.stage_folder(name)), ExitStack() as held:
                yield Stage(name, experiment, options, held)
        elif os.environ["RANK"] == "0":
            _check(name, options)
        end_rank()


def _check(name: StageName, options: Namespace) -> None:
    """Become scripts/check.py for this stage."""
    check = str(Path(sys.argv[0]).with_name("scripts") / "check.py")
    settings = ["--config", options.config, *options.overrides]
    os.execv(sys.executable, [sys.executable, check, "--stage", name, *settings])


def _launch(name: StageName, experiment: Experiment) -> int:
    """The exit code of a stage whose ranks this process starts: 0, or 130 where they were stopped."""
    folder = experiment.stage_folder(name)
    try:
        stopped_by = launch_ranks(experiment, find_cluster())
    except UserError as error:
        if not (folder / "job.json").exists():
            raise
        last = next(reversed(_complete(folder)), "none")
        raise UserError(f"{name} did not finish: {error}. Last complete checkpoint: {last}") from None
    if stopped_by:
        print(f"stopped by {stopped_by} {_where(folder)}", flush=True)
    return STOPPED if stopped_by else 0


def _complete(folder: Path) -> list[Path]:
    return [path for path in find_checkpoints(folder / "checkpoints") if (path / COMPLETE).is_file()]


def _where(folder: Path) -> str:
    if not (complete := _complete(folder)):
        return "before the first checkpoint; run the same command to start again"
    step, steps = step_of(complete[-1]), Job.load(folder / "job.json").schedule.steps
    return f"at step {step} of {steps}; run the same command to continue"


class Stage:
    """A stage as one of its ranks: `prepare`, `train`, `publish`, in that order."""

    def __init__(self, name: StageName, experiment: Experiment, options: Namespace, held: ExitStack) -> None:
        self.name, self.experiment, self.options = name, experiment, options
        self.folder = experiment.stage_folder(name)
        self.held = held  # the lock that rank 0 holds on to until the end
        # Before torch and DeepSpeed are imported:
        os.environ.setdefault("OMP_NUM_THREADS", str(experiment.launch.threads_per_process))
        os.environ["DS_ACCELERATOR"] = experiment.launch.device
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard")
        self.ranks = Ranks(experiment.launch.timeout_minutes)

    def prepare(self) -> Job:
        """Rank 0: verify the parent, make or find the rows, and refuse what cannot go well; the others wait for it. All ranks
        end here if the stage is finished, and all but rank 0 if it only has to be published."""
        asked = {"stage": self.name, "experiment": self.experiment.model_dump(mode="json")}
        message = self.ranks.share(asked, self._prepare_alone)
        self.resume, self.is_trained = message["resume"], message["is_trained"]
        if message["job"] is None or (self.is_trained and self.ranks.rank):
            end_rank()
        return self._find_job(message["job"])

    def _prepare_alone(self) -> dict[str, Any]:
        """The sha256 of the job's file (None: there is nothing left to do), and where training is to go on."""
        self.held.enter_context(artifact.exclusive(self.folder, "training"))
        with artifact.disk_errors_explained(self.folder):
            if self.options.restart and self.folder.exists():
                print(f"moved what was there to {artifact.quarantine(self.folder, 'before')}", flush=True)
            with progress(f"preparing {self.name}"):
                job, parameters = prepare_job(self.experiment, self.name, self.ranks.count)
            job.check_begun()
            merged = artifact.Artifact(job.merged, job.identity()).state()
            if merged.name in (
                "done",
                "differs",
            ):  # merged folders made before 2026-11-25 name no inputs; job.json does
                print(f"{job.stage}: already finished ({merged.manifest['created']}): {job.merged}", flush=True)
                return {"job": None, "resume": None, "is_trained": True}
            if merged.name == "damaged":
                aside = artifact.quarantine(job.merged, "damaged")
                print(f"{merged.why}. Kept as {aside.name}; publishing again", flush=True)
            if not self.options.force:
                refuse_what_cannot_fit(job, self.ranks.nodes)
            describe(job, *parameters)
            job.folder.mkdir(parents=True, exist_ok=True)
            artifact.write_json(
                Path(self.experiment.output_dir) / "config.json", job.experiment.model_dump(mode="json")
            )
            job.save(job.folder / "job.json")
            checkpoint, resume = self._choose_checkpoint(job)
        is_trained = checkpoint is not None and step_of(checkpoint) == job.schedule.steps
        text = (job.folder / "job.json").read_text(encoding="utf-8")
        return {"job": artifact.digest(text), "resume": resume and str(resume.absolute()), "is_trained": is_trained}

    def _find_job(self, written: str) -> Job:
        """The job that rank 0 wrote; UserError if this node does not see it, or not the model that it starts from."""
        path, deadline = self.folder / "job.json", time.monotonic() + _DELAY
        while not (path.is_file() and artifact.digest(path.read_text(encoding="utf-8")) == written):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path.absolute()} is not the file that rank 0 wrote; output_dir must lie on a file system that all"
                    " nodes share, under the same path: a checkpoint holds parts of every node in one folder"
                )
            time.sleep(1)
        job = Job.load(path)
        if not job.parent.is_dir():
            raise UserError(
                f"{job.parent.absolute()}, the model that rank 0 starts from, is not here; share or copy it"
            )
        return job

    def train(self, job: Job, build_trainer: "Callable[[Job], Trainer]") -> Path:
        """Train up to the last optimizer step, from the newest complete checkpoint on. Returns on rank 0, with the final
        checkpoint; the others end here."""
        import torch

        if not self.is_trained:
            if stopped_by := run_trainer(job, build_trainer, self.resume):
                if self.ranks.rank == 0 and LAUNCHED_HERE not in os.environ:
                    print(f"stopped by {stopped_by} {_where(job.folder)}", flush=True)
                end_rank(STOPPED)
            if self.ranks.rank:
                end_rank()
        torch.set_num_threads(os.cpu_count() or 1)  # for merging, which rank 0 does alone
        shutil.rmtree(job.folder / ".universal.part", ignore_errors=True)
        return _complete(job.folder)[-1]

    def _choose_checkpoint(self, job: Job) -> tuple[Path | None, Path | None]:
        """The newest complete checkpoint, and what the ranks load: where DeepSpeed split its optimizer among another number
        of ranks, a copy that these ranks can load."""
        with progress("looking for checkpoints"):
            checkpoint, lines = newest_complete(job.checkpoints, job.fingerprint())
        for line in lines:
            print(line, flush=True)
        print(f"continuing from {checkpoint.name}" if checkpoint else "starting", flush=True)
        if checkpoint is None or job.zero_stage == 0:
            return checkpoint, checkpoint
        ranks = artifact.read_manifest(checkpoint, COMPLETE)["ranks"]
        if ranks == job.schedule.ranks:
            return checkpoint, checkpoint
        print(f"{checkpoint.name} was written by {ranks} ranks: converting it for {job.schedule.ranks}", flush=True)
        folder = job.folder / ".universal.part"
        shutil.rmtree(folder, ignore_errors=True)
        with progress(f"converting {checkpoint.name}"):
            return checkpoint, convert_checkpoint(checkpoint, folder)

    def publish(self, job: Job, checkpoint: Path, model: "PreTrainedModel", ends_turns: bool) -> None:
        """Rank 0: hand the merged model over. The folder appears under its name only when it is whole. Generation ends at
        EOS, and where the model has learnt to end its turns, at the template's end of a turn."""
        from qilin_med.model.load import load_tokenizer, save_whole_model
        from qilin_med.prompt.template import ChatTemplate

        print("merging and publishing", flush=True)
        adapter, merged = (artifact.Artifact(job.folder / name, job.identity()) for name in ("adapter", "merged"))
        with progress("merging and publishing"):
            if job.section.lora and not adapter.folder.exists():
                with adapter.building() as folder:
                    for name in ("adapter_config.json", "adapter_model.safetensors"):
                        shutil.copy2(checkpoint / name, folder / name)
            with merged.building() as folder:
                tokenizer = load_tokenizer(job.parent, job.experiment.model.template)
                ends = {ChatTemplate(tokenizer).end_id} if ends_turns else set()
                dtype = job.experiment.model.dtype
                save_whole_model(model, tokenizer, folder, dtype, {tokenizer.eos_token_id} | ends)
                metrics = read_metrics(job.folder / "metrics.jsonl")
                cost, rows = checkpoint_cost(metrics), artifact.read_manifest(job.rows)
                merged.facts = {  # enough to trace every number measured on it
                    "stage": job.stage,
                    "experiment": job.experiment.model_dump(mode="json"),
                    "overrides": self.experiment.overrides,
                    "job": job.fingerprint(),
                    "parent": {"folder": str(job.parent), "fingerprint": job.parent_fingerprint},
                    "data": {"fingerprint": rows["fingerprint"], "counts": read_counts(job.rows)},
                    "ranks": job.schedule.ranks,
                    "optimizer_steps": job.schedule.steps,
                    "trained": trained_on(metrics, job.schedule),
                    "final_metrics": metrics[-1] if metrics else None,
                    "checkpoints": cost,
                }
        print(
            f"{job.stage}: finished, {job.merged}. Training waited {cost['seconds']:,} s for {cost['number']} checkpoints,"
            f" {cost['share']:.1%} of its time",
            flush=True,
        )


def prepare_job(experiment: Experiment, stage: StageName, ranks: int) -> tuple[Job, tuple[int, int]]:
    """Verify the parent and prepare the rows: all that one process does alone while the others wait. Returns the job, and
    the numbers of parameters and of trainable ones."""
    import torch

    from qilin_med.model.folder import check_model_folder, count_parameters, max_positions
    from qilin_med.model.load import check_packages, check_trackers, load_tokenizer

    section, parent = experiment.stage(stage), experiment.parent_folder(stage)
    check_batch_size(stage, section, ranks)
    check_trackers(stage, section.report_to)
    if not parent.exists() and parent == Path(experiment.model.path):
        raise UserError(f"model.path: {parent} does not exist; README.md tells how to get and convert the base model")
    if not parent.exists():
        raise UserError(f"{stage} starts from {parent}, which does not exist; run the stage that makes it first")
    parameters = count_parameters(check_model_folder(parent), section.lora)
    check_packages(experiment.model, training=True)
    wants_bf16 = experiment.model.dtype == "bfloat16" and experiment.launch.device == "cuda"
    if wants_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"model.dtype is bfloat16, which {name} cannot compute; set model.dtype=float32")
    fingerprint = artifact.fingerprint_model(parent)
    tokenizer = load_tokenizer(parent, experiment.model.template)
    cache = Path(experiment.output_dir) / "cache"
    rows = prepare_rows(stage, section, tokenizer, max_positions(parent), cache)
    schedule = make_schedule(stage, section, len(rows.dataset), ranks)
    job = Job(experiment, stage, parent, fingerprint, rows.folder, schedule)
    check_rows(stage, schedule)
    job.check_engine()
    return job, parameters


def refuse_what_cannot_fit(job: Job, nodes: int) -> None:
    """UserError if memory or disk of this machine, one of `nodes` alike, are certainly too small."""
    import torch

    from qilin_med.plan.data import Amount
    from qilin_med.plan.preflight import check_machine

    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    amount = Amount(job.schedule.rows, 0, 0, read_counts(job.rows)["longest"], str(job.rows))
    ranks, memory = job.schedule.ranks, min(gpus, default=0)
    if note := check_machine(job.experiment, job.stage, job.parent, amount, ranks, nodes, memory):
        print(note, flush=True)


def describe(job: Job, parameters: int, trainable: int) -> None:
    """The summary before a run."""
    from qilin_med.model.load import attention_path

    counts, schedule = read_counts(job.rows), job.schedule
    lines = {
        "stage": f"{job.stage} of {job.experiment.name}",
        "starts from": str(job.parent),
        "data": f"{counts['records']:,} records in {len(counts['files'])} files, {counts['used']:,} used",
        "rows": f"{counts['rows']:,}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} with a loss",
        "steps": f"{schedule.steps:,} of {schedule.global_batch_size} {EXAMPLES[job.stage]} ({schedule.ranks} ranks x"
        f" {schedule.batch_size} x {schedule.accumulation} accumulated), {schedule.epochs:.2f} epochs,"
        f" {counts['tokens'] * schedule.epochs:,.0f} tokens",
        "parameters": f"{parameters:,}, {trainable:,} trainable ({trainable / parameters:.2%})",
        "attention": attention_path(job.experiment.model, job.keeps_sequences_apart),
        "writes to": str(job.folder),
    }
    if counts["skipped"]:
        reasons = "; ".join(f"{number} {reason}" for reason, number in counts["skipped"].items())
        lines["skipped"] = f"{reasons} (see {job.rows}/skipped.jsonl)"
    kinds = ("cut_sources", "cut_targets", "continued", "dropped_turns")
    if cut := [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in kinds if counts.get(kind)]:
        lines["cut"] = ", ".join(cut)
    for name, value in lines.items():
        print(f"{name + ':':13}{value}", flush=True)


def training_arguments(job: Job, kind: "type[TrainingArguments] | None" = None, **extra: Any) -> "TrainingArguments":
    """The library's arguments for a job; `kind` is TrainingArguments or a subclass of it."""
    from transformers import TrainingArguments

    section, on_cpu = job.section, job.experiment.launch.device == "cpu"
    if on_cpu and section.deepspeed:
        import deepspeed

        # Ranks on a CPU would compile and load an operator that only inference uses.
        deepspeed.ops.__compatible_ops__ = {}
    arguments = (kind or TrainingArguments)(
        output_dir=str(job.checkpoints),
        seed=job.experiment.seed,
        max_steps=job.schedule.steps,
        per_device_train_batch_size=job.schedule.batch_size,
        gradient_accumulation_steps=job.schedule.accumulation,
        lr_scheduler_type=section.scheduler,
        warmup_steps=job.schedule.warmup_steps,
        bf16=job.experiment.model.dtype == "bfloat16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        # Re-entrant checkpointing needs inputs with gradients, which a frozen embedding under LoRA does not give.
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        logging_steps=1,  # a resumed run must log the same numbers, so no averages over several steps
        logging_nan_inf_filter=False,  # Guard stops the run instead
        save_strategy="no",  # our callback says when
        disable_tqdm=True,  # Progress shows more
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=round(60 * job.experiment.launch.timeout_minutes),
        **section.model_dump(include=_SAME_NAMES),
        **extra,
    )
    if job.zero_stage == 3:
        # ZeRO-3 splits a model among the ranks while it loads, before the trainer connects them.
        import deepspeed

        _ = arguments.device  # connects the ranks
        deepspeed.init_distributed(auto_mpi_discovery=False)  # on a CPU DeepSpeed was left out of it
    return arguments


def run_trainer(job: Job, build_trainer: "Callable[[Job], Trainer]", resume: str | None) -> str:
    """Train as one of the ranks, from the start or from a checkpoint; returns who had it stopped, "" if no one. All of the
    trainer's memory is free again."""
    with ExitStack() as starting:
        starting.enter_context(progress("starting the ranks: libraries, model, checkpoint"))
        from transformers import PrinterCallback, set_seed
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from qilin_med.train.callbacks import Checkpoints, Guard, MetricsFile, Progress, wait_for_all

        trainer = build_trainer(job)
        trainer.remove_callback(PrinterCallback)
        checkpoints, metrics = Checkpoints(job, trainer), MetricsFile(job.folder / "metrics.jsonl")
        guard = Guard(job, trainer, checkpoints)
        # In this order: a row is written before its checkpoint is committed, and times all that is waited for.
        for callback in (metrics, Progress(starting), checkpoints, guard):
            trainer.add_callback(callback)
        set_seed(job.experiment.seed)  # again: whether the reference pass was cached must not change the dropout
        with checkpoints:
            trainer.train(resume_from_checkpoint=resume)
    wait_for_all()
    unset_hf_deepspeed_config()  # else ZeRO-3 would split the merged model too
    return (guard.stopped_by or "another rank") if trainer.stop_agreed else ""
