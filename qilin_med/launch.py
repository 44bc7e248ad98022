"""Start the ranks of one machine, watch them, and tell in one line how they ended.

torchrun would do the starting, but it kills the other ranks as soon as one exits badly, even one that aborts in the
interpreter's shutdown when its work is done while another is still writing a checkpoint; and it answers a user's error
with a page of its own traceback. What is written on disk decides here whether a stage is done, never an exit code.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qilin_med.errors import UserError

_GRACE = 60.0  # seconds that the other ranks get to finish what they write once one has failed
_MESSAGES = "QILIN_MED_MESSAGES"  # folder in which ranks leave the message of a user's error


class RanksFailed(RuntimeError):
    """Ranks ended badly and left no message of their own; str() says which and how."""


def is_rank() -> bool:
    return _MESSAGES in os.environ


def find_port() -> int:
    """MASTER_PORT if set (UserError if something listens there), else a free port."""
    wanted = os.environ.get("MASTER_PORT", "0")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(wanted)))
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"MASTER_PORT={wanted} cannot be used ({error}); unset it to let a free port be found"
            ) from None
        return probe.getsockname()[1]


def launch_ranks(command: list[str], ranks: int, threads: int, environment: dict[str, str]) -> None:
    """Run `command` once per rank with torch's rendezvous variables and wait for all of them.

    SIGTERM and SIGINT go on to the ranks, which save a checkpoint and end. Raises the ranks' own UserError, or
    RanksFailed.
    """
    with tempfile.TemporaryDirectory(prefix="qilin-med-") as messages:
        shared = {
            **os.environ, **environment, _MESSAGES: messages, "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()),
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        }  # fmt: skip
        processes: list[subprocess.Popen[bytes]] = []
        forward = _forward_signals_to(processes)
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                silent = None if rank == 0 else subprocess.DEVNULL  # rank 0 alone speaks; errors of all are heard
                processes.append(subprocess.Popen(command, env=shared | own, start_new_session=True, stdout=silent))
            _wait_for_all(processes)
        finally:
            forward.restore()
            for process in processes:
                process.poll() is None and process.kill()
        _raise_what_ranks_said(Path(messages), processes)


class _forward_signals_to:
    """Hand SIGTERM and SIGINT to the ranks for as long as they run."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}

    def _forward(self, number: int, _frame: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.poll() not in (None, 0) for process in processes):
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.poll() is None and process.kill()
        time.sleep(0.1)


def _raise_what_ranks_said(messages: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    said = sorted({path.read_text(encoding="utf-8") for path in messages.glob("error-*")})
    if said:
        # The other ranks' complaints about a lost connection are no news then.
        raise UserError("; ".join(said))
    for path in sorted(messages.glob("traceback-*")):
        print(f"{path.name.removeprefix('traceback-')}:\n{path.read_text(encoding='utf-8')}", file=sys.stderr)
    bad = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
    if bad:
        raise RanksFailed(", ".join(f"rank {rank} {_describe_exit(code)}" for rank, code in bad.items()))


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
