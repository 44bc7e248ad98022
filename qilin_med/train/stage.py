"""The shape that all stages share: verify the parent, prepare rows, train on the ranks, merge, publish.

A stage script calls `run_stage` with the one thing that is its own, a function from a Job to a trainer. The first
process prepares and publishes; the ranks that it launches only train and write checkpoints. Every step can be killed and
the same command run again.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qilin_med.artifact import (
    commit,
    disk_errors_explained,
    fingerprint_model,
    publish_folder,
    quarantine,
    read_manifest,
    verify_folder,
    versions,
    write_json,
)
from qilin_med.config.experiment import (
    EXAMPLES,
    Experiment,
    StageName,
    experiment_parser,
    parse_experiment,
    read_deepspeed,
)
from qilin_med.config.schedule import check_batch_size
from qilin_med.console.progress import progress
from qilin_med.errors import UserError, user_errors_end_with_one_line
from qilin_med.train.checkpoints import COMPLETE, newest_complete, step_of
from qilin_med.train.job import Job, check_begun, check_engine, check_rows, count_ranks
from qilin_med.train.launch import RanksFailed, die_with_launcher, errors_reported, is_rank
from qilin_med.train.metrics import checkpoint_cost, read_metrics
from qilin_med.train.nodes import NodeLost, Place, Team, find_place, other_nodes_started
from qilin_med.train.operators import build_operators, load_operators, needed_operators
from qilin_med.train.ranks import follow, train_on_all_nodes
from qilin_med.train.universal import convert_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_QUIET = {
    "HF_HUB_OFFLINE": "1",  # every model is a local folder; nothing is looked up or reported anywhere
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "DS_ACCELERATOR": "cpu",  # for the first process, which only prepares and merges
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # qilin_med.console.progress draws the only bar
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",  # of this environment, not one for all of the user's
}


def quiet_libraries() -> None:
    """Libraries' notes on optional parts that this pipeline does not use only hide what matters.

    Call before they are imported.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run_stage(stage: StageName, build_trainer: "Callable[[Job], Trainer]", description: str) -> None:
    """The main function of a stage script."""
    quiet_libraries()
    if is_rank():
        _run_rank(build_trainer, Path(sys.argv[-1]))
        return
    parser = experiment_parser(description)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--force", action="store_true", help="start even if memory or disk seem too small")
    parser.add_argument("--restart", action="store_true", help="move what this stage made before aside and start anew")
    with user_errors_end_with_one_line():
        arguments, experiment = parse_experiment(parser)
        experiment.stage(stage)
        if arguments.dry_run:
            _show_stage(experiment, stage)
        else:
            _take_part(experiment, stage, find_place(), arguments.restart, arguments.force)


def _show_stage(experiment: Experiment, stage: StageName) -> None:
    from qilin_med.check.report import check_experiment, print_report

    print(json.dumps(experiment.model_dump(mode="json"), ensure_ascii=False, indent=2))
    print_report(check_experiment(experiment, stage))


def _take_part(experiment: Experiment, stage: StageName, place: Place, restart: bool, force: bool) -> None:
    """Run the stage as node 0, or follow node 0 as one of the other nodes."""
    own_ranks = _count_ranks(experiment, place.slots)
    asked = {"stage": stage, "experiment": experiment.model_dump(mode="json"), "libraries": versions()}
    build_operators(*_operators(experiment, stage))  # before ranks, or node 0, wait for it
    patience = 60 * experiment.launch.timeout_minutes
    with other_nodes_started(place) as started, Team(place, patience, started) as team:
        if place.node:
            sys.exit(follow(team, own_ranks, asked))
        with team.last_word():
            _run_whole_stage(experiment, stage, team.agree_on_ranks(own_ranks, asked), team, restart, force)


def _operators(experiment: Experiment, stage: StageName) -> tuple[dict[str, str], str]:
    device = experiment.launch.device
    return needed_operators(read_deepspeed(experiment.stage(stage).deepspeed), device), device


