import json
from dataclasses import replace

import pytest

from qilin_med.config.experiment import STAGES, DataSource
from qilin_med.data.read.formats.reading import UnusableRow
from qilin_med.data.read.readers import read_chats, read_documents, read_preferences
from qilin_med.data.render import from_row, render, stable_id, text_of, to_row
from qilin_med.prompt.wording import exam_answer, exam_prompt
from qilin_med.records import Chat, Document, Message, Preference, Question

OPTIONS = (("A", "能补、能缓"), ("B", "能泄、能坚"))
PROMPT = """返回限制：只返回两行。假设你是一位医疗行业专家，请回答下列问题，注意是单选题，只需要返回一个最合适的选项。
甘味的作用特点是
A 能补、能缓
B 能泄、能坚
注意，结果只有两行。第一行只需要返回答案的英文选项(注意只需要返回一个最合适的答案)，第二行进行简要的解释。输出格式限制为：“答案：”，“解释：”。
注意，题目是单选题，若有多个合适的答案，只返回最准确的即可。"""

SYSTEM = Message("system", "你是医生")
Q, A = Message("user", "发热怎么办"), Message("assistant", "多喝水")
Q2, A2 = Message("user", "还要吃药吗\n谢谢"), Message("assistant", "不用")

DOCUMENT = Document("d", "第一章\n\n发热")
SINGLE, MULTI = Chat("c", (Q, A)), Chat("m", (SYSTEM, Q, A, Q2, A2))
PAIR, LONG_PAIR = Preference("p", (Q,), "多喝水", "不知道"), Preference("q", (SYSTEM, Q, A, Q2), "不用", "要")
EXAM = Question("e", "甘味的作用特点是", OPTIONS, "A", "甘能补能缓。", (("科", "中医"),))
RECORDS = (DOCUMENT, SINGLE, MULTI, PAIR, LONG_PAIR, EXAM)


def test_the_exam_prompt_is_the_paper_s_to_the_byte():
    assert exam_prompt("甘味的作用特点是", OPTIONS) == PROMPT
    assert exam_answer("A", "甘能补能缓。") == "答案：A\n解释：甘能补能缓。"


def test_the_paper_s_sentences_stand_in_the_reference(shared):
    paper = (shared / "reference" / "paper.md").read_text(encoding="utf-8")
    head, _, *options, tail, last = PROMPT.splitlines()
    assert all(f"`{part}`" in paper for part in (head, options[0], tail, last))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (DOCUMENT, "第一章\n\n发热"),
        (SINGLE, "问：发热怎么办\n答：多喝水"),
        (Chat("s", (SYSTEM, Q, A)), "你是医生\n问：发热怎么办\n答：多喝水"),
        (MULTI, "你是医生\n患者：发热怎么办\n医生：多喝水\n患者：还要吃药吗\n谢谢\n医生：不用"),
        (EXAM, "甘味的作用特点是\nA 能补、能缓\nB 能泄、能坚\n答案：A\n解释：甘能补能缓。"),
        (replace(EXAM, explanation=""), "甘味的作用特点是\nA 能补、能缓\nB 能泄、能坚\n答案：A"),
    ],
)
def test_pretraining_takes_readable_text(record, text):
    assert render(record, "pretraining") == Document(record.id, text)


def test_sft_takes_chats_and_exam_questions():
    assert render(MULTI, "sft") == MULTI
    answer = Message("assistant", "答案：A\n解释：甘能补能缓。")
    assert render(EXAM, "sft") == Chat("e", (Message("user", PROMPT), answer))


def test_dpo_takes_preferences():
    assert render(LONG_PAIR, "dpo") == LONG_PAIR


