"""The answer letters out of what a model wrote: which options it chose, or none.

Rules are tried from the most to the least explicit, and the first that finds letters of the question's options decides.
A letter counts only where it stands for an option: never inside a word or term (CT, X线, A型血, 维生素C, B超, T细胞).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

Options = Sequence[tuple[str, str]]

OPEN = r"[\s*\"'“‘「『《(\[{<【$:]*"
RUN = r"(?<![A-Za-z0-9])([A-Ja-j](?:[ \t,、;/和及与&+]*[A-Ja-j])*)(?![A-Za-z0-9])"
IS = r"(?:应该|应当|应|就|便)?(?:选择|选|是|为|[:】\]])?"
ANSWER = re.compile(
    rf"(?:答案|(?:正确|最佳|最合适|最恰当|最准确|符合题意)的?(?:选项|选择|一项))(?:[)】\]*]*){IS}(?:选项|选择|选)?{OPEN}{RUN}"
)
FINAL = re.compile(rf"(?:最终|综上|因此|所以|故)[^\n。;]{{0,16}}?{ANSWER.pattern}")
ENGLISH = re.compile(
    rf"(?:answer|choice|correct option)\b[*]*(?:\s*(?:is|should be|would be|[:=]))+\s*(?:option|choice)?{OPEN}{RUN}",
    re.IGNORECASE,
)
CHOOSE = re.compile(
    rf"(?<![不勿未误没可备筛])(?<!不应|不能|不可|不宜|不该|排除)(?:应选|故选|选择|选)(?:项|择|的?是|为|了|[:])?(?:选项)?{OPEN}{RUN}"
)
ONLY = re.compile(rf"{OPEN}(?:选项)?{RUN}")
CORRECT = re.compile(
    rf"{RUN}\s*(?:选?项)?(?:均|都|是|为)?(?:正确|对(?![于症照称应抗])|符合题意|最(?:合适|准确|恰当|佳))"
)
# Questions that ask for the wrong one, in their last clause, and how answers to them name it.
NEGATIVE = re.compile(
    r"错误|有误|除.{0,4}外|例外|无关|没有|不(?:正确|恰当|准确|妥|对(?!称)|符|属|包|是|应(?!超)|宜|能|会|可能|需|必|具|支持|存在|含|参与"
    r"|适[当宜用])|\b(?:except|not|incorrect|false|wrong|least)\b",
    re.IGNORECASE,
)
CLAUSE_ENDS = re.compile(r"[。，,;；:：?？()（）_]+")
GIVEN = re.compile(rf"答案(?:[)】\]*]*){IS}{OPEN}{RUN}")
PICKED = re.compile(CHOOSE.pattern.replace("|选)", "|选(?!项))"))
SAYS = r"\s*(?:选?项)?(?:的(?:说法|叙述|描述|表述))?(?:均|都|是|为)?"
ODD = r"(?:错|有误|不正确|不对|不恰当|不准确|不妥|不符合?(?!题意)|不属于|不包括|不是|不能|不应|不宜|除外|例外)"
# A comma may begin what is said of the next letter: "错误的是D，B正确".
LIST = RUN.replace(r"[ \t,", r"(?:,(?!\s*[A-J][^,。\n]{0,6}(?:正确|错|不|符)))?[ \t", 1)
NAMED_WRONG = re.compile(
    rf"{ODD}[^\n。;,A-Ja-j]{{0,12}}?的?(?:选项|说法|一项|叙述|描述|表述|答案|[是为:])(?:应该|应|就)?[是为:]?(?:选项)?{OPEN}{LIST}"
)
CALLED_WRONG = re.compile(rf"{RUN}{SAYS}{ODD}")
BRACKETED = re.compile(r"[(\[【]\s*([A-Ja-j])\s*[)\]】]")
LISTED = re.compile(r"^\W*([A-J])(?:[.、:)]|\s)\s*\S", re.MULTILINE)
ANSWER_LINE = re.compile(r"^\s*[【\[]?答案[】\]]?\s*[:：]?[A-JＡ-Ｊ、，,\s]+(?:[。.]|\n|$)")
LAST_LINE = re.compile(rf"^{OPEN}{RUN}[^\w\n]*\Z", re.MULTILINE)
EXPLANATION = re.compile(r"解释|解析|explanation", re.IGNORECASE)
CHAINED = re.compile("所以答案是(.+?)。")
CEVAL = "*是正确的 选项*正确 答案为* 答案是* 答案* 选择* 答案：* 答：* 选择答案*".replace("*", "([ABCD])").split()
SHORTER = re.compile(r"(.*[A-Ja-j])[ \t,、;/和及与&+]+[A-Ja-j]")

PUNCTUATION = re.compile(r"$|[\n,.:;、。!?)\]}】\"'”’》」』*|$<\\]")
AFTER = re.compile(r"选项|项|正确|是|为|对|因|吧|最|的")
# What makes a term of the letter before it.
TERM = re.compile(
    r"型|超|线|细胞|族|类|级|期|区|波|肽|链|抗原|抗体|受体|蛋白|淋巴|肝|段|点|值|组|照|光|片|染色体|病毒|群|因子|亚型|溶血|胺|峰|环"
)
WRONG = re.compile(rf"{SAYS}(?:错|不正确|不对|有误|不符|不合)")
RIGHT = re.compile(rf"{SAYS}(?:正确|对(?![于症照称应抗])|属于|包括|符合(?!题意)|不符合题意)")


def extract_letters(output: str, options: Options, stem: str = "") -> str:
    """The chosen letters in order ("A", "BD"), "" if the output names none; `options` are (letter, text).

    `stem`: the question. Where it asks for the wrong option, one that the output calls wrong is its answer."""
    # A bracketed letter keeps a blank on each side, so that "(A)(C)" is a run of letters.
    text = unicodedata.normalize("NFKC", output).replace("\\boxed", "").replace("\\text", "")
    text = BRACKETED.sub(r" \1 ", text).strip()
    last_clause = next((clause for clause in reversed(CLAUSE_ENDS.split(stem)) if clause.strip()), "")
    readings = chain(
        _readings(text, options, RIGHT) if NEGATIVE.search(last_clause) else (),
        _readings(NAMED_WRONG.sub("", text), options, WRONG),  # what is named as wrong, only if there is no other
        _readings(text, options, WRONG),
    )
    return "".join(sorted(next(filter(None, readings), "")))


def _readings(text: str, options: Options, denied: re.Pattern[str]) -> Iterator[Iterable[str]]:
    """The letters by each rule. `denied`: what stands behind one that is not chosen, RIGHT where the wrong one is asked for."""
    explicit = (FINAL, GIVEN, NAMED_WRONG, ANSWER, ENGLISH) if denied is RIGHT else (FINAL, ANSWER, ENGLISH)
    yield from (_first(pattern, text, options, denied) for pattern in explicit)
    yield _at_start(text, options, denied)
    if denied is RIGHT:
        yield _first(PICKED, text, options, denied)
        yield _odd_ones(text, options)
    yield _first(CHOOSE, text, options, denied)
    yield _all(CORRECT, text, options, WRONG)
    yield _first(LAST_LINE, text, options, denied)
    yield _by_text(text, options, denied)


def split_explanation(output: str) -> str:
    """The explaining part of an answer in two parts ("答案：...", "解释：..."): after the second mark, else all of it
    but the answer at its start."""
    before, *explanation = re.split(r"解释\s*[:：]", output, maxsplit=1)
    return (explanation[0] if explanation else ANSWER_LINE.sub("", before)).strip()


def first_capitals(output: str, options: Options) -> str:
    """By the rule of the paper's own script for CMExam: "所以答案是...。", else the first run of capitals, whatever it stands
    for (one that is no set of options in order is never right, and is "" here), else the only option quoted."""
    if (chained := CHAINED.findall(output)) and chained[-1] in dict(options):
        return chained[-1]
    if run := re.search("[A-Z]+", output):
        return run[0] if run[0] == "".join(letter for letter, _ in options if letter in run[0]) else ""
    return _only_quoted(output, [(letter, text.split(" ")[0]) for letter, text in options])


def ceval_answer(output: str, options: Options) -> str:
    """By the rule of the paper's own script for C-Eval, which reads "答：" before what the model wrote."""
    text = f"答：{output}".strip()
    if (chained := CHAINED.findall(text)) and chained[-1] in dict(options):
        return chained[-1]
    if named := next(filter(None, (re.search(form, text) for form in CEVAL)), None):
        return named[1]
    letters = re.findall("[ABCD]", text)
    return letters[0] if len(letters) == 1 else _only_quoted(text, options)


