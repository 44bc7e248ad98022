"""Work spread over processes of this machine."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from qilin_med.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_function: Callable[[Any], Any]  # of a worker: inherited, not sent with every job


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """(job, its result) in the order of the jobs, by `forked` processes; by this one if `workers` is 1.

    Twice as many jobs as workers are under way or done and not yet taken: memory stays that of these.
    """
    if workers == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    under_way: deque[tuple[Job, Any]] = deque()
    with forked(function, workers) as pool:
        for job in jobs:
            under_way.append((job, pool.submit(_work, job)))
            if len(under_way) >= 2 * workers:
                job, future = under_way.popleft()
                yield job, future.result()
        yield from ((job, future.result()) for job, future in under_way)


def run_all(function: Callable[[Job], Any], jobs: Sequence[Job], workers: int) -> None:
    """Run the jobs in any order, by `forked` processes; by this one, in turn, if `workers` is 1."""
    if workers == 1:
        for job in jobs:
            function(job)
        return
    with forked(function, workers) as pool:
        for future in as_completed([pool.submit(_work, job) for job in jobs]):
            future.result()


@contextmanager
def forked(function: Callable[[Any], Any], workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that run `_work`; they end with this one, or at once if the block fails. UserError: one was killed."""
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_work, (function, os.getpid()))
    try:
        # Ctrl-C reaches workers too, from their first moment; the parent alone acts on it, and ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pool.submit(int)  # starts them all
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pool
    except BaseException as error:
        for worker in set(active_children()) - others:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a worker process was killed (by hand, or by the system when memory ran out); run the same"
                            " command again, with fewer processes if memory is short") from None  # fmt: skip
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_work(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there after a fork
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(job: Any) -> Any:
    return _function(job)
