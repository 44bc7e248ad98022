"""Is a question in some text the question of an exam? Not how much they share decides, but what is asked and answered.

Exams ask one thing of many subjects (of 肝硬化 and of 肝癌) and many things about one case. Such questions share most of
their words and are different all the same, while a leak may have lost an option or have another word. So stems are
aligned, and what they leave open is settled by the options and the answer.
"""

import re
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from qilin_med.data.folding import fold
from qilin_med.records import LETTER, LETTERS, MARK, AnyRecord, Chat, Document, Preference, Question

# Lengths are in folded characters, similarities are Indel ratios (0 to 1) of folded texts.
NEAR, NEARER = 0.8, 0.9
"""Similarity of two stems from which they are versions of one, if options and answer agree; if the answer alone does."""
ALL_BUT_ONE = 0.75
"""Share of the options that a copy of a question has left."""
ALTERED = 0.75
"""Least similarity of a question and itself with a word exchanged."""
BRIEF, SPECIFIC, TELLING, LONG = 5, 8, 10, 12
"""Lengths from which a text has a stem if the answer follows (a longer one if it asks something); a consultation's question
whatever the answer; one with a word changed; a stem that is no more than a term."""
ONE_WORD, SMALL_WORD = 0.25, 0.1
"""Share of a question, by the weight of its characters, that another word may take; in a stem without its options."""
LAST_WORDS = 10
NEARBY = 300
"""Length of text behind a stem in which its answer is looked for."""
ASKS = re.compile(
    "[的是为于有应哪何不属指用选]"
)  # a stem without any of these is a mere term, which every textbook has
ANY_ANSWER = re.compile("^(?:以上|上述|全部|[都均])")  # answers that fit many stems
# One organ or disease for another makes another question.
SUBJECT = re.compile("[心肝脾肺肾胃肠脑胆胰病炎癌瘤症疮疹毒]|硬化|梗")
NEVER_SUBJECT = 30
"""Length from which a question tells so much that one word does not make it another."""

