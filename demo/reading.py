"""What a retriever may read, and practice in reading it: questions after a note that answers them, alone or with
another."""

from random import Random

from demo.answers import plain_answer
from demo.exams import open_answer, open_question, training_exams
from demo.medicine import MEDICAL
from demo.relations import Relation
from demo.text import as_retrieved
from demo.world import Thing, World, disease_of
from qilin_med.prompt.wording import with_passages

ROWS = 1200


def reading_turns(world: World) -> list[list[str]]:
    """Each about diseases that no fact of the world is about."""
    rng = Random(f"reading {world.seed}")
    return [_reading(rng, world) for _ in range(ROWS)]


def _reading(rng: Random, world: World) -> list[str]:
    diseases = [disease_of(rng, f"{rng.choice(world.spare_stems)}症", "nowhere", world.pools) for _ in range(2)]
    told = [(disease, rng.choice(MEDICAL)) for disease in diseases]
    notes = [disease.state(rng, relation) for disease, relation in told]
    question, answer = _consultation(rng, *told[0]) if rng.random() < 0.3 else _exam(rng, *told[0])
    return [with_passages(question, as_retrieved(rng, notes)), answer]


def _consultation(rng: Random, disease: Thing, relation: Relation) -> tuple[str, str]:
    return disease.say(rng.choice(relation.asked), relation), plain_answer(disease, relation)


def _exam(rng: Random, disease: Thing, relation: Relation) -> tuple[str, str]:
    return open_question(rng, disease, relation), open_answer(disease, relation)


def retrieval_corpus(world: World) -> list[dict[str, str]]:
    """A note on every fact, also about diseases that no model has met, and what the training exams explain."""
    rng = Random(f"retrieval {world.seed}")
    notes = [
        {"id": f"{disease.name} {relation.label}", "source": "notes", "text": disease.state(rng, relation)}
        for disease in world.diseases
        for relation in MEDICAL
    ]
    explanations = [exam.explanation for exam in training_exams(world)]
    return notes + [{"id": f"exam {n}", "source": "exam", "text": text} for n, text in enumerate(explanations)]