def _only_quoted(text: str, options: Options) -> str:
    quoted = [letter for letter, option in options if option in text]
    return quoted[0] if len(quoted) == 1 else ""


def _first(pattern: re.Pattern[str], text: str, options: Options, denied: re.Pattern[str]) -> str:
    """Letters of the first match whose run stands for options."""
    return next(filter(None, (_letters(match, options, denied) for match in pattern.finditer(text))), "")


def _all(pattern: re.Pattern[str], text: str, options: Options, denied: re.Pattern[str]) -> set[str]:
    return {letter for match in pattern.finditer(text) for letter in _letters(match, options, denied, strict=False)}


def _odd_ones(text: str, options: Options) -> set[str]:
    """Letters called wrong, or those called right where they are fewer: "A、B、C错误，D正确" answers by D."""
    wrong, right = _all(CALLED_WRONG, text, options, RIGHT), _all(CORRECT, text, options, WRONG)
    return right if 0 < len(right) < len(wrong) else wrong


def _at_start(text: str, options: Options, denied: re.Pattern[str]) -> str:
    """An output that begins with its answer, unless it lists the options again."""
    listed = [letter for letter in LISTED.findall(text) if letter in dict(options)]
    if len(listed) > 1:
        is_restated = listed == [letter for letter, _ in options][: len(listed)] or len(set(listed)) < len(listed)
        return "" if is_restated else "".join(listed)
    match = ONLY.match(text)
    if not match or (match[1].islower() and not re.match(r"[.、:)。]|\s*$", text[match.end(1) :])):
        return ""  # "a patient" is no answer
    return _letters(match, options, denied)


