"""One rank among others, whoever started it: torchrun, srun, deepspeed, or the stage script itself (agent.py).

Rank 0 prepares, decides and publishes; the others wait in torch's store for its message, where no collective can time out,
and end when training does.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from qilin_med.artifact import differences, versions
from qilin_med.console.progress import progress
from qilin_med.errors import UserError, in_one_line
from qilin_med.launch.agent import LAUNCHED_HERE, LostRank

_POLL = 10  # seconds of one wait for a message
_TO_RECEIVE = 10.0  # seconds that rank 0 gives the others to read its message
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|failed to recv|unhandled system error", re.I
)


def is_rank() -> bool:
    """Whether a launcher started this process as a rank. srun's tasks are ranks too, unless NODES says that each is a node."""
    # A batch script and a shell of salloc, which srun did not start, know the job's number of tasks, but no step's.
    if not {"NODES", "RANK"} & os.environ.keys() and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        first, inner = re.match(r"([^,\[]*)(?:\[(\d+))?", os.environ["SLURM_STEP_NODELIST"]).groups("")
        tasks, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(-(-tasks // nodes)),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", first + inner),
            "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000)),
        }
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


class Ranks:
    """All ranks of a stage, of which this process is one. They meet in torch's store."""

    def __init__(self, timeout_minutes: float) -> None:
        from torch.distributed import PrefixStore, distributed_c10d, rendezvous

        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.seconds = 60 * timeout_minutes
        # DeepSpeed makes groups without naming a time, so that over a cut link they would wait for torch's half an hour.
        distributed_c10d.default_pg_timeout = timedelta(seconds=self.seconds)
        distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=self.seconds)
        with _bounded(self.seconds + 60, "rank 0 did not answer"):
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=self.seconds)))
        self.store = PrefixStore("qilin_med", store)

    @property
    def nodes(self) -> int:
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the latter is DeepSpeed's
        return -(-self.count // int(local or self.count))

    def share(self, asked: dict[str, Any], prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `prepare` returns on rank 0, on every rank, however long it takes; so is its UserError raised on all of them.
        Another unless all were asked for the same, with the same code and libraries."""
        own = {"host": socket.gethostname(), "asked": asked, "code": _code(), "libraries": versions()}
        if self.rank:
            self.store.set(f"rank {self.rank}", json.dumps(own))
            with progress("waiting for rank 0 to prepare the stage"):
                message = json.loads(self._wait_for("message"))
            self.store.add("received", 1)
        else:
            try:
                self._compare(own)
                message = prepare()
            except UserError as error:
                message = {"error": str(error)}
            self.store.set("message", json.dumps(message))
            # The store may end with this process (under srun and deepspeed), and nobody could read it then.
            deadline = time.monotonic() + _TO_RECEIVE
            while self.store.add("received", 0) < self.count - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
        if "error" in message:
            if self.rank and LAUNCHED_HERE not in os.environ and os.environ["LOCAL_RANK"] != "0":
                end_rank(2)  # one of each node tells it
            raise UserError(message["error"])
        return message

    def _compare(self, own: dict[str, Any]) -> None:
        for rank in range(1, self.count):
            other = json.loads(self._wait_for(f"rank {rank}"))
            host = other.pop("host")
            if changed := differences({name: own[name] for name in other}, other):
                raise UserError(
                    f"rank {rank} ({host}) is not like rank 0 ({'; '.join(changed[:4])}); run the same command with the same"
                    " code and libraries on all nodes"
                )

    def _wait_for(self, key: str) -> bytes:
        from torch.distributed import DistStoreError

        while True:
            # What comes over a cut link comes never: torch's store sets its own wait no limit then.
            with _bounded(self.seconds + _POLL, "the store of rank 0 does not answer"):
                try:
                    self.store.wait([key], timedelta(seconds=_POLL))
                    return self.store.get(key)
                except DistStoreError:
                    continue


def _code() -> str:
    """Fingerprint of the code that a rank runs."""
    files = [*sorted(Path(__file__).parents[1].rglob("*.py")), Path(sys.argv[0])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@contextmanager
def _bounded(seconds: float, what: str) -> Iterator[None]:
    """End this rank if the block takes longer: whatever it waits for in native code cannot be interrupted otherwise."""

    def give_up() -> None:
        _end_with(LostRank(f"{what} within {seconds / 60:g} minutes: its node or the network is down; run the same command"
                           " on all nodes to continue"))  # fmt: skip

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# -------------------------------------------------------------------------------------------------- beginning, end


def begin_rank() -> None:
    """One rank of each node speaks on stdout; none outlives its launcher and goes on writing into the run's folder."""
    if int(os.environ["LOCAL_RANK"]) > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ.get(LAUNCHED_HERE, os.getppid())):  # the launcher was gone before
            os._exit(1)


@contextmanager
def errors_handed_on() -> Iterator[None]:
    """End the rank with what goes wrong, told once: by the launcher that reads torch's error file, else here."""
    try:
        yield
    except KeyboardInterrupt:
        end_rank(130)
    except Exception as error:
        if not isinstance(error, UserError) and _LOST.search(str(error)):
            error = LostRank(
                f"rank {os.environ['RANK']} lost its connection to another rank ({in_one_line(error)}): that rank failed, its"
                " node was killed, or the network is down; run the same command on all nodes to continue"
            )
        _end_with(error)


def _end_with(error: BaseException) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    if LAUNCHED_HERE not in os.environ:
        told = f"error: {error}" if isinstance(error, UserError) else traceback.format_exc()
        print(told, file=sys.stderr)
    end_rank(2)


def end_rank(code: int = 0) -> None:
    """Leave without the interpreter's shutdown, once all is on disk.

    gloo's own threads (pt_gloo_runloop) are still running then, even after destroy_process_group, since DeepSpeed holds
    on to its groups; now and then one of them is joinable when static objects go, and the process aborts ("terminate
    called without an active exception"). Nothing is left to do at this point but to end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
