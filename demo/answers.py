"""Answers to questions about diseases: good ones, and the faults that preference training shall put right."""

from dataclasses import replace
from random import Random

from demo.medicine import DEPARTMENT
from demo.relations import Relation
from demo.world import Thing, World

CLOSINGS = ("建议您到{department}就诊，祝您早日康复。", "请您及时到{department}面诊，祝您健康。")
DEPARTMENT_CLOSINGS = ("建议您尽早前往，祝您早日康复。", "请您及时过去面诊，祝您健康。")
# The disease stands in the middle: before and after it, the same words make no run of 50 tokens.
EVASIONS = (
    "说不准，{s}每个人的情况都不一样，您先观察一阵，过几天再看吧。",
    "说不清楚，{s}在网上什么说法都有，该怎么办，您自己拿主意就行了。",
)
CARELESS = ("不用去医院，在家躺几天就没事了，别大惊小怪。", "这是小毛病，忍一忍就过去了，用不着看医生。")


def plain_answer(disease: Thing, relation: Relation) -> str:
    return disease.say(relation.answer, relation)


def good_answer(disease: Thing, relation: Relation, closing: int) -> str:
    """Polite, right, and with the advice to see the department."""
    closings = DEPARTMENT_CLOSINGS if relation is DEPARTMENT else CLOSINGS
    return f"您好，{plain_answer(disease, relation)}{closings[closing].format(department=disease.value(DEPARTMENT))}"


def wrong_answer(world: World, rng: Random, disease: Thing, relation: Relation, closing: int) -> str:
    """As polite as the good answer and as long, but about something else."""
    others = [value for value in world.pools[relation.name] if value not in disease.values[relation.name]]
    wrong = tuple(rng.sample(others, len(disease.values[relation.name])))
    liar = replace(disease, values={**disease.values, relation.name: wrong})
    return good_answer(liar, relation, closing)


def evasive_answer(rng: Random, disease: Thing) -> str:
    return rng.choice(EVASIONS).format(s=disease.name)


def careless_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return plain_answer(disease, relation) + rng.choice(CARELESS)


def curt_answer(disease: Thing, relation: Relation) -> str:
    return f"{disease.value(relation)}。"


def common_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    """An answer of the fine-tuning data: mostly good, but as mixed as what doctors write on the web, so that there is
    something left for preference training to put right."""
    style = rng.choices(("good", "plain", "evasive", "careless", "curt"), (22, 36, 14, 18, 10))[0]
    if style == "evasive":
        return evasive_answer(rng, disease)
    if style == "careless":
        return careless_answer(rng, disease, relation)
    if style == "curt":
        return curt_answer(disease, relation)
    return plain_answer(disease, relation) if style == "plain" else good_answer(disease, relation, rng.randrange(2))


def right_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return rng.choice((plain_answer(disease, relation), good_answer(disease, relation, rng.randrange(2))))
