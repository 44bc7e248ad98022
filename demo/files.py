"""The world as files: raw data with planted faults, what is held out, what retrieval may read, and a manifest."""

import gzip
import hashlib
import json
from collections import Counter

from demo import formats
from demo.conversations import answers_heldout, consultations_heldout
from demo.faults import plant_faults
from demo.preferences import preferences_heldout
from demo.raw import RawFile, raw_files
from demo.reading import retrieval_corpus
from demo.text import general_heldout, general_reading, general_text, medical_heldout
from demo.world import DISEASES, World, build_world, facts
from qilin_med.data.read.formats.graphs import HEALTH39, ONE_TAIL_WORDINGS, TRIPLE_WORDINGS, XYWY
from qilin_med.prompt.wording import HEAD, TAIL, exam_prompt

# What the corpus builder adds to the words of the raw files.
BUILDERS_WORDS = (HEAD, TAIL, "问：答：患者：医生：答案：解释：〔电话〕、（）", *TRIPLE_WORDINGS, *ONE_TAIL_WORDINGS,
                  *(wording for fields in (XYWY, HEALTH39) for wordings in fields.values() for wording in wordings))  # fmt: skip


def build_files(seed: int) -> dict[str, bytes]:
    """Everything that lies under the demo's data folder, by relative name."""
    world = build_world(seed)
    raw = spoilt_files(world)
    files = _sound_files(world) | {f"raw/{name}": file.write(file.rows) for name, file in raw.items()}
    files["manifest.json"] = _manifest(world, raw, files)
    return files


def spoilt_files(world: World) -> dict[str, RawFile]:
    files = raw_files(world)
    plant_faults(files, world)
    return files


def _sound_files(world: World) -> dict[str, bytes]:
    return {
        "general/train-general.txt": formats.lines(general_text(world)),
        "general/train-reading.jsonl": formats.json_lines(general_reading(world)),
        "heldout/general.txt": formats.lines(general_heldout(world)),
        "heldout/medical.jsonl": formats.json_lines(medical_heldout(world)),
        "heldout/answers.jsonl": formats.json_lines(answers_heldout(world)),
        "heldout/consultations.jsonl": formats.json_lines(consultations_heldout(world)),
        "heldout/preferences.jsonl": formats.json_lines(preferences_heldout(world)),
        "retrieval/corpus.jsonl": formats.json_lines(retrieval_corpus(world)),
        "facts.jsonl": formats.json_lines(facts(world)),
    }


def _manifest(world: World, raw: dict[str, RawFile], files: dict[str, bytes]) -> bytes:
    manifest = {
        "seed": world.seed,
        "diseases": DISEASES,
        "facts": dict(Counter(fact["seen"] for fact in facts(world))),
        "planted": planted_faults(raw),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    return (json.dumps(manifest, ensure_ascii=False, indent=2) + "\n").encode()


def planted_faults(raw: dict[str, RawFile]) -> dict[str, dict[str, int]]:
    """{source of the corpus file, as "stage/name": {the builder's reason: how many rows or records}}."""
    planted: dict[str, Counter[str]] = {}
    for file in raw.values():
        for source in file.sources:
            planted.setdefault(source, Counter()).update(file.planted.get(source, ()))
    return {source: dict(counts) for source, counts in sorted(planted.items())}


# ----------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_text(files: dict[str, bytes]) -> list[str]:
    """What a general model's tokenizer is learnt from: general text, and the exam prompt's plain words, which any text
    is full of but this world's."""
    return [*files["general/train-general.txt"].decode().splitlines(), *exam_prompt("", ()).split("\n") * 100]


def all_characters(files: dict[str, bytes]) -> str:
    """Every visible character of the data: a tokenizer that knows them all never falls back to bytes."""
    texts = (decoded(name, content) for name, content in files.items())
    characters = set("".join((*texts, *BUILDERS_WORDS)))
    return "".join(sorted(c for c in characters if c.isprintable() and c not in " \ufffd"))


def decoded(name: str, content: bytes) -> str:
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("gb18030")
