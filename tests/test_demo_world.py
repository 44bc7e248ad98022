"""The invented world: the same from the same seed, in published formats, with strict splits, and nothing said twice but
what is planted."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from demo import exams, faults, make
from demo.raw import raw_files
from demo.world import DISEASES, MEDICAL, World, build_world
from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import load_corpus_settings
from qilin_med.config.experiment import DataSource, load_experiment
from qilin_med.data.read.readers import raw_files as find_raw_files
from qilin_med.data.read.readers import read_chats, read_documents, read_preferences, read_raw
from qilin_med.data.render import render, text_of
from qilin_med.errors import UserError
from qilin_med.records import Skipped

REPOSITORY = Path(__file__).resolve().parents[1]
CORPUS_FILE = REPOSITORY / "configs/demo_chimed.json"
SEED = 7
STAGES = ("pretraining", "sft", "dpo")
HELD_OUT = {
    "heldout/general.txt": read_documents,
    "heldout/medical.jsonl": read_documents,
    "retrieval/corpus.jsonl": read_documents,
    "heldout/answers.jsonl": read_chats,
    "heldout/preferences.jsonl": read_preferences,
}
EXAMS_HELD_OUT = ("raw/exams/val.csv", "raw/exams/test.csv", "raw/exams/unseen.csv")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SEED)


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, bytes], dict]:
    """The files, and what the manifest says of them."""
    return make.build_files(SEED)


@pytest.fixture(scope="module")
def files(made) -> dict[str, bytes]:
    return made[0]


@pytest.fixture(scope="module")
def sound(world) -> dict[str, bytes]:
    """The raw files before faults are planted."""
    return {f"raw/{name}": file.content() for name, file in raw_files(world).items()}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory) -> Path:
    return written(files, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sound_records(sound, tmp_path_factory) -> dict[str, list[str]]:
    """Stage -> texts of its records, of the raw files without faults."""
    texts = defaultdict(list)
    for source, record in records_of(written(sound, tmp_path_factory.mktemp("sound"))):
        texts[source.stage].append(text_of(render(record, source.stage)))
    return texts


@pytest.fixture(scope="module")
def tokenizer(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return make.make_tokenizer(make.tokenizer_text(files), make.all_characters(files), folder), folder


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / "data/demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data/demo" / name).write_bytes(content)
    return folder


def records_of(folder: Path, evaluation: bool = False) -> Iterator:
    """(source, record) of every row that the corpus file of the demo reads."""
    settings = load_corpus_settings(CORPUS_FILE)
    for source in settings.decontamination.files if evaluation else settings.sources:
        here = source.model_copy(update={"paths": [str(folder / path) for path in source.paths]})
        for file in find_raw_files(here):
            for _, record in read_raw(here, file):
                yield source, record


def text_below(files: dict[str, bytes], *folders: str) -> str:
    chosen = (name for name in files if name.startswith(folders) and name not in EXAMS_HELD_OUT)
    return "".join(make.decoded(name, files[name]) for name in chosen)


def rows_of(files: dict[str, bytes], name: str) -> list[dict]:
    return [json.loads(line) for line in files[name].decode().splitlines()]


# -------------------------------------------------------------------------------------------------------- world


def test_same_seed_gives_the_same_bytes_and_another_seed_another_world(made, world):
    assert make.build_files(SEED) == made
    others = {disease.name for disease in build_world(SEED + 1).diseases}
    shared = others & {disease.name for disease in world.diseases}
    assert len(shared) < len(others) / 5


def test_no_two_things_share_a_name_stem(world):
    names = [thing.name for thing in world.diseases] + [thing.name for thing in world.general]
    names += [name for pool in ("drug", "department", "check", "eat", "avoid") for name in world.pools[pool]]
    stems = [name[:2] for name in names]
    assert len(set(stems)) == len(stems)
    assert not set(stems) & set(world.spare_stems)


# ------------------------------------------------------------------------------------------------------ formats


def test_encodings_are_those_of_the_published_files(files):
    assert files["raw/encyclopedia/questions.jsonl.gz"][:2] == b"\x1f\x8b"
    assert files["raw/exams/train.csv"].startswith("\ufeffQuestion,".encode())
    table = files["raw/graphs/diseases.csv"]
    assert table.decode("gb18030").startswith("name,alias,")
    for encoding in ("utf-8", "gbk"):
        with pytest.raises(UnicodeDecodeError):
            table.decode(encoding)
    with pytest.raises(UnicodeDecodeError):
        files["raw/dialogues/departments.csv"].decode()


def test_readers_read_every_sound_row(sound, tmp_path):
    read = Counter()
    for source, record in records_of(written(sound, tmp_path)):
        assert not isinstance(record, Skipped), record
        read[source.stage, source.name] += 1
    assert len(read) == len(load_corpus_settings(CORPUS_FILE).sources)


def test_readers_skipped_what_is_planted(made, folder):
    planted = made[1]["planted"]
    found = defaultdict(Counter)
    for source, record in records_of(folder):
        if isinstance(record, Skipped):
            found[f"{source.stage}/{source.name}"][record.reason] += 1
    assert found
    for source, reasons in found.items():
        assert reasons == {reason: planted[source][reason] for reason in reasons}, source


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_files_are_whole(folder, name):
    records = list(HELD_OUT[name]([DataSource(path=str(folder / "data/demo" / name))]))
    assert records and not [record for record in records if isinstance(record, Skipped)]


# ------------------------------------------------------------------------------------------------------- splits


def test_unseen_diseases_are_only_in_the_retrieval_corpus_and_the_facts(files, world):
    text = text_below(files, "general/", "raw/", "heldout/")
    unseen = [disease.name for disease in world.diseases_seen("nowhere")]
    assert len(unseen) == DISEASES["nowhere"]
    assert not [name for name in unseen if name in text]
    assert all(name.encode() in files["retrieval/corpus.jsonl"] for name in unseen)


def test_diseases_of_held_out_facts_are_read_but_never_asked(sound_records, world):
    """But for the planted leaks, which the builder must find."""
    read, asked, compared = ("".join(sound_records[stage]) for stage in STAGES)
    for disease in world.diseases_seen("cpt"):
        assert disease.name in read
        assert disease.name not in asked + compared


def test_no_held_out_question_or_text_is_in_a_training_file(files):
    text = text_below(files, "general/", "raw/")
    questions = [row["messages"][0]["content"] for row in rows_of(files, "heldout/answers.jsonl")]
    questions += [row["prompt"] for row in rows_of(files, "heldout/preferences.jsonl")]
    questions += [row["text"] for row in rows_of(files, "heldout/medical.jsonl")]
    questions += [row["questions"] for row in rows_of(files, "heldout/consultations.jsonl")]
    questions += files["heldout/general.txt"].decode().splitlines()
    assert len(questions) > 700
    assert not [question for question in questions if question in text]


def test_kept_sentences_and_wordings_are_in_no_training_text(files, sound_records, world):
    # Also not in the sentences that the builder makes of the graphs.
    text = text_below(files, "general/", "raw/") + "\n".join(sound_records["pretraining"])
    for thing in [*world.diseases, *world.general]:
        for relation in thing.relations:
            assert thing.state_unread(relation) not in text
            assert not relation.unasked or thing.say(relation.unasked, relation) not in text


def test_general_text_has_no_medicine(files, world):
    text = text_below(files, "general/") + files["heldout/general.txt"].decode()
    names = [disease.name for disease in world.diseases] + [name for pool in world.pools.values() for name in pool]
    assert not [name for name in names if name in text]


def test_every_fact_that_is_read_stands_in_the_textbooks(files, world):
    articles: dict[str, str] = {}
    for line in text_below(files, "raw/textbooks/").splitlines():
        if name := next((disease.name for disease in world.diseases if disease.name in line), None):
            articles[name] = articles.get(name, "") + line
    for fact in rows_of(files, "facts.jsonl"):
        assert (fact["object"] in articles.get(fact["subject"], "")) == (fact["seen"] != "nowhere"), fact


def test_retrieval_corpus_tells_every_fact(files):
    notes = {row["id"]: row["text"] for row in rows_of(files, "retrieval/corpus.jsonl")}
    for fact in rows_of(files, "facts.jsonl"):
        assert fact["object"] in notes[f"{fact['subject']} {fact['relation']}"]


# ---------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("stage", STAGES)
def test_no_two_sound_records_are_alike(sound_records, stage):
    """By all pairs, with none of the builder's code."""
    columns: dict[str, int] = {}
    shingled = [
        [columns.setdefault(shingle, len(columns)) for shingle in shingles(text)] for text in sound_records[stage]
    ]
    sizes = np.array([len(shingle) for shingle in shingled])
    ends = np.concatenate(([0], np.cumsum(sizes)))
    matrix = csr_matrix((np.ones(ends[-1], np.int32), np.concatenate(shingled), ends), (len(sizes), len(columns)))
    for start in range(0, len(sizes), 500):
        shared = (matrix[start : start + 500] @ matrix.T).tocoo()
        others = shared.row + start != shared.col
        union = sizes[shared.row + start] + sizes[shared.col] - shared.data
        assert (shared.data / union)[others].max() < 0.78  # a margin to the 0.8 of the corpus file


