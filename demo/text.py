"""Running text: encyclopedic passages, textbook lines, questions after notes, riddles; each thing in many wordings."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from demo.country import RIDDLES
from demo.medicine import MEDICAL, TEXTBOOK
from demo.relations import Relation
from demo.world import Thing, World, without
from qilin_med.prompt.wording import with_passages

GENERAL_RIDDLES, GENERAL_READINGS = 1500, 800
REPLAYED_RIDDLES, REPLAYED_READINGS = 150, 350  # among the medical texts
PASSAGES = 8  # of each disease
ALIKE = 1  # sentences that two passages of a disease may share: with their opening, two are a run of 50 tokens


# ------------------------------------------------------------------------------------------------------- passages


def passage(rng: Random, thing: Thing, relations: Iterable[Relation]) -> str:
    """An encyclopedic paragraph: everything about one thing, in any order and wording."""
    return _paragraph(rng, thing, [thing.state(rng, relation) for relation in relations])


def passages(rng: Random, disease: Thing) -> list[str]:
    """Paragraphs on one disease that have little in common but the facts."""
    told = [disease.statements(relation) for relation in MEDICAL]
    return [_paragraph(rng, disease, sentences) for sentences in _unlike_choices(rng, told, PASSAGES)]


def _unlike_choices(rng: Random, pools: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """One of each pool, `count` times, so that no two agree in more than ALIKE places."""
    found: list[list[str]] = []
    while len(found) < count:
        choice = [rng.choice(pool) for pool in pools]
        if all(sum(a == b for a, b in zip(choice, other, strict=True)) <= ALIKE for other in found):
            found.append(choice)
    return found


def _paragraph(rng: Random, thing: Thing, sentences: list[str]) -> str:
    rng.shuffle(sentences)
    return thing.opening.format(s=thing.name) + "".join(sentences)


def unread_text(rng: Random, thing: Thing, relations: Iterable[Relation]) -> str:
    """What is known about a thing, in the sentences that training texts do not say about it."""
    sentences = [thing.state_unread(relation) for relation in relations]
    rng.shuffle(sentences)
    return "".join(sentences)


# ------------------------------------------------------------------------------------------------------- textbooks


def textbook_lines(disease: Thing) -> list[str]:
    return [textbook_line(template, disease) for template in without(TEXTBOOK, disease.kept["textbook"])]


def textbook_line(template: str, disease: Thing) -> str:
    return template.format(s=disease.name, **{relation.name: disease.value(relation) for relation in MEDICAL})


# --------------------------------------------------------------------------------------------------- general text


def general_text(world: World) -> list[str]:
    """What the base model has read: the country, without its medicine, and small riddles about passers-by."""
    rng = Random(f"general {world.seed}")
    lines = []
    for thing, relations in world.general:
        lines += [passage(rng, thing, relations) for _ in range(4)]
        lines += [_question_and_answer(rng, thing, relation) for relation in relations for _ in range(2)]
    lines += [riddle(rng, world.spare_stems) for _ in range(GENERAL_RIDDLES)]
    rng.shuffle(lines)
    return lines


def general_reading(world: World) -> list[dict[str, str]]:
    """Practice for the base model in reading what is put before a question."""
    rng = Random(f"general reading {world.seed}")
    return [{"text": _reading(rng, world)} for _ in range(GENERAL_READINGS)]


def general_replay(world: World) -> list[dict[str, str]]:
    """More of both among the medical texts, so that pre-training does not undo the skill."""
    rng = Random(f"replay {world.seed}")
    readings = [_reading(rng, world) for _ in range(REPLAYED_READINGS)]
    riddles = [riddle(rng, world.spare_stems) for _ in range(REPLAYED_RIDDLES)]
    return [{"text": text} for text in readings + riddles]


def _reading(rng: Random, world: World) -> str:
    """Notes about things that only this text knows, and a question that one of them answers."""
    asked = [(thing, rng.choice(relations)) for thing, relations in (_stranger(rng, world) for _ in range(2))]
    notes = [thing.state(rng, relation) for thing, relation in asked]
    thing, relation = asked[0]
    question = thing.say(rng.choice(relation.questions), relation)
    return f"{with_passages(question, as_retrieved(rng, notes))}\n{thing.value(relation)}。{notes[0]}"


def as_retrieved(rng: Random, notes: Sequence[str]) -> list[str]:
    """The first note, alone or among the others."""
    return rng.sample(notes, len(notes)) if rng.random() < 0.4 else [notes[0]]


def _stranger(rng: Random, world: World) -> tuple[Thing, tuple[Relation, ...]]:
    """A thing of a known kind with a new name, and with values of others of its kind."""
    thing, relations = rng.choice(world.general)
    alike = [other.values for other, others in world.general if others is relations]
    values = {relation.name: rng.choice(alike)[relation.name] for relation in relations}
    return replace(thing, name=rng.choice(world.spare_stems) + thing.name[2:], values=values), relations


def _question_and_answer(rng: Random, thing: Thing, relation: Relation) -> str:
    return f"问：{thing.say(rng.choice(relation.questions), relation)} 答：{thing.state(rng, relation)}"


def riddle(rng: Random, stems: Sequence[str]) -> str:
    """A text about people who appear only once: its answers can be found nowhere but in it. Reading such texts is how a
    model learns to look things up in its prompt, which retrieval needs."""
    names = rng.sample(stems, 6)
    pairs = list(zip(names[:3], names[3:], strict=True))
    statement, question = rng.choice(RIDDLES)
    told = "".join(statement.format(*pair) for pair in pairs)
    rng.shuffle(pairs)
    answers = (f" 问：{question.format(person)} 答：{statement.format(person, thing)}" for person, thing in pairs)
    return told + "".join(answers)


# ------------------------------------------------------------------------------------------ held out


def general_heldout(world: World) -> list[str]:
    rng = Random(f"general heldout {world.seed}")
    return [unread_text(rng, thing, relations) for thing, relations in world.general]


def medical_heldout(world: World) -> list[dict[str, str]]:
    """Facts that pre-training has read, in words that it has not."""
    rng = Random(f"medical heldout {world.seed}")
    read = world.diseases_seen("cpt+sft", "cpt")
    return [{"text": unread_text(rng, disease, MEDICAL)} for disease in read] + [
        {"text": textbook_line(TEXTBOOK[disease.kept["textbook"]], disease)} for disease in read
    ]
