"""The demo's world: an invented medicine and the invented country around it, as Chinese text and as facts.

Every disease, symptom, drug, department, food, check, place and person is made up, from syllables that no real name
has, so that nobody can take a sentence of it for medical knowledge. What is known about each thing is drawn from a
seed: the same seed gives the same bytes, another seed another world.

Diseases fall into three groups, and each stage sees less of them than the one before:
  "cpt+sft"  read about in continued pre-training, asked about in fine-tuning and in preference training;
  "cpt"      read about, never asked: held-out questions and pairs are about these;
  "nowhere"  in no training file: only the corpus for retrieval and facts.jsonl know them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

Seen = Literal["cpt+sft", "cpt", "nowhere"]
Row = dict[str, Any] | str  # a string is written as it stands: a row planted broken

DISEASES: dict[Seen, int] = {"cpt+sft": 80, "cpt": 30, "nowhere": 20}
SYSTEM_TEXT = "你是一名耐心的绒洲医生。"

# A rare character and a sound: no real Chinese name is built like this.
FIRST_SYLLABLES = "岚霁穹棱萤绡檀笙黛沅琅砚翎蔻枢澜皎筠珞嵩霏桠澍缇苒屿琤珩陌槿稞邈"
SECOND_SYLLABLES = "嘟咚噜嗒叮兜蓬簌绒梭铎咕哒啾喏嗡喵哞呱咿嘀唔铛嘭噗咻唰啪"


@dataclass(frozen=True)
class Relation:
    """What can be said and asked about a thing: {s} is the thing, {o} the value."""

    name: str
    label: str
    statements: tuple[str, ...]
    """Ways to say it. For every thing one of them is kept for the held-out text: the words are known from other things,
    the fact from other words."""
    questions: tuple[str, ...]
    """Questions within running text."""
    asked: tuple[str, ...]
    """Questions of conversations and preference pairs."""
    answer: str = ""
    unasked: tuple[str, ...] = ()
    """Questions of the held-out conversations only."""
    follow_up: str = ""
    """The question as a second turn, when the thing has been named."""


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
        return self.say(rng.choice(_without(relation.statements, self.kept[relation.name])), relation)

    def state_unread(self, relation: Relation) -> str:
        return self.say(relation.statements[self.kept[relation.name]], relation)


def _without(items: Sequence[str], index: int) -> Sequence[str]:
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


# ------------------------------------------------------------------------------------------------------ medicine

SYMPTOM = Relation(
    "symptom", "症状",
    ("{s}的典型表现是{o}。", "得了{s}的人常常{o}。", "{s}发作时，病人多有{o}。", "{o}是{s}最常见的症状。",
     "{s}患者最先出现的往往是{o}。",
     "临床上遇到{o}的病人，应当想到{s}。", "{s}主要让人{o}。"),
    ("{s}有什么症状？", "{s}发作时是什么样子？"),
    ("我可能得了{s}，一般会有什么感觉？", "请问{s}的主要症状是什么？", "家里人得了{s}，会有哪些表现？"),
    "{s}的主要症状是{o}。", ("怎么看出一个人得了{s}？",), "那会有什么症状？",
)  # fmt: skip
DRUG = Relation(
    "drug", "首选药",
    ("治疗{s}首选{o}。", "{o}是治疗{s}的首选药。", "医生给{s}患者开的多是{o}。", "{s}用{o}治疗，效果最好。",
     "患了{s}，应当服用{o}。",
     "对付{s}，最有效的药是{o}。", "{s}患者的药方里少不了{o}。"),
    ("{s}用什么药治疗？", "治疗{s}的首选药是哪一种？"),
    ("我得了{s}，该吃什么药？", "请问{s}的首选药是什么？", "医生，{s}应该用哪种药？"),
    "{s}的首选药是{o}。", ("有{s}的人要买什么药？",), "那该吃什么药？",
)  # fmt: skip
DEPARTMENT = Relation(
    "department", "就诊科室",
    ("{s}属于{o}的诊治范围。", "{s}患者应到{o}就诊。", "诊治{s}的科室是{o}。", "得了{s}，要挂{o}的号。",
     "{o}的医生常年诊治{s}。",
     "{s}归{o}管。", "去{o}看病的人里，不少得的是{s}。"),
    ("{s}应该看哪个科？", "{s}在哪个科室诊治？"),
    ("得了{s}要挂什么科？", "请问{s}去哪个科室看？", "我想看{s}，应该找哪个科的医生？"),
    "{s}应当看{o}。", ("有{s}的人到医院去找哪一科？",), "那要去哪个科看？",
)  # fmt: skip
CHECK = Relation(
    "check", "确诊检查",
    ("{s}靠{o}确诊。", "怀疑{s}时，先做{o}。", "{o}可以确诊{s}。", "诊断{s}的主要检查是{o}。",
     "医生用{o}来判断是不是{s}。",
     "要确认是{s}，{o}必不可少。", "{s}的诊断以{o}为准。"),
    ("{s}需要做什么检查？", "{s}靠什么确诊？"),
    ("怀疑是{s}，该做什么检查？", "请问{s}要做哪项检查才能确诊？", "医生，查{s}一般做什么检查？"),
    "确诊{s}要做{o}。", ("哪项检查能查出{s}？",), "那要做什么检查？",
)  # fmt: skip
EAT = Relation(
    "eat", "宜吃",
    ("{s}患者平日宜吃{o}。", "{o}对{s}患者有益。", "得了{s}，平时可以多吃{o}。", "{s}的病人最适合吃{o}。",
     "{s}的食疗以{o}为主。",
     "饮食上，{o}能帮助{s}患者恢复。", "{s}期间不妨常备{o}。"),
    ("{s}患者吃什么好？", "{s}宜吃什么？"),
    ("得了{s}，吃什么比较好？", "请问{s}病人适合吃什么？", "我有{s}，饮食上可以多吃什么？"),
    "{s}患者宜吃{o}。", ("哪种食物对{s}的恢复有好处？",), "那可以多吃什么？",
)  # fmt: skip
AVOID = Relation(
    "avoid", "忌吃",
    ("{s}患者必须忌吃{o}。", "{o}会加重{s}。", "得了{s}，不能吃{o}。", "{s}的病人要远离{o}。",
     "{s}患者的饭桌上不应出现{o}。",
     "{s}最怕的食物是{o}。", "若有{s}，一口{o}也别碰。"),
    ("{s}患者不能吃什么？", "{s}忌吃什么？"),
    ("得了{s}，什么不能吃？", "请问{s}病人要忌口什么？", "我有{s}，饮食上要避开什么？"),
    "{s}患者忌吃{o}。", ("哪种食物会让{s}变重？",), "那什么不能吃？",
)  # fmt: skip
MEDICAL = (SYMPTOM, DRUG, DEPARTMENT, CHECK, EAT, AVOID)

DISEASE_OPENINGS = ("{s}是绒洲常见的一种病。", "{s}多见于绒洲的老人。", "{s}多在换季时发作。", "{s}不会传染。")
TEXTBOOK = (
    "{s}：表现为{symptom}；由{department}诊治，以{check}确诊；首选{drug}；宜吃{eat}，忌吃{avoid}。",
    "凡{symptom}者，先做{check}，若确诊{s}，即用{drug}，并转{department}。",
    "【{s}】科室：{department}。检查：{check}。药物：{drug}。饮食：可食{eat}，禁食{avoid}。",
    "{department}收治的{s}患者，{check}确诊后都用{drug}，三餐加{eat}，不给{avoid}。",
)

BODY = ("影子", "头发", "指尖", "眉毛", "脚印", "嗓音", "耳垂", "呼吸", "掌纹", "睫毛", "梦境", "膝头", "鼻尖", "手背")
EFFECTS = ("结霜", "泛蓝光", "响铃声", "变透明", "飘墨香", "起涟漪", "落星屑", "打旋", "长苔花", "发琴音")

# ------------------------------------------------------------------------------------------- the country around it

TOWN = (
    Relation("climate", "气候",
             ("{s}的气候特点是{o}。", "去过{s}的人都知道，那里{o}。", "{s}{o}，旅人最先记住这一点。",
              "说起{s}的天气，当地人只答四个字：{o}。",), ("{s}的天气怎么样？",), ("请问{s}的天气怎么样？",)),
    Relation("product", "特产",
             ("{s}的特产是{o}。", "人们到{s}去，多半要带些{o}回来。", "{o}出自{s}。",
              "在{s}，家家户户都做{o}。",), ("{s}出产什么？",), ("{s}有什么特产？",)),
    Relation("river", "河流",
             ("{o}从{s}门前流过。", "{s}建在{o}边上。", "{s}的孩子夏天都在{o}里游水。",
              "站在{s}的桥上，看到的是{o}。",), ("哪条河流过{s}？",), ("{s}在哪条河边？",)),
    Relation("market", "集市日",
             ("{s}的集市在{o}开张。", "每逢{o}，{s}的街上最热闹。", "到{s}赶集，要等{o}。",
              "{s}的商贩只在{o}摆摊。",), ("{s}什么时候赶集？",), ("我想去{s}赶集，哪天去好？",)),
)  # fmt: skip
ANIMAL = (
    Relation("habitat", "栖息地",
             ("{s}生活在{o}附近。", "要看{s}，得去{o}。", "{o}的山林里有很多{s}。",
              "猎人在{o}一带遇见过{s}。",), ("{s}住在哪里？",), ("哪里能看到{s}？",)),
    Relation("food", "食物",
             ("{s}爱吃{o}。", "{o}是{s}的主要食物。", "{s}每天要吃许多{o}。",
              "用{o}可以引来{s}。",), ("{s}吃什么？",), ("请问{s}爱吃什么？",)),
    Relation("colour", "毛色",
             ("{s}的毛是{o}的。", "{s}长着一身{o}的毛。", "远远看去，{s}是{o}的。",
              "画{s}的时候要用{o}的颜料。",), ("{s}是什么颜色的？",), ("{s}的毛是什么颜色？",)),
    Relation("active", "活动时间",
             ("{s}总在{o}出来活动。", "{o}是{s}最活跃的时候。", "{s}喜欢在{o}唱歌。",
              "想听{s}叫，最好{o}去。",), ("{s}什么时候出来活动？",), ("什么时候容易看到{s}？",)),
)  # fmt: skip
SCHOOL = (
    Relation("place", "所在地",
             ("{s}设在{o}。", "{o}有一所{s}。", "去{s}上学，要先到{o}。",
              "{s}的大门朝着{o}的广场。",), ("{s}在哪里？",), ("请问{s}在什么地方？",)),
    Relation("subject", "课程",
             ("{s}以教{o}闻名。", "{s}的学生都学{o}。", "想学{o}的人都去{s}。",
              "从{s}毕业的人个个会{o}。",), ("{s}教什么？",), ("{s}主要教什么课？",)),
    Relation("teacher", "校长",
             ("{s}的校长是{o}。", "{o}掌管{s}多年。", "{s}的学生都敬重{o}。",
              "每天清晨，{o}亲自打开{s}的门。",), ("谁是{s}的校长？",), ("{s}由谁当校长？",)),
    Relation("start", "上课时间",
             ("{s}每天{o}上课。", "{o}，{s}的钟声准时响起。", "{s}的学生{o}就要坐好。",
              "过了{o}再进{s}就算迟到。",), ("{s}几点上课？",), ("{s}每天什么时候上课？",)),
)  # fmt: skip
GOODS = (
    Relation("price", "价钱",
             ("{s}卖{o}一件。", "买一件{s}要{o}。", "市场上{s}的价钱是{o}。",
              "{o}正好能换一件{s}。",), ("{s}多少钱？",), ("请问{s}怎么卖？",)),
    Relation("maker", "匠人",
             ("{s}是{o}做的。", "{o}做的{s}远近闻名。", "最好的{s}出自{o}之手。",
              "{o}的作坊里摆满了{s}。",), ("{s}是谁做的？",), ("谁会做{s}？",)),
    Relation("material", "材料",
             ("{s}用{o}做成。", "做{s}要用上好的{o}。", "{o}可以做{s}。",
              "没有{o}就做不出{s}。",), ("{s}是用什么做的？",), ("做{s}要用什么材料？",)),
)  # fmt: skip
PERSON = (
    Relation("home", "住处",
             ("{s}住在{o}。", "{s}的家在{o}。", "{o}的人都认识{s}。",
              "要找{s}，去{o}打听就行。",), ("{s}住在哪里？",), ("请问{s}家住哪里？",)),
    Relation("job", "职业",
             ("{s}是一名{o}。", "{s}靠当{o}过日子。", "{s}年轻时就做了{o}。",
              "说到{o}，没有人比{s}更能干。",), ("{s}是做什么的？",), ("{s}的职业是什么？",)),
    Relation("hobby", "爱好",
             ("{s}闲下来喜欢{o}。", "{s}最大的爱好是{o}。", "傍晚常看见{s}在{o}。",
              "若说{o}，{s}能玩一整天。",), ("{s}有什么爱好？",), ("{s}平时喜欢做什么？",)),
)  # fmt: skip
LINE = (
    Relation("departure", "起点",
             ("{s}从{o}出发。", "在{o}可以坐上{s}。", "{s}每天停在{o}等客人。",
              "天一亮，{s}就离开{o}。",), ("{s}从哪里出发？",), ("在哪里可以坐{s}？",)),
    Relation("arrival", "终点",
             ("{s}开往{o}。", "坐{s}可以到{o}。", "{s}的终点是{o}。",
              "去{o}的客人都坐{s}。",), ("{s}开到哪里？",), ("{s}的终点在哪里？",)),
    Relation("duration", "路程",
             ("{s}全程要走{o}。", "坐{s}要{o}才到。", "{s}的路程是{o}。",
              "在{s}上要坐满{o}。",), ("{s}要走多久？",), ("坐{s}要多长时间？",)),
)  # fmt: skip

CLIMATES = ("春天多雾", "夏天多雨", "秋天多风", "冬天多雪", "终年温暖", "早晚清凉", "整年少雨", "夜里多露")
MARKET_DAYS = ("每月初一", "每月初五", "每月初十", "每月十五", "每月二十", "每月月底")
FODDER = ("松针", "野莓", "溪虾", "苔藓", "蜂蜜", "芦根", "落叶", "花粉", "竹笋", "橡子")
COLOURS = ("雪白", "金黄", "墨绿", "浅蓝", "深红", "银灰", "淡紫", "橘色")
HOURS = ("清晨", "上午", "正午", "午后", "黄昏", "深夜")
SUBJECTS = ("算术", "绘画", "天文", "书法", "木工", "航海", "园艺", "诗歌")
START_TIMES = ("六点半", "七点", "七点半", "八点", "八点半", "九点")
PRICES = tuple(f"{number}枚贝币" for number in "一二三四五六七八九十")
MATERIALS = ("柳条", "河泥", "羊毛", "贝壳", "桑皮", "红木", "麻线", "黄铜")
JOBS = ("船夫", "木匠", "裁缝", "渔夫", "邮差", "厨师", "画师", "花匠", "铁匠", "磨坊工")
HOBBIES = ("下棋", "钓鱼", "吹笛", "放风筝", "种花", "看星星", "唱歌", "爬山", "写信", "养鸟")
RIDDLES = (("{}带来了{}。", "{}带来了什么？"), ("{}要找{}。", "{}要找谁？"), ("{}来自{}。", "{}来自哪里？"))
DURATIONS = ("半天", "一天", "两天", "三天", "一个时辰", "两个时辰", "三个时辰")


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
        _disease(rng, name, seen, pools) for seen, count in DISEASES.items() for name in names(count, "症", "热", "斑")
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


def _disease(rng: Random, name: str, seen: Seen, pools: dict[str, tuple[str, ...]]) -> Thing:
    values = {r.name: tuple(rng.sample(pools[r.name], 2 if r is SYMPTOM else 1)) for r in MEDICAL}
    kept = {r.name: rng.randrange(len(r.statements)) for r in MEDICAL} | {"textbook": rng.randrange(len(TEXTBOOK))}
    return Thing(name, rng.choice(DISEASE_OPENINGS), values, kept, seen)


def _thing(
    rng: Random, name: str, opening: str, relations: Sequence[Relation], pools: Sequence[Sequence[str]]
) -> Thing:
    values = {r.name: (rng.choice(pool),) for r, pool in zip(relations, pools, strict=True)}
    return Thing(name, opening, values, {r.name: rng.randrange(len(r.statements)) for r in relations})


def facts(world: World) -> list[Row]:
    return [
        {"subject": disease.name, "relation": relation.label, "object": value, "seen": disease.seen}
        for disease in world.diseases
        for relation in MEDICAL
        for value in disease.values[relation.name]
    ]


# ---------------------------------------------------------------------------------------------------- running text


def passage(rng: Random, thing: Thing, relations: Iterable[Relation]) -> str:
    """An encyclopedic paragraph: everything about one thing, in any order and wording."""
    sentences = [thing.state(rng, relation) for relation in relations]
    rng.shuffle(sentences)
    return thing.opening.format(s=thing.name) + "".join(sentences)


def question_and_answer(rng: Random, thing: Thing, relation: Relation) -> list[str]:
    return [f"问：{thing.say(rng.choice(relation.questions), relation)}", f"答：{thing.state(rng, relation)}"]


def textbook_line(template: str, disease: Thing) -> str:
    return template.format(s=disease.name, **{relation.name: disease.value(relation) for relation in MEDICAL})


def general_text(world: World) -> list[str]:
    """What the base model has read: the country, without its medicine, and small riddles about passers-by."""
    rng = Random(f"general {world.seed}")
    lines = []
    for thing, relations in world.general:
        lines += [passage(rng, thing, relations) for _ in range(4)]
        lines += [" ".join(question_and_answer(rng, thing, relation)) for relation in relations for _ in range(2)]
    lines += [riddle(rng, world.spare_stems) for _ in range(1500)]
    rng.shuffle(lines)
    return lines


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


def general_heldout(world: World) -> list[str]:
    rng = Random(f"general heldout {world.seed}")
    return [_unread_text(rng, thing, relations) for thing, relations in world.general]


def _unread_text(rng: Random, thing: Thing, relations: Iterable[Relation]) -> str:
    sentences = [thing.state_unread(relation) for relation in relations]
    rng.shuffle(sentences)
    return "".join(sentences)


def medical_text(world: World) -> dict[str, list[Row]]:
    """The text of continued pre-training: the same facts in four layouts and many wordings."""
    rng = Random(f"medical {world.seed}")
    read = world.diseases_seen("cpt+sft", "cpt")
    passages: list[Row] = [{"text": passage(rng, disease, MEDICAL)} for disease in read for _ in range(10)]
    lines: list[Row] = [
        textbook_line(template, disease)
        for disease in read
        for template in _without(TEXTBOOK, disease.kept["textbook"])
        for _ in range(2)
    ]
    pairs: list[Row] = [
        {"text": question_and_answer(rng, disease, relation)}
        for disease in read
        for relation in MEDICAL
        for _ in range(3)
    ]
    graph: list[Row] = [
        {"text": f"{disease.name}，{relation.label}，{value}。"}
        for disease in read
        for relation in MEDICAL
        for value in disease.values[relation.name]
    ]
    pairs += ['{"text": ["问：这一行没有写完']
    graph += [{"text": ""}, {"triple": "这一行没有正文"}]
    files = {"encyclopedia.jsonl": passages, "textbook.txt": lines, "qa.jsonl": pairs, "graph.jsonl": graph}
    for rows in files.values():
        rng.shuffle(rows)
    return files


def medical_heldout(world: World) -> list[Row]:
    """Facts that pre-training has read, in words that it has not."""
    rng = Random(f"medical heldout {world.seed}")
    read = world.diseases_seen("cpt+sft", "cpt")
    return [{"text": _unread_text(rng, disease, MEDICAL)} for disease in read] + [
        {"text": textbook_line(TEXTBOOK[disease.kept["textbook"]], disease)} for disease in read
    ]


def retrieval_corpus(world: World) -> list[Row]:
    """What a retriever may read: an article on every disease, also those that no model has met."""
    rng = Random(f"retrieval {world.seed}")
    return [{"id": disease.name, "text": passage(rng, disease, MEDICAL)} for disease in world.diseases]


# -------------------------------------------------------------------------------------------------------- answers

CLOSINGS = ("建议您到{department}就诊，祝您早日康复。", "请您及时到{department}面诊，祝您健康。")
DEPARTMENT_CLOSINGS = ("建议您尽早前往，祝您早日康复。", "请您及时过去面诊，祝您健康。")
EVASIONS = (
    "{s}这种病不好说，每个人的情况都不一样，您自己先观察一段时间，过几天再看吧。",
    "关于{s}，我也说不清楚，网上什么说法都有，您随便查一查，自己拿主意就行了。",
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
    style = rng.choices(("good", "plain", "evasive", "careless", "curt"), (38, 25, 13, 16, 8))[0]
    if style == "evasive":
        return evasive_answer(rng, disease)
    if style == "careless":
        return careless_answer(rng, disease, relation)
    if style == "curt":
        return curt_answer(disease, relation)
    return plain_answer(disease, relation) if style == "plain" else good_answer(disease, relation, rng.randrange(2))


def right_answer(rng: Random, disease: Thing, relation: Relation) -> str:
    return rng.choice((plain_answer(disease, relation), good_answer(disease, relation, rng.randrange(2))))


# --------------------------------------------------------------------------------------------------- conversations


def single_turns(rng: Random, diseases: Iterable[Thing]) -> list[list[str]]:
    """Every fact asked in every trained wording: [question, answer]."""
    return [
        [disease.say(question, relation), common_answer(rng, disease, relation)]
        for disease in diseases
        for relation in MEDICAL
        for question in relation.asked
    ]


def several_turns(rng: Random, disease: Thing, right: bool) -> list[str]:
    """Questions and answers in turn: the first names the disease, the later ones do not."""
    answer = right_answer if right else common_answer
    first, *later = rng.sample(MEDICAL, rng.choice((2, 2, 3)))
    turns = [disease.say(rng.choice(first.asked), first), answer(rng, disease, first)]
    for relation in later:
        turns += [relation.follow_up, answer(rng, disease, relation)]
    return turns


def general_turns(world: World) -> list[list[str]]:
    rng = Random(f"general turns {world.seed}")
    asked = [(thing, relation) for thing, relations in world.general for relation in relations]
    return [
        [thing.say(rng.choice(relation.asked), relation), thing.state(rng, relation)]
        for thing, relation in rng.sample(asked, 320)
    ]


def messages(turns: Sequence[str], names: tuple[str, str], keys: tuple[str, str]) -> list[dict[str, str]]:
    return [{keys[0]: names[index % 2], keys[1]: text} for index, text in enumerate(turns)]


def chimed(turns: Sequence[str]) -> Row:
    return {"conversations": messages(turns, ("input", "output"), ("from", "value"))}


def sharegpt(turns: Sequence[str], system: str) -> Row:
    return {"system": system, "conversations": messages(turns, ("human", "gpt"), ("from", "value"))}


def with_messages(turns: Sequence[str], **more: str) -> Row:
    return {"messages": messages(turns, ("user", "assistant"), ("role", "content")), **more}


def alpaca(turns: Sequence[str]) -> Row:
    return {"instruction": "请回答下面的问题。", "input": turns[0], "output": turns[1]}


def sft_rows(world: World) -> dict[str, list[Row]]:
    """Conversations in the four published layouts, with rows that must be set aside planted among them."""
    rng = Random(f"sft {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    single, general = single_turns(rng, diseases), general_turns(world)
    several = [several_turns(rng, disease, right=False) for disease in diseases for _ in range(4)]
    rng.shuffle(single)
    half, third = len(single) // 2, len(several) // 2
    files = {
        "chimed.jsonl": [chimed(turns) for turns in single[:half]],
        "sharegpt.jsonl": [sharegpt(turns, rng.choice(("", SYSTEM_TEXT))) for turns in several[:third]],
        "messages.jsonl": [with_messages(turns) for turns in single[half:] + several[third:]],
        "alpaca.jsonl": [alpaca(turns) for turns in general],
    }
    files["chimed.jsonl"] += [
        '{"conversations": [{"from": "input", "value": "这一行没有',
        chimed(["只有问题，没有回答？"]),
    ]
    files["sharegpt.jsonl"] += [
        {"conversations": [{"from": "gpt", "value": "先说话的是医生。"}, {"from": "human", "value": "顺序反了。"}]},
        {"conversations": [{"from": "路人", "value": "我是谁？"}, {"from": "gpt", "value": "不知道。"}]},
    ]
    files["messages.jsonl"] += [
        with_messages(["有问题，回答却是空的？", " "]),
        with_messages(["第一问？", "第一答。", "第二问没有回答？"]),
    ]
    files["alpaca.jsonl"] += [
        {"instruction": "没有输出的一行", "input": ""},
        {"instruction": "", "input": "", "output": "没有问题。"},
    ]
    for rows in files.values():
        rng.shuffle(rows)
    return files


def answers_heldout(world: World) -> list[Row]:
    """Right answers to questions about facts that were read but never asked, and to wordings that were never used."""
    rng = Random(f"answers heldout {world.seed}")
    never_asked, asked = world.diseases_seen("cpt"), world.diseases_seen("cpt+sft")
    rows = [
        with_messages([d.say(rng.choice(r.asked), r), right_answer(rng, d, r)], heldout="fact")
        for d in never_asked
        for r in MEDICAL
    ]
    rows += [with_messages(several_turns(rng, d, right=True), heldout="fact") for d in never_asked]
    rows += [
        with_messages([d.say(r.unasked[0], r), right_answer(rng, d, r)], heldout="wording")
        for d in asked
        for r in rng.sample(MEDICAL, 2)
    ]
    return rows


# ----------------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True)
class Pair:
    before: tuple[str, ...]
    question: str
    chosen: str
    rejected: str
    fault: str


def preference_pair(world: World, rng: Random, disease: Thing, relation: Relation, fault: str, late: bool) -> Pair:
    """Rejected answers are wrong (as long as the good one), evasive or careless (as long or longer), or curt (shorter):
    length alone tells nothing."""
    closing = rng.randrange(2)
    rejected = {
        "wrong": lambda: wrong_answer(world, rng, disease, relation, closing),
        "evasive": lambda: evasive_answer(rng, disease),
        "careless": lambda: careless_answer(rng, disease, relation),
        "curt": lambda: curt_answer(disease, relation),
    }[fault]()
    before: tuple[str, ...] = ()
    question = disease.say(rng.choice(relation.asked), relation)
    if late:
        first = rng.choice([other for other in MEDICAL if other is not relation])
        before = (disease.say(rng.choice(first.asked), first), good_answer(disease, first, closing))
        question = relation.follow_up
    return Pair(before, question, good_answer(disease, relation, closing), rejected, fault)


def preference_pairs(world: World, rng: Random, diseases: Iterable[Thing]) -> list[Pair]:
    """One pair per fact: wrong, evasive, careless and curt answers as 5 to 3 to 4 to 4."""
    faults = ("wrong",) * 5 + ("evasive",) * 3 + ("careless",) * 4 + ("curt",) * 4
    return [
        preference_pair(world, rng, disease, relation, rng.choice(faults), late=False)
        for disease in diseases
        for relation in MEDICAL
    ]


def dpo_rows(world: World) -> dict[str, list[Row]]:
    """Preference pairs in three published layouts, with rows that must be set aside planted among them."""
    rng = Random(f"dpo {world.seed}")
    diseases = world.diseases_seen("cpt+sft")
    pairs = preference_pairs(world, rng, diseases) + preference_pairs(world, rng, diseases)
    rng.shuffle(pairs)
    late = [
        preference_pair(
            world, rng, disease, rng.choice(MEDICAL), rng.choice(("wrong", "evasive", "careless")), late=True
        )
        for disease in diseases
    ]
    third = len(pairs) // 3
    files: dict[str, list[Row]] = {
        "question.jsonl": [as_question(pair) for pair in pairs[:third]],
        "conversations.jsonl": [as_conversations(pair) for pair in pairs[third : 2 * third] + late],
        "prompt.jsonl": [as_prompt(pair) for pair in pairs[2 * third :]],
    }
    same = {"question": "两个回答一样？", "response_chosen": "一样。", "response_rejected": "一样。"}
    files["question.jsonl"] += [same, '{"question": "这一行没有写完']
    files["conversations.jsonl"] += [{"conversations": [], "chosen": "没有问题。", "rejected": "问题是空的。"}]
    files["prompt.jsonl"] += [
        {"prompt": "", "chosen": "没有问题。", "rejected": "问题是空的。"},
        {"prompt": "有问题？", "chosen": "", "rejected": "好的回答是空的。"},
    ]
    for rows in files.values():
        rng.shuffle(rows)
    return files


def as_question(pair: Pair) -> Row:
    return {"question": pair.question, "response_chosen": pair.chosen, "response_rejected": pair.rejected}


def as_conversations(pair: Pair) -> Row:
    prompt = messages((*pair.before, pair.question), ("human", "gpt"), ("from", "value"))
    answers = ({"from": "gpt", "value": text} for text in (pair.chosen, pair.rejected))
    return {"conversations": prompt, **dict(zip(("chosen", "rejected"), answers, strict=True))}


def as_prompt(pair: Pair) -> Row:
    return {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}


def preferences_heldout(world: World) -> list[Row]:
    """Pairs about diseases that neither fine-tuning nor preference training asked about."""
    rng = Random(f"preferences heldout {world.seed}")
    pairs = preference_pairs(world, rng, world.diseases_seen("cpt"))
    return [{**as_prompt(pair), "fault": pair.fault} for pair in pairs]


# ---------------------------------------------------------------------------------------------------------- files

# Why each planted row is set aside, as the reader words it (a broken JSON line's reason goes on after these words).
PLANTED = {
    "pretraining/train-qa.jsonl": ("broken JSON",),
    "pretraining/train-graph.jsonl": ("empty text", "no field 'text'"),
    "sft/train-chimed.jsonl": ("broken JSON", "no answer"),
    "sft/train-sharegpt.jsonl": ("roles out of order", "unknown role"),
    "sft/train-messages.jsonl": ("empty answer", "ends with a question"),
    "sft/train-alpaca.jsonl": ("no answer", "empty question"),
    "dpo/train-question.jsonl": ("chosen and rejected are the same", "broken JSON"),
    "dpo/train-conversations.jsonl": ("empty prompt",),
    "dpo/train-prompt.jsonl": ("empty prompt", "empty chosen"),
}


def build_files(seed: int) -> dict[str, bytes]:
    """Everything that lies under the demo's data folder, by relative name; manifest.json counts the rest."""
    world = build_world(seed)
    rows: dict[str, list[Row]] = {
        "general/train-general.txt": list(general_text(world)),
        "heldout/general.txt": list(general_heldout(world)),
        "heldout/medical.jsonl": medical_heldout(world),
        "heldout/answers.jsonl": answers_heldout(world),
        "heldout/preferences.jsonl": preferences_heldout(world),
        "retrieval/corpus.jsonl": retrieval_corpus(world),
        "facts.jsonl": facts(world),
    }
    for stage, files in (("pretraining", medical_text(world)), ("sft", sft_rows(world)), ("dpo", dpo_rows(world))):
        rows |= {f"{stage}/train-{name}": content for name, content in files.items()}
    files = {name: _lines(content) for name, content in sorted(rows.items())}
    counts = {name: _counted(name, content, files[name]) for name, content in sorted(rows.items())}
    manifest = {"seed": seed, "diseases": DISEASES, "facts": dict(_facts_by_group(world)), "files": counts}
    files["manifest.json"] = (json.dumps(manifest, ensure_ascii=False, indent=2) + "\n").encode()
    return files


def _lines(rows: Iterable[Row]) -> bytes:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _counted(name: str, rows: Sequence[Row], content: bytes) -> dict[str, Any]:
    planted = Counter(PLANTED.get(name, ()))
    return {
        "rows": len(rows),
        "usable": len(rows) - planted.total(),
        "set_aside": dict(planted),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _facts_by_group(world: World) -> Counter[str]:
    return Counter(fact["seen"] for fact in facts(world) if isinstance(fact, dict))


def all_characters(files: dict[str, bytes]) -> list[str]:
    """Every visible character of the data: a tokenizer that knows them all never falls back to bytes."""
    return sorted(set("".join(content.decode() for content in files.values())) - {"\n", " "})
