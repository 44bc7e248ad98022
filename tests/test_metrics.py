"""Scores against values worked out by hand, and against the libraries' own."""

import math
from collections import Counter
from pathlib import Path

import evaluate
import jieba
import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sklearn.metrics import f1_score

from qilin_med.evaluate.metrics.statistics import (
    Score,
    accuracy,
    bootstrap_interval,
    choice_scores,
    exact_match,
    expected_calibration_error,
    mcnemar,
    mean_of_groups,
    mean_score,
    paired_bootstrap,
    weighted_f1,
)
from qilin_med.evaluate.metrics.text import corpus_bleu, score_text, split_text, text_scores

MODULE = str(Path(__file__).resolve().parents[1] / "qilin_med/evaluate/metrics/chinese_text")
PREDICTION, REFERENCE = "我头痛", "我头很痛"


def scores_of(*pairs):
    return {name: score.value() for name, score in text_scores([score_text(*pair) for pair in pairs]).items()}


# ---------------------------------------------------------------------------------------------------------- texts


def test_bleu_on_characters_by_hand():
    scores = scores_of((PREDICTION, REFERENCE))
    # 3 of 3 characters match; the prediction is short: exp(1 - 4/3). No 3-gram matches, so BLEU-4 is 0 unsmoothed.
    assert scores["bleu1_char"] == pytest.approx(100 * math.exp(-1 / 3))
    assert scores["bleu4_char"] == 0


def test_bleu4_on_characters_by_hand():
    # abcdX of abcde: precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty.
    assert scores_of(("一二三四六", "一二三四五"))["bleu4_char"] == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )


def test_repeated_characters_match_as_often_as_the_reference_has_them():
    assert scores_of(("痛痛痛痛", "头痛头痛"))["bleu1_char"] == pytest.approx(50)


def test_rouge_on_characters_by_hand():
    scores = scores_of((PREDICTION, REFERENCE))
    # Characters: 3 of 3 and 3 of 4. Pairs: 我头 of (我头, 头痛) and of (我头, 头很, 很痛). Longest common: 我头痛.
    assert scores["rouge1_char"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75, rel=1e-6)
    assert scores["rouge2_char"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), rel=1e-6)
    assert scores["rougeL_char"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75, rel=1e-6)


def test_words_are_jiebas():
    assert split_text("高血压患者 应当低盐饮食", "word")[1] == ["高血压", "患者", "应当", "低盐", "饮食"]
    scores = scores_of(("高血压患者饮食", "高血压患者应当低盐饮食"))
    assert scores["bleu1_word"] == pytest.approx(100 * math.exp(1 - 5 / 3))
    assert scores["rouge1_word"] == pytest.approx(100 * 2 * 1 * 0.6 / 1.6, rel=1e-6)
    assert scores["rouge2_word"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4), rel=1e-6)


