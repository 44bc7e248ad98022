"""Folders that count only when whole: inputs -> work folder -> verified folder.

A step of the pipeline makes an `Artifact`: a folder of files and a commit marker (MANIFEST.json), which is written last,
lists size and sha256 of every file, says what the folder was made from, and has a sha256 of its own contents. Work is
done beside the final name, fsynced, committed, then renamed, so that a kill or a full disk at any moment leaves either
the whole folder or none under that name.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from qilin_med.config.experiment import flatten
from qilin_med.console.progress import progress
from qilin_med.errors import UserError

MANIFEST = "MANIFEST.json"
LIBRARIES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "datasets", "tokenizers")
_SHOWN = 4  # differences named in a refusal
_SHOWN_CHARACTERS = 200  # of each value: some are long lists

# ------------------------------------------------------------------------------------------------------ artifacts


@dataclass(frozen=True)
class State:
    """What lies where an artifact belongs. `why`: what is wrong or different, in words."""

    name: Literal["absent", "resumable", "done", "differs", "damaged"]
    why: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)


class Artifact:
    """A folder made from `inputs`: JSON that covers everything that its contents depend on."""

    def __init__(self, folder: Path, inputs: dict[str, Any], marker: str = MANIFEST) -> None:
        self.folder, self.inputs, self.marker = Path(folder), _as_json(inputs), marker
        self.key = digest(self.inputs)
        self.facts: dict[str, Any] = {}
        """What the manifest is to say beside the inputs; filled in while building."""

    @classmethod
    def keyed(cls, parent: Path, name: str, inputs: dict[str, Any]) -> "Artifact":
        """One of many in a cache: its folder `<name>-<key>` is named by its inputs."""
        return cls(parent / f"{name}-{digest(_as_json(inputs))[:16]}", inputs)

    @property
    def work(self) -> Path:
        """Room for what only the making needs. Named by the inputs, so that nothing of another making is ever used."""
        return self.folder.with_name(f"{self.folder.name}.work") / self.key[:16]

    def state(self) -> State:
        if not self.folder.exists():
            return State("resumable" if self.work.exists() else "absent")
        try:
            manifest = verify_folder(self.folder, self.marker)
        except UserError as error:
            return State("damaged", str(error))
        if changed := differences(manifest.get("inputs", {}), self.inputs):
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            told = "; ".join(changed[:_SHOWN]) + more
            return State("differs", f"{self.folder}: made from other files or settings ({told})", manifest)
        return State("done", manifest=manifest)

    def finished(self, restart: bool, remedy: str) -> dict[str, Any] | None:
        """The manifest if there is nothing left to do; None once the place is free to build in.

        UserError: the folder is damaged or made from other inputs. With `restart` it is moved aside instead; `remedy` says
        what else the user can do.
        """
        state = self.state()
        if state.name == "done":
            shutil.rmtree(self.work.parent, ignore_errors=True)  # left by a kill right after publishing
            return state.manifest
        if self.folder.exists():
            if not restart:
                raise UserError(f"{state.why}; {remedy}")
            print(f"{state.why}; kept as {quarantine(self.folder, 'replaced')}", flush=True)
        return None

    @contextmanager
    def building(self, resume: bool = False) -> Iterator[Path]:
        """Yields the folder to fill; publishes on a clean exit. `resume`: what an interrupted making left stays, to be used;
        else each making begins and ends with nothing. UserError: another process builds here, or the disk is full."""
        self.work.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.work, "building"), disk_errors_explained(self.folder):
            try:
                if not resume:
                    shutil.rmtree(self.work, ignore_errors=True)
                (self.work / "out").mkdir(parents=True, exist_ok=True)
                yield self.work / "out"
                self.publish()
            finally:
                if self.folder.exists() or not resume:
                    shutil.rmtree(self.work.parent, ignore_errors=True)

    def publish(self) -> dict[str, Any]:
        """Commit what was built and give it its name; returns the manifest."""
        out = self.work / "out"
        for part in list(out.rglob(".*.part")):  # left by processes that were killed
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        contents = commit_folder(out, self.marker, {**provenance(), **self.facts, "inputs": self.inputs})
        out.rename(self.folder)
        _sync(self.folder.parent)
        return contents


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf that differs; settings first, since files may be many."""
    before, after = flatten(old), flatten(new)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    changed.sort(key=lambda key: not key.startswith("settings."))
    values = ((key, *(str(flat.get(key, "none")) for flat in (before, after))) for key in changed)
    return [f"{key}: {old[:_SHOWN_CHARACTERS]} -> {new[:_SHOWN_CHARACTERS]}" for key, old, new in values]


def provenance() -> dict[str, Any]:
    """When, with which libraries and which commit of this code something is made."""
    return {"created": time.strftime("%Y-%m-%d %H:%M:%S %z"), "versions": versions(), "commit": commit()}


def versions(*further: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in (*LIBRARIES, *further)}


def commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """UserError if another process is at work on this folder (`what`: doing what)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is {what} there now; wait for it, or end it first") from None
        os.register_at_fork(after_in_child=lock.close)  # a worker that outlives this process must not hold the lock
        yield


def quarantine(path: Path, why: str) -> Path:
    """Move a file or folder out of the way under a name that tells why; nothing is deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{path.name}.{why}-{stamp}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(target for target in map(path.with_name, names) if not target.exists())
    return path.rename(target)


# --------------------------------------------------------------------------------------------- commit and verify


def commit_folder(folder: Path, marker: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Make a folder count: fsync all that lies in it, then write its commit marker. Returns what the marker says."""
    for path in folder.rglob("*"):
        _sync(path)
    files = list_files(folder, leave_out=(marker,))
    contents = _as_json({**facts, "fingerprint": digest(files), "files": files})
    write_json(folder / marker, {**contents, "digest": digest(contents)})
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


# -------------------------------------------------------------------------------------------------- fingerprints


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """As a reader will see it: JSON turns tuples into lists and numbers that are keys into strings."""
    return json.loads(json.dumps(value))


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


def list_files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """{relative path: {"size", "sha256"}} of every file below a folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in found.items() if name not in leave_out}
    hashes = hash_files(list(paths.values()), f"hashing {folder}")
    sizes = [path.stat().st_size for path in paths.values()]
    return {name: {"size": size, "sha256": h} for name, size, h in zip(paths, sizes, hashes, strict=True)}


def fingerprint_model(folder: Path) -> str:
    """One sha256 for the model in a folder: weights, configuration and tokenizer, whoever wrote it."""
    if (folder / MANIFEST).is_file():
        return verify_folder(folder)["fingerprint"]
    files = {name: entry for name, entry in list_files(folder).items() if name.endswith((".json", ".safetensors"))}
    return digest(files)


# --------------------------------------------------------------------------------------------------- single files


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that gets its name when the block ends well, after a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A task that a dead parent left behind may still write: never into the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
