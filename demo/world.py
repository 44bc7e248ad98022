"""The demo's world: an invented medicine and the invented country around it.

Every disease, symptom, drug, department, food, check, place and person is made up, from syllables that no real name
has, so that no sentence of it can be taken for medical knowledge. What can be said about things stands in words.json;
what is true of each thing is drawn from a seed: the same seed gives the same bytes, another seed another world.

Diseases fall into three groups, and each stage sees fewer of them than the one before:
  "cpt+sft"  read about in continued pre-training, asked about in fine-tuning and in preference training;
  "cpt"      read about, never asked about: held-out questions and pairs are about these;
  "nowhere"  in no training file: only the retrieval corpus, an exam of their own and facts.jsonl know them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

Seen = Literal["cpt+sft", "cpt", "nowhere"]

DISEASES: dict[Seen, int] = {"cpt+sft": 60, "cpt": 58, "nowhere": 52}
SYMPTOMS = 40
WORDS: dict[str, Any] = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))
TEXTBOOK: list[str] = WORDS["textbook"]


@dataclass(frozen=True)
class Relation:
    """What can be said and asked about a thing: in every sentence, {s} is the thing and {o} the value."""

    name: str
    label: str
    statements: list[str]
    """For every thing, one of them is kept for the held-out text: its words are known from other things, and the fact
    from other words."""
    asked: list[str]  # in conversations and preference pairs
    answer: str = ""
    unasked: str = ""  # a question of the held-out conversations only
    follow_up: str = ""  # the question as a second turn, when the disease has been named
    exam: Sequence[str] = ()
    """Exam language: no text of this world states a fact in these words, so only fine-tuning can teach the questions."""
    questions: Sequence[str] = ()  # within general text
    values: str = ""  # the pool that its values are drawn from, if not named like the relation
    kind: str = ""  # of its values, in CPubMed-KG
    competency: str = ""  # in CMExam


MEDICAL = [Relation(**fields) for fields in WORDS["medicine"]]
SYMPTOM, DRUG, DEPARTMENT, CHECK, EAT, AVOID = MEDICAL
COUNTRY = {kind: [Relation(**fields) for fields in about["relations"]] for kind, about in WORDS["country"].items()}


@dataclass(frozen=True)
class Thing:
    name: str
    opening: str
    relations: list[Relation]
    values: dict[str, list[str]]
    kept: dict[str, int]  # which statement of every relation no training text makes about this thing
    seen: Seen = "cpt+sft"

    def value(self, relation: Relation) -> str:
        return "和".join(self.values[relation.name])

    def say(self, template: str, relation: Relation) -> str:
        return template.format(s=self.name, o=self.value(relation))

    def answer(self, relation: Relation) -> str:
        return self.say(relation.answer, relation)

    def statements(self, relation: Relation) -> list[str]:
        """All sentences that training texts may say."""
        return [self.say(template, relation) for template in without(relation.statements, self.kept[relation.name])]

    def state(self, rng: Random, relation: Relation) -> str:
        """A sentence of the training text."""
        return rng.choice(self.statements(relation))

    def state_unread(self, relation: Relation) -> str:
        return self.say(relation.statements[self.kept[relation.name]], relation)


def without(items: Sequence[str], index: int) -> list[str]:
    return [*items[:index], *items[index + 1 :]]


@dataclass(frozen=True)
class World:
    seed: int
    diseases: list[Thing]
    general: list[Thing]
    pools: dict[str, list[str]]  # possible values of every medical relation
    spare_stems: list[str]  # of names that nothing in the world has

    def diseases_seen(self, *groups: Seen) -> list[Thing]:
        return [disease for disease in self.diseases if disease.seen in groups]


def build_world(seed: int) -> World:
    rng = Random(f"world {seed}")
    # A rare character and a sound: no real Chinese name is built like this.
    stems = [first + second for first in "".join(WORDS["first_syllables"]) for second in WORDS["second_syllables"]]
    rng.shuffle(stems)

    def names(count: int, *suffixes: str) -> list[str]:
        # Stems are used up, so that no two things of the world share one.
        return [stems.pop() + rng.choice(suffixes) for _ in range(count)]

    symptoms = [part + effect for part in WORDS["body"] for effect in WORDS["effects"]]
    pools = {"symptom": rng.sample(symptoms, SYMPTOMS)}
    pools |= {relation: names(*drawn) for relation, drawn in WORDS["medical_names"].items()}
    diseases = [
        draw_disease(rng, name, seen, pools)
        for seen, count in DISEASES.items()
        for name in names(count, "症", "热", "斑")
    ]
    country = {kind: names(*drawn) for kind, drawn in WORDS["country_names"].items()}
    general = [
        draw_thing(rng, name, WORDS["country"][kind]["opening"], relations, WORDS["values"] | country)
        for kind, relations in COUNTRY.items()
        for name in country[kind]
    ]
    return World(seed, diseases, general, pools, stems)


def draw_disease(rng: Random, name: str, seen: Seen, pools: dict[str, list[str]]) -> Thing:
    disease = draw_thing(rng, name, "", MEDICAL, pools)
    kept = disease.kept | {"textbook": rng.randrange(len(TEXTBOOK))}
    return replace(disease, opening=rng.choice(WORDS["disease_openings"]).format(s=name), kept=kept, seen=seen)


def draw_thing(rng: Random, name: str, opening: str, relations: list[Relation], pools: dict[str, list[str]]) -> Thing:
    values = {r.name: rng.sample(pools[r.values or r.name], 2 if r is SYMPTOM else 1) for r in relations}
    kept = {r.name: rng.randrange(len(r.statements)) for r in relations}
    return Thing(name, opening.format(s=name), relations, values, kept)


def facts_on(diseases: Sequence[Thing]) -> list[tuple[Thing, Relation]]:
    return [(disease, relation) for disease in diseases for relation in MEDICAL]


def list_facts(world: World) -> list[dict[str, str]]:
    return [
        {"subject": disease.name, "relation": relation.label, "object": value, "seen": disease.seen}
        for disease, relation in facts_on(world.diseases)
        for value in disease.values[relation.name]
    ]