START = rf"[(（]?({LETTER})(?:\s*{MARK}|\s|(?=[\u4e00-\u9fff]))\s*"
OPTIONS = (re.compile("^" + START, re.MULTILINE), re.compile(r"(?:^|(?<=[\s_。，、；：？,;:?）)]))" + START))
"""Before an option, in the order in which they are tried: at the beginnings of lines, after any mark or blank."""
FEWEST_OPTIONS = 3
LONGEST_QUESTION = 3000  # characters, with the explanation
MAY_HAVE_OPTIONS = re.compile("[CＣ]")  # a quick look
END_OF_OPTION = re.compile(r"\n|答案|注意|$")
ANSWER = re.compile(rf"(?:答案|故选|应选|选择?)\s*[是为]?\s*[:：]?\s*({LETTER}(?:[、,，\s]?{LETTER})*)(?![A-Za-z])")
BARE_ANSWER = re.compile(rf"^\s*({LETTER}+)\s*(?:[.．、:：。\s]|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, folded. `options`: their texts. `answer`: the text of the right ones, or the reply; "" if not told."""

    stem: str
    options: tuple[str, ...] = ()
    answer: str = ""


def asked_in(record: AnyRecord) -> Asked:
    """What a record asks: an exam question, the first turn of a conversation, or a text as it is."""
    match record:
        case Question(_, stem, options, answer):
            return _exam_question(stem, dict(options), answer)
        case Chat(_, messages):
            question, *answers = [message.content for message in messages if message.role != "system"]
            return Asked(fold(question), answer=fold("".join(answers)))
        case Preference(_, prompt):
            return Asked(fold(prompt[-1].content))
        case Document(_, text):
            return Asked(fold(text))


def _exam_question(stem: str, options: dict[str, str], letters: str) -> Asked:
    answer = "".join(fold(options[letter]) for letter in letters if letter in options)
    return Asked(fold(stem), tuple(map(fold, options.values())), answer)


def exam_in(text: str) -> Asked | None:
    """An exam question written out in a text: a stem, options behind the letters A, B, C, ..., and the answer if told."""
    if not MAY_HAVE_OPTIONS.search(text):
        return None
    marks = next(
        (marks for pattern in OPTIONS if len(marks := _letters_in_turn(pattern, text)) >= FEWEST_OPTIONS), None
    )
    if not marks:
        return None
    last = marks[-1].end()
    ends = [*(mark.start() for mark in marks[1:]), END_OF_OPTION.search(text, last).start()]
    options = {_plain(mark[1]): text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}
    told = ANSWER.search(text, last) or BARE_ANSWER.search(text, last)
    letters = _plain(told[1]) if told else ""
    return _exam_question(text[: marks[0].start()], options, letters)


def _letters_in_turn(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    marks: list[re.Match[str]] = []
    for mark in pattern.finditer(text):
        place = LETTERS.index(_plain(mark[1]))
        if place == len(marks):
            marks.append(mark)
        elif place == 0 and len(marks) < FEWEST_OPTIONS:
            marks = [mark]
    return marks


def question_in(text: str) -> Asked | None:
    """`exam_in` of a text that is one question, not a chapter with some."""
    return exam_in(text) if len(text) <= LONGEST_QUESTION else None


def _plain(letters: str) -> str:
    return fold(letters).upper()


# ----------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True, slots=True)
class Verdict:
    same: bool
    similarity: float
    """Of the stems; of an exam question a third is the share of its options that are found."""
    begin: int = 0
    """Where in the folded passage the stem is, or what comes nearest to it."""


def compare_exams(item: Asked, weights: np.ndarray, found: Asked) -> Verdict:
    """Compare an evaluation question that has options with another one. `weights`: see `one_word_changed`."""
    partial = fuzz.partial_ratio(item.stem, found.stem) if len(item.stem) <= len(found.stem) else 0
    stem = max(fuzz.ratio(item.stem, found.stem), partial) / 100
    shared = sum(_is_among(option, found.options) for option in item.options) / len(item.options)
    if not (item.answer and found.answer):
        reworded = stem == 1 or (stem >= ALTERED and one_word_changed(item.stem, weights, found.stem))
        same = shared >= 0.7 and reworded
    elif _agree(item.answer, found.answer):
        # One answer may be right for many subjects: with other options, the stem must be the same.
        tells_much = len(item.stem) >= SPECIFIC and not ANY_ANSWER.match(item.answer)
        same = (stem >= 0.6 and shared >= ALL_BUT_ONE) or (stem == 1 and shared >= (0 if tells_much else 0.5))
    else:  # a wrong key, an edited answer, or another question
        edited = not _is_among(item.answer, found.options) and fuzz.ratio(item.answer, found.answer) >= 40
        fewest = len(item.options) - edited
        same = stem == 1 and len(found.options) == len(item.options) and shared >= fewest / len(item.options)
    return Verdict(same, (2 * stem + shared) / 3)


def compare_text(item: Asked, weights: np.ndarray, text: str, folded: str, is_document: bool) -> Verdict:
    """Compare an evaluation item with a passage of running text (`is_document`) or of a conversation.

    `text`: the passage, `folded`: the same folded. `weights`: see `one_word_changed`.
    """
    if item.stem in folded:
        begin = folded.index(item.stem)
        stem, end = 1.0, begin + len(item.stem)
    elif len(folded) < len(item.stem):
        stem, begin, end = fuzz.ratio(item.stem, folded, score_cutoff=100 * ALTERED) / 100, 0, len(folded)
    else:
        found = fuzz.partial_ratio_alignment(item.stem, folded, score_cutoff=100 * ALTERED)
        if not found:
            return Verdict(False, 0.0)
        stem, begin, end = found.score / 100, found.dest_start, found.dest_end
    passage = folded[max(begin - 2, 0) : end + 2]
    if not item.options:
        if stem < 1:
            return Verdict(len(item.stem) >= TELLING and one_word_changed(item.stem, weights, passage), stem, begin)
        same = len(item.stem) >= SPECIFIC or (len(item.stem) >= BRIEF and item.stem in map(fold, text.split("\n")))
        return Verdict(same, stem, begin)
    behind = folded[end : end + NEARBY]
    listed = sum(len(option) > 1 and option in behind for option in item.options) / len(item.options)
    if listed >= ALL_BUT_ONE:  # options without letters
        return Verdict(True, stem, begin)
    answered = len(item.answer) > 1 and item.answer in behind
    if stem < 1:
        # Questions about one case differ in their last words.
        asked_last = fuzz.partial_ratio(item.stem[-LAST_WORDS:], folded[end - 2 * LAST_WORDS : end + LAST_WORDS]) / 100
        alike = stem >= NEARER and asked_last >= NEAR and len(item.stem) >= SPECIFIC
        same = answered and alike and one_word_changed(item.stem, weights, passage, SMALL_WORD)
        return Verdict(same, stem, begin)
    answered = answered and len(item.stem) >= BRIEF
    at_once = bool(item.answer) and behind.startswith(item.answer) and len(item.stem + item.answer) >= BRIEF
    telling = len(item.stem) >= LONG or (len(item.stem) > BRIEF and ASKS.search(item.stem) is not None)
    if not (answered or at_once or telling):
        return Verdict(False, 0.0)
    # A conversation that answers otherwise is about another question with this stem; a textbook need not answer at all.
    return Verdict(answered or at_once or is_document or not item.answer, 1.0, begin)


def one_word_changed(question: str, weights: np.ndarray, passage: str, most: float = ONE_WORD) -> bool:
    """Whether a passage has the question with a word exchanged that is not what the question is about.

    `weights`: for each character the mean of 1 / (evaluation items that share an n-gram) over its n-grams, so that what
    is asked of many subjects (的发病部位是什么) weighs little and the subject much.
    """
    lost = 0.0
    for is_equal, steps in groupby(Levenshtein.opcodes(question, passage), key=lambda step: step.tag == "equal"):
        first, *_, last = [*steps] * 2
        old, new = question[first.src_start : last.src_end], passage[first.dest_start : last.dest_end]
        if is_equal or (not old and first.src_start in (0, len(question))):  # what stands around it is no change
            continue
        if len(question) < NEVER_SUBJECT and SUBJECT.search(old) and SUBJECT.search(new):
            return False
        lost += weights[first.src_start : last.src_end].sum() if old else len(new) * weights[first.src_start] / 2
    return bool(lost <= most * weights.sum())


def _agree(left: str, right: str) -> bool:
    return left == right or (min(len(left), len(right)) >= BRIEF and fuzz.ratio(left, right) >= 85)


def _is_among(option: str, others: tuple[str, ...]) -> bool:
    return option in others or any(_agree(option, other) for other in others)
