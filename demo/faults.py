"""Faults planted in the raw files, each counted under the builder's own reason: what published data are full of.

Rows are added, or sound ones are soiled in place; no row gets two faults, so every count is known beforehand.
"""

from functools import partial
from random import Random
from typing import Any

from demo.consultations import chimed
from demo.exams import LETTERS, Exam, exams_held_out
from demo.raw import RawFile, raw_files
from demo.world import World

EXACT, NEAR, CUT = "exact duplicate", "near-duplicate", "passages cut"
HTML, SPACE, LINK, PHONE = "HTML", "white space", "link to more", "phone number"  # rules that repair a text
TEST, VALIDATION = "repeats a question of exam-test", "repeats a question of exam-val"
TELEPHONE = "电话13800138000。"  # the number that Chinese forms show as an example


def spoilt_files(world: World) -> dict[str, RawFile]:
    """The raw files by name, with their faults."""
    files, rng = raw_files(world), Random(f"faults {world.seed}")
    leaks = exams_held_out(world)  # each question is handed out once
    rng.shuffle(leaks["val"])
    rng.shuffle(leaks["test"])
    leaks["reworded"] = [exam for exam in leaks["test"] if exam.stem.startswith("下列")]
    leaks["copied"] = [exam for exam in leaks["test"] if exam not in leaks["reworded"]]
    spoil_texts(rng, files, leaks)
    spoil_dialogues(rng, files, leaks)
    spoil_questions(rng, files, leaks)
    spoil_preferences(rng, files)
    for file in files.values():
        file.plant_faulty()
        rng.shuffle(file.rows)
    return files


def nearly(text: str) -> str:
    """Two signs changed: the first full stop, and the last."""
    return f"{text.replace('。', '！', 1)[:-1]}！"


def reworded(exam: Exam) -> str:
    return exam.as_text().replace("下列", "以下", 1)


def spoil_texts(rng: Random, files: dict[str, RawFile], leaks: dict[str, list[Exam]]) -> None:
    first, second, third, fourth = (file for name, file in files.items() if name.startswith("textbooks/"))
    # The second volume repeats the first, and an encyclopedia copies from it.
    passages = first.deal(rng, lambda line: len(line) > 85)
    second.plant(EXACT, *first.take(passages, 3))
    second.plant(NEAR, *map(nearly, first.take(passages, 4)))
    copied, graph = first.take(passages, 20), files["graphs/diseases.json"]
    described = {n: text for n, row in enumerate(graph.rows) for text in copied if row["name"] in text}
    for number in list(described)[:3]:
        graph.soil([number], 1, lambda row, text=described[number]: {**row, "desc": text}, CUT)
    third.plant_faulty()
    lines = third.deal(rng)
    third.soil(lines, 2, "<p>{}</p>".format, HTML, SPACE)
    third.soil(lines, 2, "{}&nbsp;<b></b>".format, HTML, SPACE)
    third.soil(lines, 2, "{}...[详细]".format, LINK)
    fourth.plant(TEST, *(f"练习：{leaks['copied'].pop(0).as_text()}" for _ in range(2)))
    fourth.plant(TEST, *(f"练习：{reworded(leaks['reworded'].pop(0))}" for _ in range(2)))
    fourth.plant(VALIDATION, f"练习：{leaks['val'][0].as_text()}")

    entries = files["encyclopedia/questions.jsonl.gz"]
    one_answer = entries.deal(rng, lambda row: len(row["answers"]) == 1)
    copies = entries.take(one_answer, 3)
    entries.soil(one_answer, 2, lambda row: {**row, "answers": [f"<b>{row['answers'][0]}</b>"]}, HTML)
    entries.plant(EXACT, *copies)


