"""One build of a corpus: plan it from the raw files, run its steps on datatrove's executors, publish the result.

The steps lie in a work folder named by a digest of everything that the result depends on (contents of the raw files,
settings, tokenizer), so an interrupted build continues and a changed one never mixes with an older one.
"""

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qilin_med.artifact import (
    digest,
    disk_errors_explained,
    hash_files,
    publish_folder,
    quarantine,
    remove_unfinished,
    sha256_of,
    verify_folder,
)
from qilin_med.config.corpus import CorpusSettings, DeduplicationSettings, RawFiles
from qilin_med.config.experiment import STAGES
from qilin_med.data import deduplicate as deduplication
from qilin_med.data import output
from qilin_med.data.card import describe
from qilin_med.data.decontaminate import build_index
from qilin_med.data.deduplicate import Workspace
from qilin_med.data.intake import Intake, Task
from qilin_med.data.read.readers import raw_files
from qilin_med.data.steps import Step, run_steps
from qilin_med.errors import UserError

CORPUS_FORMAT = 1  # raise it whenever the same inputs and settings give another result
SEAL = "manifest.json"
PART_BYTES = 64 * 2**20  # input bytes for each part of the hash values: bounds the memory of a matching task
NOT_IN_RESULT = ("executor", "output_dir")  # settings that the result does not depend on


@dataclass(frozen=True)
class Plan:
    """Everything that a build does, known before it starts."""

    settings: CorpusSettings
    tasks: tuple[Task, ...]
    """One for each shard, in the order of stage, source, file."""
    evaluation: dict[str, list[Path]]
    """Files of each evaluation entry."""
    inputs: dict[str, Any]
    """What the result depends on."""

    @property
    def key(self) -> str:
        return digest(self.inputs)

    @property
    def output(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.settings.tokenizer) / "tokenizer.json"

    @property
    def work(self) -> Workspace:
        stages = tuple(self.settings.sources[task.source].stage for task in self.tasks)
        size = sum(task.file.stat().st_size / task.stripes for task in self.tasks)
        root = self.output.with_name(f"{self.output.name}.work") / self.key[:16]
        return Workspace(root, stages, max(1, math.ceil(size / PART_BYTES)))


# ---------------------------------------------------------------------------------------------------------- plan


def plan_build(settings: CorpusSettings, allow_missing: bool = False) -> Plan:
    """Find and fingerprint every input. UserError: a path is missing (unless allowed), nothing is left, no tokenizer."""
    tokenizer = Path(settings.tokenizer) / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: not found; tokenizer must name a model folder (Baichuan-7B: convert it first with"
                        " scripts/convert_baichuan.py)")  # fmt: skip
    found = _find_inputs([*settings.sources, *settings.decontamination.files], allow_missing)
    files = found[: len(settings.sources)]
    evaluation = {s.name: f for s, f in zip(settings.decontamination.files, found[len(files) :], strict=True)}
    order = sorted(range(len(files)), key=lambda source: (STAGES.index(settings.sources[source].stage), source))
    tasks = [
        Task(source, file, stripe, stripes)
        for source in order
        for file in sorted(files[source])
        for stripes in [_stripes_of(file, settings.shard_megabytes)]
        for stripe in range(stripes)
    ]
    if not tasks:
        raise UserError(
            "none of the corpus file's paths exists: nothing to build; see data/README.md for where to get them"
        )
    inputs = [file for group in found for file in sorted(group)]
    described = {
        "format": CORPUS_FORMAT,
        "settings": settings.model_dump(mode="json", exclude=set(NOT_IN_RESULT)),
        "tokenizer": sha256_of(tokenizer),
        "files": [[str(file), found] for file, found in zip(inputs, hash_files(inputs, "hashing"), strict=True)],
    }
    return Plan(settings, tuple(tasks), evaluation, described)


def _find_inputs(sources: list[RawFiles], allow_missing: bool) -> list[list[Path]]:
    """The files of each source; all that is missing is told at once."""
    missing = [f"{path} ({source.name})" for source in sources for path in source.paths if not Path(path).exists()]
    if missing and not allow_missing:
        raise UserError(f"missing: {'; '.join(missing)}. Get them (data/README.md says where), take them out of the corpus"
                        " file, or build without them: --allow-missing")  # fmt: skip
    present = [[path for path in source.paths if Path(path).exists()] for source in sources]
    return [
        raw_files(source.model_copy(update={"paths": paths})) if paths else []
        for source, paths in zip(sources, present, strict=True)
    ]


