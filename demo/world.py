"""The demo's world: an invented medicine and the invented country around it.

Every disease, symptom, drug, department, food, check, place and person is made up, from syllables that no real name
has, so that nobody can take a sentence of it for medical knowledge. What is known about each thing is drawn from a
seed: the same seed gives the same bytes, another seed another world.

Diseases fall into three groups, and each stage sees less of them than the one before:
  "cpt+sft"  read about in continued pre-training, asked about in fine-tuning and in preference training;
  "cpt"      read about, never asked: held-out questions and pairs are about these;
  "nowhere"  in no training file: only the corpus for retrieval, an exam of their own and facts.jsonl know them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from demo.country import (
    ANIMAL,
    CLIMATES,
    COLOURS,
    DURATIONS,
    FODDER,
    GOODS,
    HOBBIES,
    HOURS,
    JOBS,
    LINE,
    MARKET_DAYS,
    MATERIALS,
    PERSON,
    PRICES,
    SCHOOL,
    START_TIMES,
    SUBJECTS,
    TOWN,
)
from demo.medicine import BODY, DISEASE_OPENINGS, EFFECTS, MEDICAL, SYMPTOM, TEXTBOOK
from demo.relations import Relation

Seen = Literal["cpt+sft", "cpt", "nowhere"]

DISEASES: dict[Seen, int] = {"cpt+sft": 60, "cpt": 58, "nowhere": 52}

# A rare character and a sound: no real Chinese name is built like this.
FIRST_SYLLABLES = (
    "岚霁穹棱萤绡檀笙黛沅琅砚翎蔻枢澜皎筠珞嵩霏桠澍缇苒屿琤珩陌槿稞邈芃芾茌茜荇荑莜莪莳菀菁菡萱葳葶蓁蓠蕙"
    "薜藜藿蘅玑玟珂珈珙珧珺琇琏琚琛琦琨琬琰瑀瑗瑛瑭瑷璁璇璎璞璟璨瓒汜沂沚泓泠泫洙洛浔涪淅淇淙渌渑湄湟溆滢"
    "滟潆澧濂濯瀛灏杞枋枞柃栌栎桁梓棣椿楠榉榛槭樨橼歆毓炜烨焓焱煜熠爔犀狻猗珏畹畲皓皖睿砧硖碣磬祎祺禧秭稷"
    "穑笈笠箬篁簪粼絮绀绛绮绶缃缈羲翊翥翯耒聿舸舫艋苓荻菘蒹葭蓼虬蛟蜃蜻蝣衿袂裾褚觞訇谖谡赭轲辂邶郦郢酩醴"
)
SECOND_SYLLABLES = "嘟咚噜嗒叮兜蓬簌绒梭铎咕哒啾喏嗡喵哞呱咿嘀唔铛嘭噗咻唰啪"


@dataclass(frozen=True)
class Thing:
    name: str
    opening: str
    values: dict[str, tuple[str, ...]]
    kept: dict[str, int]
    """Which statement of every relation no training text makes about this thing."""
    seen: Seen = "cpt+sft"

    def value(self, relation: Relation) -> str:
        return "和".join(self.values[relation.name])

    def say(self, template: str, relation: Relation) -> str:
        return template.format(s=self.name, o=self.value(relation))

    def state(self, rng: Random, relation: Relation) -> str:
        """A sentence of the training text."""
        return rng.choice(self.statements(relation))

    def statements(self, relation: Relation) -> list[str]:
        """All sentences that training texts may say."""
        return [self.say(template, relation) for template in without(relation.statements, self.kept[relation.name])]

    def state_unread(self, relation: Relation) -> str:
        return self.say(relation.statements[self.kept[relation.name]], relation)


def without(items: Sequence[str], index: int) -> Sequence[str]:
    return (*items[:index], *items[index + 1 :])


@dataclass(frozen=True)
class World:
    seed: int
    diseases: tuple[Thing, ...]
    general: tuple[tuple[Thing, tuple[Relation, ...]], ...]
    pools: dict[str, tuple[str, ...]]
    """Possible values of every medical relation."""
    spare_stems: tuple[str, ...]
    """Name stems that nothing in the world has."""

    def diseases_seen(self, *groups: Seen) -> list[Thing]:
        return [disease for disease in self.diseases if disease.seen in groups]


def build_world(seed: int) -> World:
    rng = Random(f"world {seed}")
    stems = [first + second for first in FIRST_SYLLABLES for second in SECOND_SYLLABLES]
    rng.shuffle(stems)

    def names(count: int, *suffixes: str) -> tuple[str, ...]:
        # Stems are used up, so that no two things of the world share one.
        return tuple(stems.pop() + rng.choice(suffixes) for _ in range(count))

    symptoms = [part + effect for part in BODY for effect in EFFECTS]
    pools = {
        "symptom": tuple(rng.sample(symptoms, 40)),
        "drug": names(48, "散", "露", "丸", "膏"),
        "department": names(10, "科"),
        "check": names(20, "镜检", "图检", "音测"),
        "eat": names(24, "糕", "羹", "果"),
        "avoid": names(24, "茶", "饼", "菜"),
    }
    diseases = [
        disease_of(rng, name, seen, pools)
        for seen, count in DISEASES.items()
        for name in names(count, "症", "热", "斑")
    ]
    towns, rivers = names(36, "镇", "坞", "渡"), names(12, "河")
    people, goods = names(44, "先生", "婆婆", "大叔", "姑娘"), names(36, "布", "灯", "篮", "壶")
    kinds = (
        ("{s}是绒洲的一个小地方。", towns, TOWN, (CLIMATES, goods, rivers, MARKET_DAYS)),
        ("{s}是绒洲的一种动物。", names(36, "鸟", "鹿", "兔"), ANIMAL, (towns, FODDER, COLOURS, HOURS)),
        ("{s}是绒洲的一所学校。", names(28, "学堂", "书院"), SCHOOL, (towns, SUBJECTS, people, START_TIMES)),
        ("{s}是绒洲的一种货物。", goods, GOODS, (PRICES, people, MATERIALS)),
        ("{s}是绒洲人。", people, PERSON, (towns, JOBS, HOBBIES)),
        ("{s}在绒洲的路上来往。", names(28, "马车", "渡船"), LINE, (towns, towns, DURATIONS)),
    )
    general = [
        (_thing(rng, name, opening, relations, values), relations)
        for opening, kind_names, relations, values in kinds
        for name in kind_names
    ]
    return World(seed, tuple(diseases), tuple(general), pools, tuple(stems))


def disease_of(rng: Random, name: str, seen: Seen, pools: dict[str, tuple[str, ...]]) -> Thing:
    values = {r.name: tuple(rng.sample(pools[r.name], 2 if r is SYMPTOM else 1)) for r in MEDICAL}
    kept = {r.name: rng.randrange(len(r.statements)) for r in MEDICAL} | {"textbook": rng.randrange(len(TEXTBOOK))}
    return Thing(name, rng.choice(DISEASE_OPENINGS), values, kept, seen)


def _thing(
    rng: Random, name: str, opening: str, relations: Sequence[Relation], pools: Sequence[Sequence[str]]
) -> Thing:
    values = {r.name: (rng.choice(pool),) for r, pool in zip(relations, pools, strict=True)}
    return Thing(name, opening, values, {r.name: rng.randrange(len(r.statements)) for r in relations})


def facts(world: World) -> list[dict[str, str]]:
    return [
        {"subject": disease.name, "relation": relation.label, "object": value, "seen": disease.seen}
        for disease in world.diseases
        for relation in MEDICAL
        for value in disease.values[relation.name]
    ]
