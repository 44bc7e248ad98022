"""Running text: encyclopedia passages, textbook lines, general text, practice in reading notes, and what retrieval reads."""

from collections.abc import Sequence
from dataclasses import replace
from operator import eq
from random import Random

from demo.exams import training_exams
from demo.world import MEDICAL, TEXTBOOK, WORDS, Thing, World, draw_disease, facts_on
from qilin_med.prompt.wording import with_passages

GENERAL_RIDDLES = 1500
MEDICAL_READINGS = 1200
PASSAGES = 8  # on each disease
ALIKE = 1  # sentences that two passages on a disease may share: with their opening, two are a run of 50 tokens


def passages(rng: Random, disease: Thing) -> list[str]:
    """Encyclopedia paragraphs on one disease that have little in common but the facts."""
    pools = [disease.statements(relation) for relation in MEDICAL]
    chosen: list[list[str]] = []
    while len(chosen) < PASSAGES:
        sentences = [rng.choice(pool) for pool in pools]
        if all(sum(map(eq, sentences, other)) <= ALIKE for other in chosen):
            chosen.append(sentences)
    return [disease.opening + in_random_order(rng, sentences) for sentences in chosen]


def in_random_order(rng: Random, sentences: list[str]) -> str:
    rng.shuffle(sentences)
    return "".join(sentences)


def textbook(disease: Thing) -> list[str]:
    """Lines that each tell everything about a disease. No training text has the one that is `kept`."""
    values = {relation.name: disease.value(relation) for relation in MEDICAL}
    return [template.format(s=disease.name, **values) for template in TEXTBOOK]


def reading_turns(world: World) -> list[list[str]]:
    """Questions after a note that answers them, alone or with another; about diseases that no fact of the world is
    about."""
    rng, rows = Random(f"reading {world.seed}"), []
    for _ in range(MEDICAL_READINGS):
        strangers = [draw_disease(rng, f"{rng.choice(world.spare_stems)}症", "nowhere", world.pools) for _ in range(2)]
        told = [(disease, rng.choice(MEDICAL)) for disease in strangers]
        notes = [disease.state(rng, relation) for disease, relation in told]
        disease, relation = told[0]
        answer = disease.answer(relation)
        if rng.random() < 0.3:
            question = disease.say(rng.choice(relation.asked), relation)
        else:
            question = disease.say(rng.choice(relation.exam), relation)
            answer = f"{disease.value(relation)}。{answer}"
        rows.append([with_passages(question, _as_retrieved(rng, notes)), answer])
    return rows


def retrieval_corpus(world: World) -> list[dict[str, str]]:
    """A note on every fact, also about diseases that no model has met, and what the training exams explain."""
    rng = Random(f"retrieval {world.seed}")
    notes = [
        {"id": f"{disease.name} {relation.label}", "source": "notes", "text": disease.state(rng, relation)}
        for disease, relation in facts_on(world.diseases)
    ]
    explanations = [exam.explanation for exam in training_exams(world)]
    return notes + [{"id": f"exam {n}", "source": "exam", "text": text} for n, text in enumerate(explanations)]


def medical_heldout(world: World) -> list[dict[str, str]]:
    """Facts that pre-training has read, in words that it has not."""
    rng = Random(f"medical heldout {world.seed}")
    read = world.diseases_seen("cpt+sft", "cpt")
    texts = [in_random_order(rng, [disease.state_unread(relation) for relation in MEDICAL]) for disease in read]
    return [{"text": text} for text in texts + [textbook(disease)[disease.kept["textbook"]] for disease in read]]


def general_text(world: World) -> list[str]:
    """What the base model has read: the country without its medicine, and small riddles about passers-by."""
    rng, lines = Random(f"general {world.seed}"), []
    for thing in world.general:
        for _ in range(4):
            lines.append(thing.opening + in_random_order(rng, [thing.state(rng, r) for r in thing.relations]))
        for relation in [r for r in thing.relations for _ in range(2)]:
            lines.append(f"问：{thing.say(rng.choice(relation.questions), relation)} 答：{thing.state(rng, relation)}")
    lines += [_riddle(rng, world.spare_stems) for _ in range(GENERAL_RIDDLES)]
    rng.shuffle(lines)
    return lines


def readings(world: World, name: str, notes: int, riddles: int = 0) -> list[dict[str, str]]:
    """Practice in reading what is put before a question."""
    rng = Random(f"{name} {world.seed}")
    texts = [_reading(rng, world) for _ in range(notes)]
    return [{"text": text} for text in texts + [_riddle(rng, world.spare_stems) for _ in range(riddles)]]


def general_heldout(world: World) -> list[str]:
    rng = Random(f"general heldout {world.seed}")
    return [in_random_order(rng, [thing.state_unread(r) for r in thing.relations]) for thing in world.general]


def _reading(rng: Random, world: World) -> str:
    """Notes about things that only this text knows, and a question that the first of them answers."""
    strangers = []
    for _ in range(2):  # things of a known kind with a new name, and with values of others of their kind
        thing = rng.choice(world.general)
        alike = [other.values for other in world.general if other.relations is thing.relations]
        values = {relation.name: rng.choice(alike)[relation.name] for relation in thing.relations}
        thing = replace(thing, name=rng.choice(world.spare_stems) + thing.name[2:], values=values)
        strangers.append((thing, rng.choice(thing.relations)))
    notes = [thing.state(rng, relation) for thing, relation in strangers]
    thing, relation = strangers[0]
    question = thing.say(rng.choice(relation.questions), relation)
    return f"{with_passages(question, _as_retrieved(rng, notes))}\n{thing.value(relation)}。{notes[0]}"


def _as_retrieved(rng: Random, notes: Sequence[str]) -> list[str]:
    """The first note, alone or among the others."""
    return rng.sample(notes, len(notes)) if rng.random() < 0.4 else [notes[0]]


def _riddle(rng: Random, stems: Sequence[str]) -> str:
    """A text about people who appear only once: its answers can be found nowhere but in it. Reading such texts is how a
    model learns to look things up in its prompt, which retrieval needs."""
    names = rng.sample(stems, 6)
    pairs = list(zip(names[:3], names[3:], strict=True))
    statement, question = rng.choice(WORDS["riddles"])
    told = "".join(statement.format(*pair) for pair in pairs)
    rng.shuffle(pairs)
    answers = (f" 问：{question.format(person)} 答：{statement.format(person, thing)}" for person, thing in pairs)
    return told + "".join(answers)
