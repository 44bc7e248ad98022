"""What all benchmarks share: options, and facts of this machine that belong beside every measurement."""

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from qilin_med.artifact import provenance, write_json
from qilin_med.config.experiment import count

ROOT = Path(__file__).resolve().parents[1]


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=count, default=2, help="CPU threads of a process (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """Processes that have computed nothing yet, so that peaks of memory do not mix."""
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_mib: float


def cost_of(function: Callable[[], Any]) -> Cost:
    """Of a call with all processes that it starts; the peak is that of the largest one."""
    start, before = time.perf_counter(), os.times()
    function()
    seconds, after = time.perf_counter() - start, os.times()
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(seconds, sum(after[:4]) - sum(before[:4]), max(peaks) / 1024)


def describe_machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def describe_moment() -> str:
    """When, on what, and how busy: one line for the foot of a table."""
    facts = describe_machine()
    return (
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}; {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB;"
        f" load {os.getloadavg()[0]:.1f}"
    )


def write_result(arguments: argparse.Namespace, **result: Any) -> None:
    if arguments.output:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        write_json(arguments.output, {"machine": describe_machine(), **provenance(), "settings": settings, **result})
