"""What "complete" means on disk: commit, publish, verify, find the newest complete checkpoint.

A folder counts only with its commit marker: a JSON file, written last, that lists size and sha256 of every other file and
has a sha256 of its own contents. Folders are built under another name, fsynced, committed, then renamed, so that a kill
or a full disk at any moment leaves either the whole folder or none under its final name.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qilin_med.errors import UserError
from qilin_med.progress import progress

MANIFEST = "MANIFEST.json"  # commit marker of a published folder
COMPLETE = "COMPLETE"  # commit marker of a training checkpoint


def sha256_of(path: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """`advance` hears of the bytes read."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
            advance(size)
    return found.hexdigest()


def hash_files(paths: Sequence[Path], label: str) -> list[str]:
    """sha256 of each file, several at a time; `label` says in the progress what they are."""
    interrupted = threading.Event()

    def count(n: int) -> None:
        if interrupted.is_set():  # else Ctrl-C would wait for the rest of files of many gigabytes
            raise KeyboardInterrupt
        advance(n)

    total = sum(path.stat().st_size for path in paths)
    with progress(label, total, "B") as advance, ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        try:
            return list(pool.map(partial(sha256_of, advance=count), paths))
        except BaseException:
            interrupted.set()
            raise


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def list_files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """{relative path: {"size", "sha256"}} of every file below a folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in leave_out)
    hashes = hash_files(paths, f"hashing {folder}")
    return {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": h}
        for p, h in zip(paths, hashes, strict=True)
    }


def fingerprint_model(folder: Path) -> str:
    """One sha256 for the model in a folder: weights, configuration and tokenizer, whoever wrote it."""
    if (folder / MANIFEST).is_file():
        return verify_folder(folder)["fingerprint"]
    files = {name: entry for name, entry in list_files(folder).items() if name.endswith((".json", ".safetensors"))}
    return digest(files)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the whole new one."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one, after a power cut too."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(folder: Path, marker: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Make a folder count: fsync all that lies in it, then write its commit marker. Returns what the marker says."""
    for path in folder.rglob("*"):
        _sync(path)
    files = list_files(folder, leave_out=(marker,))
    # As a reader will see it: JSON turns tuples into lists and numbers that are keys into strings.
    contents = json.loads(json.dumps({**facts, "fingerprint": digest(files), "files": files}))
    write_json(folder / marker, {**contents, "digest": digest(contents)})
    return contents


def publish_folder(temporary: Path, final: Path, manifest: dict[str, Any], marker: str = MANIFEST) -> dict[str, Any]:
    """Commit a folder built under a temporary name and rename it to its final one, which must be free."""
    contents = commit_folder(temporary, marker, manifest)
    temporary.rename(final)
    _sync(final.parent)
    return contents


def read_manifest(folder: Path, marker: str = MANIFEST) -> dict[str, Any]:
    """What a folder's commit marker says, checked against its own digest; the files are not looked at.

    UserError if there is no marker, or it is damaged, of an earlier version, or names files outside the folder.
    """
    path = folder / marker
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        stated, found = contents.pop("digest", None), digest(contents)
        files = {PurePosixPath(name): (entry["size"], entry["sha256"]) for name, entry in contents["files"].items()}
    except FileNotFoundError:
        raise UserError(f"{folder}: not complete ({marker} is missing); run the step that makes it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged (not the JSON that was written); make the folder again") from None
    if outside := [name for name in files if name.is_absolute() or ".." in name.parts]:
        raise UserError(f"{path}: lists '{outside[0]}', which lies outside the folder; get the folder again")
    if stated is None:
        raise UserError(f"{path}: of an earlier version, which did not protect what it says; make the folder again")
    if stated != found:
        raise UserError(f"{path}: contents changed since they were written (sha256 differs); make the folder again")
    return contents


def verify_folder(folder: Path, marker: str = MANIFEST) -> dict[str, Any]:
    """Check a folder against its commit marker and return what it says; UserError names the first file that is wrong."""
    contents = check_sizes(folder, marker)
    files = contents["files"]
    hashes = hash_files([folder / name for name in files], f"verifying {folder}")
    for (name, expected), found in zip(files.items(), hashes, strict=True):
        if found != expected["sha256"]:
            raise UserError(f"{folder / name}: contents changed since they were written (sha256 differs)")
    return contents


def check_sizes(folder: Path, marker: str = MANIFEST) -> dict[str, Any]:
    """What `verify_folder` sees at a glance, without reading the files: each is there, with its size."""
    contents = read_manifest(folder, marker)
    for name, expected in contents["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though {marker} lists it; restore it or make the folder again")
        if path.stat().st_size != expected["size"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, expected {expected['size']} (truncated or changed)")
    return contents


def set_aside(path: Path, why: str) -> Path:
    """Move a file or folder out of the way under a name that tells why; nothing is deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = path.with_name(f"{path.name}.{why}-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}-{stamp}-{number}")
    path.rename(target)
    return target


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, oldest first."""
    found = (p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit())
    return sorted(found, key=step_of)


def newest_complete(folder: Path, job: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a job (its fingerprint) that verifies.

    Newer ones that are unfinished, damaged or another run's are set aside, with a line for each that says why. Of
    unfinished ones only the last attempt's is kept: they are as large as whole ones.
    """
    lines = []
    for checkpoint in reversed(find_checkpoints(folder)):
        why = "incomplete" if not (checkpoint / COMPLETE).exists() else "damaged"
        try:
            if verify_folder(checkpoint, COMPLETE)["job"] == job:
                return checkpoint, lines
            why, reason = "foreign", f"{checkpoint}: written by another run or stage"
        except UserError as error:
            reason = str(error)
        if why == "incomplete":
            _delete_unfinished(folder)
        lines.append(f"{reason}; set aside as {set_aside(checkpoint, why).name}")
    return None, lines


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and whatever earlier attempts left unfinished.

    Call only after a newer one was committed. Unfinished ones that are newer still may be in the writing by other ranks.
    """
    _delete_unfinished(folder)
    checkpoints = find_checkpoints(folder)
    complete = [c for c in checkpoints if (c / COMPLETE).is_file()]
    older = [c for c in checkpoints if complete and step_of(c) < step_of(complete[-1])]
    for checkpoint in set(older) - set(complete[-keep:]):
        # The marker first, so that a kill in the middle of the deletion leaves nothing that looks complete.
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def _delete_unfinished(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*.incomplete-*"):
        shutil.rmtree(checkpoint)


_DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write",
    errno.EFBIG: "a file would be larger than the file system allows",
}


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a failed write below `folder` into one clear UserError; other errors pass unchanged.

    Writers in native code (safetensors, torch, Arrow) report a full disk as errors of their own kind, so the disk
    itself is asked as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        reason = _DISK_PROBLEMS.get(getattr(error, "errno", None) or 0)
        if reason is None and (free < 2**20 or "No space left" in str(error)):
            reason = _DISK_PROBLEMS[errno.ENOSPC]
        if reason is None:
            raise
        raise UserError(
            f"cannot write below {folder}: {reason} ({free / 2**30:.2f} GiB free). What was complete before is"
            " untouched; free or enlarge the disk (or set output_dir) and run the same command again"
        ) from error
