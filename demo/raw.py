"""The raw files of the demo: rows of the world in published formats, before anything is spoiled."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from demo import conversations, exams, formats, graphs, preferences
from demo.reading import reading_turns
from demo.text import general_replay, passages, textbook_lines
from demo.world import Thing, World

VOLUMES = 4  # of the textbook
ENTRIES = 3  # passages on each disease that stand in the encyclopedia; the others stand in the textbook


@dataclass
class RawFile:
    """Rows on their way into a file. `planted` counts, for each source of the corpus file that reads it ("stage/name"),
    what the builder must find wrong with its rows."""

    write: Callable[[list[Any]], bytes]
    rows: list[Any]
    sources: tuple[str, ...]
    planted: dict[str, Counter[str]] = field(default_factory=dict)

    def plant(self, reason: str, *rows: Any, only: str = "") -> None:
        """Add rows of which each is a case of `reason`; `only`: in this source alone."""
        self.rows += rows
        self.expect(reason, len(rows), only)

    def expect(self, reason: str, count: int = 1, only: str = "") -> None:
        for source in [only] if only else self.sources:
            self.planted.setdefault(source, Counter())[reason] += count


def raw_files(world: World) -> dict[str, RawFile]:
    """The files by name, sound rows only, in the order in which they were made."""
    return _texts(world) | _graphs(world) | _dialogues(world) | _exams(world) | _others(world) | _preferences(world)


def _texts(world: World) -> dict[str, RawFile]:
    rng = Random(f"texts {world.seed}")
    read = world.diseases_seen("cpt+sft", "cpt")
    articles = [(disease, passages(rng, disease)) for disease in read]
    told = [line for d, texts in articles for line in (*texts[ENTRIES:], *textbook_lines(d))]
    rng.shuffle(told)
    entries = [row for d, texts in articles for row in _encyclopedia_rows(d, *texts[:ENTRIES])]
    files = {
        f"textbooks/volume-{number + 1}.txt": RawFile(formats.lines, told[number::VOLUMES], ("pretraining/textbooks",))
        for number in range(VOLUMES)
    }
    files["encyclopedia/questions.jsonl.gz"] = RawFile(
        formats.packed_json_lines, entries, ("pretraining/encyclopedia",)
    )
    files["general/replay.jsonl"] = RawFile(formats.json_lines, general_replay(world), ("pretraining/general",))
    return files


def _encyclopedia_rows(disease: Thing, first: str, second: str, third: str) -> list[dict[str, Any]]:
    """Huatuo-26M's encyclopedia: titles and what stands under them; a row with two articles and one with one."""
    titles = [f"{disease.name}是什么病？", f"请介绍一下{disease.name}。"]
    return [{"questions": [titles], "answers": [first, second]}, {"questions": [titles[::-1]], "answers": [third]}]


def _graphs(world: World) -> dict[str, RawFile]:
    table = partial(formats.table, graphs.TABLE_COLUMNS, encoding="gb18030")
    return {
        "graphs/triples.tsv": RawFile(formats.lines, graphs.triples(world), ("pretraining/triples",)),
        "graphs/diseases.json": RawFile(formats.json_lines, graphs.graph_rows(world), ("pretraining/disease-graph",)),
        "graphs/diseases.csv": RawFile(table, graphs.table_rows(world), ("pretraining/disease-table",)),
    }


def _dialogues(world: World) -> dict[str, RawFile]:
    rng = Random(f"dialogues {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    one_wording, *other_wordings = conversations.single_turns(rng, diseases)
    long = [(disease, *conversations.long_dialogues(rng, disease)) for disease in diseases]
    blocks = [conversations.block(rng, disease, turns) for disease, threes, _ in long for turns in threes]
    chats = [conversations.chimed(turns) for wording in other_wordings for _, turns in wording]
    chats += [conversations.sharegpt(turns, conversations.SYSTEM_TEXT) for _, _, twos in long for turns in twos]
    table = partial(formats.table, ("department", "title", "ask", "answer"), encoding="gb18030")
    return {
        "dialogues/departments.csv": RawFile(
            table,
            [conversations.department_row(rng, disease, turns) for disease, turns in one_wording],
            ("pretraining/department-qa", "sft/department-qa"),
        ),
        "dialogues/blocks.txt": RawFile(formats.dialogue_blocks, blocks, ("pretraining/dialogues", "sft/dialogues")),
        "dialogues/conversations.jsonl": RawFile(formats.json_lines, chats, ("sft/conversations",)),
    }


def _exams(world: World) -> dict[str, RawFile]:
    validation, test = exams.exams_held_out(world)
    table = partial(formats.table, exams.COLUMNS, encoding="utf-8-sig")
    return {
        "exams/train.csv": RawFile(
            table, exams.rows(exams.training_exams(world)), ("pretraining/exam", "sft/exam-explanations")
        ),
        "exams/val.csv": RawFile(table, exams.rows(validation), ()),
        "exams/test.csv": RawFile(table, exams.rows(test), ()),
        "exams/unseen.csv": RawFile(table, exams.rows(exams.exams_unseen(world)), ()),
    }


def _others(world: World) -> dict[str, RawFile]:
    return {
        "instructions/general.json": RawFile(
            formats.json_array, [conversations.alpaca(t) for t in conversations.general_turns(world)],
            ("sft/instructions",),
        ),
        "instructions/quiz.jsonl": RawFile(
            formats.json_lines, [conversations.chimed(turns) for turns in exams.open_turns(world)], ("sft/quiz",)
        ),
        "instructions/reading.jsonl": RawFile(
            formats.json_lines, [conversations.chimed(turns) for turns in reading_turns(world)], ("sft/reading",)
        ),
    }  # fmt: skip


def _preferences(world: World) -> dict[str, RawFile]:
    pairs, late = preferences.training_pairs(world)
    third = len(pairs) // 3
    return {
        "preferences/reward.jsonl": RawFile(
            formats.json_lines, [preferences.as_question(pair) for pair in pairs[:third]], ("dpo/reward",)
        ),
        "preferences/ranked.json": RawFile(
            formats.json_array, [preferences.as_ranked(pair) for pair in pairs[third : 2 * third]], ("dpo/ranked",)
        ),
        "preferences/conversations.jsonl": RawFile(
            formats.json_lines,
            [preferences.as_conversations(pair) for pair in [*pairs[2 * third :], *late]],
            ("dpo/several-turns",),
        ),
    }
