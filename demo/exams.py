"""Exam questions with five options, as CMExam has them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from demo.answers import plain_answer
from demo.medicine import AVOID, CHECK, DEPARTMENT, DRUG, EAT, MEDICAL, SYMPTOM
from demo.relations import Relation
from demo.world import Thing, World

COLUMNS = ("Question", "Options", "Answer", "Explanation", "Disease Group", "Area of Competency", "Clinical Department",
           "Medical Discipline", "Difficulty level")  # fmt: skip
LETTERS = "ABCDE"
VALIDATION_DISEASES = 6  # of the diseases that are never asked about; the others are those of the test
# Exam language: no textbook of this world words a fact so, which leaves it to fine-tuning to teach the questions.
STEMS = {
    SYMPTOM.name: ("{s}的临床特征为", "下列各项，见于{s}的是", "{s}的诊断要点包括"),
    DRUG.name: ("{s}的一线用品是", "下列各项，用于{s}的是", "{s}的处方核心是"),
    DEPARTMENT.name: ("{s}的接诊单位是", "下列各项，接收{s}的是", "{s}应转往"),
    CHECK.name: ("{s}的金标准是", "下列各项，证实{s}的是", "{s}的定性依据是"),
    EAT.name: ("{s}的调养佳品是", "下列各项，有助{s}的是", "{s}的膳食推荐是"),
    AVOID.name: ("{s}的饮食禁区是", "下列各项，不利{s}的是", "{s}的膳食禁忌是"),
}
COMPETENCIES = {SYMPTOM.name: "表现", DRUG.name: "用药", DEPARTMENT.name: "转诊", CHECK.name: "诊断"}


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


def training_exams(world: World) -> list[Exam]:
    """Questions on two facts of every disease that fine-tuning asks about."""
    rng = Random(f"exams {world.seed}")
    facts = [(disease, r) for disease in world.diseases_seen("cpt+sft") for r in rng.sample(MEDICAL, 2)]
    asked = [(disease, relation, rng.choice(STEMS[relation.name])) for disease, relation in facts]
    return _exams(world, rng, asked, lambda disease, relation: _explain(rng, disease, relation))


def exams_held_out(world: World) -> tuple[list[Exam], list[Exam]]:
    """(validation, test): one question on every fact of diseases that were read about but never asked about."""
    rng = Random(f"exams held out {world.seed}")
    diseases = world.diseases_seen("cpt")
    parts = diseases[:VALIDATION_DISEASES], diseases[VALIDATION_DISEASES:]
    validation, test = (_exams_on(world, rng, part) for part in parts)
    return validation, test


def exams_unseen(world: World) -> list[Exam]:
    """One question on every fact of the diseases that no stage reads about."""
    return _exams_on(world, Random(f"exams unseen {world.seed}"), world.diseases_seen("nowhere"))


def _exams_on(world: World, rng: Random, diseases: Iterable[Thing]) -> list[Exam]:
    # No fact is asked about twice: answers to two wordings of a question would not be independent.
    asked = [(disease, r, rng.choice(STEMS[r.name])) for disease in diseases for r in MEDICAL]
    return _exams(world, rng, asked, plain_answer)


def open_turns(world: World) -> list[list[str]]:
    """Questions without options on every fact that fine-tuning asks about, in every wording, and answers."""
    facts = [(disease, relation) for disease in world.diseases_seen("cpt+sft") for relation in MEDICAL]
    return [[d.say(stem, r), open_answer(d, r)] for d, r in facts for stem in STEMS[r.name]]


def open_question(rng: Random, disease: Thing, relation: Relation) -> str:
    return disease.say(rng.choice(STEMS[relation.name]), relation)


def open_answer(disease: Thing, relation: Relation) -> str:
    """The right option, and why."""
    return f"{disease.value(relation)}。{plain_answer(disease, relation)}"


def _explain(rng: Random, disease: Thing, relation: Relation) -> str:
    """The fact, and another one as a reminder."""
    other = rng.choice([other for other in MEDICAL if other is not relation])
    return disease.state(rng, relation) + disease.state(rng, other)


def _exams(
    world: World, rng: Random, asked: list[tuple[Thing, Relation, str]], explain: Callable[[Thing, Relation], str]
) -> list[Exam]:
    """The right letters take turns, so that none is the better guess."""
    rng.shuffle(asked)
    return [
        _exam(world, rng, disease, relation, stem, index % len(LETTERS), explain(disease, relation))
        for index, (disease, relation, stem) in enumerate(asked)
    ]


def _exam(
    world: World, rng: Random, disease: Thing, relation: Relation, stem: str, right: int, explanation: str
) -> Exam:
    options = _wrong_values(world, rng, disease, relation)
    options.insert(right, disease.value(relation))
    facets = (f"{disease.name[-1]}类", COMPETENCIES.get(relation.name, "饮食"), disease.value(DEPARTMENT), "绒洲医学",
              str(rng.randint(1, 5)))  # fmt: skip
    return Exam(disease.say(stem, relation), tuple(options), right, explanation, facets)


def _wrong_values(world: World, rng: Random, disease: Thing, relation: Relation) -> list[str]:
    """Four other values of the same kind, made of as many parts as the right one."""
    right = disease.values[relation.name]
    others = rng.sample([value for value in world.pools[relation.name] if value not in right], 4 * len(right))
    return ["和".join(others[index :: len(LETTERS) - 1]) for index in range(len(LETTERS) - 1)]


def as_text(stem: str, options: Sequence[str]) -> str:
    """A question as people copy it into running text."""
    return f"{stem}：{'、'.join(options)}。"


def rows(exams: Iterable[Exam]) -> list[tuple[str, ...]]:
    return [exam.row() for exam in exams]
