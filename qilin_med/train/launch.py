"""Start the ranks of one machine, watch them, and tell in one line how they ended.

torchrun would do the starting, but it kills the other ranks as soon as one exits badly, even one that aborts in the
interpreter's shutdown when its work is done while another is still writing a checkpoint; and it answers a user's error
with a page of its own traceback. What is written on disk decides here whether a stage is done, never an exit code.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.train.nodes import Team

_GRACE = 60.0  # seconds that the other ranks get to finish what they write once one has failed
_MESSAGES = "QILIN_MED_MESSAGES"  # folder in which ranks leave the message of a user's error


class RanksFailed(RuntimeError):
    """Ranks ended badly and left no message of their own; str() says which, how, and what to do."""


def is_rank() -> bool:
    return _MESSAGES in os.environ


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one machine ended: what they met, by rank."""

    errors: dict[str, str]  # a user's errors
    tracebacks: dict[str, str]
    exits: dict[str, str]  # exits other than 0, in words
    stopped_by: str = ""  # who had them stopped: "the user" (Ctrl-C), or "SIGTERM"


def run_ranks(command: list[str], ranks: list[int], team: Team, environment: dict[str, str]) -> Outcome:
    """Run `command` once per rank of this node (`ranks`: of every node) and wait for all of them.

    SIGTERM and SIGINT go on to the ranks, which save a checkpoint and end.
    """
    first, count = sum(ranks[: team.place.node]), ranks[team.place.node]
    with tempfile.TemporaryDirectory(prefix="qilin-med-") as messages:
        shared = {**os.environ, **environment, **team.environment(sum(ranks)), _MESSAGES: messages}
        processes: dict[int, subprocess.Popen[bytes]] = {}
        forward = _forward_signals_to(processes)
        try:
            for local in range(count if not forward.heard else 0):
                rank = first + local
                own = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)}
                silent = None if rank == 0 else subprocess.DEVNULL  # rank 0 alone speaks; errors of all are heard
                processes[rank] = subprocess.Popen(command, env=shared | own, start_new_session=True, stdout=silent)
            _wait_for_all(list(processes.values()), team, forward)
        finally:
            forward.restore()
            for process in processes.values():
                process.poll() is None and process.kill()
        return _gather_outcome(Path(messages), processes, forward.heard)


class _forward_signals_to:
    """Hand SIGTERM and SIGINT to the ranks for as long as they run."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        self.processes, self.heard = processes, ""
        self.before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}

    def _forward(self, number: int, _frame: object) -> None:
        self.heard = "the user" if number == signal.SIGINT else "SIGTERM"
        self.stop_ranks()

    def stop_ranks(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _wait_for_all(processes: list[subprocess.Popen[bytes]], team: Team, forward: _forward_signals_to) -> None:
    deadline, said = math.inf, False
    with ExitStack() as stopping:
        while any(process.poll() is None for process in processes):
            if forward.heard and not said:
                said = True
                forward.stop_ranks()  # again: the signal may have come while a rank was being started
                stopping.enter_context(progress("stopping: the ranks end this update and write a checkpoint"))
            failed = team.in_trouble() or any(process.poll() not in (None, 0) for process in processes)
            if failed and deadline == math.inf:
                team.say(failing=True)
                deadline = time.monotonic() + _GRACE
            if time.monotonic() > deadline:
                for process in processes:
                    process.poll() is None and process.kill()
            time.sleep(0.1)


def _gather_outcome(messages: Path, processes: dict[int, subprocess.Popen[bytes]], stopped_by: str) -> Outcome:
    def read(kind: str) -> dict[str, str]:
        paths = sorted(messages.glob(f"{kind}-*"))
        return {path.name.removeprefix(f"{kind}-"): path.read_text(encoding="utf-8") for path in paths}

    exits = {f"rank {rank}": _describe_exit(p.returncode) for rank, p in processes.items() if p.returncode}
    return Outcome(read("error"), read("traceback"), exits, stopped_by)


def raise_failures(outcomes: list[Outcome]) -> str:
    """Raise the user's errors that ranks met on any node; RanksFailed, with tracebacks shown, if they met others.

    Returns who had the ranks stopped, "" if no one: what a rank that was stopped during its start, and those it left
    alone, end with is no failure.
    """
    if said := sorted({text for outcome in outcomes for text in outcome.errors.values()}):
        # The other ranks' complaints about a lost connection are no news then.
        raise UserError("; ".join(said))
    if stopped_by := next((outcome.stopped_by for outcome in outcomes if outcome.stopped_by), ""):
        return stopped_by
    for outcome in outcomes:
        for rank, text in outcome.tracebacks.items():
            print(f"{rank}:\n{text}", file=sys.stderr)
    exits = {rank: text for outcome in outcomes for rank, text in outcome.exits.items()}
    if exits:
        listed = ", ".join(f"{rank} {text}" for rank, text in exits.items())
        raise RanksFailed(f"{listed}. The messages above tell more; run the same command to continue")
    return ""


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (signal 9: by hand, or by the system when memory ran out)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


@contextmanager
def errors_reported() -> Iterator[None]:
    """In a rank: leave what goes wrong to the launcher, which speaks once for all ranks, and end at once."""
    try:
        yield
    except Exception as error:
        kind, text = ("error", str(error)) if isinstance(error, UserError) else ("traceback", traceback.format_exc())
        path = Path(os.environ[_MESSAGES], f"{kind}-rank {os.environ['RANK']}")
        path.write_text(text, encoding="utf-8")
        os._exit(2)


def die_with_launcher() -> None:
    """In a rank: end when the launcher is killed, so that no orphan goes on writing into the run's folder."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # the launcher was already gone
            os._exit(1)
