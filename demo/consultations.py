"""Consultations: answers of every quality, dialogues of questions and answers in turn, and pairs of a good and a poor
answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from demo.world import DEPARTMENT, MEDICAL, WORDS, Relation, Thing, World, facts_on

Turns = list[str]  # question, answer, question, ...

ANSWERS: dict[str, list[str]] = WORDS["answers"]
# An evasive one has the disease in its middle: before and after it, the same words make no run of 50 tokens.
# Of the fine-tuning data: mostly good, but as mixed as what doctors write on the web, so that preference training has
# something left to put right.
COMMON = {"good": 22, "plain": 36, "evasive": 14, "careless": 18, "curt": 10}
FAULTS = ("wrong",) * 5 + ("evasive",) * 3 + ("careless",) * 4 + ("curt",) * 4  # of rejected answers

# -------------------------------------------------------------------------------------------------------- answers


def answer(disease: Thing, relation: Relation, style: str, wording: int) -> str:
    """A good one is polite, right, and with the advice to see the department; what the others lack stands in words.json."""
    wordings = ANSWERS["good, on the department" if style == "good" and relation is DEPARTMENT else style]
    told, department = disease.answer(relation), disease.value(DEPARTMENT)
    return wordings[wording].format(s=disease.name, o=disease.value(relation), answer=told, department=department)


def any_answer(rng: Random, style: str, disease: Thing, relation: Relation) -> str:
    wordings = len(ANSWERS[style])
    return answer(disease, relation, style, rng.randrange(wordings) if wordings > 1 else 0)


def common_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return any_answer(rng, rng.choices(list(COMMON), list(COMMON.values()))[0], disease, relation)


def right_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return rng.choice([any_answer(rng, style, disease, relation) for style in ("plain", "good")])


# ------------------------------------------------------------------------------------------------------- dialogues


def single_turns(rng: Random, diseases: Sequence[Thing]) -> list[list[tuple[Thing, Turns]]]:
    """Every fact asked about in every trained wording, each time in another list."""
    by_wording: list[list[tuple[Thing, Turns]]] = [[] for _ in DEPARTMENT.asked]
    for disease in diseases:
        for relation in MEDICAL:
            for turns, question in zip(by_wording, rng.sample(relation.asked, len(relation.asked)), strict=True):
                turns.append((disease, [disease.say(question, relation), common_answer(rng, disease, relation)]))
    return by_wording


def long_dialogues(rng: Random, disease: Thing) -> tuple[list[Turns], list[Turns]]:
    """Two dialogues of three questions, and two of two. No two questions stand together twice, so that dialogues about
    one disease do not repeat each other's passages."""
    a, b, c, d, e, f = rng.sample(MEDICAL, len(MEDICAL))
    threes = [dialogue(rng, disease, relations, common_answer) for relations in ((a, b, c), (d, e, f))]
    twos = [dialogue(rng, disease, relations, common_answer) for relations in ((d, a), (b, e))]
    return threes, twos


def dialogue(rng: Random, disease: Thing, relations: Sequence[Relation], answer: Callable[..., str]) -> Turns:
    """The first question names the disease, the later ones do not. No answer is given twice."""
    first, *later = relations
    turns = [disease.say(rng.choice(first.asked), first), answer(rng, disease, first)]
    for relation in later:
        while (told := answer(rng, disease, relation)) in turns:
            pass
        turns += [relation.follow_up, told]
    return turns


def general_turns(world: World) -> list[Turns]:
    rng = Random(f"general turns {world.seed}")
    asked = rng.sample([(thing, relation) for thing in world.general for relation in thing.relations], 320)
    return [[thing.say(rng.choice(r.asked), r), thing.state(rng, r)] for thing, r in asked]


def speakers(turns: Sequence[str], patient: str = "input", doctor: str = "output") -> list[dict[str, str]]:
    """Turns in the layout that ChiMed's conversations and ShareGPT share."""
    return [{"from": (patient, doctor)[index % 2], "value": text} for index, text in enumerate(turns)]


def chimed(turns: Sequence[str]) -> dict[str, Any]:
    return {"conversations": speakers(turns)}


