"""One build of a corpus: plan it from the raw files, run its steps on datatrove's executors, publish the result.

The steps lie in the work folder of an `Artifact` whose inputs are all that the result depends on (contents of the raw
files, settings, tokenizer), so an interrupted build continues and a changed one never mixes with an older one.
"""

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from qilin_med.artifact import Artifact, disk_errors_explained, exclusive, hash_files, sha256_of
from qilin_med.config.corpus import CorpusSettings, DeduplicationSettings
from qilin_med.config.experiment import STAGES
from qilin_med.data import deduplicate as deduplication
from qilin_med.data.card import describe
from qilin_med.data.curate import Task, clean_shard, cut, write_shard
from qilin_med.data.decontaminate import build_index
from qilin_med.data.read.files import unpacked_size
from qilin_med.data.read.readers import READERS, raw_files
from qilin_med.data.read.spans import line_test
from qilin_med.data.shards import Workspace
from qilin_med.data.steps import Step, run_steps
from qilin_med.errors import UserError

CORPUS_FORMAT = 4  # raise it whenever the same inputs and settings give another result
MARKER = "manifest.json"
WORK_FOLD = 6  # bytes on the disk while a build works, for each byte of raw files
PART_BYTES = 64 * 2**20  # input bytes for each part of the hash values: bounds the memory of a matching task


def build(
    settings: CorpusSettings, allow_missing: bool = False, restart: bool = False
) -> Literal["built", "built before", "submitted"]:
    """Build and publish, or continue where an earlier call was interrupted.

    UserError: a path is missing (unless allowed) or nothing is left, the tokenizer is missing, the output folder holds
    something else (`restart` moves it aside), another process builds there, or the disk is full.
    """
    tokenizer = Path(settings.tokenizer) / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: not found; tokenizer must name a model folder (Baichuan-7B: convert it first with"
                        " scripts/convert_baichuan.py)")  # fmt: skip
    tasks, evaluation = plan_tasks(settings, allow_missing)
    files = sorted({task.file for task in tasks} | {file for found in evaluation.values() for file in found})
    sources = {
        f"{source.stage}/{source.name}": {"place": place, **source.model_dump(mode="json")}
        for place, source in enumerate(settings.sources, 1)
    }
    inputs = {
        "format": CORPUS_FORMAT,
        # The result does not depend on where it lies and what made it.
        "settings": settings.model_dump(mode="json", exclude={"executor", "output_dir"}) | {"sources": sources},
        "tokenizer": sha256_of(tokenizer),
        "files": dict(zip(map(str, files), hash_files(files, "hashing"), strict=True)),
    }
    artifact = Artifact(Path(settings.output_dir), inputs, MARKER)
    if artifact.finished(restart, "--restart moves it aside and builds anew, or set output_dir"):
        return "built before"
    raw_size = sum(unpacked_size(task.file) for task in tasks if not task.stripe)
    parts = max(1, math.ceil(raw_size / PART_BYTES))
    work = Workspace(artifact.work, tuple(settings.sources[task.source].stage for task in tasks), parts)
    with exclusive(artifact.folder, "building"), disk_errors_explained(artifact.folder):
        (work.root / "out").mkdir(parents=True, exist_ok=True)
        needed, free = WORK_FOLD * raw_size, shutil.disk_usage(work.root).free
        if needed > free:
            print(f"{artifact.folder}: the build takes up to {needed / 1e9:,.1f} GB beside it while it works, and"
                  f" {free / 1e9:,.1f} GB are free; a full disk stops it, and it can be continued", flush=True)  # fmt: skip
        run_steps(steps_of(settings, tasks, evaluation, artifact, work, raw_size), settings.executor, work.root / "log")
    if not artifact.folder.exists():  # jobs of a cluster go on after this process
        return "submitted"
    shutil.rmtree(work.root.parent)
    return "built"


def plan_tasks(settings: CorpusSettings, allow_missing: bool) -> tuple[tuple[Task, ...], dict[str, list[Path]]]:
    """(tasks, one for each shard in the order of stage, source, file; files of each evaluation entry)."""
    held_out = settings.decontamination.files
    entries = [*settings.sources, *held_out]
    missing = [f"{path} ({entry.name})" for entry in entries for path in entry.paths if not Path(path).exists()]
    if missing and not allow_missing:
        raise UserError(f"missing: {'; '.join(missing)}. Get them (data/README.md says where), take them out of the corpus"
                        " file, or build without them: --allow-missing")  # fmt: skip
    found = []
    for entry in entries:
        present = [path for path in entry.paths if Path(path).exists()]
        found.append(raw_files(entry.model_copy(update={"paths": present})))
    tasks = []
    for number in sorted(range(len(settings.sources)), key=lambda number: STAGES.index(settings.sources[number].stage)):
        for file in sorted(found[number]):
            stripes = max(1, math.ceil(unpacked_size(file) / (settings.shard_megabytes * 2**20)))
            source = settings.sources[number]
            is_cut = stripes > 1 and line_test(file, READERS[source.kind], source) is not None
            tasks += [Task(number, file, stripe, stripes, is_cut) for stripe in range(stripes)]
    if not tasks:
        raise UserError(
            "none of the corpus file's paths exists: nothing to build; see data/README.md for where to get them"
        )
    return tuple(tasks), dict(zip([entry.name for entry in held_out], found[len(settings.sources) :], strict=True))


def steps_of(
    settings: CorpusSettings,
    tasks: tuple[Task, ...],
    evaluation: dict[str, list[Path]],
    artifact: Artifact,
    work: Workspace,
    raw_size: int,
) -> list[Step]:
    """All steps of a build, each of which needs the ones before it. `raw_size`: bytes of the raw files, unpacked."""
    repeated, shards, parts = settings.deduplication, len(tasks), work.parts
    large = [shard for shard, task in enumerate(tasks) if task.is_cut and not task.stripe]

    def publish(_: int) -> None:
        artifact.facts = describe(settings, tasks, work, work.root / "out")
        artifact.publish()

    steps = [
        Step("evaluation", 1, lambda _: build_index(settings.decontamination, work.root / "evaluation", evaluation)),
        *([Step("cut", len(large), lambda number: cut(work, settings, tasks, large[number]))] if large else []),
        Step("clean", shards, partial(clean_shard, work, settings, tasks), lambda: raw_size),
        Step("exact", parts, partial(deduplication.find_exact, work)),
    ]
    if repeated.near:
        steps += near_steps(work, repeated, [settings.sources[task.source].threshold(repeated) for task in tasks])
    if repeated.substring_tokens and "pretraining" in work.stages:
        pretraining = work.stages.count("pretraining")  # these shards come first
        text_size = partial(work.size, ("pretraining",))
        steps += [
            Step("tokenise", pretraining, partial(deduplication.tokenise_shard, work, settings), text_size),
            Step("repeats", parts, partial(deduplication.find_repeats, work)),
        ]
    write = Step("write", shards, partial(write_shard, work, settings, tasks), work.size)
    return [*steps, write, Step("publish", 1, publish)]


def near_steps(work: Workspace, settings: DeduplicationSettings, thresholds: Sequence[float]) -> list[Step]:
    """Near-deduplication of what exact deduplication left (benchmarks/dedup.py times it alone). `thresholds`: of shards."""
    return [
        Step("sign", len(work.stages), partial(deduplication.sign_shard, work, settings), work.size),
        Step("pair", work.parts, partial(deduplication.pair_candidates, work)),
        Step("verify", work.parts, partial(deduplication.verify_pairs, work, settings.shingle, thresholds)),
        Step("near", 1, partial(deduplication.find_near, work)),
    ]
