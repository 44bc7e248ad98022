"""Cleaning: what is mended in a record's texts, and why a record is rejected.

A rule is a function text -> text with a name for the report. In doubt a rule leaves the text as it is: a dosage taken
for a telephone number costs more than a number left in. `Cleaner.clean` is idempotent.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from html.entities import html5
from typing import TypeVar

from qilin_med.config.corpus import CleaningSettings
from qilin_med.data.render import text_of
from qilin_med.records import AnyRecord, Chat, Document, Message, Preference, Question

Record = TypeVar("Record", Document, Chat, Preference, Question)
Rule = Callable[[str], str]
Substitution = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

# One rule may make work for another (an entity decodes to a tag), so they are repeated until nothing changes.
MAX_PASSES = 5


# ------------------------------------------------------------------------------------------------- odd characters

# Format characters that web pages and PDF leave.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]"
)
STRAY_JOINER = re.compile("\u200d(?<![\u2600-\u27bf\ufe0f\U0001f000-\U0001faff].)")  # one after an emoji joins it
LINE_ENDS = re.compile("[\r\v\f\x85\u2028\u2029](?:(?<=\r)\n)?")
BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
LOOSE_SPACE = re.compile("[ \t\n](?:\n\n|(?<!\n)\n)")
INDENT = re.compile("^[ \t]*\u3000[ \t\xa0\u3000]*", re.MULTILINE)
TRAILING_BLANKS = re.compile(r"[ \t](?<![ \t].)[ \t]*+(?=\n)")
EMPTY_LINES = re.compile("\n{3,}")
# Chinese punctuation of the full-width block (！（），：；？～) stays: it is how Chinese is written.
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "！（），：；？～"}


def clean_space(text: str) -> str:
    """Blanks and line ends of one kind each; no paragraph indents, trailing blanks or runs of empty lines."""
    if not text.isprintable():
        text = LINE_ENDS.sub("\n", text)
        text = BLANKS.sub(" ", INDENT.sub("", text))
    if LOOSE_SPACE.search(text):
        text = EMPTY_LINES.sub("\n\n", TRAILING_BLANKS.sub("", text))
    return text.strip()


@cache
def simplifier() -> Rule:
    from opencc import OpenCC  # only corpora that ask for it need the package

    return OpenCC("t2s").convert


# ------------------------------------------------------------------------------------------------ remains of pages

BLOCK_TAGS = "br p div li ol ul tr table tbody thead tfoot h1 h2 h3 h4 h5 h6 hr dl dt dd blockquote center"
INLINE_TAGS = "a b i u s q strong em font span small big strike del ins sub sup img td th nobr noscript iframe"
TAG = re.compile(
    rf"</?({'|'.join((BLOCK_TAGS + ' ' + INLINE_TAGS).split())})"
    r"""(?:\s+[A-Za-z:_-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*\s*/?>""",
    re.IGNORECASE,
)
HIDDEN = re.compile(r"<!--.{0,1000}?-->|<(script|style)\b[^<>]*>.{0,1000}?</\1\s*>", re.IGNORECASE | re.DOTALL)
POWER = re.compile(r"(?<=\d)<sup>\s*([-+]?\d+)\s*</sup>", re.IGNORECASE)
ENTITY = re.compile(r"&(?:amp;)*(#\d{2,7}|#[xX][0-9A-Fa-f]{2,6}|\d{4,6}|[A-Za-z][A-Za-z0-9]{1,30});", re.ASCII)
MARKUP = re.compile("[<&](?:[/!#A-Za-z]|[0-9]{4})")
# Text that speaks about markup, or holds code or a Markdown table, means its tags.
MEANS_TAGS = re.compile(
    r"```|`[<&]|(?<![.a-z0-9_])(?:html|xml|css|jsx)(?![a-z0-9_])|>[`”\"』」]?\s*(?:标签|标记|元素)"
    r"|^[ \t]+</?[a-z]|\|[ \t]*\n[ \t]*\|",
    re.IGNORECASE | re.MULTILINE,
)
MORE_LINK = re.compile(r"(?:\.{3,}|…+)?\s*\[(?:详细|更多)\]")
CUT_OFF = re.compile(r"(?:\.{3,}|…+)\s*\Z")


def drop_html(text: str) -> str:
    """Tags and entities of HTML. "<5mm", "a<b" and "<user>" are none; "10<sup>9</sup>" becomes "10^9"."""
    if not MARKUP.search(text) or MEANS_TAGS.search(text):
        return text

    def decoded(match: re.Match[str]) -> str:
        name = match[1]
        if name.isdecimal():
            name = f"#{name}"  # "&65533;" is a "&#65533;" that lost its sign
        return html.unescape(f"&{name};") if name[0] == "#" else html5.get(f"{name};", match[0])

    def instead_of(tag: re.Match[str]) -> str:
        name, before = tag[1].lower(), tag.string[tag.start() - 1 : tag.start()]
        formula = len(name) == 1 and tag[0][1] != "/" and before.isascii() and before.isalnum()
        if formula and f"</{name}>" not in tag.string.lower():
            return tag[0]  # "a<b>c"
        return "\n" if name in BLOCK_TAGS.split() else " " if name in ("td", "th") else ""

    text = ENTITY.sub(decoded, text)
    if "<" in text:
        text = TAG.sub(instead_of, POWER.sub(r"^\1", HIDDEN.sub("", text)))
    return text


# -------------------------------------------------------------------------------------------------- personal data

# Amounts and numbers inside longer ones, decimals, identifiers or links are left alone. START stands after the first
# character of a number and looks behind it: `re` is fastest with patterns that begin with a literal.
START = r"(?<![0-9A-Za-z_.=%].)(?<![0-9A-Za-z]-.)(?<![A-Za-z]/.)"
UNITS = (
    r"元|美元|人(?!工)|名(?!片)|年|岁|个(?!人)|万|亿|次|多|余|位|例|单位|拷贝|像素|[毫微纳]?[克升米]|公[斤里分]"
    r"|IU|iu|copies|[mkμu]?[gGlL]\b|mm|cm|[%％]"
)
END = rf"(?![0-9A-Za-z_]|\.[0-9]|-[0-9]|\s?(?:{UNITS}))"
SAID = r"(?:号码|[帐账]?号|ID|id)?\s?(?:就是|[为是])?\s?[:：]?\s?"
PHONE_WORD = r"(?:电话|手机|座机|热线|致电|Tel|tel|TEL|Phone|phone)(?<![A-Za-z][Tt]el)(?<![A-Za-z][Pp]hone)\.?"
QQ_WORD = "(?:QQ|qq|Qq|扣扣|企鹅号)(?<![A-Za-z][Qq]{2})群?"
WECHAT_WORD = "(?:微信|WeChat|Wechat|wechat|Weixin|weixin|vx|VX)(?<![A-Za-z]vx)(?<![A-Za-z]VX)"

LONG_FULL_WIDTH = re.compile("[０-９][０-９]{6,}")
# The rules below look only at lines in which one of these is found. `re` is fastest with patterns that begin with a class.
LONG_NUMBER = re.compile("[0-9][0-9]{3}(?:[0-9]|[ -][0-9]{4})")
AT = re.compile("[@＠]")
WECHAT = re.compile("[微wWvV][信eExX]")

MOBILE_PREFIX = "(?:[38][0-9]|4[145-9]|5[0-35-9]|6[2567]|7[0-8]|9[0-35-9])"
MOBILE = re.compile(
    rf"(?:1{START}(?![0-9]{{3}}0{{7}})|\+86[- ]?1|＋86[- ]?1|0086[- ]?1)"
    rf"{MOBILE_PREFIX}(?:[0-9]{{8}}|-[0-9]{{4}}-[0-9]{{4}}){END}"
)
AREA = "(?:10|2[0-57-9]|[3-9][0-9]{2})"
LANDLINE = re.compile(
    rf"(?:0{START}{AREA}[-—－]|\({START}0{AREA}\)[- ]?|（{START}0{AREA}）[- ]?)[2-8][0-9]{{6,7}}(?:[-转][0-9]{{1,5}})?{END}"
)
# Without an area code, or with blanks, only what the word announces.
NAMED_PHONE = re.compile(
    rf"({PHONE_WORD}{SAID})(?:1{MOBILE_PREFIX} [0-9]{{4}} [0-9]{{4}}|(?:0{AREA}[- ]?)?[2-8][0-9]{{6,7}}){END}"
)
MONTH_DAY = "(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
IDENTITY = re.compile(rf"[1-8]{START}[0-9]{{5}}(?:19|20)[0-9]{{2}}{MONTH_DAY}[0-9]{{3}}[0-9Xx]{END}")
# Fifteen digits are too common to be taken for an old identity number without the word.
OLD_IDENTITY = re.compile(rf"(身份证{SAID})[1-8][0-9]{{7}}{MONTH_DAY}[0-9]{{3}}{END}")
IDENTITY_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}[@＠]"
    r"(?!example\.)(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,10}(?![A-Za-z0-9_])",
    re.ASCII,
)
QQ = re.compile(rf"({QQ_WORD}{SAID})[1-9][0-9]{{4,10}}{END}")
WECHAT_NUMBER = re.compile(rf"({WECHAT_WORD}{SAID})(?:wxid_[0-9a-z]{{6,20}}|[1-9][0-9]{{4,10}}){END}")
# A name of letters is one after "微信号"; after "微信：" only with a digit in it ("微信：Android" is none).
WECHAT_NAME = re.compile(
    rf"({WECHAT_WORD}(?:\s?(?:号码|号|ID|id){SAID}|\s?[:：]\s?(?=[A-Za-z_-]*[0-9])))[A-Za-z][A-Za-z0-9_-]{{5,19}}{END}"
)


def mask_identity(match: re.Match[str]) -> str:
    """The mark, if the last character is the check digit of GB 11643 (ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * weight for digit, weight in zip(match[0], IDENTITY_WEIGHTS, strict=False))
    return "〔证件号〕" if "10X98765432"[total % 11] == match[0][-1].upper() else match[0]


def on_lines(suspect: re.Pattern[str], *substitutions: Substitution) -> Rule:
    """Substitutions in the lines in which `suspect` is found."""

    def rule(text: str) -> str:
        if not suspect.search(text):
            return text
        lines = text.split("\n")
        for index, line in enumerate(lines):
            if suspect.search(line):
                for pattern, mark in substitutions:
                    line = pattern.sub(mark, line)
                lines[index] = line
        return "\n".join(lines)

    return rule


# --------------------------------------------------------------------------------------------------------- rules

RULES: dict[str, Rule] = {
    "HTML": drop_html,
    "link to more": lambda text: MORE_LINK.sub("", text) if "[详细]" in text or "[更多]" in text else text,
    "full-width characters": lambda text: text.translate(HALF_WIDTH),
    "traditional characters": lambda text: text if text.isascii() else simplifier()(text),
    "Unicode NFC": partial(unicodedata.normalize, "NFC"),
    "invisible characters": lambda text: text if text.isprintable() else STRAY_JOINER.sub("", INVISIBLE.sub("", text)),
    "white space": clean_space,
    # What the rules below look for is written in ASCII digits.
    "full-width numbers": partial(LONG_FULL_WIDTH.sub, lambda match: match[0].translate(HALF_WIDTH)),
    "e-mail address": on_lines(AT, (EMAIL, "〔邮箱〕")),
    "identity number": on_lines(LONG_NUMBER, (IDENTITY, mask_identity), (OLD_IDENTITY, r"\1〔证件号〕")),
    "phone number": on_lines(LONG_NUMBER, (MOBILE, "〔电话〕"), (LANDLINE, "〔电话〕"), (NAMED_PHONE, r"\1〔电话〕")),
    "QQ number": on_lines(LONG_NUMBER, (QQ, r"\1〔QQ〕")),
    "WeChat number": on_lines(WECHAT, (WECHAT_NUMBER, r"\1〔微信〕"), (WECHAT_NAME, r"\1〔微信〕")),
    "cut off by dots": lambda text: CUT_OFF.sub("", text) if text.rstrip().endswith(("...", "…")) else text,
}
"""In the order in which they are applied."""
MASKS = ("full-width numbers", "e-mail address", "identity number", "phone number", "QQ number", "WeChat number")

# Every text that a rule changes matches one of these, or is not in NFC, or has blanks or dots at its ends: most texts
# need no closer look.
ODD_CHARACTER = re.compile(
    "[<&\\[@＠０-９\0-\x08\x0b-\x1f\x7f-\xa0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000"
    "\ue000-\uf8ff\ufeff\ufff9-\ufffb\U000f0000-\U0010ffff]"
)
SUSPECTS = (ODD_CHARACTER, LOOSE_SPACE, LONG_NUMBER, WECHAT)


class Cleaner:
    """The cleaning of one corpus."""

    def __init__(self, settings: CleaningSettings):
        converted = {
            "full-width characters": settings.full_width_to_half,
            "traditional characters": settings.traditional_to_simplified,
        }
        switched = {**converted, **dict.fromkeys(MASKS, settings.mask_personal_data)}
        self.settings, self.skims = settings, not any(converted.values())
        self.rules = {name: rule for name, rule in RULES.items() if switched.get(name, True)}

    def clean(self, record: Record) -> tuple[Record, tuple[str, ...]]:
        """The record with its texts mended, and the names of the rules that changed something, in their order."""
        rules = self.rules.items()
        if not isinstance(record, Document):
            rules = [(name, rule) for name, rule in rules if name != "cut off by dots"]  # they may be meant
        changed: set[str] = set()

        def mend(text: str) -> str:
            plain = not any(pattern.search(text) for pattern in SUSPECTS) and not text.endswith(("...", "…"))
            if self.skims and plain and text == text.strip() and unicodedata.is_normalized("NFC", text):
                return text
            for _ in range(MAX_PASSES):
                before = text
                for name, rule in rules:
                    mended = rule(text)
                    if mended != text:
                        changed.add(name)
                        text = mended
                if text == before:
                    break
            return text

        def mend_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
            mended = (Message(message.role, mend(message.content)) for message in messages)
            return tuple(message for message in mended if message.content or message.role != "system")

        match record:
            case Document(id_, text):
                record = Document(id_, mend(text))
            case Chat(id_, messages):
                record = Chat(id_, mend_messages(messages))
            case Preference(id_, prompt, chosen, rejected):
                record = Preference(id_, mend_messages(prompt), mend(chosen), mend(rejected))
            case Question(id_, stem, options, answer, explanation, facets):
                options = tuple((letter, mend(text)) for letter, text in options)
                record = Question(id_, mend(stem), options, answer, mend(explanation), facets)
        return record, tuple(name for name, _ in rules if name in changed)

    def reject_reason(self, record: AnyRecord) -> str | None:
        """Why the record is rejected, in fixed words without numbers or contents; None if it stays."""
        return next(self._reject_reasons(record), None)

    def _reject_reasons(self, record: AnyRecord) -> Iterator[str]:
        settings, text = self.settings, text_of(record)
        messages: tuple[Message, ...] = ()
        answers: tuple[str, ...] = ()
        learnt: tuple[str, ...] = ()  # what a model shall learn to write; a rejected answer may be poor
        match record:
            case Document():
                learnt = (text,)
                if not text.strip() or len(text) < settings.min_characters:
                    yield "too short"
            case Chat(_, messages):
                answers = learnt = tuple(message.content for message in messages if message.role == "assistant")
            case Preference(_, messages, chosen, rejected):
                answers, learnt = (chosen, rejected), (chosen,)
            case Question(_, _, _, _, explanation):
                learnt = (explanation,)
                yield from question_faults(record)
        for message in messages:
            if not message.content:
                yield "empty question" if message.role == "user" else "empty answer"
        if not all(answers):
            yield "empty answer"
        if isinstance(record, Preference) and record.chosen == record.rejected:
            yield "chosen and rejected are the same"
        if len(text) > settings.max_characters:
            yield "too long"
        if "\ufffd" in text:
            yield "replacement characters (U+FFFD)"
        # A turn of a long conversation may be a mere "好"; one of two answers to compare may not.
        measured = min if isinstance(record, Preference) else max
        if answers and measured(map(len, answers)) < settings.min_answer_characters:
            yield "answer too short"
        if any(ONLY_LINK.fullmatch(answer) for answer in answers):
            yield "answer is only a link"
        counts = count_characters(text)
        if counts["symbol"] > settings.max_symbol_share * (counts.total() - counts["blank"]):
            yield "mostly symbols"
        letters = counts["zh"] + counts["en"] + counts["other"]
        if 2 * sum(counts[language] for language in settings.languages) < letters:
            yield "wrong language"
        if any(repeated_share(part) > settings.max_repeated_share for part in learnt):
            yield "repeated lines"


# ----------------------------------------------------------------------------------------------------- measures

ONLY_LINK = re.compile(r"[^\s/]{0,12}?[:：]?\s*<?(?:https?://|www\.)[^\s\u4e00-\u9fff]+\s*", re.IGNORECASE)
COMMON_HAN = re.compile("[\u4e00-\u9fff]+")
ASCII_LETTERS = re.compile("[A-Za-z]+")
SENTENCE_ENDS = re.compile("[\n。！？!?]")
HAN = re.compile("[々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def question_faults(question: Question) -> Iterator[str]:
    """What an exam question lacks to be one."""
    letters, texts = {letter for letter, _ in question.options}, [text for _, text in question.options]
    if not question.stem:
        yield "empty question"
    if not texts:
        yield "no options"
    if not all(texts):
        yield "empty option"
    if len(set(texts)) < len(texts) or len(letters) < len(texts):
        yield "doubled options"
    if not letters.issuperset(question.answer):
        yield "answer is not among the options"


def count_characters(text: str) -> Counter[str]:
    """Characters by class: the languages "zh" and "en", "other" letters, "digit", "symbol", "blank"."""
    without_han = COMMON_HAN.sub("", text)  # most of the text is counted by length, the rest one by one
    rest = ASCII_LETTERS.sub("", without_han)
    counts = Counter(map(class_of, rest))
    counts["zh"] += len(text) - len(without_han)
    counts["en"] += len(without_han) - len(rest)
    return counts


@cache
def class_of(character: str) -> str:
    if character.isspace():
        return "blank"
    if HAN.match(character):
        return "zh"
    if character.isalpha():
        return "en" if "LATIN" in unicodedata.name(character, "") else "other"
    return "digit" if character.isnumeric() else "symbol"


def repeated_share(text: str) -> float:
    """Share of the characters that lie in lines or sentences that stood before."""
    parts = [part for piece in SENTENCE_ENDS.split(text.replace(". ", "\n")) if (part := piece.strip())]
    if len(set(parts)) == len(parts):
        return 0.0
    return 1 - sum(map(len, set(parts))) / sum(map(len, parts))
