"""The raw files of the demo: rows of the world in the formats in which such data are published."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from demo import consultations, exams
from demo.text import general_replay, passages, reading_turns, textbook
from demo.world import AVOID, CHECK, DEPARTMENT, DRUG, EAT, SYMPTOM, WORDS, Thing, World, facts_on, without

VOLUMES = 4  # of the textbook
TYPES = {"symptom": "症状", "drug": "药物", "department": "科室", "check": "检查", "eat": "食物", "avoid": "食物"}
XYWY = {"symptom": SYMPTOM, "cure_department": DEPARTMENT, "check": CHECK, "recommand_drug": DRUG, "do_eat": EAT,
        "not_eat": AVOID}  # fmt: skip
HEALTH39 = ("name", "alias", "part", "age", "infection", "insurance", "department", "checklist", "symptom",
            "complication", "treatment", "drug", "period", "rate", "money", "", "", "", "", "")  # fmt: skip

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


def table(encoding: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """A CSV. Encodings: "gb18030", or "utf-8-sig" (with a byte order mark)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([columns, *rows])
    return text.getvalue().encode(encoding)


def dialogue_blocks(rows: Iterable[Sequence[str]]) -> bytes:
    """MedDialog: a row holds the lines of a block, which is numbered and set off by an empty line."""
    blocks = ("\n".join((f"id={number}", "", *row)) for number, row in enumerate(rows, 1))
    return "".join(f"{block}\n\n" for block in blocks).encode()


@dataclass
class RawFile:
    """Rows on their way into a file. `planted` counts, for each source of the corpus file that reads it ("stage/name"),
    what the builder must find wrong with its rows."""

    write: Callable[[list[Any]], bytes]
    rows: list[Any]
    sources: tuple[str, ...]
    planted: dict[str, Counter[str]] = field(default_factory=dict)

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
    validation, test = exams.exams_held_out(world)
    held_out = {"val": validation, "test": test, "unseen": exams.exams_unseen(world)}
    exam_table, exam_sources = partial(table, "utf-8-sig", exams.COLUMNS), ("pretraining/exam", "sft/exam-explanations")
    files = _texts(world) | _graphs(world) | _dialogues(world)
    files["exams/train.csv"] = RawFile(exam_table, [exam.row() for exam in exams.training_exams(world)], exam_sources)
    for name, questions in held_out.items():
        files[f"exams/{name}.csv"] = RawFile(exam_table, [exam.row() for exam in questions], ())
    alpaca = [
        {"instruction": "请回答下面的问题。", "input": question, "output": answer}
        for question, answer in consultations.general_turns(world)
    ]
    quiz = [consultations.chimed(turns) for turns in exams.open_turns(world)]
    reading = [consultations.chimed(turns) for turns in reading_turns(world)]
    files["instructions/general.json"] = RawFile(json_array, alpaca, ("sft/instructions",))
    files["instructions/quiz.jsonl"] = RawFile(json_lines, quiz, ("sft/quiz",))
    files["instructions/reading.jsonl"] = RawFile(json_lines, reading, ("sft/reading",))
    return files | _preferences(world)


def _texts(world: World) -> dict[str, RawFile]:
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
    volumes = {
        f"textbooks/volume-{number + 1}.txt": RawFile(lines, told[number::VOLUMES], ("pretraining/textbooks",))
        for number in range(VOLUMES)
    }
    return volumes | {
        "encyclopedia/questions.jsonl.gz": RawFile(packed_json_lines, entries, ("pretraining/encyclopedia",)),
        "general/replay.jsonl": RawFile(json_lines, general_replay(world), ("pretraining/general",)),
    }


def _graphs(world: World) -> dict[str, RawFile]:
    """CPubMed-KG (head@@type, relation, tail@@type), Xywy-KG (an object for each disease; several fields are optional)
    and 39Health-KG (a row for each disease; blanks split lists, and cells end where the page did)."""
    diseases = world.diseases_seen("cpt+sft", "cpt")
    triples = [
        f"{disease.name}@@疾病\t{relation.label}\t{value}@@{TYPES[relation.name]}"
        for disease, relation in facts_on(diseases)
        for value in disease.values[relation.name]
    ]
    rng, graph = Random(f"graph {world.seed}"), []
    for disease in diseases:
        optional = {"easy_get": rng.choice(WORDS["values"]["jobs"])} if rng.random() < 0.5 else {}
        fields = {field: disease.values[relation.name] for field, relation in XYWY.items()}
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
        rows.append(tuple(cells.get(column, "") for column in HEALTH39))
    return {
        "graphs/triples.tsv": RawFile(lines, triples, ("pretraining/triples",)),
        "graphs/diseases.json": RawFile(json_lines, graph, ("pretraining/disease-graph",)),
        "graphs/diseases.csv": RawFile(partial(table, "gb18030", HEALTH39), rows, ("pretraining/disease-table",)),
    }


def _dialogues(world: World) -> dict[str, RawFile]:
    rng = Random(f"dialogues {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    one_wording, *other_wordings = consultations.single_turns(rng, diseases)
    long = [(disease, *consultations.long_dialogues(rng, disease)) for disease in diseases]
    blocks = [_block(rng, disease, turns) for disease, threes, _ in long for turns in threes]
    chats = [consultations.chimed(turns) for wording in other_wordings for _, turns in wording]
    chats += [
        {"system": consultations.SYSTEM_TEXT, "conversations": consultations.speakers(turns, "human", "gpt")}
        for _, _, twos in long
        for turns in twos
    ]
    # Chinese-medical-dialogue-data: patients often leave `ask` to the title, or repeat the title there.
    rows = [
        (disease.value(DEPARTMENT), question, rng.choice(("无", f"您好，{question}")), answer)
        for disease, (question, answer) in one_wording
    ]
    department_table = partial(table, "gb18030", ("department", "title", "ask", "answer"))
    department_sources = ("pretraining/department-qa", "sft/department-qa")
    return {
        "dialogues/departments.csv": RawFile(department_table, rows, department_sources),
        "dialogues/blocks.txt": RawFile(dialogue_blocks, blocks, ("pretraining/dialogues", "sft/dialogues")),
        "dialogues/conversations.jsonl": RawFile(json_lines, chats, ("sft/conversations",)),
    }


def _block(rng: Random, disease: Thing, turns: list[str]) -> tuple[str, ...]:
    """Medical-Dialogue-System: a form, then the talk, with the speaker before the words or on a line of its own; the
    patient's thanks, which nobody answers, may end it."""
    parting = rng.choice(((), ("病人：", "谢谢医生。")))
    break_ = rng.choice(("", "\n"))
    spoken = "\n".join(f"{('病人：', '医生：')[n % 2]}{break_}{text}" for n, text in enumerate(turns)).split("\n")
    form = ("Doctor faculty", disease.value(DEPARTMENT), "Description", f"疾病：{disease.name}", "Dialogue")
    return (*form, *spoken, *parting)


def _preferences(world: World) -> dict[str, RawFile]:
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
        "preferences/reward.jsonl": RawFile(json_lines, reward, ("dpo/reward",)),
        "preferences/ranked.json": RawFile(json_array, ranked, ("dpo/ranked",)),
        "preferences/conversations.jsonl": RawFile(json_lines, several, ("dpo/several-turns",)),
    }