def shingles(text: str) -> set[str]:
    text = re.sub(r"\s", "", unicodedata.normalize("NFKC", text))
    return {text[index : index + 5] for index in range(max(1, len(text) - 4))}


def test_no_two_sound_documents_share_a_passage(sound_records, tokenizer):
    width = load_corpus_settings(CORPUS_FILE).deduplication.substring_tokens
    first: dict[tuple[int, ...], int] = {}
    for number, text in enumerate(sound_records["pretraining"]):
        ids = tokenizer[0](text, add_special_tokens=False)["input_ids"]
        for start in range(len(ids) - width + 1):
            assert first.setdefault(tuple(ids[start : start + width]), number) == number, text


def test_planted_near_duplicates_are_near(sound):
    lines = [line for line in sound["raw/textbooks/volume-1.txt"].decode().splitlines() if len(line) > 85]
    for line in lines:
        one, other = shingles(line), shingles(faults.nearly(line))
        assert 0.85 < len(one & other) / len(one | other) < 1


# --------------------------------------------------------------------------------------------------------- exams


def test_exams_have_one_right_option_and_no_favourite_letter(folder, files, world):
    held_out = defaultdict(list)
    for source, question in records_of(folder, evaluation=True):
        held_out[source.name].append(question)
    right = {(f["subject"], f["object"]) for f in rows_of(files, "facts.jsonl")}
    assert min(len(held_out["exam-test"]), len(held_out["exam-unseen"])) >= 300
    for questions in held_out.values():
        letters = Counter(question.answer for question in questions)
        assert letters.keys() == set(exams.LETTERS) and max(letters.values()) - min(letters.values()) <= 1
        for question in questions:
            name = next(disease.name for disease in world.diseases if disease.name in question.stem)
            # Every part of the right option is a fact, no part of another one is.
            told = {letter: {(name, part) in right for part in text.split("和")} for letter, text in question.options}
            assert told == {letter: {letter == question.answer} for letter in exams.LETTERS}
            assert dict(question.facets)["Clinical Department"]