def _run_whole_stage(
    experiment: Experiment, stage: StageName, ranks: list[int], team: Team, restart: bool, force: bool
) -> None:
    folder = experiment.stage_folder(stage)
    with disk_errors_explained(folder), _only_run_in(folder):
        if restart and folder.exists():
            say(f"moved what was there to {quarantine(folder, 'before')}")
        with progress(f"preparing {stage}"):
            job, parameters, trainable = _prepare_job(experiment, stage, sum(ranks))
        check_begun(job)
        if _is_finished(job):
            return
        if not force:
            _refuse_what_cannot_fit(job, len(ranks))
        _describe(job, parameters, trainable)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(Path(experiment.output_dir) / "config.json", experiment.model_dump(mode="json"))
        job.save(job.folder / "job.json")
        checkpoint = _train(job, ranks, team)
        say("merging and publishing")
        with progress("merging and publishing"):
            _publish(job, checkpoint)
        say(f"{job.stage}: finished, {job.merged}")


@contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """UserError if another process is at work on this stage of this run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training there now; wait for it, or end it first") from None
        yield


def _prepare_job(experiment: Experiment, stage: StageName, ranks: int) -> tuple[Job, int, int]:
    """Verify the parent and prepare the rows: all that needs one process alone, before ranks wait for anything.
    Also the number of parameters, and of trainable ones."""
    from qilin_med.model.folder import check_model_folder, count_parameters, max_positions
    from qilin_med.model.load import check_packages, check_trackers, load_tokenizer

    check_batch_size(stage, experiment.stage(stage), ranks)
    check_trackers(stage, experiment.stage(stage).report_to)
    parent = experiment.parent_folder(stage)
    _explain_missing_parent(experiment, stage, parent)
    parameters, trainable = count_parameters(check_model_folder(parent), experiment.stage(stage).lora)
    check_packages(experiment.model, training=True)
    parent_fingerprint = fingerprint_model(parent)

    from qilin_med.data.rows import prepare_rows

    tokenizer = load_tokenizer(parent, experiment.model.template)
    cache = Path(experiment.output_dir) / "cache"
    rows = prepare_rows(stage, experiment.stage(stage), tokenizer, max_positions(parent), cache)
    job = Job(experiment, stage, parent, parent_fingerprint, rows.folder, len(rows.dataset), ranks)
    check_rows(job)
    check_engine(job)
    return job, parameters, trainable


def _count_ranks(experiment: Experiment, slots: int | None = None) -> int:
    """Ranks on this node: `slots` where a hostfile says so, else as launch.processes says."""
    import torch

    if slots:
        launch = experiment.launch.model_copy(update={"processes": slots})
        experiment = experiment.model_copy(update={"launch": launch})
    ranks = count_ranks(experiment, torch.cuda.device_count())
    wants_bf16 = experiment.model.dtype == "bfloat16" and experiment.launch.device == "cuda"
    if wants_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"model.dtype is bfloat16, which {name} cannot compute; set model.dtype=float32")
    return ranks


def _explain_missing_parent(experiment: Experiment, stage: StageName, parent: Path) -> None:
    if parent.exists():
        return
    if parent == Path(experiment.model.path):
        raise UserError(f"model.path: {parent} does not exist; README.md tells how to get and convert the base model")
    raise UserError(f"{stage} starts from {parent}, which does not exist; run the stage that makes it first")


def _refuse_what_cannot_fit(job: Job, nodes: int) -> None:
    """UserError if memory or disk of this machine, one of `nodes` alike, are certainly too small."""
    import torch

    from qilin_med.plan.data import Amount
    from qilin_med.plan.preflight import check_machine

    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    amount = Amount(job.row_count, 0, 0, read_manifest(job.rows)["counts"]["longest"], str(job.rows))
    gpu_memory = min(gpus, default=0)
    if note := check_machine(job.experiment, job.stage, job.parent, amount, job.ranks, nodes, gpu_memory):
        say(note)


def _is_finished(job: Job) -> bool:
    if not job.merged.exists():
        return False
    try:
        manifest = verify_folder(job.merged)
    except UserError as error:
        say(f"{error}. Kept as {quarantine(job.merged, 'damaged').name}; publishing again")
        return False
    say(f"{job.stage}: already finished ({manifest['updates']} updates, {manifest['created']}): {job.merged}")
    return True


def _train(job: Job, ranks: list[int], team: Team) -> Path:
    """Train up to the last update, from the newest complete checkpoint on; returns the final checkpoint."""
    with progress("looking for checkpoints"):
        checkpoint, lines = newest_complete(job.checkpoints, job.fingerprint())
    for line in lines:
        say(line)
    if checkpoint is None or step_of(checkpoint) < job.updates:
        say(f"continuing from {checkpoint.name}" if checkpoint else "starting")
        checkpoint, stopped_by = _launch(job, checkpoint, ranks, team)
        if checkpoint is None or step_of(checkpoint) < job.updates:
            by = f"by {stopped_by} " if stopped_by else ""
            at = f"at step {step_of(checkpoint)} of {job.updates}" if checkpoint else "before the first checkpoint"
            say(f"stopped {by}{at}; run the same command to {'continue' if checkpoint else 'start again'}")
            sys.exit(130)
    return checkpoint


def _launch(job: Job, checkpoint: Path | None, ranks: list[int], team: Team) -> tuple[Path | None, str]:
    """The newest checkpoint of all after training from one on, and who had it stopped ("" if no one)."""
    failure, stopped_by = None, ""
    universal = job.folder / ".universal.part"
    resume = _for_these_ranks(job, checkpoint, universal) if checkpoint else None
    try:
        stopped_by = train_on_all_nodes(job, resume, ranks, team)
    except (RanksFailed, NodeLost) as error:
        failure = error
    shutil.rmtree(universal, ignore_errors=True)
    newest, lines = newest_complete(job.checkpoints, job.fingerprint())
    for line in lines:
        say(line)
    done = newest is not None and step_of(newest) == job.updates
    if failure and not done:
        raise UserError(f"{job.stage} did not finish: {failure}. Last complete checkpoint: {newest or 'none'}")
    return newest, stopped_by


def _for_these_ranks(job: Job, checkpoint: Path, folder: Path) -> Path:
    """The checkpoint itself, or where DeepSpeed split its optimiser among another number of ranks, a copy in `folder`
    that these ranks can load."""
    ranks = read_manifest(checkpoint, COMPLETE)["ranks"]
    if ranks == job.ranks or job.zero_stage == 0:
        return checkpoint
    say(f"{checkpoint.name} was written by {ranks} ranks: converting it for {job.ranks}")
    with progress(f"converting {checkpoint.name}"):
        return convert_checkpoint(checkpoint, _empty_folder(folder))


def _run_rank(build_trainer: "Callable[[Job], Trainer]", job_file: Path) -> None:
    """Train as one of the ranks: from the start, or from the checkpoint named by --resume."""
    die_with_launcher()
    job = Job.load(job_file)
    resume = sys.argv[sys.argv.index("--resume") + 1] if "--resume" in sys.argv else None
    with errors_reported(), ExitStack() as starting:
        starting.enter_context(progress("starting the ranks: libraries, model, checkpoint"))
        from transformers import PrinterCallback, set_seed

        from qilin_med.train.callbacks import Checkpoints, Guard, MetricsFile, Progress, StartUp, end_rank

        trainer = build_trainer(job)
        trainer.remove_callback(PrinterCallback)
        checkpoints, metrics = Checkpoints(job, trainer), MetricsFile(job.folder / "metrics.jsonl")
        # In this order: a row is written before its checkpoint is committed, and times all that is waited for.
        for callback in (StartUp(starting), metrics, Progress(), checkpoints, Guard(job, trainer, checkpoints)):
            trainer.add_callback(callback)
        set_seed(job.experiment.seed)  # again: whether the reference pass was cached must not change the dropout
        with checkpoints:
            trainer.train(resume_from_checkpoint=resume)
    end_rank()


def training_arguments(job: Job, kind: "type[TrainingArguments] | None" = None, **extra: Any) -> "TrainingArguments":
    """The library's arguments for a job; `kind` is TrainingArguments or a subclass of it."""
    from transformers import TrainingArguments

    load_operators(*_operators(job.experiment, job.stage))
    section, on_cpu = job.section, job.experiment.launch.device == "cpu"
    arguments = (kind or TrainingArguments)(
        output_dir=str(job.checkpoints),
        seed=job.experiment.seed,
        max_steps=job.updates,
        per_device_train_batch_size=section.batch_size_per_device,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.scheduler,
        warmup_steps=job.warmup_updates,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=job.experiment.model.dtype == "bfloat16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        activation_checkpointing=section.activation_checkpointing,
        # Re-entrant checkpointing needs inputs with gradients, which a frozen embedding under LoRA does not give.
        activation_checkpointing_kwargs={"use_reentrant": False} if section.activation_checkpointing else None,
        deepspeed=section.deepspeed,
        logging_steps=1,  # a resumed run must log the same numbers, so no averages over several updates
        logging_nan_inf_filter=False,  # Guard stops the run instead
        save_strategy="no",  # our callback says when
        report_to=section.report_to,
        disable_tqdm=True,  # Progress shows more
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=round(60 * job.experiment.launch.timeout_minutes),
        **extra,
    )
    if job.zero_stage == 3:
        _connect_for_loading(arguments)
    return arguments