def test_the_published_convention_by_hand():
    scores = scores_of((PREDICTION, REFERENCE))
    # ROUGE-L: precision 1, recall 3/4, beta 4/3; near the smaller of the two. The rest as on characters and on words.
    assert scores["rougeL_published"] == pytest.approx(100 * (1 + 16 / 9) * 0.75 / (16 / 9 + 0.75))
    assert scores["rouge2_published"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    # One of one distinct character, and one of two.
    assert scores_of(("痛痛痛痛", "头痛头痛"))["rouge1_published"] == pytest.approx(100 * 2 / 3)
    scores = scores_of(("高血压患者饮食", "高血压患者应当低盐饮食"))
    assert scores["bleu1_published"] == scores["bleu1_word"] == pytest.approx(100 * math.exp(1 - 5 / 3))
    # Blanks are taken out of answers; a reference's is a word more (6 for 5), and two empty characters (13 for 11).
    scores = scores_of(("高血压 患者饮食", "高血压患者 应当低盐饮食"))
    assert scores["bleu1_published"] == pytest.approx(100 * math.exp(1 - 6 / 3))
    recall = 7 / 13
    assert scores["rougeL_published"] == pytest.approx(100 * (1 + recall**2) * recall / (1 + recall**3))


def test_the_published_convention_as_transcribed_from_its_script():
    """The formulas of the script (google/seq2seq's rouge.py, google/nmt's bleu.py), loop by loop."""
    pairs = [
        (
            "本题考查高血压。高血压 患者应低盐饮食，低盐，低盐。\n故选A。",
            "本题考查高血压的饮食。\n患者应当低盐 饮食（A对）。",
        ),
        ("多喝水，多喝水，多喝水，多喝水", "应当多喝水，多休息。"),
        ("CT 检查", "首选CT检查，其次为 X线 检查。"),
        ("故应当低盐饮食", "故应当低盐饮食。"),
        ("好", "就诊"),
    ]
    grams = lambda tokens, n: [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]  # noqa: E731
    expected = {name: [] for name in ("rouge1_published", "rouge2_published", "rougeL_published")}
    for answer, reference in pairs:
        x, y = (" ".join(list(text)).split(" ") for text in (answer.replace(" ", ""), reference))
        for n in (1, 2):
            a, b = set(grams(x, n)), set(grams(y, n))
            p, r = len(a & b) / max(len(a), 1), len(a & b) / max(len(b), 1)
            expected[f"rouge{n}_published"].append(200 * p * r / (p + r + 1e-8))
        table = np.zeros((len(x) + 1, len(y) + 1), dtype=int)
        for i, j in np.ndindex(len(x), len(y)):
            table[i + 1, j + 1] = table[i, j] + 1 if x[i] == y[j] else max(table[i, j + 1], table[i + 1, j])
        p, r = table[-1, -1] / len(x), table[-1, -1] / len(y)
        beta = p / (r + 1e-12)
        expected["rougeL_published"].append(100 * (1 + beta**2) * r * p / (r + beta**2 * p + 1e-12))
    expected = {name: np.mean(values) for name, values in expected.items()}
    words = [(jieba.lcut(answer.replace(" ", "")), jieba.lcut(reference)) for answer, reference in pairs]
    for order in (1, 4):
        precisions = []
        for n in range(1, order + 1):
            both = [(Counter(grams(a, n)), Counter(grams(b, n))) for a, b in words]
            precisions.append(sum((a & b).total() for a, b in both) / sum(a.total() for a, _ in both))
        ratio = sum(len(a) for a, _ in words) / sum(len(b) for _, b in words)
        brevity = 1 if ratio > 1 else math.exp(1 - 1 / ratio)
        expected[f"bleu{order}_published"] = 100 * brevity * math.prod(precisions) ** (1 / order)
    found = {name: value for name, value in scores_of(*pairs).items() if name.endswith("_published")}
    assert found == pytest.approx(expected, rel=1e-6) and min(found.values()) > 1


def test_corpus_bleu_is_sacrebleus():
    pairs = [("发热三天伴咳嗽咽痛", "发热三天，伴有咳嗽、咽痛"), ("多喝水", "应当多喝水，多休息"), ("好", "就诊")]
    spaced = [[" ".join(text) for text in texts] for texts in zip(*pairs, strict=True)]
    for order in (1, 4):
        expected = BLEU(tokenize="none", max_ngram_order=order, smooth_method="none", force=True)
        found = corpus_bleu([score_text(*pair)[f"bleu{order}_char"] for pair in pairs])
        assert found == pytest.approx(expected.corpus_score(spaced[0], [spaced[1]]).score)
        assert found == pytest.approx(scores_of(*pairs)[f"bleu{order}_char"])


@pytest.mark.parametrize("pair", [("", "头痛"), ("  \n", "头痛"), ("头痛", ""), ("", "")])
def test_an_empty_text_scores_0(pair):
    assert set(scores_of(pair).values()) == {0}
    assert all(0 < score < 60 for name, score in scores_of(pair, (REFERENCE, REFERENCE)).items() if "rouge" in name)


@pytest.mark.parametrize(("name", "metrics"), [("bleu", 6), ("rouge", 9), (None, 15)])
def test_evaluate_loads_the_module_by_its_path(name, metrics, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = evaluate.load(MODULE, name).compute(predictions=[PREDICTION, ""], references=[REFERENCE, "头"])
    expected = scores_of((PREDICTION, REFERENCE), ("", "头"))
    assert found == {metric: pytest.approx(expected[metric]) for metric in found}
    assert len(found) == metrics


# --------------------------------------------------------------------------------------------------------- choices


def test_letters_match_as_sets():
    assert exact_match("BA", "AB") == 1
    assert [exact_match(answer, "AB") for answer in ("A", "ABC", "")] == [0, 0, 0]


def test_accuracy_apart_and_together():
    predicted, gold = ["A", "", "AB", "A", "C"], ["A", "B", "AB", "AC", "C"]
    scores = {name: score.value() for name, score in choice_scores(predicted, gold).items()}
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["accuracy_single"] == pytest.approx(2 / 3)
    assert scores["accuracy_multiple"] == pytest.approx(1 / 2)


def test_weighted_f1_by_hand_and_as_scikit_learns():
    predicted, gold = ["A", "A", "B", ""], ["A", "B", "B", "B"]
    # A: precision 1/2, recall 1, F1 2/3, weight 1/4. B: precision 1, recall 1/3, F1 1/2, weight 3/4.
    assert weighted_f1(predicted, gold).value() == pytest.approx(2 / 3 / 4 + 3 / 8)
    random = np.random.default_rng(0)
    predicted, gold = (random.choice(["A", "B", "CD", ""], 200).tolist() for _ in range(2))
    expected = f1_score(gold, predicted, average="weighted", zero_division=0)
    assert weighted_f1(predicted, gold).value() == pytest.approx(expected)


def test_mean_of_groups_weighs_groups_alike():
    assert mean_of_groups([1, 1, 1, 0], ["x", "x", "x", "y"]).value() == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------- significance


def test_mcnemar_by_hand():
    first, second = [0] * 8 + [1] * 1 + [1] * 5, [1] * 8 + [0] * 1 + [1] * 5
    # 8 gained, 1 lost: 2 x (1 + 9) / 2^9
    assert mcnemar(first, second) == {"difference": 0.5, "gained": 8, "lost": 1, "p": pytest.approx(20 / 512)}
    assert mcnemar([1, 0], [1, 0])["p"] == 1
    assert mcnemar([0] * 5, [1] * 5)["p"] == pytest.approx(2 / 32)


@pytest.mark.parametrize(("right", "questions"), [(0, 10), (5, 10), (10, 10), (2724, 6811)])
def test_a_share_of_questions_has_wilsons_interval(right, questions):
    share, z = right / questions, 1.959963984540054
    centre = (share + z**2 / (2 * questions)) / (1 + z**2 / questions)
    half = z / (1 + z**2 / questions) * math.sqrt(share * (1 - share) / questions + z**2 / (4 * questions**2))
    found = mean_score([1] * right + [0] * (questions - right)).with_interval()
    assert found == pytest.approx({"value": share, "low": max(centre - half, 0), "high": min(centre + half, 1)})


def test_other_scores_have_bootstrap_intervals():
    for score in (mean_score([0, 1, 0.5]), mean_of_groups([1, 0, 1], ["x", "x", "y"])):
        assert score.interval() == bootstrap_interval(score)


def test_calibration_by_hand():
    # Edges belong below: 0.5 to (0.4, 0.5]. Distances: |0.45 - 1/2| of two, |0.95 - 1/3| of three.
    found = expected_calibration_error([0.4 + 1e-9, 0.5, 0.9 + 1e-9, 1.0, 0.95], [0, 1, 0, 1, 0])
    assert found["ece"] == pytest.approx((2 * 0.05 + 3 * (0.95 - 1 / 3)) / 5)
    assert found["bins"] == [
        pytest.approx({"low": 0.4, "high": 0.5, "confidence": 0.45, "accuracy": 0.5, "questions": 2}),
        pytest.approx({"low": 0.9, "high": 1.0, "confidence": 0.95, "accuracy": 1 / 3, "questions": 3}),
    ]
    assert expected_calibration_error([1.0, 1.0], [1, 1], bins=4)["ece"] == 0


def test_bootstrap_interval_is_about_two_standard_errors_wide_and_repeats():
    score = mean_score([1] * 400 + [0] * 600)
    low, high = bootstrap_interval(score)
    error = math.sqrt(0.4 * 0.6 / 1000)
    assert (low, high) == pytest.approx((0.4 - 1.96 * error, 0.4 + 1.96 * error), abs=0.004)
    assert bootstrap_interval(score) == (low, high)
    assert bootstrap_interval(score, seed=1) != (low, high)


def test_an_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(mean_score([0.25] * 10)) == pytest.approx((0.25, 0.25))


def test_bootstrap_of_two_questions_by_hand():
    # Means of two draws of (0, 1): 0 in 1/4, 1/2 in 1/2, 1 in 1/4 of the resamples.
    assert bootstrap_interval(mean_score([0, 1])) == (0, 1)
    assert bootstrap_interval(mean_score([0, 1]), level=0.4) == (0.5, 0.5)


def test_paired_bootstrap():
    random = np.random.default_rng(0)
    first = random.normal(size=300)
    better = paired_bootstrap(mean_score(first), mean_score(first + 0.2 + 0.3 * random.normal(size=300)))
    assert better["low"] < better["difference"] < better["high"]
    assert better["difference"] == pytest.approx(0.2, abs=0.06)
    assert better["p"] == pytest.approx(1 / 1001)
    same = paired_bootstrap(mean_score(first), mean_score(first))
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_paired_bootstrap_needs_the_same_questions():
    with pytest.raises(ValueError, match="same questions: found 2 and 3"):
        paired_bootstrap(mean_score([0, 1]), mean_score([0, 1, 1]))


def test_bootstrap_of_a_ratio():
    score = Score(np.array([[1.0, 2.0], [3.0, 4.0]]), lambda means: means[..., 0] / means[..., 1])
    assert score.value() == pytest.approx(4 / 6)
    assert bootstrap_interval(score) == pytest.approx((0.5, 0.75))


def test_accuracy_needs_as_many_answers_as_questions():
    with pytest.raises(ValueError):
        accuracy(["A"], ["A", "B"])
