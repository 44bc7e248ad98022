"""The invented world: the same from the same seed, read by the pipeline's own readers, and with strict splits."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from qilin_med import demo_world
from qilin_med.config import DataSource, load_experiment
from qilin_med.corpus.sources import read_chats, read_documents, read_preferences
from qilin_med.records import SetAside

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 7
READERS = {
    "pretraining/": read_documents,
    "general/": read_documents,
    "heldout/general.txt": read_documents,
    "heldout/medical.jsonl": read_documents,
    "retrieval/": read_documents,
    "sft/": read_chats,
    "heldout/answers.jsonl": read_chats,
    "dpo/": read_preferences,
    "heldout/preferences.jsonl": read_preferences,
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return demo_world.build_files(SEED)


@pytest.fixture(scope="module")
def world() -> demo_world.World:
    return demo_world.build_world(SEED)


@pytest.fixture(scope="module")
def folder(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo", REPOSITORY / "scripts/make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_text(files: dict[str, bytes], *folders: str) -> str:
    return "".join(content.decode() for name, content in files.items() if name.startswith(folders))


def rows_of(files: dict[str, bytes], name: str) -> list[dict]:
    return [json.loads(line) for line in files[name].decode().splitlines()]


def test_same_seed_gives_the_same_bytes_and_another_seed_another_world(files, world):
    assert demo_world.build_files(SEED) == files
    others = {disease.name for disease in demo_world.build_world(SEED + 1).diseases}
    shared = others & {disease.name for disease in world.diseases}
    assert len(shared) < len(others) / 5


def test_no_two_things_share_a_name_stem(world):
    names = [thing.name for thing in world.diseases] + [thing.name for thing, _ in world.general]
    names += [name for pool in ("drug", "department", "check", "eat", "avoid") for name in world.pools[pool]]
    stems = [name[:2] for name in names]
    assert len(set(stems)) == len(stems)
    assert not set(stems) & set(world.spare_stems)


def test_readers_find_what_the_manifest_says(files, folder):
    counts = json.loads(files["manifest.json"])["files"]
    for name, expected in counts.items():
        reader = next((reader for prefix, reader in READERS.items() if name.startswith(prefix)), None)
        if reader is None:
            assert name == "facts.jsonl"
            continue
        records = list(reader([DataSource(path=str(folder / name))]))
        aside = [record.reason for record in records if isinstance(record, SetAside)]
        assert len(records) == expected["rows"]
        assert len(records) - len(aside) == expected["usable"]
        # A broken line's and an unknown role's reason go on after the words that the manifest has.
        found = Counter(next((p for p in expected["set_aside"] if reason.startswith(p)), reason) for reason in aside)
        assert found == expected["set_aside"], name


def test_unseen_diseases_are_only_in_the_retrieval_corpus_and_the_facts(files, world):
    text = training_text(files, "general/", "pretraining/", "sft/", "dpo/", "heldout/")
    unseen = [disease.name for disease in world.diseases_seen("nowhere")]
    assert len(unseen) == demo_world.DISEASES["nowhere"]
    assert not [name for name in unseen if name in text]
    assert all(name.encode() in files["retrieval/corpus.jsonl"] for name in unseen)


def test_diseases_of_held_out_facts_are_read_but_never_asked(files, world):
    asked, read = training_text(files, "sft/", "dpo/"), training_text(files, "pretraining/")
    for disease in world.diseases_seen("cpt"):
        assert disease.name not in asked
        assert disease.name in read


def test_no_held_out_question_or_text_is_in_a_training_file(files):
    text = training_text(files, "general/", "pretraining/", "sft/", "dpo/")
    questions = [row["messages"][0]["content"] for row in rows_of(files, "heldout/answers.jsonl")]
    questions += [row["prompt"] for row in rows_of(files, "heldout/preferences.jsonl")]
    questions += [row["text"] for row in rows_of(files, "heldout/medical.jsonl")]
    questions += files["heldout/general.txt"].decode().splitlines()
    assert len(questions) > 700
    assert not [question for question in questions if question in text]


def test_kept_sentences_and_wordings_are_in_no_training_text(files, world):
    text = training_text(files, "general/", "pretraining/", "sft/", "dpo/")
    things = [(disease, demo_world.MEDICAL) for disease in world.diseases] + list(world.general)
    for thing, relations in things:
        for relation in relations:
            assert thing.state_unread(relation) not in text
            assert not [question for question in relation.unasked if thing.say(question, relation) in text]


def test_general_text_has_no_medicine(files, world):
    text = training_text(files, "general/") + files["heldout/general.txt"].decode()
    names = [disease.name for disease in world.diseases] + [name for pool in world.pools.values() for name in pool]
    assert not [name for name in names if name in text]


def test_every_fact_that_is_read_stands_in_the_pretraining_text(files, world):
    documents = [json.dumps(row, ensure_ascii=False) for row in rows_of(files, "pretraining/train-encyclopedia.jsonl")]
    articles: dict[str, str] = {}
    for document in documents:
        name = next(disease.name for disease in world.diseases if disease.name in document)
        articles[name] = articles.get(name, "") + document
    for fact in rows_of(files, "facts.jsonl"):
        assert (fact["object"] in articles.get(fact["subject"], "")) == (fact["seen"] != "nowhere"), fact


def test_retrieval_corpus_tells_every_fact(files):
    articles = {row["id"]: row["text"] for row in rows_of(files, "retrieval/corpus.jsonl")}
    assert all(fact["object"] in articles[fact["subject"]] for fact in rows_of(files, "facts.jsonl"))


@pytest.mark.parametrize("name", ["dpo/train-prompt.jsonl", "heldout/preferences.jsonl"])
def test_length_alone_does_not_tell_the_chosen_answer(files, name):
    rows = [row for row in rows_of(files, name) if row["prompt"] and row["chosen"]]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows) / len(rows)
    # The best rule by length, guessing where both are as long.
    assert max(longer, shorter) + (1 - longer - shorter) / 2 < 0.6
    assert min(longer, shorter) > 0.2


def test_chosen_answers_are_right_and_wrong_ones_are_not(files, world):
    by_name = {disease.name: disease for disease in world.diseases}
    for row in rows_of(files, "heldout/preferences.jsonl"):
        name = next(name for name in by_name if name in row["prompt"])
        relation = next(r for r in demo_world.MEDICAL if row["prompt"] in {by_name[name].say(q, r) for q in r.asked})
        right = demo_world.plain_answer(by_name[name], relation)
        assert right in row["chosen"]
        assert (right in row["rejected"]) == (row["fault"] == "careless")


def test_riddles_can_be_answered_from_their_own_text(world, files):
    lines = [line for line in files["general/train-general.txt"].decode().splitlines() if line.count(" ") == 6]
    assert len(lines) == 1500
    for line in lines:
        told, *asked = line.split(" ")
        assert all(answer.removeprefix("答：") in told for answer in asked[1::2])


@pytest.mark.parametrize("name", ["demo_base.json", "demo.json"])
def test_configurations_name_files_that_the_world_has(files, name):
    experiment = load_experiment(REPOSITORY / "configs" / name)
    sections = [
        getattr(experiment, stage).data for stage in ("pretraining", "sft", "dpo") if getattr(experiment, stage)
    ]
    evaluation = experiment.evaluation
    sections += [evaluation.answers, evaluation.preferences, *evaluation.documents.values()]
    for source in (source for section in sections for source in section):
        assert any(f"data/demo/{file}".startswith(source.path) for file in files), source.path


def test_making_the_demo_again_changes_nothing(script, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        script.write_data(files)
        script.write_untrained_model(files, SEED)
    assert capsys.readouterr().out.count("already there") == 2
    written = {
        p.relative_to("data/demo").as_posix(): p.read_bytes() for p in Path("data/demo").rglob("*") if p.is_file()
    }
    assert written == files


def test_foreign_folder_is_not_overwritten(script, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/demo").mkdir(parents=True)
    Path("data/demo/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        script.write_data(files)
    assert Path("data/demo/mine.txt").read_text() == "keep"


def test_tokenizer_knows_every_character_and_agrees_with_sentencepiece(script, files, tmp_path):
    import sentencepiece

    general = files["general/train-general.txt"].decode().splitlines()
    tokenizer = script.make_tokenizer(general, "".join(demo_world.all_characters(files)), tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert len(tokenizer) == script.VOCABULARY
    texts = ["\n".join(row["text"]) for row in rows_of({"qa": _whole_lines(files)}, "qa")]
    texts += [row["text"] for row in rows_of(files, "retrieval/corpus.jsonl")] + general[:500]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(original.is_byte(number) for number in ids)


def _whole_lines(files: dict[str, bytes]) -> bytes:
    """The question-answer file without the line that is planted broken."""
    lines = files["pretraining/train-qa.jsonl"].splitlines()
    return b"\n".join(line for line in lines if line.endswith(b"}"))
