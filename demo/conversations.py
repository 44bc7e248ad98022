"""Questions to a doctor and answers, in turn, and the rows of raw files that hold them. Turns: question, answer, ..."""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from demo.answers import common_answer, good_answer, right_answer
from demo.medicine import DEPARTMENT, MEDICAL
from demo.relations import Relation
from demo.world import Thing, World

Turns = list[str]
Answer = Callable[[Random, Thing, Relation], str]

SYSTEM_TEXT = "你是一名耐心的绒洲医生。"


# --------------------------------------------------------------------------------------------------------- turns


def single_turns(rng: Random, diseases: Iterable[Thing]) -> list[list[tuple[Thing, Turns]]]:
    """Every fact asked in every trained wording, each time in another list."""
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


def dialogue(rng: Random, disease: Thing, relations: Sequence[Relation], answer: Answer) -> Turns:
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
    asked = [(thing, relation) for thing, relations in world.general for relation in relations]
    return [
        [thing.say(rng.choice(relation.asked), relation), thing.state(rng, relation)]
        for thing, relation in rng.sample(asked, 320)
    ]


# ---------------------------------------------------------------------------------------------------------- rows


def messages(turns: Sequence[str], names: tuple[str, str], keys: tuple[str, str]) -> list[dict[str, str]]:
    return [{keys[0]: names[index % 2], keys[1]: text} for index, text in enumerate(turns)]


def chimed(turns: Sequence[str]) -> dict[str, Any]:
    return {"conversations": messages(turns, ("input", "output"), ("from", "value"))}


def sharegpt(turns: Sequence[str], system: str = "") -> dict[str, Any]:
    return {"system": system, "conversations": messages(turns, ("human", "gpt"), ("from", "value"))}


def with_messages(turns: Sequence[str], **more: str) -> dict[str, Any]:
    return {"messages": messages(turns, ("user", "assistant"), ("role", "content")), **more}


def alpaca(turns: Sequence[str]) -> dict[str, str]:
    return {"instruction": "请回答下面的问题。", "input": turns[0], "output": turns[1]}


def department_row(rng: Random, disease: Thing, turns: Turns) -> tuple[str, ...]:
    """Chinese-medical-dialogue-data: department, title, ask, answer. Patients often leave `ask` to the title, or write
    there what the title says."""
    question, answer = turns
    return disease.value(DEPARTMENT), question, rng.choice(("无", f"您好，{question}")), answer


def block(rng: Random, disease: Thing, turns: Turns) -> tuple[str, ...]:
    """Medical-Dialogue-System: a form, then the talk; the patient's thanks, which nobody answers, may end it."""
    parting = rng.choice(((), ("病人：", "谢谢医生。")))
    return (
        *("Doctor faculty", disease.value(DEPARTMENT), "Description", f"疾病：{disease.name}", "Dialogue"),
        *spoken(rng, turns),
        *parting,
    )


def spoken(rng: Random, turns: Turns) -> list[str]:
    """The speaker stands before the words or on a line of its own."""
    break_ = rng.choice(("", "\n"))
    return "\n".join(f"{('病人：', '医生：')[n % 2]}{break_}{text}" for n, text in enumerate(turns)).split("\n")


# ------------------------------------------------------------------------------------------------------ held out


def answers_heldout(world: World) -> list[dict[str, Any]]:
    """Right answers to questions about facts that were read but never asked, and to wordings that were never used."""
    rng = Random(f"answers heldout {world.seed}")
    never_asked, asked = world.diseases_seen("cpt"), world.diseases_seen("cpt+sft")
    rows = [
        with_messages([d.say(rng.choice(r.asked), r), right_answer(rng, d, r)], heldout="fact")
        for d in never_asked
        for r in MEDICAL
    ]
    rows += [
        with_messages(dialogue(rng, d, rng.sample(MEDICAL, rng.choice((2, 2, 3))), right_answer), heldout="fact")
        for d in never_asked
    ]
    rows += [
        with_messages([d.say(r.unasked[0], r), right_answer(rng, d, r)], heldout="wording")
        for d in asked
        for r in rng.sample(MEDICAL, 2)
    ]
    return rows


def consultations_heldout(world: World) -> list[dict[str, Any]]:
    """Huatuo-26M's test set: questions about facts that were read but never asked, and a good doctor's answers."""
    rng = Random(f"consultations heldout {world.seed}")
    return [
        {"questions": d.say(rng.choice(r.asked), r), "answers": good_answer(d, r, rng.randrange(2))}
        for d in world.diseases_seen("cpt")
        for r in rng.sample(MEDICAL, 3)
    ]