def _connect_for_loading(arguments: "TrainingArguments") -> None:
    """ZeRO-3 splits a model among the ranks while it loads, before the trainer connects them."""
    import deepspeed

    _ = arguments.device  # connects the ranks
    deepspeed.init_distributed(auto_mpi_discovery=False)  # on a CPU DeepSpeed was left out of it


def _publish(job: Job, checkpoint: Path) -> None:
    """Merge the final checkpoint and hand it over: the folder appears under its name only when it is whole."""
    from qilin_med.model.load import DTYPES, load_checkpoint, load_tokenizer, merge_adapter, save_whole_model
    from qilin_med.prompt.template import ChatTemplate

    settings = job.experiment.model
    if job.section.lora:
        _publish_adapter(job, checkpoint)
        model = merge_adapter(job.parent, checkpoint)
    else:
        model = load_checkpoint(checkpoint, DTYPES[settings.dtype])
    tokenizer = load_tokenizer(job.parent, settings.template)
    answers_end = set() if job.stage == "pretraining" else {ChatTemplate(tokenizer).end_id}
    temporary = _empty_folder(job.folder / ".merged.part")
    save_whole_model(model, tokenizer, temporary, settings.dtype, {tokenizer.eos_token_id} | answers_end)
    cost = publish_folder(temporary, job.merged, _manifest(job))["checkpoints"]
    say(
        f"{job.stage}: finished, {job.merged}. Training waited {cost['seconds']:,} s for {cost['number']} checkpoints,"
        f" {cost['share']:.1%} of its time"
    )


