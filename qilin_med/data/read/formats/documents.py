"""Documents: running text (books, web pages, guidelines), and knowledge graphs.

Each head or disease of a graph becomes one passage of sentences, worded in ways that a hash chooses.
"""

import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, read_lines
from qilin_med.data.read.formats.reading import (
    LONE_SURROGATE,
    Counted,
    Fields,
    Reader,
    UnusableRow,
    convert_row,
    field_text,
    name_of,
    row_reader,
    skipped,
    texts_of,
)
from qilin_med.data.read.raw import RawRow
from qilin_med.data.read.tables import ROW_SUFFIXES, read_rows
from qilin_med.data.shards import batched, read_json_lines
from qilin_med.records import Document, Skipped

Wordings = tuple[str, ...]


def document_text(row: Fields) -> str:
    """The field `text`, a string or a list of strings (joined by newlines), as it stands."""
    value = row.get("text")
    if value is None:
        raise UnusableRow("no field 'text'")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: 'text' is {name_of(value)}, expected text")
    if not value.strip():
        raise UnusableRow("empty text")
    if LONE_SURROGATE.search(value):
        raise UnusableRow("not Unicode: half a surrogate pair")
    return value


@row_reader("text", suffixes=(".txt", *ROW_SUFFIXES))
def _text_rows(id_: str, row: Fields) -> Document:
    return Document(id_, document_text(row))


def _read_text(part: Part, source: RawFiles) -> Iterator[Counted]:
    """Lines of a .txt are joined to documents of at least `join_lines` characters (the last may be shorter)."""
    characters = getattr(source, "join_lines", 0)
    if not characters or part.suffix != ".txt" or source.header:
        yield from _text_rows.read(part, source)
        return
    for some in batched(read_lines(part), characters + 1, lambda line: 0 if line.fault else len(line.text) + 1):
        yield from ((1, skipped(f"{part.place}:{line.number}", line.fault, line.text)) for line in some if line.fault)
        if whole := [line for line in some if not line.fault]:
            yield len(whole), Document(f"{part.place}:{whole[0].number}", "\n".join(line.text for line in whole))


TEXT = Reader(
    _read_text,
    _text_rows.fields,
    _text_rows.suffixes,
    lambda suffix, source: None if suffix == ".txt" and getattr(source, "join_lines", 0) else str,
)


# --------------------------------------------------------------------------------------------------------- graphs


def word(name: str, relation: str, value: str, wordings: Wordings) -> str:
    """One of the wordings, always the same for this name and relation."""
    chosen = wordings[zlib.crc32(f"{name}\t{relation}".encode()) % len(wordings)]
    return chosen.format(name=name, relation=relation, value=value.rstrip("。；;，,. "))


# -------------------------------------------------------------------------------------------------------- triples

TRIPLE_FIELDS = ("head", "head_type", "relation", "tail", "tail_type")
FILES_AT_A_TIME = 64
# Types that say nothing.
VAGUE_TYPES = ("", "其他", "其它", "未知")
TRIPLE_WORDINGS = (
    "{name}的{relation}包括{value}。",
    "{name}的{relation}有{value}。",
    "说到{name}，其{relation}为{value}。",
    "在{relation}方面，与{name}有关的是{value}。",
    "{value}，这些是{name}的{relation}。",
)
ONE_TAIL_WORDINGS = (
    "{name}的{relation}是{value}。",
    "{name}的{relation}为{value}。",
    "说到{name}，其{relation}为{value}。",
    "在{relation}方面，与{name}有关的是{value}。",
    "{value}是{name}的{relation}。",
)


