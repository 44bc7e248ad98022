"""One stage of one experiment, resolved: everything its ranks need, and what makes two runs of it the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qilin_med.artifact import differences, digest, write_json
from qilin_med.config.experiment import Experiment, InstructionConfig, StageConfig, StageName, read_deepspeed
from qilin_med.config.schedule import Schedule
from qilin_med.errors import UserError

# Keys that change how a run is watched, stored or divided, never what it computes: free to change before a resume.
_HARMLESS_KEYS = {
    "report_to", "checkpoint_minutes", "checkpoint_every", "keep_checkpoints", "data", "parent", "batch_size_per_device",
    "global_batch_size", "packing",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A stage with its parent verified and its rows prepared."""

    experiment: Experiment
    stage: StageName
    parent: Path  # model folder
    parent_fingerprint: str
    rows: Path  # folder of prepared rows
    schedule: Schedule

    @property
    def section(self) -> StageConfig:
        return self.experiment.stage(self.stage)

    @property
    def folder(self) -> Path:
        return self.experiment.stage_folder(self.stage)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def keeps_sequences_apart(self) -> bool:
        """Whether a row holds several sequences that must not see each other."""
        section = self.section
        return section.packing if isinstance(section, InstructionConfig) else section.isolate_documents

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """Contents of the stage's DeepSpeed file; UserError if it cannot be read."""
        return read_deepspeed(self.section.deepspeed)

    @property
    def zero_stage(self) -> int:
        return (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)

    def identity(self) -> dict[str, Any]:
        """What decides the result. Two jobs with equal identities end with the same weights; where ranks or micro-batches
        differ, up to rounding and dropout."""
        section = {k: v for k, v in self.section.model_dump(mode="json").items() if k not in _HARMLESS_KEYS}
        model = {k: v for k, v in self.experiment.model.model_dump(mode="json").items() if k != "path"}
        return {
            "seed": self.experiment.seed,
            "model": model,
            self.stage: section,
            "deepspeed": self.deepspeed and digest(self.deepspeed),
            "global batch size": self.schedule.global_batch_size,
            "device": self.experiment.launch.device,
            "parent fingerprint": self.parent_fingerprint,
            "rows": self.rows.name,
        }

    def fingerprint(self) -> str:
        return digest(self.identity())

    def save(self, path: Path) -> None:
        write_json(path, {**TypeAdapter(Job).dump_python(self, mode="json"), "identity": self.identity()})

    @classmethod
    def load(cls, path: Path) -> "Job":
        return TypeAdapter(cls).validate_json(path.read_bytes())

    def check_begun(self, unknown: tuple[str, ...] = ()) -> None:
        """UserError if this folder was begun with other settings, data or parent: a good run is never overwritten. Keys of
        the identity that are not known yet are left out."""
        path = self.folder / "job.json"
        if not path.exists():
            return
        old = json.loads(path.read_text(encoding="utf-8"))["identity"]
        before, after = ({k: v for k, v in identity.items() if k not in unknown} for identity in (old, self.identity()))
        if changed := differences(before, after):
            raise UserError(
                f"{self.folder} was made with other settings ({'; '.join(changed)}). Use the old ones, set another"
                " output_dir, or add --restart to move the old folder aside"
            )

    def check_engine(self) -> None:
        """UserError if DeepSpeed's file and the stage do not go together."""
        if self.zero_stage < 3:
            return
        file, gather = self.section.deepspeed, "stage3_gather_16bit_weights_on_model_save"
        if self.section.lora and self.section.lora.quantization:
            raise UserError(
                f"{self.stage}.lora.quantization is set, but {file} is ZeRO-3, which cannot split 4-bit weights; use"
                " configs/deepspeed/zero2.json"
            )
        if not self.deepspeed["zero_optimization"].get(gather):
            raise UserError(f"{file}: without '{gather}': true ZeRO-3 saves checkpoints without weights; add it")
