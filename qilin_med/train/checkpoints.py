"""Training checkpoints of a stage: found, verified, pruned, converted. One counts only with its commit marker, COMPLETE."""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path

from qilin_med.artifact import quarantine, verify_folder
from qilin_med.errors import UserError

COMPLETE = "COMPLETE"  # commit marker of a training checkpoint
_LATEST = "latest_universal"  # DeepSpeed's own name


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


def convert_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Write a DeepSpeed checkpoint into an empty folder as a universal one (Lian et al. 2024), which another number of
    ranks can load; returns the folder."""
    import torch
    from deepspeed.checkpoint.ds_to_universal import main
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    [split] = checkpoint.glob("global_step*")
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(split.name, "*.safetensors"), dirs_exist_ok=True)
    arguments = Namespace(
        input_folder=str(split), output_folder=str(folder / f"{split.name}_universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
    # ZeRO-3's loader gives all parameter groups the settings of the first, so that norms would get its weight decay; a
    # setting that is not in the file stays as the trainer made it.
    path = folder / f"{split.name}_universal" / "zero" / "optimizer_state.pt"
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    for group in state["param_groups"]:
        del group["weight_decay"]
    torch.save(state, path)
    return folder


def is_universal(checkpoint: Path) -> bool:
    return (checkpoint / _LATEST).is_file()
