"""Training checkpoints of DeepSpeed that another number of ranks can load."""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path

_LATEST = "latest_universal"  # DeepSpeed's own name


def convert_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Write a DeepSpeed checkpoint into an empty folder as a universal one (Lian et al. 2024); returns the folder."""
    from deepspeed.checkpoint.ds_to_universal import main

    [split] = checkpoint.glob("global_step*")
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(split.name, "*.safetensors"), dirs_exist_ok=True)
    arguments = Namespace(
        input_folder=str(split), output_folder=str(folder / f"{split.name}_universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
    _leave_weight_decay_alone(folder / f"{split.name}_universal" / "zero" / "optimizer_state.pt")
    return folder


def _leave_weight_decay_alone(path: Path) -> None:
    """ZeRO-3's loader gives all parameter groups the settings of the first, so that norms would get its weight decay;
    a setting that is not in the file stays as the trainer made it."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    for group in state["param_groups"]:
        del group["weight_decay"]
    torch.save(state, path)


def is_universal(checkpoint: Path) -> bool:
    return (checkpoint / _LATEST).is_file()
