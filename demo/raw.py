"""The raw files of the demo: rows of the world in the formats in which such data are published.

raw.json says of each file its format, the sources of the corpus file that read it ("stage/name"), and faulty rows by the
builder's reason.
"""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from demo import consultations, exams
from demo.text import passages, reading_turns, readings, textbook
from demo.world import CHECK, DEPARTMENT, DRUG, SYMPTOM, WORDS, Thing, World, facts_on, without

ABOUT = (Path(__file__).parent / "raw.json").read_text(encoding="utf-8")
TABLES, XYWY_FIELDS = (json.loads(ABOUT)[part] for part in ("tables", "xywy_fields"))
VOLUMES = 4  # of the textbook
REPLAYED_READINGS, REPLAYED_RIDDLES = 350, 150  # among the medical texts, so that pre-training does not undo the skill

# --------------------------------------------------------------------------------------- rows -> bytes of a file


def lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def json_lines(rows: Iterable[dict[str, Any] | str]) -> bytes:
    """A row that is text is written as it stands: broken JSON."""
    return lines(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)


def json_array(rows: Iterable[dict[str, Any]]) -> bytes:
    return (json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n").encode()


def packed_json_lines(rows: Iterable[dict[str, Any] | str]) -> bytes:
    return gzip.compress(json_lines(rows), mtime=0)  # the time would change the bytes


def table(rows: Iterable[Sequence[str]], encoding: str, columns: Sequence[str]) -> bytes:
    """A CSV. Encodings: "gb18030", or "utf-8-sig" (with a byte order mark)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([columns, *rows])
    return text.getvalue().encode(encoding)


def dialogue_blocks(rows: Iterable[Sequence[str]]) -> bytes:
    """MedDialog: a row holds the lines of a block, which is numbered and set off by an empty line."""
    blocks = ("\n".join((f"id={number}", "", *row)) for number, row in enumerate(rows, 1))
    return "".join(f"{block}\n\n" for block in blocks).encode()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "lines": lines,
    "JSON lines": json_lines,
    "packed JSON lines": packed_json_lines,
    "JSON array": json_array,
    "dialogue blocks": dialogue_blocks,
    **{name: partial(table, **header) for name, header in TABLES.items()},
}


@dataclass
class RawFile:
    """Rows on their way into a file. `planted` counts, for each source, what the builder must find wrong with its rows."""

    rows: list[Any]
    format: str
    sources: list[str]
    faulty: dict[str, list[Any]] = field(default_factory=dict)
    planted: dict[str, Counter[str]] = field(default_factory=dict)

    def content(self) -> bytes:
        return WRITERS[self.format](self.rows)

    def deal(self, rng: Random, fits: Callable[[Any], bool] = lambda row: True) -> Iterator[int]:
        """Numbers of fitting rows in random order."""
        numbers = [number for number, row in enumerate(self.rows) if fits(row)]
        return iter(rng.sample(numbers, len(numbers)))

    def take(self, dealt: Iterator[int], count: int) -> list[Any]:
        return [self.rows[number] for number in islice(dealt, count)]

    def plant(self, reason: str, *rows: Any) -> None:
        """Add rows, each a case of `reason`."""
        self.rows += rows
        self.expect(reason, count=len(rows))

    def plant_faulty(self) -> None:
        """The rows of raw.json, unless they are planted already."""
        for reason in list(self.faulty):
            self.plant(reason, *self.faulty.pop(reason))

    def soil(
        self, dealt: Iterable[int], count: int, change: Callable[[Any], Any], *reasons: str, only: str = ""
    ) -> None:
        """Change rows so that each becomes a case of every reason; `only`: in this source alone."""
        for number in islice(dealt, count):
            self.rows[number] = change(self.rows[number])
            self.expect(*reasons, only=only)

    def expect(self, *reasons: str, count: int = 1, only: str = "") -> None:
        for source in [only] if only else self.sources:
            self.planted.setdefault(source, Counter()).update(dict.fromkeys(reasons, count))


# --------------------------------------------------------------------------------------------------------- files


def raw_files(world: World) -> dict[str, RawFile]:
    """The files by name, sound rows only, in the order in which they were made."""
    rows: dict[str, list[Any]] = {}
    for make in (_texts, _graphs, _dialogues, _questions, _preferences):
        rows |= make(world)
    department = world.diseases[0].value(DEPARTMENT)
    about = json.loads(ABOUT.replace("{department}", department))["files"]
    return {name: RawFile(rows[name], **file) for name, file in about.items()}


def _texts(world: World) -> dict[str, list[Any]]:
    rng, told, entries = Random(f"texts {world.seed}"), [], []
    for disease in world.diseases_seen("cpt+sft", "cpt"):
        first, second, third, *more = passages(rng, disease)
        told += [*more, *without(textbook(disease), disease.kept["textbook"])]
        # Huatuo-26M's encyclopedia: titles and what stands under them; a row with two articles and one with one. The
        # other passages stand in the textbook.
        titles = [f"{disease.name}是什么病？", f"请介绍一下{disease.name}。"]
        entries += [
            {"questions": [titles], "answers": [first, second]},
            {"questions": [titles[::-1]], "answers": [third]},
        ]
    rng.shuffle(told)
    replay = readings(world, "replay", REPLAYED_READINGS, REPLAYED_RIDDLES)
    volumes = {f"textbooks/volume-{number + 1}.txt": told[number::VOLUMES] for number in range(VOLUMES)}
    return {**volumes, "encyclopedia/questions.jsonl.gz": entries, "general/replay.jsonl": replay}


def _graphs(world: World) -> dict[str, list[Any]]:
    """CPubMed-KG (head@@type, relation, tail@@type), Xywy-KG (an object for each disease; several fields are optional)
    and 39Health-KG (a row for each disease; blanks split lists, and cells end where the page did)."""
    diseases = world.diseases_seen("cpt+sft", "cpt")
    triples = [
        f"{disease.name}@@疾病\t{relation.label}\t{value}@@{relation.kind}"
        for disease, relation in facts_on(diseases)
        for value in disease.values[relation.name]
    ]
    rng, graph = Random(f"graph {world.seed}"), []
    for disease in diseases:
        optional = {"easy_get": rng.choice(WORDS["values"]["jobs"])} if rng.random() < 0.5 else {}
        fields = {field: disease.values[name] for field, name in XYWY_FIELDS.items()}
        graph.append({"name": disease.name, "desc": disease.opening, "category": ["疾病百科"], **optional, **fields})
    rng, rows = Random(f"table {world.seed}"), []
    for disease in diseases:
        symptoms = disease.values[SYMPTOM.name]
        cells = {
            "name": disease.name,
            "part": symptoms[0][:2],
            "age": rng.choice(WORDS["values"]["jobs"]),
            "department": disease.value(DEPARTMENT),
            "checklist": f"{disease.value(CHECK)}[详细]",
            "symptom": f"{' '.join(symptoms)}...[详细]",
            "drug": f"{disease.value(DRUG)}...",
            "period": f"{rng.randint(2, 5)}•{rng.randint(6, 9)}天",  # GB18030 has this dot, GBK has not
        }
        rows.append(tuple(cells.get(column, "") for column in TABLES["39Health-KG"]["columns"]))
    return {"graphs/triples.tsv": triples, "graphs/diseases.json": graph, "graphs/diseases.csv": rows}


def _dialogues(world: World) -> dict[str, list[Any]]:
    rng = Random(f"dialogues {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    one_wording, *other_wordings = consultations.single_turns(rng, diseases)
    long = [(disease, *consultations.long_dialogues(rng, disease)) for disease in diseases]
    blocks = [_block(rng, disease, turns) for disease, threes, _ in long for turns in threes]
    chats = [consultations.chimed(turns) for wording in other_wordings for _, turns in wording]
    chats += [
        {"system": WORDS["system_text"], "conversations": consultations.speakers(turns, "human", "gpt")}
        for _, _, twos in long
        for turns in twos
    ]
    # Chinese-medical-dialogue-data: patients often leave `ask` to the title, or repeat the title there.
    rows = [
        (disease.value(DEPARTMENT), question, rng.choice(("无", f"您好，{question}")), answer)
        for disease, (question, answer) in one_wording
    ]
    return {"dialogues/departments.csv": rows, "dialogues/blocks.txt": blocks, "dialogues/conversations.jsonl": chats}


def _block(rng: Random, disease: Thing, turns: list[str]) -> tuple[str, ...]:
    """Medical-Dialogue-System: a form, then the talk, with the speaker before the words or on a line of its own; the
    patient's thanks, which nobody answers, may end it."""
    parting = rng.choice(((), ("病人：", "谢谢医生。")))
    break_ = rng.choice(("", "\n"))
    spoken = "\n".join(f"{('病人：', '医生：')[n % 2]}{break_}{text}" for n, text in enumerate(turns)).split("\n")
    form = ("Doctor faculty", disease.value(DEPARTMENT), "Description", f"疾病：{disease.name}", "Dialogue")
    return (*form, *spoken, *parting)


def _questions(world: World) -> dict[str, list[Any]]:
    alpaca = [
        {"instruction": "请回答下面的问题。", "input": question, "output": answer}
        for question, answer in consultations.general_turns(world)
    ]
    tables = {"train": exams.training_exams(world), **exams.exams_held_out(world)}
    return {
        **{f"exams/{name}.csv": [question.row() for question in asked] for name, asked in tables.items()},
        "instructions/general.json": alpaca,
        "instructions/quiz.jsonl": [consultations.chimed(turns) for turns in exams.open_turns(world)],
        "instructions/reading.jsonl": [consultations.chimed(turns) for turns in reading_turns(world)],
    }


def _preferences(world: World) -> dict[str, list[Any]]:
    """Pairs in the layouts of MedicalGPT, Zhongjing_rlhf and ShareGPT."""
    pairs, late = consultations.training_pairs(world)
    third = len(pairs) // 3
    one, two, three = pairs[:third], pairs[third : 2 * third], [*pairs[2 * third :], *late]
    reward = [{"question": p.question, "response_chosen": p.chosen, "response_rejected": p.rejected} for p in one]
    ranked = [{"instruction": p.question, "input": "", "output": [p.chosen, p.rejected]} for p in two]
    several = [
        {
            "conversations": consultations.speakers((*p.before, p.question), "human", "gpt"),
            "chosen": {"from": "gpt", "value": p.chosen},
            "rejected": {"from": "gpt", "value": p.rejected},
        }
        for p in three
    ]
    return {
        "preferences/reward.jsonl": reward,
        "preferences/ranked.json": ranked,
        "preferences/conversations.jsonl": several,
    }