@pytest.mark.parametrize(
    ("record", "stage", "reason"),
    [
        (PAIR, "pretraining", "a pair of answers is no text for pretraining"),
        (replace(EXAM, answer=""), "pretraining", "no answer"),
        (replace(EXAM, answer=""), "sft", "no answer"),
        (replace(EXAM, explanation=""), "sft", "no explanation"),
        (DOCUMENT, "sft", "running text is no conversation for sft"),
        (PAIR, "sft", "a pair of answers is no conversation for sft"),
        (DOCUMENT, "dpo", "no pair of answers for dpo"),
        (SINGLE, "dpo", "no pair of answers for dpo"),
        (EXAM, "dpo", "no pair of answers for dpo"),
    ],
)
def test_what_a_stage_cannot_use(record, stage, reason):
    with pytest.raises(UnusableRow) as error:
        render(record, stage)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("stage", "read", "records"),
    [
        ("pretraining", read_documents, [DOCUMENT]),
        ("sft", read_chats, [SINGLE, MULTI]),
        ("dpo", read_preferences, [PAIR, LONG_PAIR]),
    ],
)
def test_training_files_are_read_back_as_written(write_lines, stage, read, records):
    path = write_lines(*map(to_row, records))
    expected = [replace(record, id=f"{path}:{line}") for line, record in enumerate(records, 1)]
    assert list(read([DataSource(path=str(path))])) == expected
    assert [from_row(stage, json.loads(line)) for line in path.read_text().splitlines()] == records


def test_rows_have_the_layouts_of_chimed():
    assert to_row(DOCUMENT) == {"id": "d", "text": "第一章\n\n发热"}
    turns = [{"from": "input", "value": "发热怎么办"}, {"from": "output", "value": "多喝水"}]
    assert to_row(SINGLE) == {"id": "c", "conversations": turns}
    answers = {"response_chosen": "多喝水", "response_rejected": "不知道"}
    assert to_row(PAIR) == {"id": "p", "question": "发热怎么办", **answers}
    assert set(to_row(LONG_PAIR)) == {"id", "conversations", "chosen", "rejected"}
    with pytest.raises(TypeError, match="Question is no training record"):
        to_row(EXAM)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (DOCUMENT, "第一章\n\n发热"),
        (MULTI, "你是医生\n发热怎么办\n多喝水\n还要吃药吗\n谢谢\n不用"),
        (PAIR, "发热怎么办\n多喝水\n不知道"),
        (EXAM, "甘味的作用特点是\nA 能补、能缓\nB 能泄、能坚\n甘能补能缓。"),
        (Question("e", "为何", (), "A"), "为何"),
    ],
)
def test_text_of_a_record_is_all_of_it(record, text):
    assert text_of(record) == text


def test_stable_ids_tell_contents_not_places():
    ids = [stable_id("huatuo", record) for record in RECORDS]
    assert [stable_id("huatuo", replace(record, id="elsewhere:7")) for record in RECORDS] == ids
    assert len(set(ids)) == len(RECORDS)
    # An id must outlive versions: files that were written with it are compared by it.
    assert stable_id("huatuo", DOCUMENT) == "huatuo-8ca16d76fce83ca4"
    assert stable_id("other", DOCUMENT) == "other-8ca16d76fce83ca4"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SINGLE, Chat("c", (replace(Q, role="system"), A))),
        (PAIR, replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen)),
        (EXAM, replace(EXAM, answer="B")),
        (EXAM, replace(EXAM, options=OPTIONS[::-1])),
        (Document("", "ab"), Document("", "ab ")),
    ],
)
def test_every_part_counts_for_the_id(one, other):
    assert stable_id("s", one) != stable_id("s", other)


def test_every_stage_is_rendered():
    kinds = {stage: {type(render(record, stage)) for record in fitting} for stage, fitting in FITTING.items()}
    assert kinds == {"pretraining": {Document}, "sft": {Chat}, "dpo": {Preference}} and set(kinds) == set(STAGES)


FITTING = {"pretraining": (DOCUMENT, SINGLE, EXAM), "sft": (MULTI, EXAM), "dpo": (PAIR,)}
