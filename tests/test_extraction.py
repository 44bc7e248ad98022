"""Letters out of what models write, and what is no letter."""

from collections import Counter

import pytest
from reading import records

from qilin_med.evaluate.extraction import NEGATIVE, ceval_answer, extract_letters, first_capitals, split_explanation
from qilin_med.records import Question

DRUGS = (("A", "青霉素"), ("B", "头孢曲松"), ("C", "维生素C"), ("D", "阿司匹林"), ("E", "地高辛"))
TESTS = (("A", "CT检查"), ("B", "B超检查"), ("C", "X线胸片"), ("D", "磁共振"), ("E", "T细胞亚群"))
LUNGS = (("A", "肺炎"), ("B", "支气管肺炎"), ("C", "肺结核"), ("D", "肺癌"), ("E", "以上都不是"))
FOUR = (("A", "甲"), ("B", "乙"), ("C", "丙"), ("D", "丁"))

# (output, letters) for questions with the options DRUGS
OUTPUTS = [
    # The form that the prompt asks for, and what becomes of it
    ("答案：A\n解释：青霉素是首选。", "A"),
    ("答案：A。", "A"),
    ("答案:B", "B"),
    ("答案： C\n解释：因为……", "C"),
    ("答案：D、阿司匹林\n解释：略", "D"),
    ("答案：A C\n解释：略", "AC"),
    ("答案：ABD", "ABD"),
    ("答案：A、C、E。", "ACE"),
    ("答案：C、A", "AC"),
    ("答案：A和D", "AD"),
    ("答案：A,B,C,D,E", "ABCDE"),
    ("答案：ＡＤ", "AD"),
    ("答案：Ｂ．头孢曲松", "B"),
    ("答案：（E）", "E"),
    ("答案：(A)(C)", "AC"),
    ("答案：**B**", "B"),
    ("**答案：** D", "D"),
    ("【答案】B", "B"),
    ("【答案】：C。【解析】本题考查……", "C"),
    ("[答案] E\n[解析] 地高辛……", "E"),
    ("答案：“D”", "D"),
    ("答案：选项A", "A"),
    ("答案：选B", "B"),
    ("答案：\nB", "B"),
    ("答案：c", "C"),
    ("答案: b.", "B"),
    ("答案：$\\boxed{D}$", "D"),
    # Sentences
    ("答案是A", "A"),
    ("答案是A。因为青霉素……", "A"),
    ("答案应为B。", "B"),
    ("答案为C，理由如下。", "C"),
    ("正确答案为 A、C", "AC"),
    ("正确答案是：E. 地高辛", "E"),
    ("本题的正确选项是D。", "D"),
    ("最合适的选项是B。", "B"),
    ("选A", "A"),
    ("选C。", "C"),
    ("本题选D。", "D"),
    ("故选E。", "E"),
    ("应选B", "B"),
    ("我会选择A，因为它对革兰阳性菌有效。", "A"),
    ("我认为应该选择 C 选项。", "C"),
    ("选项D是正确的。", "D"),
    ("B正确。", "B"),
    ("A、D正确，其余错误。", "AD"),
    ("B项正确，A项错误。", "B"),
    ("选项A错误，选项B正确，选项C错误。", "B"),
    ("青霉素（A对）过敏者可用头孢曲松（B错），有维生素C（C错）。", "A"),
    # The letter first
    ("A", "A"),
    ("a", "A"),
    ("B.", "B"),
    ("C、", "C"),
    ("A、青霉素", "A"),
    ("D 阿司匹林", "D"),
    ("E. 地高辛\n解释：……", "E"),
    ("(A)", "A"),
    ("（B）头孢曲松", "B"),
    ("A C", "AC"),
    ("A,C", "AC"),
    ("ABD", "ABD"),
    ("B\n青霉素过敏者可用。", "B"),
    ("A. 青霉素\nD. 阿司匹林", "AD"),
    ("选项E", "E"),
    # The letter last
    ("该患者青霉素过敏，头孢类可考虑，因此答案是B。", "B"),
    ("先排除A，再排除C，综上所述，本题答案为D", "D"),
    ("有人认为答案是A，但考虑到心衰，最终答案是E。", "E"),
    ("患者心率快，应控制心室率。\n\nE", "E"),
    ("A选项不对，B选项不对，所以选C", "C"),
    ("不选A，选D。", "D"),
    # English
    ("The answer is B", "B"),
    ("The correct answer is (C).", "C"),
    ("Answer: D", "D"),
    ("answer: c", "C"),
    ("The correct option is E. Digoxin ...", "E"),
    ("The best choice would be A because ...", "A"),
    # Only the text of an option
    ("阿司匹林", "D"),
    ("答案：地高辛", "E"),
    ("本例应首先使用青霉素治疗。", "A"),
    ("头孢曲松\n解释：青霉素过敏。", "B"),
    ("维生素C", "C"),
    ("答案：维生素C", "C"),
    # Letters that are none, and no answer
    ("", ""),
    ("   \n", ""),
    ("建议做CT检查。", ""),
    ("CT", ""),
    ("X线", ""),
    ("患者血型为A型血，可以输血。", ""),
    ("A型血的人不能输B型血。", ""),
    ("B超提示胆囊结石。", ""),
    ("B 超提示胆囊结石。", ""),
    ("HBsAg阳性提示乙肝。", ""),
    ("T细胞减少，B细胞正常。", ""),
    ("B细胞产生抗体。", ""),
    ("CEA升高见于结肠癌。", ""),
    ("CEA", ""),
    ("ACE抑制剂可用于高血压。", ""),
    ("选ACE抑制剂。", ""),
    ("维生素A缺乏导致夜盲，维生素D缺乏导致佝偻病。", ""),
    ("补充维生素B和维生素E。", ""),
    ("DNA和RNA", ""),
    ("G", ""),
    ("答案：F", ""),
    ("答案：", ""),
    ("作为一个AI语言模型，我无法回答这个问题。", ""),
    ("抱歉，我不能提供医疗建议，请咨询医生。", ""),
    ("A 青霉素\nB 头孢曲松\nC 维生素C\nD 阿司匹林\nE 地高辛", ""),
    ("A. 青霉素\nB. 头孢曲松\nC. 维", ""),
    ("青霉素和阿司匹林都可以使用。", ""),
    ("A patient with fever should rest.", ""),
    ("a patient with fever", ""),
    ("I cannot answer this question.", ""),
    ("返回限制：只返回两行。", ""),
]  # fmt: skip


