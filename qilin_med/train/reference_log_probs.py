"""DPO's reference log-probabilities, kept in one file beside the rows.

`reference-<key>.npz` holds log p of the chosen and the rejected answer of every row under the frozen SFT model. The key
covers the rows and the model, so that runs which share both share the file. What is there already, from an interrupted run
or one of fewer steps, is not computed again.
"""

import time
import zipfile

import numpy as np

from qilin_med.artifact import digest, written_whole
from qilin_med.errors import UserError
from qilin_med.train.job import Job

_SECONDS_BETWEEN_SAVES = 30.0


class ReferenceLogProbs:
    """`writes`: whether this is the rank that keeps the file."""

    def __init__(self, job: Job, writes: bool = False) -> None:
        model = [job.parent_fingerprint, job.experiment.model.dtype, job.section.lora.quantization]
        self.path = job.rows.parent / f"reference-{digest([job.rows.name, *model])[:16]}.npz"
        self.values = np.full((job.schedule.rows, 2), np.nan, dtype=np.float32)
        """[rows, 2]: chosen, rejected; NaN where nothing was computed."""
        self._writes, self._saved = writes, time.monotonic()

    def read(self) -> np.ndarray:
        """`values` as the file has them; a damaged file counts for nothing."""
        if self.path.exists():
            try:
                with np.load(self.path, allow_pickle=False) as arrays:
                    self.values = arrays["log_probs"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # a zip has checksums of its own
                print(f"{self.path}: damaged; the reference log-probabilities will be computed again", flush=True)
        return self.values

    def add(self, rows: np.ndarray, log_probs: np.ndarray) -> None:
        """rows: [n]; log_probs: [n, 2]. Saves every half minute. UserError: the model gives a row no finite number."""
        if not np.isfinite(log_probs).all():
            raise UserError(
                f"the SFT model gives no finite log-probability to row {rows[~np.isfinite(log_probs).all(axis=1)][0]} of"
                " the pairs; its weights or its number format (model.dtype) are at fault"
            )
        self.values[rows] = log_probs
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        if not self._writes:
            return
        with written_whole(self.path) as file:
            np.savez(file, log_probs=self.values)
        self._saved = time.monotonic()
