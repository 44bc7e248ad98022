"""Which records repeat an evaluation question: what edits leave a question the same, and what makes it another."""

from dataclasses import replace

import pytest

from qilin_med.data.decontaminate import Index, write_index
from qilin_med.data.folding import fold, fold_all
from qilin_med.data.questions import exam_in
from qilin_med.records import Chat, Document, Message, Question

OPTIONS = (
    ("A", "肌酐值"),
    ("B", "淀粉酶值"),
    ("C", "胆红素类物质"),
    ("D", "卵磷脂与鞘磷脂比值"),
    ("E", "脂肪细胞出现率"),
)
LUNGS = Question("exam:1", "能反映胎儿肺成熟度的羊水检查指标是", OPTIONS, "D")
KIDNEYS = "能反映胎儿肾成熟度的羊水检查指标是"
DIET = Chat(
    "chat:1", (Message("user", "肝硬化腹水患者平时饮食应该注意些什么问题呢"), Message("assistant", "低盐饮食。"))
)
REST = "绪论部分介绍了本章的学习目标与重点。" * 20


def chat(question: str, answer: str) -> Chat:
    return Chat("c", (Message("user", question), Message("assistant", answer)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    write_index([("exams", LUNGS), ("chats", DIET)], 4, folder)
    index = Index(folder, 4, 0.85)

    def find(record) -> str | None:
        [hit] = index.find([record])
        return hit.item if hit and hit.same else None

    return find


def lettered(*texts: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip("ABCDE", texts, strict=False))


TEXTS = [text for _, text in OPTIONS]
LINES = "\n".join(f"{letter}. {text}" for letter, text in OPTIONS)
TRADITIONAL = ("肌酐值", "澱粉酶值", "膽紅素類物質", "卵磷脂與鞘磷脂比值", "脂肪細胞出現率")
SAME = {
    "verbatim": LUNGS,
    "punctuation": replace(LUNGS, stem="能反映胎儿肺成熟度的、羊水检查指标是：（ ）"),
    "traditional": replace(LUNGS, stem="能反映胎兒肺成熟度的羊水檢查指標是", options=lettered(*TRADITIONAL)),
    "full width": replace(LUNGS, stem="能反映胎儿肺成熟度的羊水检查指标是　（Ａ－Ｅ）"),
    "order": replace(LUNGS, options=lettered(*TEXTS[::-1]), answer="B"),
    "a wrong option dropped": replace(LUNGS, options=lettered(*TEXTS[1:]), answer="C"),
    "one word": replace(LUNGS, stem="能提示胎儿肺成熟度的羊水检查指标是"),
    "dialogue": chat(f"请问选什么？{LUNGS.stem}\n{LINES}", "答案：D"),
    "other order in a dialogue": chat(f"{LUNGS.stem} A.淀粉酶值 B.卵磷脂与鞘磷脂比值 C.肌酐值 D.胆红素类物质", "选B"),
    "answer's text": chat("能反映胎儿肺成熟度的羊水检查指标是什么？", "卵磷脂与鞘磷脂比值。"),
    "options without letters": Document("d", f"练习：能提示胎儿肺成熟度的羊水检查指标是：{'、'.join(TEXTS)}。{REST}"),
    "textbook": Document("d", f"{REST}能反映胎儿肺成熟度的羊水检查指标是卵磷脂与鞘磷脂比值。{REST}"),
}  # fmt: skip
OTHERS = {
    "another organ, the same options": replace(LUNGS, stem=KIDNEYS, answer="A"),
    "the same in a dialogue": chat(f"能反映胎儿肾成熟度的羊水检查指标是\n{LINES}", "答案：A"),
    "stem with another answer": chat("能反映胎儿肾成熟度的羊水检查指标是", "肌酐值"),
    "another organ, the same answer": replace(LUNGS, stem=KIDNEYS, options=lettered("雌三醇", *TEXTS[3:4], "尿素氮"), answer="B"),
    "the subject alone": Document("d", f"{REST}胎儿肺成熟度可以在羊水中检查。{REST}"),
    "the options alone": replace(LUNGS, stem="下列各项中，不由肝脏代谢的是"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_an_edited_question_is_found(found, kind):
    assert found(SAME[kind]) == "exam:1"


@pytest.mark.parametrize("kind", OTHERS)
def test_another_question_stays(found, kind):
    assert found(OTHERS[kind]) is None


@pytest.mark.parametrize(
    ("question", "same"),
    [
        ("肝硬化腹水患者平时饮食应该注意些什么问题呢", True),
        ("医生您好，我想问一下，肝硬化腹水患者平时饮食应该注意些什么问题呢？谢谢！", True),
        ("肝硬化腹水患者平时饮食应当注意些什么问题呢", True),
        ("肝癌腹水患者平时饮食应该注意些什么问题呢", False),
        ("肝硬化腹水患者平时应该做些什么检查", False),
        ("应该注意些什么问题呢", False),
    ],
)
def test_a_consultation_is_found_by_its_question_whatever_the_answer(found, question, same):
    assert found(chat(question, "建议到消化内科就诊。")) == ("chat:1" if same else None)


def test_a_near_miss_shows_the_question_beside_the_record(tmp_path):
    write_index([("exams", LUNGS)], 4, tmp_path)
    other = OTHERS["another organ, the same options"]
    [hit] = Index(tmp_path, 4, 0.85).find([other])
    # Of 17 characters of the stem one is another: 32 of 34 agree; all options do.
    assert (hit.same, hit.similarity) == (False, pytest.approx((2 * 32 / 34 + 1) / 3, abs=1e-4))
    assert hit.question.startswith(LUNGS.stem) and hit.passage.startswith(other.stem)


def test_folding_leaves_letters_and_digits_of_one_writing():
    assert fold("Ⅲ°腫大，５㎎／日；二十四小時！ FAD½") == "iii肿大5mg日2十4小时fad12"
    folded, places = fold_all(["㎎。a", "", "B"])
    assert folded.tobytes().decode("utf-32-le") == "mgab" and places.tolist() == [0, 0, 2, 3]


def test_exams_are_read_from_running_text():
    asked = exam_in("单选题：原发性B细胞缺陷见于\nA、甲病 B、乙病\nC、丙病 D、丁病\n答案：B、D。解释略")
    assert asked.options == ("甲病", "乙病", "丙病", "丁病") and asked.answer == "乙病丁病"
    grades = exam_in("妊娠毒性分级是\nA X级\nB A级\nC C级\nD B级\n答案：D")
    assert grades.options == ("x级", "a级", "c级", "b级") and grades.answer == "b级"
    ten = exam_in("\n".join(["选一项", *(f"{letter}、第{n}" for n, letter in enumerate("ABCDEFGHIJ")), "答案：J"]))
    assert len(ten.options) == 10 and ten.answer == "第9"
    assert exam_in("维生素A和维生素B的作用，C反应蛋白") is None