def _read_triples(part: Part, source: RawFiles) -> Iterator[Counted]:
    """Triples are dealt out to temporary files by a hash of their head, and each of these is grouped in memory, so a
    graph may be larger than memory and the triples of a head lie anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(FILES_AT_A_TIME)]
        with ExitStack() as stack:
            streams = [stack.enter_context(file.open("wb")) for file in files]
            for row in _triple_rows(part, source):
                [(_, triple)] = convert_row(row, (source.columns,), _triple, TRIPLE_FIELDS, objects=False)
                if isinstance(triple, Skipped):
                    yield 1, triple
                else:
                    head, *others = triple
                    stream = streams[zlib.crc32(head.encode()) % len(streams)]
                    stream.write(orjson.dumps([head, row.id[len(part.place) :], *others]) + b"\n")
        for file in files:
            triples: dict[str, list[tuple[str, str, str, str]]] = {}
            for head, *others in read_json_lines(file):
                triples.setdefault(head, []).append(others)
            for head, found in triples.items():
                yield len(found), Document(f"{part.place}{found[0][0]}", _passage_of(head, found))


def _triple_rows(part: Part, source: RawFiles) -> Iterator[RawRow]:
    """Rows as in other files; lines of cells between tabs have no quotation marks, and the first may name the columns."""
    if part.suffix not in (".tsv", ".txt") or source.header:
        yield from read_rows(part, source.rows, source.header)
        return
    names = {source.columns.get(field, field).lower(): field for field in TRIPLE_FIELDS}
    header: list[str] = []
    for count, (number, line, fault) in enumerate(read_lines(part)):
        cells = [" ".join(cell.split()) for cell in line.split("\t")]
        named = [] if count else [names.get(cell.lower(), "") for cell in cells]
        if {"head", "relation", "tail"} <= set(named):
            header = named
            continue
        columns = header or list(TRIPLE_FIELDS if len(cells) == len(TRIPLE_FIELDS) else ("head", "relation", "tail"))
        if not fault and len(cells) != len(columns):
            fault = "not as many cells as columns" if header else "not three or five columns"
        yield RawRow(f"{part.place}:{number}", dict(zip(columns, cells, strict=False)), line, fault)


def _triple(_: str, row: Any) -> tuple[str, str, str, str]:
    """(head, its type, relation, tail)."""
    if not isinstance(row, dict) or not {"head", "relation", "tail"} <= row.keys():
        raise UnusableRow("unknown layout")
    head, head_type, relation, tail = (field_text(row, field) for field in ("head", "head_type", "relation", "tail"))
    head, _, its_type = head.partition("@@")
    tail = tail.partition("@@")[0]
    if not (head and relation and tail):
        raise UnusableRow("empty head, relation or tail")
    return head, its_type or head_type, relation, tail


def _passage_of(head: str, triples: list[tuple[str, str, str, str]]) -> str:
    relations: dict[str, dict[str, None]] = {}
    for _, _, relation, tail in triples:
        relations.setdefault(relation, {})[tail] = None
    passage = "".join(
        word(head, relation, "、".join(tails), TRIPLE_WORDINGS if len(tails) > 1 else ONE_TAIL_WORDINGS)
        for relation, tails in relations.items()
    )
    # The first mention tells what the head is.
    kind = next((type_ for _, type_, _, _ in triples if type_ not in VAGUE_TYPES), "")
    return passage.replace(head, f"{head}（{kind}）", 1) if kind else passage


CPUBMED_KG = Reader(_read_triples, TRIPLE_FIELDS, (".txt", *ROW_SUFFIXES), lambda suffix, source: None)


# ------------------------------------------------------------------------------------------------------- diseases

# What a field says, in several wordings, in the order of the passage.
XYWY: dict[str, Wordings] = {
    "category": ("{name}归入{value}。", "按分类，{name}属于{value}。", "在疾病目录里，{name}列在{value}之下。"),
    "symptom": ("{name}的常见症状有{value}。", "患{name}的人可能出现{value}。", "{name}的临床表现包括{value}。"),
    "acompany": ("{name}可能并发{value}。", "{name}的并发症有{value}。", "得了{name}，要留意{value}等并发症。"),
    "easy_get": ("{name}的易感人群：{value}。", "哪些人容易得{name}：{value}。"),
    "get_prob": ("{name}的发病率：{value}。", "{name}在人群中的患病比例：{value}。"),
    "get_way": ("{name}的传播方式：{value}。", "{name}是否传染、如何传播：{value}。"),
    "cure_department": ("{name}应到{value}就诊。", "{name}的就诊科室是{value}。", "怀疑{name}，可以挂{value}的号。"),
    "check": ("诊断{name}常做的检查有{value}。", "为确诊{name}，可以做{value}。", "{name}的检查项目包括{value}。"),
    "cure_way": ("{name}的治疗方式有{value}。", "治疗{name}可以采用{value}。", "{name}通常以{value}来治疗。"),
    "recommand_drug": ("{name}的推荐用药有{value}。", "针对{name}，推荐的药物包括{value}。"),
    "common_drug": ("治疗{name}的常用药有{value}。", "{name}常用{value}等药物。"),
    "drug_detail": ("市面上用于{name}的药品有{value}。", "可用于{name}的具体药品包括{value}。"),
    "do_eat": ("{name}患者宜吃{value}。", "得了{name}，适合吃{value}。"),
    "not_eat": ("{name}患者忌吃{value}。", "得了{name}，不要吃{value}。"),
    "recommand_eat": ("推荐给{name}患者的食谱有{value}。", "{name}患者的饮食可以选{value}。"),
    "cure_lasttime": ("{name}的治疗周期：{value}。", "治疗{name}需要的时间：{value}。"),
    "cured_prob": ("{name}的治愈率：{value}。", "{name}经过治疗，治愈的比例：{value}。"),
    "cost_money": ("{name}的治疗费用：{value}。", "治疗{name}的花费：{value}。"),
    "yibao_status": ("{name}是否属于医保疾病：{value}。", "{name}是否纳入医保：{value}。"),
}
XYWY_PARAGRAPHS: dict[str, Wordings] = {
    "cause": ("{name}的病因：{value}。", "为什么会得{name}：{value}。", "{name}的发病原因：{value}。"),
    "prevent": ("{name}的预防：{value}。", "怎样预防{name}：{value}。", "预防{name}的办法：{value}。"),
}
XYWY_FIELDS = ("desc", *XYWY, *XYWY_PARAGRAPHS)
# The root of all categories.
NO_CATEGORY = "疾病百科"


@row_reader("name", *XYWY_FIELDS)
def xywy_kg(id_: str, row: Fields) -> Document:
    name = _name(row)
    values = {field: list(map(_without_blanks, texts_of(row.get(field), field))) for field in XYWY_FIELDS}
    values["category"] = [category for category in values["category"] if category != NO_CATEGORY]
    description = "\n".join(values["desc"])
    if description and name not in description:
        description = f"{name}：{description}"
    paragraphs = ({field: wordings} for field, wordings in XYWY_PARAGRAPHS.items())
    return _passage(id_, name, description, values, XYWY, *paragraphs)


HEALTH39: dict[str, Wordings] = {
    "alias": ("{name}又称{value}。", "{name}也叫{value}。", "{name}的别名有{value}。"),
    "part": ("{name}的发病部位是{value}。", "{name}发生在{value}。"),
    "age": ("{name}的多发人群：{value}。", "哪些人容易得{name}：{value}。"),
    "infection": ("{name}的传染性：{value}。", "{name}是否传染：{value}。"),
    "insurance": ("{name}是{value}。", "就医保而言，{name}属于{value}。"),
    "department": ("{name}应到{value}就诊。", "{name}的就诊科室是{value}。", "怀疑{name}，可以挂{value}的号。"),
    "symptom": ("{name}的常见症状有{value}。", "患{name}的人可能出现{value}。", "{name}的临床表现包括{value}。"),
    "complication": ("{name}可能并发{value}。", "{name}的并发症有{value}。", "得了{name}，要留意{value}等并发症。"),
    "checklist": ("诊断{name}常做的检查有{value}。", "为确诊{name}，可以做{value}。", "{name}的检查项目包括{value}。"),
    "treatment": ("{name}的治疗方式有{value}。", "治疗{name}可以采用{value}。", "{name}通常以{value}来治疗。"),
    "drug": ("治疗{name}的常用药有{value}。", "{name}常用{value}等药物。"),
    "period": ("{name}的治疗周期：{value}。", "治疗{name}需要的时间：{value}。"),
    "rate": ("{name}的治愈率：{value}。", "{name}经过治疗，治愈的比例：{value}。"),
    "money": ("{name}的治疗费用：{value}。", "治疗{name}的花费：{value}。"),
}
HEALTH39_LISTS = {
    **dict.fromkeys(("part", "department", "symptom", "complication", "checklist", "treatment", "drug"), r"\s+"),
    # Foreign names hold blanks themselves.
    "alias": r"[,，;；、]\s*|(?<=[\u4e00-\u9fff])\s+(?=[\u4e00-\u9fff])",
}
# Marks of truncated pages, and fillers for what is unknown.
CUT_MARKS = re.compile(r"\[详细\]?|^>>|\.{3,}|…+")
NOTHING_KNOWN = re.compile(r"暂无.*|关资料|应该如何用药？用什么药？")


@row_reader("name", *HEALTH39)
def health39_kg(id_: str, row: Fields) -> Document:
    name = CUT_MARKS.sub("", _name(row)).strip()
    # A price in another column tells that cells have moved.
    if any("收费标准" in str(value) for field, value in row.items() if field != "money"):
        raise UnusableRow("shifted cells")
    cells: dict[str, list[str]] = {}
    for field in HEALTH39:
        text = "\n".join(texts_of(row.get(field) or None, field))
        cell = _without_blanks(CUT_MARKS.sub("", text).strip())
        items = re.split(HEALTH39_LISTS[field], cell) if field in HEALTH39_LISTS else [cell]
        cells[field] = list(dict.fromkeys(item for item in items if item and not NOTHING_KNOWN.fullmatch(item)))
    return _passage(id_, name, "", cells, HEALTH39)


def _name(row: Fields) -> str:
    name = " ".join(" ".join(texts_of(row.get("name"), "name")).split())
    if not name:
        raise UnusableRow("no name")
    return name


def _without_blanks(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _passage(
    id_: str, name: str, description: str, values: dict[str, list[str]], *paragraphs: dict[str, Wordings]
) -> Document:
    """The description, then paragraphs with a sentence for each field that has values."""
    parts = [description]
    for fields in paragraphs:
        told = {field: "、".join(values[field]) for field in fields if values[field]}
        parts.append("".join(word(name, field, value, fields[field]) for field, value in told.items()))
    text = "\n".join(part for part in parts if part)
    if not text:
        raise UnusableRow("nothing but a name")
    return Document(id_, text)
