"""Long work says how far it is, in lines and on a terminal."""

import hashlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qilin_med.artifact import MANIFEST, commit_folder, sha256_of, verify_folder
from qilin_med.console import progress as module
from qilin_med.console.progress import clock, progress

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import time
from qilin_med.console.progress import progress
with progress("hashing", 4_000_000, "B") as advance:
    for _ in range(4):
        time.sleep(0.4)
        advance(1_000_000)
print("done")
"""


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.1)


def shown(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_has_the_count_and_the_time_left(often, capsys):
    with progress("reading", 40, "rows") as advance:
        advance(10)
        time.sleep(0.15)
    assert shown(capsys) == ["reading: 10 of 40 rows, 0:00 left"]
    with progress("merging"):
        time.sleep(0.25)
    assert shown(capsys) == ["merging: 0:00 so far"] * 2


def test_short_work_is_silent(capsys):
    with progress("reading", 40, "rows") as advance:
        advance(40)
    assert shown(capsys) == []


def test_time_left_is_what_the_rest_takes_at_the_pace_so_far(monkeypatch, capsys):
    now = iter([100.0, 130.0, 100.0, 110.0])  # a quarter in 30 seconds; one of 15 steps in 10
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    meter = module._Meter("hashing", 4_000_000_000, "B")
    meter.done = 1_000_000_000
    meter.show()
    continued = module._Meter("training", 17, "steps", done=2)
    continued.done, continued.note = 3, "loss 1.2"
    continued.show()
    assert shown(capsys) == [
        "hashing: 1,000 of 4,000 MB, 33.3 MB/s, 1:30 left",
        "training: 3 of 17 steps, loss 1.2, 2:20 left",
    ]
    assert [clock(s) for s in (7, 750, 11_100)] == ["0:07", "12:30", "3:05:00"]


def test_the_inner_work_is_shown_and_many_short_pieces_are_not_silent(often, capsys):
    with progress("preparing"):
        for _ in range(8):
            with progress("hashing", 2, "files") as advance:
                advance(1)
                time.sleep(0.06)  # less than the time between lines
        time.sleep(0.12)
    lines = shown(capsys)
    assert lines.count("hashing: 1 of 2 files, 0:00 left") >= 3
    assert lines[-1].startswith("preparing: 0:0")


def test_no_count_is_lost_among_threads(capsys):
    with progress("hashing", unit="B") as advance, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: advance(1), range(20_000)))
        assert module._under_way[-1].done == 20_000


def test_other_ranks_and_forked_workers_are_silent(often, capfd, monkeypatch):
    child = os.fork()
    if not child:
        with progress("working"):
            time.sleep(0.3)
        os._exit(0)
    os.waitpid(child, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with progress("working"):
        time.sleep(0.3)
    assert capfd.readouterr() == ("", "")


HASH = """
from pathlib import Path
from qilin_med.artifact import hash_files
from qilin_med.errors import user_errors_end_with_one_line
with user_errors_end_with_one_line():
    print("begun", flush=True)
    hash_files([Path({!r})], "hashing")
"""


def test_hashing_shows_bytes(often, capsys, tmp_path):
    (tmp_path / "weights").open("wb").truncate(10**9)  # takes no room on the disk
    with (tmp_path / "weights").open("rb") as file:
        assert sha256_of(tmp_path / "weights") == hashlib.file_digest(file, "sha256").hexdigest()
    commit_folder(tmp_path, MANIFEST, {})
    verify_folder(tmp_path)
    lines = shown(capsys)
    for label in (f"hashing {tmp_path}", f"verifying {tmp_path}"):
        assert any(re.fullmatch(rf"{label}: [\d,]+ of 1,000 MB, [\d,.]+ MB/s, \d:\d\d left", line) for line in lines), (
            lines
        )


def test_ctrl_c_does_not_wait_for_the_rest_of_a_large_file(tmp_path):
    (tmp_path / "weights").open("wb").truncate(10**12)
    process = subprocess.Popen(
        [sys.executable, "-c", HASH.format(str(tmp_path / "weights"))], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "\nstopped by the user; run the same command to continue\n")


def test_a_terminal_gets_one_bar_that_goes_when_the_work_is_done():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", WORK]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = ""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(4096):
                text += part.decode()
        except OSError:  # the other end is closed
            pass
    assert process.wait() == 0
    drawn = [line for line in text.split("\r") if line.startswith("hashing")]
    assert len(drawn) >= 3 and re.search(r"hashing: +50%.*2.00M/4.00M", text)
    assert text.count("\n") == 1 and text.rsplit("\r", 2)[-2].endswith("done"), text