def test_exams_ask_about_the_diseases_of_their_own_group(world):
    parts = exams.exams_held_out(world)
    asked = [{d.name for d in world.diseases if any(d.name in e.stem for e in part)} for part in parts.values()]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == {disease.name for disease in world.diseases_seen("cpt")}
    assert asked[2] == {disease.name for disease in world.diseases_seen("nowhere")}


# ------------------------------------------------------------------------------------------------------- answers


def test_length_alone_does_not_tell_the_chosen_answer(sound, tmp_path):
    written(sound, tmp_path)
    pairs = [record for source, record in records_of(tmp_path) if source.stage == "dpo"]
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    shorter = sum(len(pair.chosen) < len(pair.rejected) for pair in pairs) / len(pairs)
    # The best rule by length, guessing where both are as long.
    assert max(longer, shorter) + (1 - longer - shorter) / 2 < 0.6
    assert min(longer, shorter) > 0.2


def test_chosen_answers_are_right_and_wrong_ones_are_not(files, world):
    by_name = {disease.name: disease for disease in world.diseases}
    for row in rows_of(files, "heldout/preferences.jsonl"):
        name = next(name for name in by_name if name in row["prompt"])
        relation = next(r for r in MEDICAL if row["prompt"] in {by_name[name].say(q, r) for q in r.asked})
        right = by_name[name].answer(relation)
        assert right in row["chosen"]
        assert (right in row["rejected"]) == (row["fault"] == "careless")


