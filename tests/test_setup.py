"""scripts/setup.sh with a stand-in for Python, which writes down what it is asked to do: no network, no GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/bash
asked=$*
case "$asked" in
  *version_info*) echo 3.12 ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*)
    echo "pip: ${asked##*--disable-pip-version-check }" >>asked
    case "$asked" in *"$FAILS"*) echo "no nvcc"; exit 1 ;; esac ;;
  *-m*) echo "$*" >>asked ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("scripts/setup.sh", "requirements.txt", "requirements-gpu.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("python", PYTHON), ("nvidia-smi", "#!/bin/sh\n$LISTS\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def set_up(checkout: Path, lists: str = "false", fails: str = "nothing") -> tuple[str, list[str]]:
    """What setup.sh prints, and what Python was asked to do."""
    asked = checkout / "asked"
    asked.write_text("")
    path = f"{checkout}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": str(checkout / "python"), "LISTS": lists, "FAILS": fails}
    run = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=checkout, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, run.stdout
    return run.stdout, asked.read_text().splitlines()


BASE = ["pip: -r requirements.txt", "pip: --no-deps --editable ."]
FOR_GPUS = "pip: --no-build-isolation -r requirements-gpu.txt"


def test_without_a_gpu_nothing_for_gpus_is_installed_and_a_second_run_does_nothing(checkout):
    assert set_up(checkout)[1] == BASE
    assert set_up(checkout) == ("", [])
    (checkout / "requirements-gpu.txt").write_text("flash-attn==0\n")
    assert set_up(checkout) == ("", [])


def test_with_a_gpu_both_files_count(checkout):
    gpu = "echo GPU 0: NVIDIA A100"
    assert set_up(checkout)[1] == BASE
    assert set_up(checkout, gpu)[1] == [BASE[0], FOR_GPUS, *BASE[1:]]
    assert set_up(checkout, gpu) == ("", [])
    (checkout / "requirements-gpu.txt").write_text("flash-attn==0\n")
    assert FOR_GPUS in set_up(checkout, gpu)[1]


def test_what_cannot_be_installed_for_gpus_is_said_in_a_line(checkout):
    printed, asked = set_up(checkout, "echo GPU 0: NVIDIA A100", "requirements-gpu.txt")
    notes = [line for line in printed.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "requirements-gpu.txt" in notes[0] and "no nvcc" not in printed
    assert (checkout / ".venv/gpu.log").read_text() == "no nvcc\n"
    assert asked == [BASE[0], FOR_GPUS, *BASE[1:]]