def _stripes_of(file: Path, megabytes: int) -> int:
    return max(1, math.ceil(file.stat().st_size / (megabytes * 2**20)))


# --------------------------------------------------------------------------------------------------------- steps


def steps_of(plan: Plan) -> list[Step]:
    """All steps of a build, each of which needs the ones before it."""
    work, settings = plan.work, plan.settings
    near = settings.deduplication
    shards, parts = len(plan.tasks), work.parts
    steps = [
        Step("evaluation", 1, partial(_index_evaluation, plan)),
        Step("clean", shards, partial(_clean, plan)),
        Step("exact", parts, partial(deduplication.find_exact, work)),
    ]
    if near.near:
        steps += near_steps(work, near)
    if near.substring_tokens and "pretraining" in work.stages:
        pretraining = work.stages.count("pretraining")  # these shards come first
        steps += [
            Step("tokenise", pretraining, partial(deduplication.tokenise_shard, work, near, plan.tokenizer_file)),
            Step("repeats", parts, partial(deduplication.find_repeats, work, near.substring_tokens)),
        ]
    steps += [
        Step("write", shards, partial(output.write_shard, work, settings, plan.tokenizer_file)),
        Step("publish", 1, partial(_publish, plan)),
    ]
    return steps


def near_steps(work: Workspace, settings: DeduplicationSettings) -> list[Step]:
    """Near-deduplication of what exact deduplication left."""
    pairs = settings.bands * work.parts
    return [
        Step("sign", len(work.stages), partial(deduplication.sign_shard, work, settings)),
        Step("pair", pairs, partial(deduplication.pair_candidates, work, settings)),
        Step("verify", work.parts, partial(deduplication.verify_pairs, work, settings)),
        Step("near", 1, partial(_find_near, work)),
    ]


def _index_evaluation(plan: Plan, _: int) -> None:
    build_index(plan.settings.decontamination, plan.work.root / "evaluation", plan.evaluation)


def _clean(plan: Plan, shard: int) -> None:
    Intake(plan.work, plan.settings, plan.tasks[shard]).write(plan.work, shard)


def _find_near(work: Workspace, _: int) -> None:
    deduplication.find_near(work)


def _publish(plan: Plan, _: int) -> None:
    out = plan.work.root / "out"
    remove_unfinished(out)
    manifest, readme = describe(plan.settings, plan.tasks, plan.evaluation, plan.work, plan.inputs)
    (out / "README.md").write_text(readme, encoding="utf-8")
    publish_folder(out, plan.output, {"key": plan.key, **manifest}, SEAL)


# --------------------------------------------------------------------------------------------------------- build


def build(plan: Plan, restart: bool = False) -> Literal["built", "built before", "submitted"]:
    """Build and publish, or continue where an earlier call was interrupted.

    UserError: the output folder holds something else (`restart` moves it aside), or the disk is full.
    """
    work = plan.work.root
    if plan.output.exists() and not _make_way(plan, restart):
        shutil.rmtree(work.parent, ignore_errors=True)  # left by Slurm's jobs, or by a kill after publishing
        return "built before"
    with disk_errors_explained(plan.output):
        work.mkdir(parents=True, exist_ok=True)
        run_steps(steps_of(plan), plan.settings.executor, work / "log")
    if not plan.output.exists():  # jobs of a cluster go on after this process
        return "submitted"
    shutil.rmtree(work.parent)
    return "built"


def _make_way(plan: Plan, restart: bool) -> bool:
    """Whether there is something to build."""
    try:
        if verify_folder(plan.output, SEAL).get("key") == plan.key:
            return False
        problem = "was built from other files or settings"
    except UserError as error:
        problem = f"is no whole build ({error})"
    if not restart:
        raise UserError(f"{plan.output} {problem}; --restart moves it aside and builds anew, or set output_dir")
    print(f"{plan.output} {problem}: kept as {quarantine(plan.output, 'replaced')}", flush=True)
    return True