def answers_heldout(world: World) -> list[dict[str, Any]]:
    """Right answers to questions about facts that were read but never asked about, and to wordings never used before."""
    rng = Random(f"answers heldout {world.seed}")
    never_asked, asked = world.diseases_seen("cpt"), world.diseases_seen("cpt+sft")
    facts = [[d.say(rng.choice(r.asked), r), right_answer(rng, d, r)] for d, r in facts_on(never_asked)]
    facts += [dialogue(rng, d, rng.sample(MEDICAL, rng.choice((2, 2, 3))), right_answer) for d in never_asked]
    wordings = [[d.say(r.unasked, r), right_answer(rng, d, r)] for d in asked for r in rng.sample(MEDICAL, 2)]
    return [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)], "heldout": kind}
        for kind, dialogues in (("fact", facts), ("wording", wordings))
        for turns in dialogues
    ]  # fmt: skip


def consultations_heldout(world: World) -> list[dict[str, Any]]:
    """Huatuo-26M's test set: questions about facts that were read but never asked about, and a good doctor's answers."""
    rng = Random(f"consultations heldout {world.seed}")
    return [
        {"questions": d.say(rng.choice(r.asked), r), "answers": any_answer(rng, "good", d, r)}
        for d in world.diseases_seen("cpt")
        for r in rng.sample(MEDICAL, 3)
    ]


# ---------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pair:
    before: tuple[str, ...]
    question: str
    chosen: str
    rejected: str
    fault: str


def training_pairs(world: World) -> tuple[list[Pair], list[Pair]]:
    """(two pairs on each fact; late pairs: one on each disease, whose question comes after another one)."""
    rng, late = Random(f"dpo {world.seed}"), []
    diseases = world.diseases_seen("cpt+sft")
    pairs = [pair for d, r in facts_on(diseases) for pair in _pairs_on(world, rng, d, r, 2)]
    rng.shuffle(pairs)
    for disease in diseases:
        first, relation = rng.sample(MEDICAL, 2)
        # An evasive answer tells so little that the pair would come near to the one on the first fact.
        closing, fault = rng.randrange(2), rng.choice(("wrong", "careless"))
        before = (disease.say(rng.choice(first.asked), first), answer(disease, first, "good", closing))
        late.append(_pair(world, rng, disease, relation, fault, closing, relation.follow_up, before))
    return pairs, late


def preferences_heldout(world: World) -> list[dict[str, Any]]:
    """Pairs about diseases that neither fine-tuning nor preference training asked about."""
    rng, diseases = Random(f"preferences heldout {world.seed}"), world.diseases_seen("cpt")
    pairs = [pair for d in diseases for r in rng.sample(MEDICAL, 3) for pair in _pairs_on(world, rng, d, r, 1)]
    return [{"prompt": p.question, "chosen": p.chosen, "rejected": p.rejected, "fault": p.fault} for p in pairs]


def _pairs_on(world: World, rng: Random, disease: Thing, relation: Relation, count: int) -> list[Pair]:
    """Pairs that differ in question, closing and fault: sharing any would make near-duplicates of them."""
    questions = rng.sample(relation.asked, count)
    faults: dict[str, None] = {}
    while len(faults) < count:
        faults[rng.choice(FAULTS)] = None
    asked = zip(questions, rng.sample((0, 1), count), faults, strict=True)
    return [
        _pair(world, rng, disease, relation, fault, closing, disease.say(q, relation)) for q, closing, fault in asked
    ]


def _pair(
    world: World, rng: Random, disease: Thing, relation: Relation, fault: str, closing: int, question: str,
    before: tuple[str, ...] = (),
) -> Pair:  # fmt: skip
    """Rejected answers are wrong (as long as the good one), evasive or careless (as long or longer), or curt (shorter):
    length alone tells nothing."""
    if fault == "wrong":  # as polite as the good answer, but about another value
        right = disease.values[relation.name]
        wrong = rng.sample([value for value in world.pools[relation.name] if value not in right], len(right))
        mistaken = replace(disease, values={**disease.values, relation.name: wrong})
        rejected = answer(mistaken, relation, "good", closing)
    else:
        rejected = any_answer(rng, fault, disease, relation)
    return Pair(before, question, answer(disease, relation, "good", closing), rejected, fault)