def _publish_adapter(job: Job, checkpoint: Path) -> None:
    final = job.folder / "adapter"
    if final.exists():
        return
    temporary = _empty_folder(job.folder / ".adapter.part")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(checkpoint / name, temporary / name)
    publish_folder(temporary, final, {"stage": job.stage, "job": job.fingerprint()})


def _empty_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _manifest(job: Job) -> dict[str, Any]:
    """How the merged folder was made: enough to trace every number measured on it."""
    rows = read_manifest(job.rows)
    metrics = read_metrics(job.folder / "metrics.jsonl")
    return {
        "stage": job.stage,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "experiment": job.experiment.model_dump(mode="json"),
        "job": job.fingerprint(),
        "parent": {"folder": str(job.parent), "fingerprint": job.parent_fingerprint},
        "data": {"fingerprint": rows["fingerprint"], "counts": rows["counts"]},
        "ranks": job.ranks,
        "updates": job.updates,
        "final_metrics": metrics[-1] if metrics else None,
        "checkpoints": checkpoint_cost(metrics),
        "versions": versions(),
        "commit": commit(),
    }


def _describe(job: Job, parameters: int, trainable: int) -> None:
    """The summary before a run."""
    counts = read_manifest(job.rows)["counts"]
    from qilin_med.model.load import attention_path

    section, passes = job.section, job.updates / math.ceil(job.row_count / job.global_batch_size)
    lines = {
        "stage": f"{job.stage} of {job.experiment.name}",
        "starts from": str(job.parent),
        "data": f"{counts['records']:,} records in {len(counts['files'])} files, {counts['used']:,} used",
        "rows": f"{counts['rows']:,}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained on",
        "updates": f"{job.updates:,} of {job.global_batch_size} {EXAMPLES[job.stage]} ({job.ranks} ranks x"
        f" {section.batch_size_per_device} x {job.accumulation} accumulated), {passes:.2f} epochs,"
        f" {counts['tokens'] * passes:,.0f} tokens",
        "parameters": f"{parameters:,}, {trainable:,} trainable ({trainable / parameters:.2%})",
        "attention": attention_path(job.experiment.model, job.keeps_sequences_apart),
        "writes to": str(job.folder),
    }
    if counts["skipped"]:
        reasons = "; ".join(f"{number} {reason}" for reason, number in counts["skipped"].items())
        lines["skipped"] = f"{reasons} (see {job.rows}/skipped.jsonl)"
    cut = {name: counts.get(name, 0) for name in ("cut_sources", "cut_targets", "continued", "dropped_turns")}
    if any(cut.values()):
        lines["cut"] = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in cut.items() if number)
    for name, value in lines.items():
        print(f"{name + ':':13}{value}", flush=True)


def say(line: str) -> None:
    print(line, flush=True)
