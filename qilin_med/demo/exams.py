"""Exam questions with five options, as CMExam has them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from qilin_med.demo.medicine import AVOID, CHECK, DEPARTMENT, DRUG, EAT, MEDICAL, SYMPTOM
from qilin_med.demo.relations import Relation
from qilin_med.demo.world import Thing, World

COLUMNS = ("Question", "Options", "Answer", "Explanation", "Disease Group", "Area of Competency", "Clinical Department",
           "Medical Discipline", "Difficulty level")  # fmt: skip
LETTERS = "ABCDE"
VALIDATION_DISEASES = 6  # of the diseases that are never asked about; the others are those of the test
STEMS = {
    SYMPTOM.name: ("{s}最常见的症状是", "下列表现中，属于{s}的是", "病人得了{s}，最可能出现"),
    DRUG.name: ("治疗{s}应首先选用", "下列药物中，可用来治疗{s}的是", "{s}患者首先服用的药物是"),
    DEPARTMENT.name: ("{s}患者就诊的科室是", "下列科室中，负责诊治{s}的是", "得了{s}，挂号应选"),
    CHECK.name: ("为确诊{s}，应做的检查是", "下列检查中，能确诊{s}的是", "怀疑病人得了{s}，首先应做"),
    EAT.name: ("{s}患者的饮食，适合选", "下列食物中，对{s}患者有益的是", "{s}患者平日可以多吃"),
    AVOID.name: ("{s}患者的饮食，应避开", "下列食物中，会加重{s}的是", "{s}患者不能吃的食物是"),
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
    """One question on every fact that fine-tuning asks about."""
    rng = Random(f"exams {world.seed}")
    facts = [(disease, relation) for disease in world.diseases_seen("cpt+sft") for relation in MEDICAL]
    asked = [(disease, relation, rng.choice(STEMS[relation.name])) for disease, relation in facts]
    return _exams(world, rng, asked, lambda disease, relation: _explain(rng, disease, relation))


def exams_held_out(world: World) -> tuple[list[Exam], list[Exam]]:
    """(validation, test): every fact of some diseases that no other question is about, in three wordings."""
    rng = Random(f"exams held out {world.seed}")
    diseases = world.diseases_seen("cpt")
    parts = diseases[:VALIDATION_DISEASES], diseases[VALIDATION_DISEASES:]
    validation, test = (
        _exams(world, rng, [(d, r, stem) for d in part for r in MEDICAL for stem in STEMS[r.name]], _plain)
        for part in parts
    )
    return validation, test


def _explain(rng: Random, disease: Thing, relation: Relation) -> str:
    """The fact, and another one as a reminder."""
    other = rng.choice([other for other in MEDICAL if other is not relation])
    return disease.state(rng, relation) + disease.state(rng, other)


def _plain(disease: Thing, relation: Relation) -> str:
    return disease.say(relation.answer, relation)


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
