"""The experiment file: one JSON for all stages, validated into frozen objects before anything else happens.

Numbers that the paper states (arXiv:2310.09089, section 4.1) have no defaults: a file that leaves one out is refused, so
that no run passes for "the paper" by accident. Each key is described once, in the docstring below its field, from which
`configs/README.md` is generated (`python -m qilin_med.config.reference`).
"""

import argparse
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qilin_med.errors import UserError

StageName = Literal["pretraining", "sft", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
EXAMPLES: dict[StageName, str] = {"pretraining": "blocks", "sft": "conversations", "dpo": "pairs"}
"""What the batch sizes of a stage count."""

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DataSource(Section):
    path: str
    """.txt, .jsonl, .json, .csv, .tsv, .xlsx or .parquet, also .gz, .zst or in a .zip; or a folder, read in name order."""
    split: Literal["train", "dev"] = "train"
    """Which part of a built corpus: a folder that holds `train-*` or `dev-*` files gives only these."""
    text: str = "text"
    """Field that holds a document's text, in files other than .txt (pretraining only)."""


Source = Annotated[DataSource, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]

Kind = Literal[
    "text", "huatuo", "exam", "cpubmed_kg", "xywy_kg", "39health_kg", "department_qa", "meddialog", "chat", "instruct_chat",
    "multiturn_chat", "hc3", "safety_prompts", "preference", "zhongjing",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


MAX_EXPANSION = 100  # text is seldom packed to less than a twentieth


class RawFiles(Section):
    name: str
    """Name in tables and records. If it is one from the paper's Tables 1 to 3, the paper's figures are shown next to ours."""
    kind: Kind
    """Raw format; data/README.md describes each."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, or folders read recursively. .gz, .zst and .zip are read in place."""
    columns: dict[str, str] = {}
    """For files whose columns have other names or lie deeper: {field of the kind: column of the file, or a JMESPath
    expression over the row}."""
    rows: str = ""
    """For files whose rows hold several records: a JMESPath expression that lists them. "*" in front: the file is one object,
    whose values are read."""
    header: list[str] = []
    """For .csv, .tsv and tab-separated .txt without a line that names the columns: their names, in order."""
    max_expansion: PositiveInt = MAX_EXPANSION
    """How many times its size a packed file may unpack to before it is refused as a decompression bomb."""


class DecontaminationSettings(Section):
    files: list[RawFiles] = []
    """Evaluation files. A record that repeats one of their questions is removed."""
    ngram: PositiveInt = 4
    """Characters of the n-grams that find the questions which a record is compared with."""
    near_miss: Share = 0.85
    """Similarity to an evaluation question from which a record that does not repeat it is reported (and kept)."""


class ModelConfig(Section):
    path: str
    """Folder of the base model in Hugging Face layout (Baichuan-7B: converted by scripts/convert_baichuan.py)."""
    template: Literal["qilin", "own"]
    """Prompt format: "qilin" (Baichuan's reserved role marks) or "own" (the template in the model's tokenizer)."""
    dtype: Literal["bfloat16", "float32"]
    """Number format of training and of the merged models."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; packed sequences stay apart in any. "flash_attention_2" needs flash-attn, a GPU and bfloat16."""
    fused_kernels: bool = False
    """Liger's kernels for norms, rotary positions and MLPs (needs liger-kernel and a GPU); the loss stays our own."""


class LaunchConfig(Section):
    device: Literal["cuda", "cpu"]
    """Where to train. "cuda" is refused on a machine without a GPU, where it would run for weeks."""
    processes: PositiveInt | Literal["auto"] = "auto"
    """Ranks on this machine. "auto": one per visible GPU, or one on a CPU."""
    threads_per_process: PositiveInt = 1
    """CPU threads of each rank. More threads than cores in total make a CPU run several times slower."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30
    """Minutes after which a node gives up waiting for other nodes to join, and a rank waiting for the others in an exchange."""


class LoraSettings(Section):
    rank: PositiveInt
    """Rank of the LoRA matrices."""
    alpha: PositiveInt
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: Share
    """Dropout probability on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: "all-linear" (every linear layer but the output head), or a list of their names."""
    quantization: Literal["nf4"] | None = None
    """"nf4": QLoRA (bitsandbytes; not with ZeRO-3). The adapter is merged into the parent in the parent's own precision."""


class StageConfig(Section):
    data: Annotated[list[Source], Field(min_length=1)]
    """Training files or folders, in the order in which they are read."""
    parent: str | None = None
    """Model folder to start from. null: the previous stage's merged folder; for the first stage, the base model."""
    epochs: Annotated[float, Field(gt=0)]
    """Passes over the training rows."""
    batch_size_per_device: PositiveInt
    """Blocks, conversations or pairs that a rank computes at once (packed: on average). Affects memory and speed only."""
    global_batch_size: PositiveInt | None = None
    """Rows of an optimizer step over all ranks. null: ranks x batch_size_per_device; a multiple of it is accumulated."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_ratio: Share
    """Share of the optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW weight decay."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up (the paper does not state it)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which larger gradients are scaled down."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; overrides epochs."""
    deepspeed: str | None = None
    """DeepSpeed file (of configs/deepspeed, or your own). null: plain PyTorch (DDP with several ranks)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 30
    """Minutes between checkpoints, by rank 0's clock."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; whichever is due first. The last step, and one that a signal makes the last, always are."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """How many complete checkpoints to keep; an older one is deleted once a newer one is complete."""
    report_to: list[str] = ["tensorboard"]
    """Trackers besides metrics.jsonl, by their names in transformers (tensorboard, wandb, swanlab, mlflow, ...)."""


class PretrainingConfig(StageConfig):
    block_size: Annotated[int, Field(ge=8)]
    """Tokens of one row. Documents are joined, each followed by EOS, and cut into blocks; nothing is dropped."""
    isolate_documents: bool = True
    """true: documents in one block do not see each other. false: plain concatenation, as in the published scripts."""
    lora: LoraSettings | None = None
    """null: train all parameters, as the paper does. Otherwise a LoRA adapter, merged into the model at the end of the stage."""


class InstructionConfig(StageConfig):
    max_source_length: Annotated[int, Field(ge=8)]
    """Most tokens of a question with its role marks. A longer question loses its end, never a mark."""
    max_target_length: Annotated[int, Field(ge=8)]
    """Most tokens of an answer with its EOS. A longer answer is cut, and then has no EOS."""
    packing: bool = True
    """Affects speed only. true: sequences side by side, kept apart. false: one a row, padded to the batch's longest."""
    lora: LoraSettings
    """LoRA adapter, merged into the model at the end of the stage."""


class DpoConfig(InstructionConfig):
    beta: Annotated[float, Field(gt=0)]
    """Weight of staying close to the SFT model in the DPO loss."""


class Average(Section):
    over: str | None = None
    """Facet whose groups count alike, as C-Eval's subjects do. null: every question counts alike."""
    of: dict[str, list[str]] = {}
    """Only the questions whose facets have one of these values: {facet: values}."""


Listed = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
AnswerForm = Literal["letters", "options", "generate"]


class QuestionSettings(Section):
    """What a task file (configs/tasks) says of its questions in `metadata`, and an experiment may say otherwise.

    Prompts are Jinja templates over stem, options_text (an option a line, "A text"), letters, options, answer, explanation,
    subject, subject_name, every facet, round (1 for the first worked example), several (whether several letters are right),
    right_texts, exam_prompt and exam_answer (the wording that training uses).
    """

    test: Annotated[list[str], Listed] = []
    """Raw files or folders with the questions. []: those named by the task's file in configs/tasks, below data/raw."""
    fewshot: Annotated[list[str], Listed] = []
    """Raw files with the worked examples. []: those named by the task's file, if they are not in the archive of `test`."""
    kind: Kind = "exam"
    """Raw format of both; data/README.md describes each."""
    columns: dict[str, str] = {}
    """For files whose columns have other names: {field: column of the file, or a JMESPath expression over the row}."""
    place: str | None = None
    """Only records whose file or archive member matches this regular expression; its named groups become facets. {split}
    stands for the split."""
    fewshot_place: str | None = None
    """The same for the worked examples, which are then read from `test` if `fewshot` is empty."""
    split: str | None = None
    """For tasks with several (C-Eval: "val" or "test"). null: the first that has answers."""
    splits: list[str] = [""]
    """What `split` may be."""
    subjects: dict[str, list[str]] = {}
    """{subject: [name in the prompt, category]}: only questions whose facet `subject` is one of these. {}: all."""
    shots_by: str | None = None
    """Worked examples of the question's own value of this facet, for example "subject". null: the same before all."""
    system: str = ""
    """System text before everything; with a line end, as plain text needs it."""
    prompt: str = "{{ stem }}\n{{ options_text }}\n答案："
    """The question with its options, where letters are answered."""
    stem_prompt: str = "{{ stem }}\n"
    """The question without options, where the text of an option, or a free text, is the answer."""
    solution: str = "{{ answer }}"
    """A worked example's answer after `prompt`."""
    prefix: str = ""
    """Start of the answer, from which the next letter is predicted ("letters" only)."""
    rule: Literal["letters", "first_capitals", "ceval_script"] = "letters"
    """How a letter is found in a written answer: our rules, or those of the paper's two evaluation scripts."""
    explained: bool = False
    """Only questions with a reference explanation, which is what a written answer is compared with."""
    averages: dict[str, Average] = {}
    """Further scores by name, beside the accuracy of all questions."""
    chat: bool | None = None
    """true: in the model's chat template, false: in plain text. null: as evaluation.chat says of the model."""
    rotate: Annotated[int, Field(ge=0)] = 0
    """Move every option up by as many places, cyclically: what a model's liking for a place does to its score."""
    shuffle: int | None = None
    """Seed by which the options of each question are put in another order."""
    known_as: str | None = None
    """The published test set that these questions are, in the words of the paper's tables ("CMExam test"). null: found
    out by comparing the questions with those of the published sets."""


class TaskSettings(QuestionSettings):
    task: str | None = None
    """Task of configs/tasks. null: the key itself. Lets several question sets share one task."""
    answers: AnswerForm | None = None
    """Exams only: the most likely letter, the most likely option text after the bare question, or a letter in what the model
    writes. null: the task's own."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question, from the start of their file. null: the task's own number (C-Eval 5)."""
    limit: PositiveInt | None = None
    """Ask only the first questions, up to this many."""
    max_new_tokens: PositiveInt | None = None
    """Most tokens of a written answer. null: the task's own limit."""
    batch_size: PositiveInt | None = None
    """Questions answered at once. null: evaluation.batch_size."""

    def questions(self) -> dict[str, Any]:
        """What stands in for what the task's file says of the questions: all that is no default here."""
        return self.model_dump(mode="json", include=set(QuestionSettings.model_fields), exclude_defaults=True)


class ProtocolSettings(Section):
    questions: TaskSettings
    """The exam, as an entry of evaluation.tasks. The lists below stand in for what it says of the same."""
    answers: Annotated[list[AnswerForm], Field(min_length=1)] = ["letters"]
    """Ways to answer."""
    chat: Annotated[list[bool], Field(min_length=1)] = [False]
    """In the chat template (true), in plain text (false)."""
    shots: Annotated[list[int], Field(min_length=1)] = [0]
    """Numbers of worked examples."""
    prompts: dict[str, str] = {}
    """Templates of the question with its options, by names of yours. {}: the task's own."""
    rotate: Annotated[list[int], Field(min_length=1)] = [0]
    """Places by which options move up; all from 0 to one less than there are options show a liking for a place."""
    shuffle: list[int] = []
    """Seeds of further orders of the options."""
    combine: Literal["all", "one_at_a_time"] = "all"
    """"all": every combination. "one_at_a_time": the first of each list together, then each other one in its place."""


class EvaluationConfig(Section):
    documents: dict[str, list[Source]] = {}
    """Held-out texts by name (for example medical, general). Every model's perplexity is measured on each."""
    answers: list[Source] = []
    """Held-out conversations. Measured: the loss on their answers, in nats per token."""
    preferences: list[Source] = []
    """Held-out preference pairs. Measured: how often the model finds the chosen answer more likely than the rejected one."""
    batch_size: PositiveInt = 16
    """Rows measured, or questions answered, at once."""
    tasks: dict[str, TaskSettings] = {}
    """Question sets; results bear their names. A name is that of a task in configs/tasks, or `task` names one."""
    protocols: dict[str, ProtocolSettings] = {}
    """Exams asked in several ways, by names of yours: how much of a score is the model's, how much the way of asking."""
    chat: list[Literal["base", "pretraining", "sft", "dpo"]] = ["sft", "dpo"]
    """Models that are asked in their tokenizer's chat template; the others are asked in plain text."""
    backend: Literal["hf", "vllm"] = "hf"
    """What answers the tasks' questions: transformers, or vLLM (to be installed in addition to the pinned packages)."""


class DenseSettings(Section):
    model: str
    """Folder of a sentence-transformers embedding model, safetensors."""
    index: Literal["flat", "hnsw", "ivf"] = "flat"
    """FAISS index: "flat" compares every chunk; "hnsw" and "ivf" are approximate, for millions of chunks."""
    query_prefix: str | None = None
    """Text that the model expects before a question. null: as its folder says (`prompts`); else see its model card."""
    passage_prefix: str | None = None
    """The same before a passage. A change needs a new index."""
    batch_size: PositiveInt = 64
    """Texts encoded at once."""


class RerankerSettings(Section):
    model: str
    """Folder of a sentence-transformers cross-encoder that gives one score, safetensors."""
    candidates: PositiveInt = 50
    """Best passages of the retriever that the reranker orders anew; at least `passages`."""
    batch_size: PositiveInt = 32
    """Pairs of question and passage scored at once."""


class RetrievalConfig(Section):
    corpus: list[Source] = []
    """Documents to retrieve from. Rows may have an `id` and a `source`; else these are their place and file name."""
    index: str | None = None
    """Folder of the index. null: <output_dir>/retrieval."""
    chunk_tokens: PositiveInt = 192
    """Most tokens of a chunk. Chunks end where sentences end; only a longer sentence is cut."""
    overlap_tokens: Annotated[int, Field(ge=0)] = 32
    """Most tokens of whole sentences that a chunk repeats from the previous one; less than chunk_tokens."""
    decontamination: DecontaminationSettings = DecontaminationSettings()
    """Evaluation questions to keep out (keys as in a corpus file): documents that repeat one are left out and counted."""
    retriever: Literal["bm25", "dense", "hybrid"] = "bm25"
    """How passages are found: by shared terms, by similarity of embeddings, or by both with reciprocal rank fusion."""
    bm25_unit: Literal["bigram", "word"] = "bigram"
    """Terms of BM25: pairs of characters, or words as jieba cuts them. A run of Latin letters and digits is one term."""
    dense: DenseSettings | None = None
    """Embedding model, needed by the retrievers "dense" and "hybrid"."""
    reranker: RerankerSettings | None = None
    """Model that reads the best passages of any retriever with the question and orders them anew. Needs no new index."""
    exclude_sources: list[str] = []
    """Sources whose chunks are never retrieved. A change needs no new index."""
    exam_sources: list[str] = []
    """Sources that come from exams. Evaluation with retrieval runs once with and once without their chunks."""
    passages: PositiveInt = 5
    """Passages retrieved for each question (the paper: 5)."""
    max_context_tokens: PositiveInt = 1024
    """Most tokens of all passages in a prompt, or what the model has left beside the question, if that is less. The most
    relevant passages are kept whole first."""
    query_with_options: bool = False
    """true: search with an exam question and its options. false: with the question alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RetrievalConfig":
        if self.overlap_tokens >= self.chunk_tokens:
            raise ValueError(f"overlap_tokens {self.overlap_tokens} must be less than chunk_tokens {self.chunk_tokens}")
        if self.retriever != "bm25" and self.dense is None:
            raise ValueError(f"retriever '{self.retriever}' needs the section 'dense' with a model folder")
        if self.reranker and self.reranker.candidates < self.passages:
            raise ValueError(
                f"reranker.candidates {self.reranker.candidates} must be at least passages {self.passages}"
            )
        return self


class Experiment(Section):
    name: str
    """Name of the run in reports."""
    seed: int
    """Seed of all shuffling, dropout and adapter initialisation."""
    output_dir: str
    """Run folder. Everything that the run writes lies below it."""
    model: ModelConfig
    """Base model."""
    launch: LaunchConfig
    """Devices and ranks."""
    pretraining: PretrainingConfig | None = None
    """Stage 1, continued pre-training: all parameters, next token."""
    sft: InstructionConfig | None = None
    """Stage 2, supervised fine-tuning with LoRA."""
    dpo: DpoConfig | None = None
    """Stage 3, direct preference optimisation with LoRA against the frozen SFT model."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured of the base model and of every stage."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Passages that are put before a question at inference."""

    _overrides: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Those of the command line that this was read with; not among the settings, which have them already."""
        return self._overrides

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        if not any(getattr(self, stage) for stage in STAGES):
            raise ValueError(f"no stage: expected at least one of the sections {', '.join(STAGES)}")
        device, dtype = self.launch.device, self.model.dtype
        if self.model.fused_kernels and device != "cuda":
            raise ValueError("model.fused_kernels is true, but these kernels run on a GPU only: set it to false")
        if self.model.attention == "flash_attention_2" and (device, dtype) != ("cuda", "bfloat16"):
            raise ValueError(
                "model.attention is 'flash_attention_2', which runs on a GPU in bfloat16 only; here launch.device is"
                f" '{device}' and model.dtype '{dtype}': set model.attention to 'sdpa'"
            )
        return self

    def stage(self, name: StageName) -> StageConfig:
        """The section of one stage; UserError if the file has none."""
        section = getattr(self, name)
        if section is None:
            raise UserError(f"this experiment has no section '{name}': add it, or run a stage that it has")
        return section

    def stage_folder(self, name: StageName) -> Path:
        return Path(self.output_dir) / name

    def index_folder(self) -> Path:
        return Path(self.retrieval.index or Path(self.output_dir) / "retrieval")

    def parent_folder(self, name: StageName) -> Path:
        """Where a stage starts from: its `parent`, else the nearest earlier stage's merged folder, else the base."""
        if parent := self.stage(name).parent:
            return Path(parent)
        earlier = [stage for stage in STAGES[: STAGES.index(name)] if getattr(self, stage)]
        return self.stage_folder(earlier[-1]) / "merged" if earlier else Path(self.model.path)


def load_experiment(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read an experiment file, apply `key.path=value` overrides and validate.

    A file may extend one other (`"extends": "other.json"`, relative to itself), one level deep: its keys replace the
    other's, section by section. UserError names every unknown, missing or impossible key in one line.
    """
    experiment = read_settings(Experiment, path, overrides)
    experiment._overrides = tuple(overrides)
    return experiment


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """The command line that all commands on an experiment share: --config FILE and key.path=value overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="experiment file, for example configs/demo.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the experiment file")
    return parser


def parse_experiment(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Experiment]:
    """The arguments and the validated experiment. Overrides may stand on either side of flags."""
    arguments = parser.parse_intermixed_args()
    return arguments, load_experiment(arguments.config, arguments.overrides)


def count(text: str) -> int:
    """The value of an option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return number


def read_deepspeed(path: str | None) -> dict[str, Any] | None:
    """Contents of a stage's DeepSpeed file (None for none); UserError if it cannot be read."""
    try:
        return path and json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed configuration {path} cannot be read: {error}") from None


# ------------------------------------------------------------------------------------------- any kind of settings


Settings = TypeVar("Settings", bound=Section)


def read_settings(kind: type[Settings], path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """`load_experiment` for any kind of settings file."""
    path = Path(path)
    raw = _read_json(path)
    if "extends" in raw:
        base_path = path.parent / raw.pop("extends")
        base = _read_json(base_path)
        if "extends" in base:
            raise UserError(f"{path} extends {base_path}, which extends another file: only one level is allowed")
        raw = _merged(base, raw)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = "; ".join(_explain(problem, kind) for problem in error.errors())
        raise UserError(f"{path}: {problems}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such settings file (shipped ones lie in configs/)") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a JSON text file in UTF-8, found {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both_objects = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both_objects else value
    return result


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected key.path=value, for example sft.learning_rate=1e-5")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string, so that paths need no quotes
    *sections, last = key.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"override '{override}': '{section}' is a value, not a section")
        raw = inner
    raw[last] = value


def _explain(problem: dict[str, Any], section: type[Section]) -> str:
    """One pydantic problem in a user's words, with the nearest known key for an unknown one."""
    # Unions add the tried type's name to the location; only names of the file are shown.
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("constrained-", "literal["))]
    where = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        for part in location[:-1]:
            field = section.model_fields.get(part)
            section = next(_sections_in(field.annotation), section) if field else section
        nearest = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(section.model_fields)}"
        return f"unknown key '{where}': {hint}"
    if problem["type"] == "missing":
        return f"'{where}' is missing: it has no default, state it in the file"
    found = json.dumps(problem["input"], ensure_ascii=False, default=str)
    shown = "" if isinstance(problem["input"], dict) else f", found {found}"
    return f"'{where}': {problem['msg'].removeprefix('Value error, ')}{shown}"


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sft.learning_rate": value} of nested settings."""
    flat: dict[str, Any] = {}
    for key, inner in settings.items():
        flat |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return flat
