"""DPO's reference log-probabilities, kept beside the rows: written in parts while they are computed, then committed.

A folder `reference-<key>` holds part-*.npz (row numbers, and log p of the chosen and the rejected answer under the frozen
SFT model). The key covers the rows and the model, so that runs which share both share the folder. What is there already,
from an interrupted run or one of fewer steps, is not computed again.
"""

import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qilin_med.artifact import MANIFEST, commit_folder, digest, verify_folder
from qilin_med.errors import UserError
from qilin_med.train.job import Job

_SECONDS_A_PART = 30.0


class ReferenceLogProbs:
    def __init__(self, job: Job) -> None:
        model = [job.parent_fingerprint, job.experiment.model.dtype, job.section.lora.quantization]
        self.folder = job.rows.parent / f"reference-{digest([job.rows.name, *model])[:16]}"
        self._facts = {"stage": "dpo", "rows": job.rows.name, "parent": job.parent_fingerprint}
        self._row_count = job.schedule.rows

    def drop_damaged(self) -> None:
        """Remove what does not verify. Call before any rank reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*.part"):
            unfinished.unlink()
        if (self.folder / MANIFEST).exists():
            try:
                verify_folder(self.folder)
            except UserError as error:
                print(f"reference log-probabilities are damaged and will be computed again: {error}", flush=True)
                shutil.rmtree(self.folder)
                self.folder.mkdir()
        for part in self.folder.glob("part-*.npz"):
            try:
                _load(part)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # a zip's own checksums
                print(f"{part}: damaged; its pairs will be computed again", flush=True)
                part.unlink()

    def read(self) -> np.ndarray:
        """[rows, 2], fp32: chosen, rejected; NaN where nothing was computed."""
        values = np.full((self._row_count, 2), np.nan, dtype=np.float32)
        for part in self.folder.glob("part-*.npz"):
            rows, log_probs = _load(part)
            values[rows] = log_probs
        return values

    @contextmanager
    def writer(self) -> Iterator[Callable[[Sequence[int], torch.Tensor], None]]:
        """Yields write(rows, log_probs [rows, 2]), which puts a part on disk every half minute, and the rest at the end."""
        (self.folder / MANIFEST).unlink(missing_ok=True)  # there will be more than it lists
        rows: list[int] = []
        log_probs: list[np.ndarray] = []
        begun = time.monotonic()

        def write(new_rows: Sequence[int], new: torch.Tensor) -> None:
            nonlocal begun
            rows.extend(new_rows)
            log_probs.append(new.float().cpu().numpy())
            if time.monotonic() - begun > _SECONDS_A_PART:
                flush()
                begun = time.monotonic()

        def flush() -> None:
            if rows:
                _save(self.folder, np.array(rows), np.concatenate(log_probs))
                rows.clear()
                log_probs.clear()

        yield write
        flush()

    def commit(self) -> None:
        """List all parts in a manifest, if that is not done yet."""
        if not (self.folder / MANIFEST).exists():
            commit_folder(self.folder, MANIFEST, self._facts)


def _load(part: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(part, allow_pickle=False) as arrays:
        return arrays["rows"], arrays["log_probs"]


def _save(folder: Path, rows: np.ndarray, log_probs: np.ndarray) -> None:
    if not np.isfinite(log_probs).all():
        raise UserError(
            f"the SFT model gives no finite log-probability to row {rows[~np.isfinite(log_probs).all(axis=1)][0]} of"
            " the pairs; its weights or its number format (model.dtype) are at fault"
        )
    name = f"part-{uuid.uuid4().hex}.npz"
    temporary = folder / f".{name}.part"
    with temporary.open("wb") as file:
        np.savez(file, rows=rows, log_probs=log_probs)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / name)
