"""DeepSpeed's operators: which are needed, and builds that are killed, interrupted, or fail.

The compiler is a stand-in that waits, fails, or hands out the library that the true one made: a true build takes a minute.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qilin_med.launch.operators import ON_CPU, build_operators, library_of, needed_operators

ROOT = Path(__file__).resolve().parents[1]
OPERATOR = "deepspeed_shm_comm"
COMPILER = """#!/bin/bash
case " $* " in
  *" -o "*) ;;
  *) exec c++ "$@" ;;  # torch asks for its version
esac
[ "$DOES" != wait ] || exec sleep 600
[ "$DOES" != fail ] || { echo "shm.cpp:1: error: broken"; exit 1; }
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) cp "$LIBRARY" "$2" ;; *) touch "$2" ;; esac
"""
LOAD = """
from qilin_med.launch.operators import ON_CPU, load_operators
load_operators(ON_CPU, "cpu")
from deepspeed.comm.torch import build_shm_op
print(build_shm_op().vector_kernel_level() in (0, 1, 2))
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts Python with the stand-in for a compiler, which `does` what it is told."""
    build_operators(ON_CPU, "cpu")
    (tmp_path / "cxx").write_text(COMPILER, encoding="utf-8")
    (tmp_path / "cxx").chmod(0o755)
    places = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), "CXX": str(tmp_path / "cxx"), "DS_ACCELERATOR": "cpu"}
    places["LIBRARY"] = str(library_of(OPERATOR, "cpu"))

    def start(does: str, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *(command or ("-m", "qilin_med.launch.operators"))], cwd=ROOT, text=True,
            env={**os.environ, **places, "DOES": does}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


def finished(process: subprocess.Popen) -> tuple[int, list[str]]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()


def compilers_of(process: subprocess.Popen, built: Path) -> list[psutil.Process]:
    """All that a build has started, once its compiler runs and torch's lock file is there."""
    while True:
        assert process.poll() is None, process.communicate()[0]
        below = psutil.Process(process.pid).children(recursive=True)
        if list(built.glob(f"*/{OPERATOR}/lock")) and any(p.name() == "sleep" for p in below):
            return below
        time.sleep(0.01)


def test_a_killed_build_stands_in_no_ones_way(start, tmp_path):
    built = tmp_path / "built"
    killed = start("wait")
    left = compilers_of(killed, built)
    killed.kill()
    killed.wait()
    try:
        assert list(built.glob(f"*/{OPERATOR}/lock"))  # for which torch would wait without end
        code, lines = finished(start("copy"))
        assert code == 0 and lines[0].startswith(f"compiling DeepSpeed's {OPERATOR}: once")
        assert {path.suffix or path.name for path in built.iterdir()} == {".so", ".lock"}
        assert finished(start("fail")) == (0, [])
        # Nor does a lock file where DeepSpeed itself would build, and nothing is compiled then.
        (built / OPERATOR).mkdir()
        (built / OPERATOR / "lock").touch()
        assert finished(start("fail", "-c", LOAD))[1][-1] == "True"
    finally:
        for process in left:
            process.kill()


def test_ctrl_c_ends_the_compilers_too_and_says_how_to_go_on(start, tmp_path):
    process = start("wait")
    left = compilers_of(process, tmp_path / "built")
    process.send_signal(signal.SIGINT)
    code, lines = finished(process)
    assert code == 130 and lines[-1] == "stopped by the user; run the same command to continue"
    assert not any("Traceback" in line for line in lines)
    assert psutil.wait_procs(left, timeout=10)[1] == []
    assert [path.name for path in (tmp_path / "built").iterdir()] == [".lock"]


def test_a_failed_build_and_a_missing_compiler_get_one_line(start, monkeypatch, tmp_path):
    code, lines = finished(start("fail"))
    assert code == 2 and len(lines) == 2
    assert lines[1].startswith(f"error: DeepSpeed's {OPERATOR} could not be compiled: shm.cpp:1: error: broken.")
    (tmp_path / "cxx").unlink()
    code, lines = finished(start("fail"))
    assert code == 2 and "cxx: not found" in lines[-1] and "install g++" in lines[-1]


@pytest.mark.parametrize("file", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_on_gpus_the_files_that_come_with_it_need_no_compiler(file):
    contents = json.loads(file.read_text())
    assert needed_operators(contents, "cuda") == {}
    assert needed_operators(contents, "cpu") == {"ShareMemCommBuilder": OPERATOR}


@pytest.mark.parametrize(
    ("contents", "operators"),
    [
        (None, []),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, ["fused_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, []),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["cpu_adam"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "Adam"}}, ["cpu_adam"]),
    ],
)
def test_what_a_file_of_the_users_own_needs(contents, operators):
    assert list(needed_operators(contents, "cuda").values()) == operators