@pytest.mark.parametrize(("output", "letters"), OUTPUTS)
def test_letters_are_found(output, letters):
    assert extract_letters(output, DRUGS) == letters


@pytest.mark.parametrize(
    ("output", "options", "letters"),
    [
        ("首选CT检查。", TESTS, "A"),
        ("B超检查", TESTS, "B"),
        ("答案：B超检查", TESTS, "B"),
        ("B 超检查", TESTS, ""),
        ("B B超检查", TESTS, "B"),
        ("C X线胸片", TESTS, "C"),
        ("X线胸片", TESTS, "C"),
        ("E、T细胞亚群", TESTS, "E"),
        ("支气管肺炎", LUNGS, "B"),
        ("考虑支气管肺炎。", LUNGS, "B"),
        ("不是肺炎", LUNGS, ""),
        ("肺结核和肺癌", LUNGS, ""),
        ("答案：E", FOUR, ""),
        ("答案：D\n解释：甲乙丙均不对", FOUR, "D"),
    ],
)
def test_letters_are_found_with_other_options(output, options, letters):
    assert extract_letters(output, options) == letters


# (output, letters where the question asks for the wrong one, where it asks for the right one)
EITHER_WAY = [
    ("错误的选项是C，因为维生素C不是抗生素。选项A是正确的。", "C", "A"),
    ("不正确的选项是C。A项正确。", "C", "A"),
    ("C错误，A正确。", "C", "A"),
    ("选项A是正确的，选项C是错误的。", "C", "A"),
    ("A、B、D正确，C错误。", "C", "ABD"),
    ("A是正确的。\nB是正确的。\nC是错误的。", "C", "A"),
    ("C选项的说法有误，D选项正确。", "C", "D"),
    ("说法错误的是D，B正确。", "D", "B"),
    ("其中不属于抗生素的是D，选项A正确。", "D", "A"),
    ("不包括E，选项A是正确的。E不属于抗生素。", "E", "A"),
    ("C不符合题意，选A。", "A", "A"),
    ("A错误，B错误，C错误，D正确。", "D", "D"),
    ("正确的选项是A、B、D，错误的选项是C。", "C", "ABD"),
    ("维生素C是错误的。", "C", ""),
    ("不是阿司匹林。", "D", ""),
    # The answer itself is said before all else.
    ("答案：C\n解释：A项正确，B项正确。", "C", "C"),
    ("答案：B。A错误。", "B", "B"),
    ("故本题答案为D，A错误。", "D", "D"),
    ("A正确，故选C。", "C", "A"),
    ("C", "C", "C"),
    ("C. 维生素C\n解释：不是抗生素。", "C", "C"),
]  # fmt: skip


