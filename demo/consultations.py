"""Consultations: answers of every quality, dialogues of questions and answers in turn, and pairs of a good and a poor
answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from demo.world import DEPARTMENT, MEDICAL, Relation, Thing, World, facts_on

Turns = list[str]  # question, answer, question, ...

SYSTEM_TEXT = "你是一名耐心的绒洲医生。"
CLOSINGS = ("建议您到{department}就诊，祝您早日康复。", "请您及时到{department}面诊，祝您健康。")
DEPARTMENT_CLOSINGS = ("建议您尽早前往，祝您早日康复。", "请您及时过去面诊，祝您健康。")
# The disease stands in the middle: before and after it, the same words make no run of 50 tokens.
EVASIONS = (
    "说不准，{s}每个人的情况都不一样，您先观察一阵，过几天再看吧。",
    "说不清楚，{s}在网上什么说法都有，该怎么办，您自己拿主意就行了。",
)
CARELESS = ("不用去医院，在家躺几天就没事了，别大惊小怪。", "这是小毛病，忍一忍就过去了，用不着看医生。")
# Of the fine-tuning data: mostly good, but as mixed as what doctors write on the web, so that preference training has
# something left to put right.
COMMON = {"good": 22, "plain": 36, "evasive": 14, "careless": 18, "curt": 10}
FAULTS = ("wrong",) * 5 + ("evasive",) * 3 + ("careless",) * 4 + ("curt",) * 4  # of rejected answers

# -------------------------------------------------------------------------------------------------------- answers


def good_answer(disease: Thing, relation: Relation, closing: int) -> str:
    """Polite, right, and with the advice to see the department."""
    closings = DEPARTMENT_CLOSINGS if relation is DEPARTMENT else CLOSINGS
    return f"您好，{disease.answer(relation)}{closings[closing].format(department=disease.value(DEPARTMENT))}"


def answer(rng: Random, style: str, disease: Thing, relation: Relation) -> str:
    match style:
        case "good":
            return good_answer(disease, relation, rng.randrange(2))
        case "plain":
            return disease.answer(relation)
        case "evasive":
            return rng.choice(EVASIONS).format(s=disease.name)
        case "careless":
            return disease.answer(relation) + rng.choice(CARELESS)
        case _:
            assert style == "curt", style
            return f"{disease.value(relation)}。"


def common_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return answer(rng, rng.choices(list(COMMON), list(COMMON.values()))[0], disease, relation)


def right_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return rng.choice([answer(rng, style, disease, relation) for style in ("plain", "good")])


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
        {"questions": d.say(rng.choice(r.asked), r), "answers": good_answer(d, r, rng.randrange(2))}
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
        before = (disease.say(rng.choice(first.asked), first), good_answer(disease, first, closing))
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
        rejected = good_answer(replace(disease, values={**disease.values, relation.name: wrong}), relation, closing)
    else:
        rejected = answer(rng, fault, disease, relation)
    return Pair(before, question, good_answer(disease, relation, closing), rejected, fault)