def _by_text(text: str, options: Options, denied: re.Pattern[str]) -> str:
    """The letter of the only option whose text is quoted before any explanation."""
    answer = EXPLANATION.split(text)[0]
    whole = re.sub(r"^\W*(?:答案)?\W*|\W+$", "", answer)
    texts = {letter: unicodedata.normalize("NFKC", option).strip() for letter, option in options}
    if equal := [letter for letter, option in texts.items() if option == whole]:
        return equal[0] if len(equal) == 1 else ""
    quoted = {letter: option for letter, option in texts.items() if len(option) > 1 and option in answer}
    # "肺炎" within "支气管肺炎" is not quoted on its own.
    longest = [a for a, x in quoted.items() if not any(a != b and x in y for b, y in quoted.items())]
    if len(longest) != 1:
        return ""
    before, _, after = answer.partition(quoted[longest[0]])
    is_excluded = denied is WRONG and re.search(r"(?:不是|不选|不应|排除|并非|而非)\W*$", before)
    return "" if is_excluded or denied.match(after) else longest[0]


def _letters(match: re.Match[str], options: Options, denied: re.Pattern[str], strict: bool = True) -> str:
    """The option letters of a match's run, "" where they do not stand for options; shorter runs are tried too.

    `strict`: what follows the run must leave it an answer, and be no end of a term that begins with the letter.
    """
    run, texts = match[1], dict(options)
    if denied.match(match.string, match.end(1)):
        run = run.rpartition(",")[0].rstrip()  # "D，A错误"
    while run:
        rest = match.string[match.start(1) + len(run) :]
        letters = re.sub(r"[^A-J]", "", run.upper())
        is_set = len(set(letters)) == len(letters) and set(letters) <= set(texts)
        # "CEA" or "BAD" is a word: answers come in order. Apart ("C、A") any order will do.
        is_word = len(letters) > 1 and letters in run.upper() and letters != "".join(sorted(letters))
        if is_set and not is_word and not (strict and _goes_on(rest, texts[letters[-1]])):
            return letters
        shorter = SHORTER.fullmatch(run)
        run = shorter[1] if shorter else ""
    return ""


def _goes_on(rest: str, option: str) -> bool:
    """Whether what follows a letter makes it the beginning of a term or word, unless it is the letter's own option."""
    after = rest.lstrip(" \t")
    own = unicodedata.normalize("NFKC", option).strip()
    if (own and after.lstrip(".、:-) \t").startswith(own[:4])) or PUNCTUATION.match(rest):
        return False
    if after != rest and rest[:1].isspace():
        return bool(TERM.match(after) or re.match(r"(?!because|since|is )[a-z]", after))
    return not AFTER.match(rest)