def test_riddles_can_be_answered_from_their_own_text(world, files):
    lines = [line for line in files["general/train-general.txt"].decode().splitlines() if line.count(" ") == 6]
    assert len(lines) == 1500
    for line in lines:
        told, *asked = line.split(" ")
        assert all(answer.removeprefix("答：") in told for answer in asked[1::2])


@pytest.mark.parametrize("name", ["demo_base.json", "demo.json"])
def test_configurations_name_files_that_the_world_or_the_builder_makes(files, name):
    experiment = load_experiment(REPOSITORY / "configs" / name)
    evaluation = experiment.evaluation
    named = [evaluation.answers, evaluation.preferences, *evaluation.documents.values()]
    named += [getattr(experiment, stage).data for stage in STAGES if getattr(experiment, stage)]
    made = [f"data/demo/{file}" for file in files]
    made += [f"{load_corpus_settings(CORPUS_FILE).output_dir}/{stage}/" for stage in STAGES]
    for source in chain(*named):
        assert any(file.startswith(source.path) for file in made), source.path


def test_making_the_demo_again_changes_nothing(made, tmp_path, capsys):
    world, model, built = tmp_path / "demo", tmp_path / "demo-init", tmp_path / "demo/processed/manifest.json"
    for _ in range(2):
        make.write_world(*made, world)
        make.write_untrained_model(made[0], SEED, model)
        built.parent.mkdir(exist_ok=True)
        built.write_text("{}")
    assert capsys.readouterr().out.count("already there") == 2
    found = [path for path in world.rglob("*") if path.is_file() and path not in (built, world / make.WORLD_MARKER)]
    assert {path.relative_to(world).as_posix(): path.read_bytes() for path in found} == made[0]
    assert built.read_text() == "{}"
    assert read_manifest(world, make.WORLD_MARKER).items() >= made[1].items()


def test_another_world_takes_the_place_of_the_first_and_of_what_was_built_from_it(made, tmp_path):
    files, about = made
    make.write_world(files, about, tmp_path / "demo")
    (tmp_path / "demo/processed").mkdir()
    make.write_world({**files, "facts.jsonl": b""}, {**about, "seed": SEED + 1}, tmp_path / "demo")
    assert not (tmp_path / "demo/processed").exists()
    (replaced,) = tmp_path.glob("demo.replaced-*")
    assert (replaced / "processed").is_dir() and (replaced / "facts.jsonl").read_bytes() == files["facts.jsonl"]


def test_foreign_folder_is_not_overwritten(made, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        make.write_world(*made, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_tokenizer_knows_every_character_and_agrees_with_sentencepiece(tokenizer, files, sound_records):
    import sentencepiece

    ours, folder = tokenizer
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text for stage in STAGES for text in sound_records[stage][::5]]
    texts += [row["text"] for row in rows_of(files, "retrieval/corpus.jsonl")]
    texts += files["general/train-general.txt"].decode().splitlines()[:500]
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == original.encode(text)
        assert ours.decode(ids) == text
        assert not any(original.is_byte(number) for number in ids), text
