"""The answer letters out of what a model wrote: which options it chose, or none.

Rules are tried from the most to the least explicit, and the first that finds letters of the question's options decides.
A letter counts only where it stands for an option: never inside a word or term (CT, X线, A型血, 维生素C, B超, T细胞).
"""

import re
import unicodedata
from collections.abc import Sequence

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
CORRECT = re.compile(rf"{RUN}\s*(?:选?项)?(?:均|都|是|为)?(?:正确|对的|符合题意|最(?:合适|准确|恰当|佳))")
BRACKETED = re.compile(r"[(\[【]\s*([A-Ja-j])\s*[)\]】]")
LISTED = re.compile(r"^\W*([A-J])(?:[.、:)]|\s)\s*\S", re.MULTILINE)
ANSWER_LINE = re.compile(r"^\s*[【\[]?答案[】\]]?\s*[:：]?[A-JＡ-Ｊ、，,\s]+(?:[。.]|\n|$)")
LAST_LINE = re.compile(rf"^{OPEN}{RUN}[^\w\n]*\Z", re.MULTILINE)
EXPLANATION = re.compile(r"解释|解析|explanation", re.IGNORECASE)
SHORTER = re.compile(r"(.*[A-Ja-j])[ \t,、;/和及与&+]+[A-Ja-j]")

PUNCTUATION = re.compile(r"$|[\n,.:;、。!?)\]}】\"'”’》」』*|$<\\]")
AFTER = re.compile(r"选项|项|正确|是|为|对|因|吧|最|的")
# What makes a term of the letter before it.
TERM = re.compile(
    r"型|超|线|细胞|族|类|级|期|区|波|肽|链|抗原|抗体|受体|蛋白|淋巴|肝|段|点|值|组|照|光|片|染色体|病毒|群|因子|亚型|溶血|胺|峰|环"
)
WRONG = re.compile(r"\s*(?:选?项)?(?:是|为)?(?:错|不正确|不对|有误|不符|不合)")


def extract_letters(output: str, options: Options) -> str:
    """The chosen letters in order ("A", "BD"), "" if the output names none; `options` are (letter, text)."""
    # A bracketed letter keeps a blank on each side, so that "(A)(C)" is a run of letters.
    text = unicodedata.normalize("NFKC", output).replace("\\boxed", "").replace("\\text", "")
    text = BRACKETED.sub(r" \1 ", text).strip()
    found = (
        _first(FINAL, text, options)
        or _first(ANSWER, text, options)
        or _first(ENGLISH, text, options)
        or _at_start(text, options)
        or _first(CHOOSE, text, options)
        or {letter for match in CORRECT.finditer(text) for letter in _letters(match, options, strict=False)}
        or _first(LAST_LINE, text, options)
        or _by_text(text, options)
    )
    return "".join(sorted(found))


def split_explanation(output: str) -> str:
    """The explaining part of an answer in two parts ("答案：...", "解释：..."): after the second mark, else all of it
    but the answer at its start."""
    before, *explanation = re.split(r"解释\s*[:：]", output, maxsplit=1)
    return (explanation[0] if explanation else ANSWER_LINE.sub("", before)).strip()


def _first(pattern: re.Pattern[str], text: str, options: Options) -> str:
    """Letters of the first match whose run stands for options."""
    return next(filter(None, (_letters(match, options) for match in pattern.finditer(text))), "")


def _at_start(text: str, options: Options) -> str:
    """An output that begins with its answer, unless it lists the options again."""
    listed = [letter for letter in LISTED.findall(text) if letter in dict(options)]
    if len(listed) > 1:
        is_restated = listed == [letter for letter, _ in options][: len(listed)] or len(set(listed)) < len(listed)
        return "" if is_restated else "".join(listed)
    match = ONLY.match(text)
    if not match or (match[1].islower() and not re.match(r"[.、:)。]|\s*$", text[match.end(1) :])):
        return ""  # "a patient" is no answer
    return _letters(match, options)


def _by_text(text: str, options: Options) -> str:
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
    is_denied = re.search(r"(?:不是|不选|不应|排除|并非|而非)\W*$", before) or WRONG.match(after)
    return "" if is_denied else longest[0]


def _letters(match: re.Match[str], options: Options, strict: bool = True) -> str:
    """The option letters of a match's run, "" where they do not stand for options; shorter runs are tried too.

    `strict`: what follows the run must leave it an answer, and be no end of a term that begins with the letter.
    """
    run, texts = match[1], dict(options)
    while True:
        rest = match.string[match.start(1) + len(run) :]
        letters = re.sub(r"[^A-J]", "", run.upper())
        is_set = len(set(letters)) == len(letters) and set(letters) <= set(texts)
        # "CEA" or "BAD" is a word: answers come in order. Apart ("C、A") any order will do.
        is_word = len(letters) > 1 and letters in run.upper() and letters != "".join(sorted(letters))
        if is_set and not is_word and not WRONG.match(rest) and not (strict and _goes_on(rest, texts[letters[-1]])):
            return letters
        if not (shorter := SHORTER.fullmatch(run)):
            return ""
        run = shorter[1]


def _goes_on(rest: str, option: str) -> bool:
    """Whether what follows a letter makes it the beginning of a term or word, unless it is the letter's own option."""
    after = rest.lstrip(" \t")
    own = unicodedata.normalize("NFKC", option).strip()
    if (own and after.lstrip(".、:-) \t").startswith(own[:4])) or PUNCTUATION.match(rest):
        return False
    if after != rest and rest[:1].isspace():
        return bool(TERM.match(after) or re.match(r"(?!because|since|is )[a-z]", after))
    return not AFTER.match(rest)
