"""Whole builds, as the command makes them: every row accounted for, the same bytes however often it is interrupted."""

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shared_corpus import shared_corpus

from qilin_med.config.corpus import RawSource, load_corpus_settings
from qilin_med.data.card import type_and_paper
from qilin_med.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = [chr(0x4E00 + index) for index in range(1500)]


def sentence(rng: random.Random, length: int = 40) -> str:
    return "".join(rng.choices(CHARACTERS, k=length)) + "。"


def command(corpus: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/build_chimed.py"), str(corpus), *arguments]


def build(corpus: Path, *arguments: str, code: int = 0) -> str:
    run = subprocess.run(command(corpus, *arguments), capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


def contents(folder: Path) -> dict[str, bytes | dict]:
    """All files of a build; of the manifest all but when and at which commit it was written, and its sha256."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    about = json.loads(files["manifest.json"])
    return {**files, "manifest.json": {key: about[key] for key in about.keys() - {"created", "commit", "digest"}}}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def by_name(folder: Path) -> dict[str, dict]:
    return {f"{s['stage']}/{s['name']}": s for s in manifest(folder)["sources"]}


def assert_nothing_is_missing(sources: dict[str, dict]) -> None:
    for name, source in sources.items():
        assert source["rows"] == source["rows_used"] + sum(source["rows_skipped"].values()), name
        assert source["records"] == source["kept"] + sum(source["rejected"].values()), name
        assert source["kept"] == source["train"] + source["dev"] + sum(source["duplicates"].values()), name


def rows(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob(pattern)) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, small_tokenizer) -> Path:
    """Three sources of each stage's kind with planted faults, and an exam to keep out."""
    folder = tmp_path_factory.mktemp("corpus")
    small_tokenizer.save_pretrained(folder / "tokenizer")
    rng = random.Random(5)
    texts = ["".join(sentence(rng) for _ in range(4)) for _ in range(60)]
    passage = "".join(sentence(rng) for _ in range(5))
    shared = [passage + "".join(sentence(rng) for _ in range(4)) for _ in range(2)]
    articles = [*texts, texts[0], texts[1].replace("。", "！", 1), "短", f"<p>{sentence(rng)}</p>电话13800138000",
                f"坏字\ufffd{sentence(rng)}", *shared]  # fmt: skip
    (folder / "articles.txt").write_text("\n".join(articles) + "\n", encoding="utf-8")
    questions = [(sentence(rng, 20), [sentence(rng, 3) for _ in range(5)], rng.choice("ABCDE")) for _ in range(12)]
    for name, chosen in (("train", questions[:8]), ("test", questions[8:])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Question", "Options", "Answer", "Explanation"])
            for stem, options, letter in chosen:
                listed = "\n".join(f"{a} {b}" for a, b in zip("ABCDE", options, strict=True))
                writer.writerow([stem, listed, letter, sentence(rng)])
    leaked = questions[9]
    chats = [{"instruction": sentence(rng, 15), "input": "", "output": sentence(rng)} for _ in range(30)]
    lettered = "\n".join(f"{a}. {b}" for a, b in zip("ABCDE", leaked[1], strict=True))
    for options in ("".join(leaked[1]), lettered):
        chats.append({"instruction": "请回答：" + leaked[0] + options, "input": "", "output": leaked[2]})
    chats.append({"instruction": "没有回答", "input": ""})
    lines = [json.dumps(row, ensure_ascii=False) for row in chats] + ['{"instruction": "没有写完']
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = [{"question": sentence(rng, 15), "response_chosen": sentence(rng), "response_rejected": sentence(rng)}
             for _ in range(20)]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps([*pairs, pairs[0]], ensure_ascii=False), encoding="utf-8")

    def source(stage: str, name: str, kind: str, path: str) -> dict:
        return {"stage": stage, "name": name, "kind": kind, "paths": [str(folder / path)], "licence": "CC0"}

    settings = {
        "name": "small",
        "output_dir": str(folder / "processed"),
        "tokenizer": str(folder / "tokenizer"),
        "dev_share": 0.1,
        "sources": [
            source("sft", "chats", "chat", "chats.jsonl"),
            source("pretraining", "articles", "text", "articles.txt"),
            source("pretraining", "exam", "exam", "train.csv"),
            source("sft", "exam", "exam", "train.csv"),
            source("dpo", "pairs", "preference", "pairs.json"),
        ],
        "decontamination": {"files": [{"name": "test", "kind": "exam", "paths": [str(folder / "test.csv")]}]},
    }
    (folder / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "corpus.json"


@pytest.fixture(scope="module")
def built(corpus) -> Path:
    assert "built" in build(corpus)
    return corpus.parent / "processed"


def test_every_row_is_accounted_for(built):
    sources = by_name(built)
    articles, chats = sources["pretraining/articles"], sources["sft/chats"]
    assert (articles["rows"], articles["rows_used"], articles["records"]) == (67, 67, 67)
    assert articles["rejected"] == {"replacement characters (U+FFFD)": 1, "too short": 1}
    assert articles["duplicates"] == {"exact duplicate": 1, "near-duplicate": 1}
    assert articles["cut"] == 1
    assert articles["changed"] == {"HTML": 1, "phone number": 1, "white space": 1}
    assert articles["train"] + articles["dev"] == 67 - 2 - 2
    assert chats["rows"] == 34 and sum(chats["rows_skipped"].values()) == 2
    assert chats["rejected"] == {"repeats a question of test": 2}
    assert sources["dpo/pairs"]["duplicates"] == {"exact duplicate": 1}
    assert sources["pretraining/exam"]["train"] + sources["pretraining/exam"]["dev"] == 8
    assert manifest(built)["evaluation"][0]["records_removed"] == 2
    assert_nothing_is_missing(sources)


def test_rows_that_went_or_changed_are_kept_apart(built):
    apart = rows(built, "skipped/*.jsonl") + rows(built, "rejected/*.jsonl")
    lost = sum(s["rows"] - s["rows_used"] + s["records"] - s["train"] - s["dev"] for s in by_name(built).values())
    assert len(apart) == lost and all(row["reason"] and row["place"] for row in apart)
    [masked] = [row for row in rows(built, "changed/*.jsonl") if "phone number" in row["rules"]]
    assert "13800138000" in masked["before"]["text"] and "13800138000" not in masked["after"]["text"]


def test_the_sets_hold_what_the_manifest_says(built):
    for name, source in by_name(built).items():
        for split in ("train", "dev"):
            files = rows(built, f"{source['stage']}/{split}-*.jsonl")
            assert sum(row["source"] == source["name"] for row in files) == source[split], name
    prompt = rows(built, "sft/*.jsonl")
    assert any(row["source"] == "exam" and "返回限制" in row["conversations"][0]["value"] for row in prompt)


def test_the_tables_are_the_papers(built):
    readme = (built / "README.md").read_text()
    assert "## Table 1: continued pre-training" in readme and "| type | dataset | samples | tokens | MB |" in readme
    tables = [block.splitlines() for block in readme.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table[0]


@pytest.mark.parametrize(("multi_turn", "type_"), [(None, "single"), (True, "multi"), (False, "single")])
def test_the_corpus_file_may_say_which_row_a_source_counts_in(multi_turn, type_):
    asked = RawSource(stage="sft", name="x", kind="chat", paths=["x"], licence="CC0", multi_turn=multi_turn)
    source = {"stage": "sft", "name": "x", "kind": "chat", "several_turns": 1, "train": 9, "dev": 1}
    assert type_and_paper(asked, source)["type"] == type_


def test_a_second_build_gives_the_same_bytes(corpus, built):
    assert "already" in build(corpus)
    again = corpus.parent / "again"
    build(corpus, f"output_dir={again}", "executor.workers=1")
    first, second = contents(built), contents(again)
    assert first == second


def test_exam_questions_are_whole_or_not_there(corpus, tmp_path):
    """Two stems over the same options and explanation are two questions; a copy without an option is none of its own."""
    rng, options = random.Random(5), ["阿司匹林", "青霉素", "地西泮", "胰岛素", "华法林"]
    shared = "".join(sentence(rng) for _ in range(6))
    stems = [f"关于第{number}类药物的叙述，下列各项中最恰当的是" for number in "一二三"]

    def exam(name: str, *questions: tuple[str, list[str], str]) -> dict:
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(["Question", "Options", "Answer", "Explanation"])
            for stem, texts, letter in questions:
                listed = "\n".join(f"{a} {b}" for a, b in zip("ABCDE", texts, strict=False))
                csv.writer(file).writerow([stem, listed, letter, shared])
        return {
            "stage": "pretraining",
            "name": name,
            "kind": "exam",
            "paths": [str(tmp_path / f"{name}.csv")],
            "licence": "x",
        }

    (tmp_path / "books.txt").write_text(f"{sentence(rng)}{shared}{sentence(rng)}\n", encoding="utf-8")
    books = {
        "stage": "pretraining",
        "name": "books",
        "kind": "text",
        "paths": [str(tmp_path / "books.txt")],
        "licence": "x",
    }
    settings = json.loads(corpus.read_text()) | {
        "output_dir": str(tmp_path / "processed"), "dev_share": 0, "decontamination": {},
        "sources": [
            books,
            exam("five", (stems[0], options, "A"), (stems[1], options, "A"), (stems[2], options, "B")),
            exam("four", (stems[0], options[:4], "A"), (stems[1], options[:4], "B")),
        ],
    }  # fmt: skip
    (tmp_path / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    build(tmp_path / "corpus.json")
    five, four, text = (by_name(tmp_path / "processed")[f"pretraining/{name}"] for name in ("five", "four", "books"))
    assert (five["train"], five["duplicates"], four["train"], four["duplicates"]) == (3, {}, 1, {"near-duplicate": 1})
    assert five["cut"] == four["cut"] == text["cut"] == 0
    kept = [
        row["text"].split("\n")
        for row in rows(tmp_path / "processed", "pretraining/train-*")
        if row["source"] != "books"
    ]
    assert all(len(lines) == (7 if "E 华法林" in lines else 6) + 1 and lines[-1] == f"解释：{shared}" for lines in kept)
    # The passage is cut out of a text that stands behind the exams, unless that source says otherwise.
    settings["sources"] = [*settings["sources"][1:], books]
    for own, cut in ({}, 1), ({"substring_tokens": 5000}, 0), ({"substrings": False}, 0):
        books["deduplication"] = own
        (tmp_path / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
        build(tmp_path / "corpus.json", "--restart")
        assert by_name(tmp_path / "processed")["pretraining/books"]["cut"] == cut


def test_rules_and_thresholds_may_differ_by_source(corpus, tmp_path):
    settings = json.loads(corpus.read_text()) | {"output_dir": str(tmp_path / "processed")}
    articles = next(source for source in settings["sources"] if source["name"] == "articles")
    articles |= {"cleaning": {"min_characters": 1}, "deduplication": {"threshold": 1.0}}
    (tmp_path / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    build(tmp_path / "corpus.json")
    found = by_name(tmp_path / "processed")["pretraining/articles"]
    assert found["rejected"] == {"replacement characters (U+FFFD)": 1}  # the corpus's other rules still hold
    # Its near copy is no duplicate any more, and loses the passages instead.
    assert found["duplicates"] == {
        "exact duplicate": 1,
        "nothing left without the passages that other documents have": 1,
    }
    articles["deduplication"] = {"substring_tokens": 10}
    (tmp_path / "corpus.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"'articles': .* is 10, fewer than the corpus's 50"):
        load_corpus_settings(tmp_path / "corpus.json")


SMALL_SHARDS = """
import sys
from qilin_med.config.corpus import load_corpus_settings
from qilin_med.data.build import build
settings = load_corpus_settings(sys.argv[1], sys.argv[2:])
build(settings.model_copy(update={"shard_megabytes": 0.002}))
"""


def test_the_sets_do_not_depend_on_how_files_are_cut(corpus, built, tmp_path):
    """The same files in shards of 2 KB; packed, where they cannot be cut and one task writes all shards of a file."""

    def ids(folder: Path) -> dict[str, list]:
        sets = (f"{stage}/{split}" for stage in ("pretraining", "sft", "dpo") for split in ("train", "dev"))
        return {name: [(row["source"], row["id"]) for row in rows(folder, f"{name}-*.jsonl")] for name in sets}

    settings = json.loads(corpus.read_text())
    for source in settings["sources"]:
        [path] = map(Path, source["paths"])
        source["paths"] = [str(tmp_path / f"{path.name}.gz")]
        Path(source["paths"][0]).write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "packed.json").write_text(json.dumps(settings))
    for file, name in ((corpus, "cut"), (tmp_path / "packed.json", "packed")):
        target = tmp_path / name
        subprocess.run([sys.executable, "-c", SMALL_SHARDS, str(file), f"output_dir={target}"], cwd=ROOT, check=True)
        assert len(list(target.glob("pretraining/train-*"))) > 8
        assert ids(target) == ids(built)
        assert (target / "README.md").read_text() == (built / "README.md").read_text()
    places = [row["place"] for row in rows(tmp_path / "cut", "*/*.jsonl")]
    assert sorted(places) == sorted(row["place"] for row in rows(built, "*/*.jsonl"))


def test_a_killed_build_continues_to_the_same_bytes(corpus, built):
    target = corpus.parent / "killed"
    rng = random.Random(os.getpid())
    for _ in range(3):
        process = subprocess.Popen(
            command(corpus, f"output_dir={target}"), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(1.5, 4))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    build(corpus, f"output_dir={target}")
    assert contents(target) == contents(built)
    assert not target.with_name("killed.work").exists()


def test_parquet_holds_the_same_records(corpus, built):
    target = corpus.parent / "parquet"
    build(corpus, f"output_dir={target}", "format=parquet")
    for stage in ("pretraining", "sft", "dpo"):
        table = [row for file in sorted(target.glob(f"{stage}/train-*")) for row in pq.read_table(file).to_pylist()]
        found = [{name: value for name, value in row.items() if value is not None} for row in table]
        assert found == rows(built, f"{stage}/train-*.jsonl")


def test_a_chain_of_slurm_jobs_gives_the_same_bytes(corpus, tmp_path):
    """Slurm's commands played by shell scripts: sbatch runs every index of the array at once."""
    scripts = {
        "sbatch": '''cp "${@: -1}" "$0.job"; last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$0.job")
export SLURM_NODELIST=localhost RUN_OFFSET=0
for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i bash "$0.job" >"$0.log" 2>&1 || exit 1; done
echo "Submitted batch job 7"''',
        "scontrol": "echo localhost",
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done; exec "$@"',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    settings = json.loads(corpus.read_text())
    settings["sources"] = settings["sources"][:1]
    settings["deduplication"] = {"near": False}
    (tmp_path / "corpus.json").write_text(json.dumps(settings))
    options = ["executor.kind=slurm", 'executor.options={"partition": "cpu", "time": "1:00:00"}']
    for overrides, path in (([], ""), (options, f"{tmp_path}:")):
        target = f"output_dir={tmp_path / ('slurm' if overrides else 'local')}"
        environment = {**os.environ, "PATH": path + os.environ["PATH"]}
        arguments = command(tmp_path / "corpus.json", target, *overrides)
        run = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local") != {}


def test_stripes_share_and_limit(corpus, tmp_path):
    settings = json.loads(corpus.read_text())
    settings["output_dir"] = str(tmp_path / "out")
    articles = settings["sources"][1]
    settings["sources"] = [articles | {"limit": 50}, articles | {"name": "half", "share": 0.5}]
    (tmp_path / "corpus.json").write_text(json.dumps(settings))
    build(tmp_path / "corpus.json", "deduplication.near=false", "deduplication.substring_tokens=null")
    sources = by_name(tmp_path / "out")
    assert sources["pretraining/articles"]["rows"] == 50
    half = sources["pretraining/half"]
    assert half["rows"] == 67 and 20 < half["rejected"]["not drawn"] < 47


def test_user_errors_are_one_line(corpus, built, tmp_path):
    settings = json.loads(corpus.read_text())
    (tmp_path / "tokenizer").symlink_to(corpus.parent / "tokenizer")

    def refused(*words: str, arguments: tuple[str, ...] = (), **changes: object) -> None:
        path = tmp_path / "corpus.json"
        path.write_text(json.dumps(settings | changes))
        said = build(path, *arguments, code=2).strip()
        assert said.startswith("error: ") and "\n" not in said, said
        assert all(word in said for word in words), said

    source = settings["sources"][0]
    refused("other files or settings", "settings.dev_share: 0.1 -> 0.2", "--restart", dev_share=0.2)
    refused("nowhere.jsonl", "--allow-missing", sources=[source, source | {"name": "b", "paths": ["nowhere.jsonl"]}])
    refused("39health_kg", sources=[source | {"kind": "39health"}])
    refused("did you mean 'licence'", sources=[source | {"license": "MIT"}])
    refused("tokenizer.json", "convert_baichuan", tokenizer="nowhere")
    refused("sources of sft are named 'chats'", sources=[source, source])
    held_out = settings["decontamination"]["files"]
    refused("files of decontamination are named 'test'", decontamination={"files": held_out * 2})
    refused(
        "nothing to build",
        arguments=("--allow-missing",),
        decontamination={},
        sources=[source | {"paths": ["nowhere.jsonl"]}],
    )
    refused("partition", executor={"kind": "slurm"}, output_dir=str(tmp_path / "new"))
    refused("'tasks'", executor={"options": {"tasks": 1}}, output_dir=str(tmp_path / "new"))
    assert contents(built)


def test_missing_paths_may_be_allowed(corpus, tmp_path):
    settings = json.loads(corpus.read_text())
    settings["output_dir"] = str(tmp_path / "out")
    settings["sources"][0]["paths"] = ["nowhere.jsonl"]
    (tmp_path / "corpus.json").write_text(json.dumps(settings))
    build(tmp_path / "corpus.json", "--allow-missing")
    assert by_name(tmp_path / "out")["sft/chats"]["rows"] == 0


def test_inspection_shows_what_is_trained(corpus, built):
    shown = build(corpus, "--inspect", "1")
    chat = rows(built, "sft/train-*.jsonl")[0]["conversations"][1]["value"]
    assert f"⟦{chat[:10]}" in shown.replace("⟦ ", "⟦") and "[rejected]" in shown


# -------------------------------------------------------------------------------------------------- published files


@pytest.fixture(scope="module")
def published(shared, small_tokenizer, tmp_path_factory) -> Path:
    """A build of every public file that a reader fits."""
    folder = tmp_path_factory.mktemp("published")
    small_tokenizer.save_pretrained(folder / "tokenizer")
    settings = shared_corpus(shared, folder / "tokenizer", folder / "processed")
    (folder / "corpus.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    build(folder / "corpus.json")
    return folder / "processed"


def test_published_rows_are_accounted_for(published):
    sources = by_name(published)
    # As the files' own descriptions count them.
    rows_of = {
        "pretraining/39Health-KG": 14336, "pretraining/Chinese-medical-dialogue-data": 7644,
        "pretraining/Huatuo-26M encyclopedias": 6000, "pretraining/Xywy-KG": 318, "pretraining/CMExam": 606 + 9,
        "sft/CMExam-explanation": 598, "sft/Train_1M_CN": 2000, "dpo/MedicalGPT": 598, "dpo/general": 316,
    }  # fmt: skip
    assert {name: sources[name]["rows"] for name in rows_of} == rows_of
    assert_nothing_is_missing(sources)
    assert sources["pretraining/Chinese-medical-dialogue-data"]["duplicates"]["exact duplicate"] == 378


def test_no_published_test_question_gets_through(published):
    sources = by_name(published)
    for name in ("pretraining/CMExam", "sft/CMExam-explanation"):  # samples of the test split
        assert sources[name]["train"] + sources[name]["dev"] == 0
    huatuo = sources["pretraining/Huatuo-26M encyclopedias"]  # the test set itself
    assert huatuo["rejected"]["repeats a question of Huatuo-26M test"] > 5980
    shared_questions = {e["name"]: e["shared"] for e in manifest(published)["evaluation"]}
    # 54 are equal to the letter; one is in a row without an answer, four differ in punctuation.
    assert shared_questions["CMExam test"]["CMExam val"] == {"stems": 57, "with the same options": 11}
