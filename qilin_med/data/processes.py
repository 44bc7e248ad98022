"""Work spread over processes of this machine, its results in order."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_function: Callable[[Any], Any]  # of a worker: inherited, not sent with every job


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """(job, its result) in the order of the jobs, by forked processes that die with this one; by this one if `workers` is 1.

    Twice as many jobs as workers are under way or done and not yet taken: memory stays that of these.
    """
    if workers == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_work, (function, os.getpid()))
    under_way: deque[tuple[Job, Any]] = deque()
    try:
        for job in jobs:
            under_way.append((job, pool.submit(_work, job)))
            if len(under_way) >= 2 * workers:
                job, future = under_way.popleft()
                yield job, future.result()
        yield from ((job, future.result()) for job, future in under_way)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_work(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; the parent ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there after a fork
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(job: Any) -> Any:
    return _function(job)
