"""Faults planted in the raw files, each counted under the builder's own reason: what published data are full of.

Rows are added, or sound ones are soiled in place; no row gets two faults, so every count is known beforehand.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any

from demo.conversations import chimed
from demo.exams import LETTERS, Exam, as_text, exams_held_out
from demo.raw import RawFile
from demo.world import World

Files = dict[str, RawFile]

EXACT, NEAR, CUT = "exact duplicate", "near-duplicate", "passages cut"
HTML, SPACE, LINK, PHONE = "HTML", "white space", "link to more", "phone number"  # rules that mend a text
TEST, VALIDATION = "repeats a question of exam-test", "repeats a question of exam-val"
TELEPHONE = "电话13800138000"  # the number that Chinese forms show as an example


def plant_faults(files: Files, world: World) -> None:
    rng = Random(f"faults {world.seed}")
    leaks = _Leaks(rng, world)
    _spoil_textbooks(rng, files, leaks)
    _spoil_encyclopedia(rng, files["encyclopedia/questions.jsonl.gz"])
    _spoil_graphs(files)
    _spoil_departments(rng, files["dialogues/departments.csv"])
    _spoil_blocks(rng, files["dialogues/blocks.txt"])
    _spoil_conversations(rng, files, leaks)
    _spoil_exam(rng, files["exams/train.csv"], leaks)
    _spoil_instructions(files["instructions/general.json"])
    _spoil_preferences(rng, files)
    for file in files.values():
        rng.shuffle(file.rows)


class _Leaks:
    """Questions of the held-out exams, each handed out once."""

    def __init__(self, rng: Random, world: World):
        validation, test = exams_held_out(world)
        rng.shuffle(validation)
        rng.shuffle(test)
        self.validation = iter(validation)
        self.test = iter(exam for exam in test if not _can_be_reworded(exam))
        self._rewordable = iter(exam for exam in test if _can_be_reworded(exam))

    def reworded(self) -> str:
        exam = next(self._rewordable)
        return as_text(exam.stem.replace("下列", "以下"), exam.options)

    def copied(self) -> str:
        exam = next(self.test)
        return as_text(exam.stem, exam.options)


def _can_be_reworded(exam: Exam) -> bool:
    return exam.stem.startswith("下列")


def nearly(text: str) -> str:
    """Two signs changed: the first full stop, and the last."""
    return f"{text.replace('。', '！', 1)[:-1]}！"


def _soil(file: RawFile, row: int, change: Callable[[Any], Any], *reasons: str, only: str = "") -> None:
    file.rows[row] = change(file.rows[row])
    for reason in reasons:
        file.expect(reason, only=only)


def _deal(rng: Random, file: RawFile, fits: Callable[[Any], bool] = lambda row: True) -> Iterator[int]:
    """Numbers of sound rows in any order."""
    numbers = [number for number, row in enumerate(file.rows) if fits(row)]
    return iter(rng.sample(numbers, len(numbers)))


def _take(file: RawFile, dealt: Iterator[int], count: int) -> list[Any]:
    return [file.rows[number] for number in islice(dealt, count)]


# --------------------------------------------------------------------------------------------------- running text


def _spoil_textbooks(rng: Random, files: Files, leaks: _Leaks) -> None:
    first, second, third, fourth = (file for name, file in files.items() if name.startswith("textbooks/"))
    # The second volume repeats the first, and an encyclopedia copies from it.
    passages = _deal(rng, first, lambda line: len(line) > 85)
    second.plant(EXACT, *_take(first, passages, 3))
    second.plant(NEAR, *map(nearly, _take(first, passages, 4)))
    _copy_descriptions(files["graphs/diseases.json"], _take(first, passages, 20), 3)
    third.plant("too short", "第一章", "第二章", "第三章")
    third.plant(
        "replacement characters (U+FFFD)", "绒洲的老人说，有的病会随\ufffd河水漂走。", "据说灯\ufffd能照见病根。"
    )
    lines = _deal(rng, third)
    for number in islice(lines, 2):
        _soil(third, number, "<p>{}</p>".format, HTML, SPACE)
    for number in islice(lines, 2):
        _soil(third, number, "{}&nbsp;<b></b>".format, HTML, SPACE)
    for number in islice(lines, 2):
        _soil(third, number, "{}...[详细]".format, LINK)
    fourth.plant(TEST, *(f"练习：{question}" for question in (leaks.copied(), leaks.copied())))
    fourth.plant(TEST, *(f"练习：{question}" for question in (leaks.reworded(), leaks.reworded())))
    exam = next(leaks.validation)
    fourth.plant(VALIDATION, f"练习：{as_text(exam.stem, exam.options)}")


def _copy_descriptions(graph: RawFile, passages: list[str], count: int) -> None:
    """Passages of the textbook as descriptions of as many diseases."""
    named = ((number, p) for number, row in enumerate(graph.rows) for p in passages if row["name"] in p)
    for number, passage in islice(dict(named).items(), count):
        _soil(graph, number, lambda row, passage=passage: {**row, "desc": passage}, CUT)


def _spoil_encyclopedia(rng: Random, file: RawFile) -> None:
    one_answer = _deal(rng, file, lambda row: len(row["answers"]) == 1)
    copies = _take(file, one_answer, 3)
    for number in islice(one_answer, 2):
        _soil(file, number, lambda row: {**row, "answers": [f"<b>{row['answers'][0]}</b>"]}, HTML)
    file.plant(EXACT, *copies)
    file.plant(
        "broken JSON", '{"questions": [["这一行没有写完', '{"questions": [["缺一个括号？"]], "answers": ["缺。"]'
    )
    file.plant("empty answer", {"questions": [["没有回答？"]], "answers": []})
    file.plant("empty question", {"questions": [[""]], "answers": ["没有问题。"]})


def _spoil_graphs(files: Files) -> None:
    files["graphs/triples.tsv"].plant("not three or five columns", "这一行没有关系", "头@@疾病\t只有两列")
    files["graphs/triples.tsv"].plant("empty head, relation or tail", "@@疾病\t症状\t没有头@@症状")
    graph = files["graphs/diseases.json"]
    graph.plant("broken JSON", '{"name": "这一行没有写完')
    graph.plant("no name", {"name": "", "desc": "不知说的是哪种病。"})
    graph.plant("nothing but a name", {"name": "空条目", "desc": "", "symptom": []})
    table = files["graphs/diseases.csv"]
    width = len(table.rows[0])
    table.plant("more cells than columns", ("多出一格的病", *[""] * (width - 2), "溢出"))
    table.plant("fewer cells than columns", ("少几格的病", "别名"))
    table.plant("shifted cells", ("错位的病", *[""] * 11, "收费标准不一", *[""] * (width - 13)))


# ------------------------------------------------------------------------------------------------------- dialogues


def _spoil_departments(rng: Random, file: RawFile) -> None:
    rows = _deal(rng, file)
    copies = _take(file, rows, 2)
    for number in islice(rows, 3):
        _soil(file, number, lambda row: (*row[:3], f"{row[3]}{TELEPHONE}。"), PHONE)
    department = file.rows[0][0]
    file.plant(EXACT, *copies)
    file.plant("more cells than columns", (department, "逗号", "没有加引号", "回答", "裂成两格"))
    file.plant("fewer cells than columns", (department, "这一行断了", "无"))
    file.plant("empty answer", (department, "没人回答吗？", "无", ""), (department, "还是没人回答？", "无", " "))


def _spoil_blocks(rng: Random, file: RawFile) -> None:
    rows = _deal(rng, file)
    alike = _take(file, rows, 3)
    for number in islice(rows, 2):
        _soil(file, number, _with_last_answer("{}<br/>"), HTML, SPACE)
    file.plant(NEAR, *map(_with_last_answer("{}！"), alike))
    head = ("Doctor faculty", file.rows[0][1], "Description", "疾病：不详")
    file.plant("no dialogue", head)
    file.plant("no answer", (*head, "Dialogue", "病人：", "医生在吗？"), (*head, "Dialogue", "病人：有人吗？"))


def _with_last_answer(template: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A change of the last line that the builder keeps: thanks at the end go, as nobody answers them."""

    def change(lines: tuple[str, ...]) -> tuple[str, ...]:
        last = len(lines) - (3 if lines[-1] == "谢谢医生。" else 1)
        return (*lines[:last], template.format(lines[last]), *lines[last + 1 :])

    return change


