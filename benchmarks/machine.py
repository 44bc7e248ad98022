"""Facts of this machine that belong beside every measurement."""

import os
import platform
import time
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
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
