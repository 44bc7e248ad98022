"""The demo on disk: the world's files, and an untrained model with a tokenizer of its own."""

import gzip
import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from demo import raw, text
from demo.consultations import answers_heldout, consultations_heldout, preferences_heldout
from demo.faults import spoilt_files
from demo.world import DISEASES, build_world, list_facts
from qilin_med.artifact import Artifact, digest
from qilin_med.data.read.formats.documents import HEALTH39, ONE_TAIL_WORDINGS, TRIPLE_WORDINGS, XYWY
from qilin_med.errors import UserError
from qilin_med.prompt.template import QILIN_TEMPLATE, ROLE_MARKS
from qilin_med.prompt.wording import HEAD, TAIL, exam_prompt

WORLD_MARKER = "manifest.json"
VOCABULARY = 1664
MODEL = json.loads((Path(__file__).parent / "model.json").read_text(encoding="utf-8"))
# What the corpus builder adds to the words of the raw files; and characters that only file names and the manifest have,
# which are in the tokenizer since its first version and keep the ids as they are.
FURTHER_WORDS = (HEAD, TAIL, "-HJLNSTUz", "问：答：患者：医生：答案：解释：〔电话〕、（）", *TRIPLE_WORDINGS, *ONE_TAIL_WORDINGS,
                 *(wording for fields in (XYWY, HEALTH39) for wordings in fields.values() for wording in wordings))  # fmt: skip


def build_files(seed: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(the world's files by relative name, what its manifest says). `planted` there is {source of the corpus file, as
    "stage/name": {the builder's reason: how many rows or records}}."""
    world = build_world(seed)
    spoilt = spoilt_files(world)
    files = {
        "general/train-general.txt": raw.lines(text.general_text(world)),
        "general/train-reading.jsonl": raw.json_lines(text.readings(world, "general reading", 800)),
        "heldout/general.txt": raw.lines(text.general_heldout(world)),
        "heldout/medical.jsonl": raw.json_lines(text.medical_heldout(world)),
        "heldout/answers.jsonl": raw.json_lines(answers_heldout(world)),
        "heldout/consultations.jsonl": raw.json_lines(consultations_heldout(world)),
        "heldout/preferences.jsonl": raw.json_lines(preferences_heldout(world)),
        "retrieval/corpus.jsonl": raw.json_lines(text.retrieval_corpus(world)),
        "facts.jsonl": raw.json_lines(list_facts(world)),
    }
    files |= {f"raw/{name}": file.content() for name, file in spoilt.items()}
    planted: dict[str, Counter[str]] = {}
    for file in spoilt.values():
        for source in file.sources:
            planted.setdefault(source, Counter()).update(file.planted.get(source, ()))
    counts = dict(Counter(fact["seen"] for fact in list_facts(world)))
    return files, {"seed": seed, "diseases": DISEASES, "facts": counts, "planted": dict(sorted(planted.items()))}


def write_world(files: dict[str, bytes], about: dict[str, Any], folder: Path) -> None:
    """Replace what another seed or version made there, which is moved aside with the corpus built from it."""
    if folder.exists() and not (folder / WORLD_MARKER).is_file():
        raise UserError(f"{folder}: exists but was not written by this script (no {WORLD_MARKER}); move it away")
    contents = digest({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})[:12]
    world = Artifact(folder, {"seed": about["seed"], "contents": contents}, WORLD_MARKER)
    if world.finished(restart=True, remedy=""):
        print(f"{folder}: the same world is already there")
        return
    world.facts = about
    with world.building() as out:
        for name, content in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    print(f"{folder}: {len(files)} files, {sum(map(len, files.values())) / 1e6:.1f} MB")


def write_untrained_model(files: dict[str, bytes], seed: int, folder: Path) -> None:
    lines, characters = tokenizer_text(files), all_characters(files)
    inputs = {"seed": seed, "model": MODEL, "vocabulary": VOCABULARY, "text": digest([lines, characters])[:12]}
    model = Artifact(folder, inputs)
    if model.finished(restart=True, remedy=""):
        print(f"{folder}: the same untrained model is already there")
        return
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    with model.building() as out:
        tokenizer = make_tokenizer(lines, characters, out)
        set_seed(seed)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL, **special))
        llama.save_pretrained(out)
        parameters = llama.num_parameters()
        model.facts = {"parameters": parameters}
    print(f"{folder}: untrained Llama, {parameters / 1e6:.2f}M parameters, {len(tokenizer)} tokens")


def make_tokenizer(lines: list[str], characters: str, folder: Path) -> Any:
    """A tokenizer of Baichuan's kind: SentencePiece BPE with byte fallback and reserved role marks. It is learnt from
    general text, as a general model's is; of the medicine it knows the characters only."""
    import sentencepiece

    from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        required_chars=characters,
        user_defined_symbols=[*ROLE_MARKS, "\n"],
        normalization_rule_name="identity",
        max_sentencepiece_length=4,  # words, not the sentence patterns that templates repeat
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,  # more could order ties differently
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = fast_tokenizer_from_sentencepiece(
        folder / "tokenizer.model", chat_template=QILIN_TEMPLATE, max_length=MODEL["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenizer_text(files: dict[str, bytes]) -> list[str]:
    """What a general model's tokenizer is learnt from: general text, and the exam prompt's plain words, which any text
    is full of but this world's."""
    return [*files["general/train-general.txt"].decode().splitlines(), *exam_prompt("", ()).split("\n") * 100]


def all_characters(files: dict[str, bytes]) -> str:
    """Every visible character of the data: a tokenizer that knows them all never falls back to bytes."""
    characters = set("".join([*(decoded(name, content) for name, content in files.items()), *FURTHER_WORDS]))
    return "".join(sorted(c for c in characters if c.isprintable() and c not in " \ufffd"))


def decoded(name: str, content: bytes) -> str:
    content = gzip.decompress(content) if name.endswith(".gz") else content
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("gb18030")