def _spoil_conversations(rng: Random, files: Files, leaks: _Leaks) -> None:
    file = files["dialogues/conversations.jsonl"]
    short = _deal(rng, file, lambda row: len(row["conversations"]) == 2)
    long = _deal(rng, file, lambda row: len(row["conversations"]) > 2)
    same, alike = _take(file, short, 2), _take(file, long, 3)
    for number in islice(short, 2):
        _soil(file, number, lambda row: _with_answer(row, "{}" + f"{TELEPHONE}。"), PHONE)
    file.plant(EXACT, *same)
    file.plant(NEAR, *(_with_answer(row, "{}！") for row in alike))
    file.plant("broken JSON", '{"conversations": [{"from": "input", "value": "这一行没有')
    file.plant("no answer", chimed(["只有问题，没有回答？"]))
    doctor, patient, passer_by = ({"from": name, "value": "有人吗？"} for name in ("gpt", "human", "路人"))
    file.plant("roles out of order", {"conversations": [doctor, patient]})
    file.plant("unknown role", {"conversations": [passer_by, doctor]})
    file.plant("ends with a question", chimed(["第一问？", "第一答。", "第二问没有回答？"]))
    file.plant("empty answer", chimed(["有问题，回答却是空的？", " "]))
    for question in (leaks.copied(), leaks.copied(), leaks.reworded()):
        file.plant(TEST, chimed([f"请教一道题。{question}", "选第一项。"]))
    # What another source holds as well stays with the earlier one.
    departments = files["dialogues/departments.csv"]
    asked = [row for row in departments.rows if len(row) == 4 and row[2] == "无" and row[3].endswith("。")]
    sound = [row for row in asked if TELEPHONE not in row[3] and departments.rows.count(row) == 1]
    copies = [chimed([title, answer]) for _, title, _, answer in rng.sample(sound, 3)]
    file.rows += copies
    departments.expect(EXACT, len(copies), only="sft/department-qa")


