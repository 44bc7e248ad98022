"""Pairs of a good and a poor answer, and the rows of raw files that hold them."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.answers import careless_answer, curt_answer, evasive_answer, good_answer, wrong_answer
from demo.conversations import messages
from demo.medicine import MEDICAL
from demo.relations import Relation
from demo.world import Thing, World

FAULTS = ("wrong",) * 5 + ("evasive",) * 3 + ("careless",) * 4 + ("curt",) * 4


@dataclass(frozen=True)
class Pair:
    before: tuple[str, ...]
    question: str
    chosen: str
    rejected: str
    fault: str


def training_pairs(world: World) -> tuple[list[Pair], list[Pair]]:
    """(two pairs on each fact, late pairs: one on each disease, whose question comes after another one)."""
    rng = Random(f"dpo {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    pairs = [
        pair
        for disease in diseases
        for relation in MEDICAL
        for pair in _pairs_of_fact(world, rng, disease, relation, 2)
    ]
    rng.shuffle(pairs)
    return pairs, [_late_pair(world, rng, disease) for disease in diseases]


def preferences_heldout(world: World) -> list[dict[str, Any]]:
    """Pairs about diseases that neither fine-tuning nor preference training asked about."""
    rng = Random(f"preferences heldout {world.seed}")
    pairs = [
        pair
        for disease in world.diseases_seen("cpt")
        for relation in rng.sample(MEDICAL, 3)
        for pair in _pairs_of_fact(world, rng, disease, relation, 1)
    ]
    return [{**as_prompt(pair), "fault": pair.fault} for pair in pairs]


def _pairs_of_fact(world: World, rng: Random, disease: Thing, relation: Relation, count: int) -> Iterable[Pair]:
    """Pairs that differ in question, closing and fault: less would make near-duplicates of them."""
    questions = rng.sample(relation.asked, count)
    faults: dict[str, None] = {}
    while len(faults) < count:
        faults[rng.choice(FAULTS)] = None
    for question, closing, fault in zip(questions, rng.sample((0, 1), count), faults, strict=True):
        yield _pair(world, rng, disease, relation, fault, closing, (), disease.say(question, relation))


def _late_pair(world: World, rng: Random, disease: Thing) -> Pair:
    first, relation = rng.sample(MEDICAL, 2)
    # An evasive answer tells so little that the pair would come near to the one on the first fact.
    closing, fault = rng.randrange(2), rng.choice(("wrong", "careless"))
    before = (disease.say(rng.choice(first.asked), first), good_answer(disease, first, closing))
    return _pair(world, rng, disease, relation, fault, closing, before, relation.follow_up)


def _pair(
    world: World, rng: Random, disease: Thing, relation: Relation, fault: str, closing: int, before: tuple[str, ...],
    question: str,
) -> Pair:  # fmt: skip
    """Rejected answers are wrong (as long as the good one), evasive or careless (as long or longer), or curt (shorter):
    length alone tells nothing."""
    rejected = {
        "wrong": lambda: wrong_answer(world, rng, disease, relation, closing),
        "evasive": lambda: evasive_answer(rng, disease),
        "careless": lambda: careless_answer(rng, disease, relation),
        "curt": lambda: curt_answer(disease, relation),
    }[fault]()
    return Pair(before, question, good_answer(disease, relation, closing), rejected, fault)


# ---------------------------------------------------------------------------------------------------------- rows


def as_question(pair: Pair) -> dict[str, Any]:
    """MedicalGPT."""
    return {"question": pair.question, "response_chosen": pair.chosen, "response_rejected": pair.rejected}


def as_ranked(pair: Pair) -> dict[str, Any]:
    """Zhongjing_rlhf."""
    return {"instruction": pair.question, "input": "", "output": [pair.chosen, pair.rejected]}


def as_conversations(pair: Pair) -> dict[str, Any]:
    prompt = messages((*pair.before, pair.question), ("human", "gpt"), ("from", "value"))
    answers = ({"from": "gpt", "value": text} for text in (pair.chosen, pair.rejected))
    return {"conversations": prompt, **dict(zip(("chosen", "rejected"), answers, strict=True))}


def as_prompt(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