@pytest.mark.parametrize(
    "stem",
    [
        "下列说法不正确的是",
        "关于抗生素，下列叙述错误的是（　）",
        "下列均为抗生素，除外",
        "抗生素不包括",
        "患者青霉素过敏，下列哪项不属于抗生素？",
        "Which of the following drugs is an antibiotic, EXCEPT:",
    ],
)
@pytest.mark.parametrize(("output", "wrong", "_"), EITHER_WAY)
def test_questions_for_the_wrong_one(stem, output, wrong, _):
    assert extract_letters(output, DRUGS, stem) == wrong


@pytest.mark.parametrize(
    "stem",
    [
        "下列说法正确的是",
        "患者不能平卧，不应运动，首选的药物是",
        "该患者消化不良，两侧面部不对称。最可能的病因是____。",
        "每日摄入量不应超过",
        "",
    ],
)
@pytest.mark.parametrize(("output", "_", "right"), EITHER_WAY)
def test_questions_for_the_right_one(stem, output, _, right):
    assert extract_letters(output, DRUGS, stem) == right


@pytest.mark.parametrize(
    ("output", "capitals", "ceval"),
    [
        ("A", "A", "A"),
        (" B。因为A", "B", ""),  # C-Eval's rule: two letters, and none of its words before one
        ("B。", "B", "B"),
        ("AB", "AB", "A"),
        ("BA", "", "B"),
        ("做CT，选择B", "", "B"),
        ("让我们一步一步思考，A错。所以答案是C。", "C", "C"),
        ("所以答案是甲。选D", "D", "D"),
        ("A或B，答案是C", "A", "C"),
        ("选 D", "D", "D"),
        ("B是正确的，选项A不对", "B", "B"),
        ("应该是乙", "B", "B"),
        ("甲或乙", "", ""),
        ("", "", ""),
    ],
)
def test_the_rules_of_the_published_scripts(output, capitals, ceval):
    assert (first_capitals(output, FOUR), ceval_answer(output, FOUR)) == (capitals, ceval)


def test_the_table_is_large_enough():
    assert len(OUTPUTS) >= 60
    assert len({output for output, _ in OUTPUTS}) == len(OUTPUTS)


@pytest.mark.parametrize(
    ("output", "explanation"),
    [
        ("答案：A\n解释：青霉素是首选。", "青霉素是首选。"),
        ("答案:A\n解释:①青霉素；②ＣＴ。", "①青霉素；②ＣＴ。"),
        ("答案：A。青霉素是首选。", "青霉素是首选。"),
        ("青霉素是首选。", "青霉素是首选。"),
        ("答案：A\n解释：", ""),
        ("", ""),
    ],
)
def test_explanations_are_split_off(output, explanation):
    assert split_explanation(output) == explanation


def test_explanations_by_experts_name_the_right_answer(shared):
    """CMExam's own ("……是麝香（D对）"), where they name any: questions for the wrong one, and all others."""
    counts = Counter()
    for question in records("exam", shared / "data/cmexam/val.xlsx"):
        if isinstance(question, Question) and question.explanation:
            kind = bool(NEGATIVE.search(question.stem[-12:]))
            letters = extract_letters(question.explanation, question.options, question.stem)
            counts[kind, "asked"] += 1
            counts[kind, "found"] += bool(letters)
            counts[kind, "right"] += letters == question.answer
    for kind, found, right in ((True, 0.8, 0.94), (False, 0.93, 0.97)):
        assert counts[kind, "asked"] > 300 and counts[kind, "found"] / counts[kind, "asked"] > found
        assert counts[kind, "right"] / counts[kind, "found"] > right
