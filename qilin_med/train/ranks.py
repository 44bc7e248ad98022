"""The ranks of a job on all nodes: node 0 says what to run, every node runs its own, node 0 judges how they ended."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qilin_med.artifact import digest
from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.train.job import Job
from qilin_med.train.launch import Outcome, raise_failures, run_ranks
from qilin_med.train.nodes import NodeLost, Team

_DELAY = 60.0  # seconds that a shared file system gets to show one node what another wrote


def train_on_all_nodes(job: Job, checkpoint: Path | None, ranks: list[int], team: Team) -> str:
    """Node 0: train from a checkpoint on, on `ranks` ranks of each node; returns who had them stopped, "" if no one.

    Raises a rank's UserError, NodeLost or RanksFailed.
    """
    resume = str(checkpoint) if checkpoint else None
    order = {"job": str(job.folder / "job.json"), "fingerprint": job.fingerprint(), "resume": resume, "ranks": ranks}
    team.say(order=order)
    own = _run_own_ranks(job, order, team)
    return raise_failures([own, *(Outcome(**theirs) for theirs in team.wait_for("outcome").values())])


def follow(team: Team, own_ranks: int, asked: dict[str, Any]) -> int:
    """Any other node: join, run what node 0 orders, and end with its exit code or error."""
    try:
        team.say(joined={"ranks": own_ranks, "asked": asked})
        with progress("waiting for node 0 to prepare the stage"):
            order = team.wait_for("order")[0]
        if order:
            outcome = _run_own_ranks(_find_job(order), order, team)
            team.say(outcome=asdict(outcome))
    except NodeLost:
        raise
    except UserError as error:
        team.say(error=f"node {team.place.node} ({team.own['host']}): {error}")
    with progress("waiting for node 0 to publish the stage"):
        code, text = team.hear_last_word()
    if code == 2:
        raise UserError(text)
    print(f"node {team.place.node}: node 0 ended{': ' if text else ''}{text}", flush=True)
    return code


def _run_own_ranks(job: Job, order: dict[str, Any], team: Team) -> Outcome:
    resume = ["--resume", order["resume"]] if order["resume"] else []
    environment = {
        "OMP_NUM_THREADS": str(job.experiment.launch.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": job.experiment.launch.device,
        "TENSORBOARD_LOGGING_DIR": str(job.folder / "tensorboard"),
    }
    return run_ranks([sys.executable, sys.argv[0], *resume, "--job", order["job"]], order["ranks"], team, environment)


def _find_job(order: dict[str, Any]) -> Job:
    """The job that node 0 wrote; UserError if this node does not see it, or not the model that it starts from."""
    path, deadline = Path(order["job"]), time.monotonic() + _DELAY
    while not _is_the_job(path, order["fingerprint"]):
        if time.monotonic() > deadline:
            raise UserError(
                f"{path.absolute()} is not the file that node 0 wrote; output_dir must lie on a file system that all"
                " nodes share, under the same path: a checkpoint holds parts of every node in one folder"
            )
        time.sleep(1)
    job = Job.load(path)
    if not job.parent.is_dir():
        raise UserError(f"{job.parent.absolute()}, the model that node 0 starts from, is not here; share or copy it")
    return job


def _is_the_job(path: Path, fingerprint: str) -> bool:
    return path.is_file() and digest(json.loads(path.read_text(encoding="utf-8"))["identity"]) == fingerprint
