"""Exam questions with five options, as CMExam has them."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.world import DEPARTMENT, MEDICAL, Relation, Thing, World, facts_on

LETTERS = "ABCDE"
VALIDATION_DISEASES = 6  # of those that are never asked about; the others are the test's


@dataclass(frozen=True)
class Exam:
    stem: str
    options: tuple[str, ...]
    right: int
    explanation: str
    facets: tuple[str, ...]

    def row(self) -> tuple[str, ...]:
        options = "\n".join(f"{letter} {text}" for letter, text in zip(LETTERS, self.options, strict=True))
        return self.stem, options, LETTERS[self.right], self.explanation, *self.facets

    def as_text(self) -> str:
        """As people copy a question into running text."""
        return f"{self.stem}：{'、'.join(self.options)}。"


def training_exams(world: World) -> list[Exam]:
    """Questions on two facts of every disease that fine-tuning asks about. Each explanation tells the fact and, as a
    reminder, another one."""
    rng = Random(f"exams {world.seed}")

    def explain(disease: Thing, relation: Relation) -> str:
        other = rng.choice([other for other in MEDICAL if other is not relation])
        return disease.state(rng, relation) + disease.state(rng, other)

    facts = [(disease, r) for disease in world.diseases_seen("cpt+sft") for r in rng.sample(MEDICAL, 2)]
    return _exams_on(world, rng, facts, explain)


def exams_held_out(world: World) -> dict[str, list[Exam]]:
    """One question on every fact of diseases that were read about but never asked about ("val" and "test"), and of those that
    no stage reads about ("unseen")."""
    rng, diseases = Random(f"exams held out {world.seed}"), world.diseases_seen("cpt")
    return {
        "val": _exams_on(world, rng, facts_on(diseases[:VALIDATION_DISEASES])),
        "test": _exams_on(world, rng, facts_on(diseases[VALIDATION_DISEASES:])),
        "unseen": _exams_on(world, Random(f"exams unseen {world.seed}"), facts_on(world.diseases_seen("nowhere"))),
    }


def open_turns(world: World) -> list[list[str]]:
    """Questions without options on every fact that fine-tuning asks about, in every wording; the answers begin with the
    right option."""
    asked = [(d, r, stem) for d, r in facts_on(world.diseases_seen("cpt+sft")) for stem in r.exam]
    return [[d.say(stem, r), f"{d.value(r)}。{d.answer(r)}"] for d, r, stem in asked]


def _exams_on(
    world: World, rng: Random, facts: list[tuple[Thing, Relation]], explain: Callable[[Thing, Relation], str] | None = None
) -> list[Exam]:  # fmt: skip
    """One question on each fact: answers to two wordings of one question would not be independent. The right letters take
    turns, so that none is the better guess; the wrong options are values of the same kind, of as many parts."""
    asked, exams = [(*fact, rng.choice(fact[1].exam)) for fact in facts], []
    rng.shuffle(asked)
    for index, (disease, relation, stem) in enumerate(asked):
        explanation = explain(disease, relation) if explain else disease.answer(relation)
        right, place = disease.values[relation.name], index % len(LETTERS)
        wrong = rng.sample([v for v in world.pools[relation.name] if v not in right], (len(LETTERS) - 1) * len(right))
        options = ["和".join(wrong[start :: len(LETTERS) - 1]) for start in range(len(LETTERS) - 1)]
        options.insert(place, disease.value(relation))
        difficulty = str(rng.randint(1, 5))
        facets = (f"{disease.name[-1]}类", relation.competency, disease.value(DEPARTMENT), "绒洲医学", difficulty)
        exams.append(Exam(disease.say(stem, relation), tuple(options), place, explanation, facets))
    return exams