def spoil_dialogues(rng: Random, files: dict[str, RawFile], leaks: dict[str, list[Exam]]) -> None:
    departments, blocks, chats = (file for name, file in files.items() if name.startswith("dialogues/"))
    rows = departments.deal(rng)
    copies = departments.take(rows, 2)
    departments.soil(rows, 3, lambda row: (*row[:3], f"{row[3]}{TELEPHONE}"), PHONE)
    departments.plant(EXACT, *copies)

    rows = blocks.deal(rng)
    alike = blocks.take(rows, 3)
    blocks.soil(rows, 2, partial(with_ending, ending="<br/>"), HTML, SPACE)
    blocks.plant(NEAR, *(with_ending(row, "！") for row in alike))

    short = chats.deal(rng, lambda row: len(row["conversations"]) == 2)
    long = chats.deal(rng, lambda row: len(row["conversations"]) > 2)
    same, alike = chats.take(short, 2), chats.take(long, 3)
    chats.soil(short, 2, partial(with_ending, ending=TELEPHONE), PHONE)
    chats.plant(EXACT, *same)
    chats.plant(NEAR, *(with_ending(row, "！") for row in alike))
    chats.plant_faulty()
    copied = [leaks["copied"].pop(0).as_text() for _ in range(2)]
    for question in (*copied, reworded(leaks["reworded"].pop(0))):
        chats.plant(TEST, chimed([f"请教一道题。{question}", "选第一项。"]))
    # What another source holds as well stays with the earlier one.
    asked = [row for row in departments.rows if len(row) == 4 and row[2] == "无" and row[3].endswith("。")]
    sound = [row for row in asked if TELEPHONE not in row[3] and departments.rows.count(row) == 1]
    chats.rows += [chimed([title, answer]) for _, title, _, answer in rng.sample(sound, 3)]
    departments.expect(EXACT, count=3, only="sft/department-qa")


def with_ending(row: Any, ending: str) -> Any:
    """A conversation, or a block's lines, with an ending to the last answer. Thanks at the end of a block do not count: the
    builder drops them, as nobody answers them."""
    if isinstance(row, dict):
        *before, last = row["conversations"]
        return {**row, "conversations": [*before, {**last, "value": last["value"] + ending}]}
    last = len(row) - (3 if row[-1] == "谢谢医生。" else 1)
    return (*row[:last], row[last] + ending, *row[last + 1 :])


def spoil_questions(rng: Random, files: dict[str, RawFile], leaks: dict[str, list[Exam]]) -> None:
    file = files["exams/train.csv"]
    rows = file.deal(rng)
    file.soil(rows, 1, lambda row: (*row[:3], "", *row[4:]), "no explanation", only="sft/exam-explanations")
    file.plant(EXACT, *file.take(rows, 1))
    for exam in leaks["copied"][:2]:
        options = exam.options[1:] + exam.options[:1]  # in another order, with the letter that belongs to it
        moved = Exam(exam.stem, options, (exam.right - 1) % len(LETTERS), exam.explanation, exam.facets)
        file.plant(TEST, moved.row())
    stem, options, answer, *more = file.rows[next(rows)]
    lines = options.split("\n")
    file.plant("empty option", (stem, "\n".join(["A", *lines[1:]]), answer, *more))
    file.plant("answer is not among the options", (stem, options, "F", *more), (stem, options, "G", *more))
    file.plant("no answer", (stem, options, "", *more))
    file.plant("doubled options", (stem, "\n".join([*lines[:4], f"E{lines[0][1:]}"]), "A", *more))


def spoil_preferences(rng: Random, files: dict[str, RawFile]) -> None:
    reward, several = files["preferences/reward.jsonl"], files["preferences/conversations.jsonl"]
    pairs = reward.deal(rng)
    same, alike = reward.take(pairs, 1), reward.take(pairs, 2)
    for row in reward.take(pairs, 2):  # the same pair in another layout
        question = {"from": "human", "value": row["question"]}
        pair = {"chosen": row["response_chosen"], "rejected": row["response_rejected"]}
        several.plant(EXACT, {"conversations": [question], **pair})
    reward.plant(EXACT, *same)
    reward.plant(NEAR, *({**row, "response_rejected": f"{row['response_rejected']}！"} for row in alike))