def _with_answer(row: dict[str, Any], template: str) -> dict[str, Any]:
    """The row with its last answer changed."""
    *before, last = row["conversations"]
    return {**row, "conversations": [*before, {**last, "value": template.format(last["value"])}]}


# --------------------------------------------------------------------------------------- exams, instructions, pairs


def _spoil_exam(rng: Random, file: RawFile, leaks: _Leaks) -> None:
    rows = _deal(rng, file)
    _soil(file, next(rows), lambda row: (*row[:3], "", *row[4:]), "no explanation", only="sft/exam-explanations")
    file.plant(EXACT, *_take(file, rows, 1))
    for exam in (next(leaks.test), next(leaks.test)):
        options = exam.options[1:] + exam.options[:1]  # in another order, with the letter that belongs to it
        moved = Exam(exam.stem, options, (exam.right - 1) % len(LETTERS), exam.explanation, exam.facets)
        file.plant(TEST, moved.row())
    stem, options, answer, *more = file.rows[next(rows)]
    lines = options.split("\n")
    file.plant("empty option", (stem, "\n".join(["A", *lines[1:]]), answer, *more))
    file.plant("answer is not among the options", (stem, options, "F", *more), (stem, options, "G", *more))
    file.plant("no answer", (stem, options, "", *more))
    file.plant("doubled options", (stem, "\n".join([*lines[:4], f"E{lines[0][1:]}"]), "A", *more))


def _spoil_instructions(file: RawFile) -> None:
    file.plant("no answer", {"instruction": "没有输出的一行", "input": ""})
    file.plant("empty question", {"instruction": "", "input": "", "output": "没有问题。"})
    file.plant("answer too short", {"instruction": "请回答下面的问题。", "input": "绒洲的天气好吗？", "output": "好"})


def _spoil_preferences(rng: Random, files: Files) -> None:
    reward, ranked, several = (file for name, file in files.items() if name.startswith("preferences/"))
    pairs = _deal(rng, reward)
    same, alike = _take(reward, pairs, 1), _take(reward, pairs, 2)
    several.plant(EXACT, *map(_in_turns, _take(reward, pairs, 2)))
    several.plant("empty prompt", {"conversations": [], "chosen": "没有问题。", "rejected": "问题是空的。"})
    reward.plant(EXACT, *same)
    reward.plant(NEAR, *({**row, "response_rejected": f"{row['response_rejected']}！"} for row in alike))
    reward.plant("broken JSON", '{"question": "这一行没有写完')
    equal = {"question": "两个回答一样？", "response_chosen": "一样。", "response_rejected": "一样。"}
    reward.plant("chosen and rejected are the same", equal)
    ranked.plant("unknown layout", {"instruction": "只有一个回答？", "input": "", "output": ["是的。"]})
    ranked.plant("empty rejected", {"instruction": "差的回答是空的？", "input": "", "output": ["是的。", ""]})


def _in_turns(row: dict[str, str]) -> dict[str, Any]:
    """The same pair in another layout."""
    question = {"from": "human", "value": row["question"]}
    return {"conversations": [question], "chosen": row["response_chosen"], "rejected": row["response_rejected"]}
