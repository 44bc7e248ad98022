"""Training checkpoints of a stage: found, verified, pruned. One counts only with its commit marker, COMPLETE."""

import shutil
from pathlib import Path

from qilin_med.artifact import quarantine, verify_folder
from qilin_med.errors import UserError

COMPLETE = "COMPLETE"  # commit marker of a training checkpoint


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, oldest first."""
    found = (p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit())
    return sorted(found, key=step_of)


def newest_complete(folder: Path, job: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a job (its fingerprint) that verifies.

    Newer ones that are unfinished, damaged or another run's are moved aside, with a line for each that says why. Of
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
        lines.append(f"{reason}; kept as {quarantine(checkpoint, why).name}")
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
