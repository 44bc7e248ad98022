"""DeepSpeed's compiled operators: built once, before any rank waits for one.

DeepSpeed compiles an operator when a rank first needs it, in a folder of the user's that all checkouts share, behind a
lock file: a process killed meanwhile leaves the file, and every later run waits for it without end. Here the first
process compiles, under a lock that the system releases with its owner, in a scratch folder; only the finished library
gets its name, and ranks load that.

python -m qilin_med.launch.operators builds what a run on CPUs needs (scripts/setup.sh).
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qilin_med.artifact import digest
from qilin_med.console.progress import progress
from qilin_med.errors import UserError, user_errors_end_with_one_line

# By the names of DeepSpeed's builders.
ON_CPU = {"ShareMemCommBuilder": "deepspeed_shm_comm"}
FUSED_ADAM, CPU_ADAM = {"FusedAdamBuilder": "fused_adam"}, {"CPUAdamBuilder": "cpu_adam"}
_SCRATCH = ".building-"
_BUILD = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder({!r}).load()"


def needed_operators(deepspeed: dict[str, Any] | None, device: str) -> dict[str, str]:
    """{DeepSpeed's builder: operator} that training with the contents of a DeepSpeed file loads."""
    if deepspeed is None:
        return {}
    needed = dict(ON_CPU) if device == "cpu" else {}
    offloaded = deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if own := deepspeed.get("optimizer"):  # in place of the pipeline's, which is PyTorch's
        compiled = own["type"].lower() in ("adam", "adamw") and not own.get("params", {}).get("torch_adam")
        needed |= (CPU_ADAM if offloaded else FUSED_ADAM) if compiled else {}
    elif offloaded and deepspeed.get("zero_force_ds_cpu_optimizer", True):
        needed |= CPU_ADAM
    return needed


def build_operators(needed: dict[str, str], device: str) -> None:
    """Compile what is missing. UserError: no compiler, it fails, or the environment's folder cannot be written."""
    for builder, operator in needed.items():
        if library_of(operator, device).exists():
            continue
        print(f"compiling DeepSpeed's {operator}: once for this environment, about a minute", flush=True)
        with progress(f"compiling {operator}"), _alone():
            if not library_of(operator, device).exists():  # another process may have been at it
                _build(builder, operator, device)


def load_operators(needed: dict[str, str], device: str) -> None:
    """In a rank: hand the built libraries to DeepSpeed, which then neither compiles nor waits for a lock."""
    build_operators(needed, device)
    if not needed:
        return
    from deepspeed.ops.op_builder.builder import OpBuilder

    for operator in needed.values():
        spec = importlib.util.spec_from_file_location(operator, library_of(operator, device))
        module = OpBuilder._loaded_ops[operator] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def library_of(operator: str, device: str) -> Path:
    """Where an operator's library is, or is to be: what it is compiled for is in its name."""
    processor = platform.machine()
    with suppress(OSError):  # its instruction set: DeepSpeed compiles for the processor at hand
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), processor)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    key = digest([versions, sys.implementation.cache_tag, processor])[:12]
    return _folder() / f"{operator}-{device}-{key}.so"


def _folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process builds here; what a killed one left is removed."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}), where DeepSpeed's operators are built; set"
            " TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _build(builder: str, operator: str, device: str) -> None:
    compiler, remedy = os.environ.get("CXX", "c++"), "train without DeepSpeed (deepspeed=null in the stage's section)"
    if not shutil.which(compiler):
        raise UserError(
            f"{compiler}: not found, but DeepSpeed's {operator} has to be compiled; install g++ (Debian: apt-get install"
            f" g++), or {remedy}"
        )
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=_folder(), ignore_cleanup_errors=True) as scratch:
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is in the environment
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": scratch, "DS_ACCELERATOR": device, "PATH": tools}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, "-c", _BUILD.format(builder)]
        with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as process:
            try:
                output = process.communicate()[0]
            except BaseException:
                with suppress(ProcessLookupError):  # ninja then ends its compilers, each in a group of its own
                    os.killpg(process.pid, signal.SIGTERM)
                raise
        made = Path(scratch) / operator / f"{operator}.so"
        if not made.exists():
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            said = next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")
            raise UserError(f"DeepSpeed's {operator} could not be compiled: {said}. Mend that, or {remedy}")
        made.rename(library_of(operator, device))


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        build_operators(ON_CPU, "cpu")
