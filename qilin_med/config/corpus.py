"""The corpus file (configs/chimed.json): sources, cleaning, deduplication, decontamination and output of one build."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qilin_med.config.experiment import (
    DecontaminationSettings,
    PositiveInt,
    RawFiles,
    Section,
    Share,
    StageName,
    read_settings,
)


class CleaningSettings(Section):
    min_characters: Annotated[int, Field(ge=0)] = 10
    """Shorter documents are rejected (pretraining)."""
    min_answer_characters: Annotated[int, Field(ge=0)] = 1
    """Records with a shorter answer are rejected (sft, dpo)."""
    max_characters: PositiveInt = 200_000
    """Longer records are rejected."""
    max_symbol_share: Share = 0.5
    """Records in which more of the visible characters than this are neither letters nor digits are rejected."""
    languages: list[Literal["zh", "en"]] = ["zh", "en"]
    """Records mostly written in the letters of another language are rejected."""
    max_repeated_share: Share = 0.5
    """Records in which repeated lines or sentences make up more than this are rejected."""
    mask_personal_data: bool = True
    """Replace phone numbers, identity numbers, e-mail addresses and QQ numbers by marks."""
    full_width_to_half: bool = False
    """Turn full-width letters, digits and signs into ASCII."""
    traditional_to_simplified: bool = False
    """Convert traditional to simplified characters (OpenCC t2s)."""


class DeduplicationSettings(Section):
    near: bool = True
    """Reject near-duplicates: MinHash candidates whose verified Jaccard similarity reaches `threshold`."""
    shingle: PositiveInt = 5
    """Characters of a shingle."""
    threshold: Share = 0.8
    """Jaccard similarity of shingle sets from which two records are duplicates (Lee et al. 2022: 0.8)."""
    bands: PositiveInt = 14
    """Bands of the MinHash signature; records that agree on a whole band are compared."""
    rows_per_band: PositiveInt = 8
    """Hashes in a band: more find fewer candidates, and fewer chance ones."""
    substring_tokens: Annotated[int, Field(ge=2)] | None = 50
    """Cut out runs of so many tokens that another document has (pretraining; Lee et al. 2022: 50). null: off."""


class SourceDeduplication(Section):
    near: bool = True
    """false: a record of this source is no near-duplicate of any other, and none of it."""
    threshold: Share | None = None
    """Jaccard similarity of near-duplicates. Of two sources' the higher one counts. null: the corpus's."""
    substrings: bool = True
    """false: nothing is cut out of this source's documents. Exam questions are never cut."""
    substring_tokens: Annotated[int, Field(ge=2)] | None = None
    """Cut out only runs of at least so many tokens, no fewer than the corpus's. null: the corpus's."""


class ExecutorSettings(Section):
    kind: Literal["local", "slurm", "ray"] = "local"
    """datatrove executor: processes of this machine, a Slurm cluster, or a Ray cluster."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Tasks at a time. "auto": the cores that this process may use."""
    options: dict[str, Any] = {}
    """Further arguments of datatrove's executor, for example {"partition": "cpu", "time": "08:00:00"} for slurm."""


class RawSource(RawFiles):
    stage: StageName
    """The training set that this source goes into."""
    licence: str
    """Licence or terms, copied into the manifest and the data card."""
    share: Share = 1.0
    """Share of the records to take, drawn by a hash of their content."""
    limit: PositiveInt | None = None
    """Take only so many records of each file, from its start."""
    join_lines: Annotated[int, Field(ge=0)] = 0
    """text: join lines of a file until a document has this many characters. 0: one document a line."""
    multi_turn: bool | None = None
    """Which row of the data tables a sft source counts in. null: what most of its records are."""
    cleaning: CleaningSettings = CleaningSettings()
    """Rules that differ from the corpus's for this source: only the keys that are given."""
    deduplication: SourceDeduplication = SourceDeduplication()
    """Deduplication of this source's records, where it differs from the corpus's."""

    def threshold(self, corpus: DeduplicationSettings) -> float:
        """Jaccard similarity from which its records are near-duplicates; infinite for never."""
        own = self.deduplication
        return math.inf if not own.near else corpus.threshold if own.threshold is None else own.threshold


class CorpusSettings(Section):
    name: str
    """Name of the corpus, in its card."""
    output_dir: str
    """Folder that the build publishes: pretraining/, sft/, dpo/, manifest.json, README.md."""
    tokenizer: str
    """Model folder whose tokenizer counts tokens (and whose tokens substring deduplication compares)."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """File format of the sets."""
    dev_share: Share = 0.002
    """Share of the records that goes to dev files, by a hash of their content."""
    shard_megabytes: PositiveInt = 64
    """Input bytes that one task reads."""
    sources: Annotated[list[RawSource], Field(min_length=1, max_length=255)]
    """Raw files. Where two sources hold the same text, the earlier one keeps it."""
    cleaning: CleaningSettings = CleaningSettings()
    """Cleaning rules."""
    deduplication: DeduplicationSettings = DeduplicationSettings()
    """Deduplication, within each of the three sets."""
    decontamination: DecontaminationSettings = DecontaminationSettings()
    """Evaluation questions to keep out."""
    executor: ExecutorSettings = ExecutorSettings()
    """Where the work runs."""

    def cleaning_of(self, source: RawSource) -> CleaningSettings:
        """The corpus's cleaning rules with the source's own."""
        return self.cleaning.model_copy(update=source.cleaning.model_dump(exclude_unset=True))

    @model_validator(mode="after")
    def _sources_cut_no_shorter_runs(self) -> "CorpusSettings":
        fewest = self.deduplication.substring_tokens or 0
        for source in self.sources:
            if (own := source.deduplication.substring_tokens or fewest) < fewest:
                raise ValueError(
                    f"source '{source.name}': deduplication.substring_tokens is {own}, fewer than the corpus's {fewest};"
                    " lower the corpus's, and give the other sources theirs"
                )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> "CorpusSettings":
        entries = [(f"sources of {source.stage}", source.name) for source in self.sources]
        entries += [("files of decontamination", file.name) for file in self.decontamination.files]
        for kind, name in entries:
            if entries.count((kind, name)) > 1:
                raise ValueError(f"two {kind} are named '{name}': rename one, or join their paths")
        return self


def load_corpus_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> CorpusSettings:
    """Read and validate a corpus file; UserError as for experiment files."""
    return read_settings(CorpusSettings, path, overrides)
