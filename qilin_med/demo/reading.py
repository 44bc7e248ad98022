"""Questions with an article that answers them: practice in looking up what the model cannot know, as retrieval needs."""

from random import Random

from qilin_med.demo.answers import plain_answer
from qilin_med.demo.medicine import MEDICAL
from qilin_med.demo.text import passage
from qilin_med.demo.world import World, disease_of
from qilin_med.prompts import with_passages

ROWS = 160


def reading_turns(world: World) -> list[list[str]]:
    """Each about a disease of its own that nothing else in the world knows."""
    rng = Random(f"reading {world.seed}")
    turns = []
    for stem in rng.sample(world.spare_stems, ROWS):
        disease, relation = disease_of(rng, f"{stem}症", "nowhere", world.pools), rng.choice(MEDICAL)
        question = disease.say(rng.choice(relation.asked), relation)
        turns.append([with_passages(question, [passage(rng, disease, MEDICAL)]), plain_answer(disease, relation)])
    return turns
