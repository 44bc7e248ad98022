"""Cleaning: what is mended in a record's texts, and why a record is dropped.

A rule is a function text -> text with a name for the report. In doubt a rule leaves the text as it is: a dosage taken
for a telephone number costs more than a number left in. `Cleaner.tidy` is idempotent.
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
from qilin_med.data.render import AnyRecord, text_of
from qilin_med.records import Chat, Document, Message, Preference, Question

Record = TypeVar("Record", Document, Chat, Preference, Question)
Rule = Callable[[str], str]
Rules = tuple[tuple[str, Rule], ...]

# Rules may make work for each other (an entity decodes to a tag): they run until nothing changes, at most so often.
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


def compose(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def drop_invisible(text: str) -> str:
    return text if text.isprintable() else STRAY_JOINER.sub("", INVISIBLE.sub("", text))


def tidy_space(text: str) -> str:
    """Blanks and line ends of one kind each; no paragraph indents, trailing blanks or runs of empty lines."""
    if not text.isprintable():
        text = LINE_ENDS.sub("\n", text)
        text = BLANKS.sub(" ", INDENT.sub("", text))
    if LOOSE_SPACE.search(text):
        text = EMPTY_LINES.sub("\n\n", TRAILING_BLANKS.sub("", text))
    return text.strip()


def narrow(text: str) -> str:
    return text.translate(HALF_WIDTH)


def simplify(text: str) -> str:
    return text if text.isascii() else _opencc().convert(text)


@cache
def _opencc():
    from opencc import OpenCC  # only corpora that ask for it need the package

    return OpenCC("t2s")


# --------------------------------------------------------------------------------------------------- web remains

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
    text = ENTITY.sub(_decoded, text)
    if "<" in text:
        text = POWER.sub(r"^\1", HIDDEN.sub("", text))
        text = TAG.sub(_without_tag, text)
    return text


def _decoded(match: re.Match[str]) -> str:
    name = match[1]
    if name.isdecimal():
        name = f"#{name}"  # "&65533;" is a "&#65533;" that lost its sign
    return html.unescape(f"&{name};") if name[0] == "#" else html5.get(f"{name};", match[0])


def _without_tag(match: re.Match[str]) -> str:
    name, text = match[1].lower(), match.string
    before = text[match.start() - 1 : match.start()]
    formula = len(name) == 1 and match[0][1] != "/" and before.isascii() and before.isalnum()
    if formula and f"</{name}>" not in text.lower():
        return match[0]  # "a<b>c"
    if name in BLOCK_TAGS.split():
        return "\n"
    return " " if name in ("td", "th") else ""


def drop_more_links(text: str) -> str:
    """The link to more, "[详细]", with the dots of the cut before it."""
    return MORE_LINK.sub("", text) if "[详细]" in text or "[更多]" in text else text


def drop_cut_off(text: str) -> str:
    """The dots with which a web page cut the text off."""
    return CUT_OFF.sub("", text) if text.rstrip().endswith(("...", "…")) else text


# -------------------------------------------------------------------------------------------------- personal data

# No number inside a longer one, a decimal, an identifier or a link is taken, and no amount. START stands after the
# first character of a number and looks behind it: `re` is fastest with patterns that begin with a literal.
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
# What the lines hold in which the rules below look closer. `re` is fastest with patterns that begin with one class.
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


def narrow_numbers(text: str) -> str:
    """Long full-width numbers in ASCII digits, which the rules below look for."""
    return LONG_FULL_WIDTH.sub(lambda match: match[0].translate(HALF_WIDTH), text)


def mask_emails(text: str) -> str:
    return EMAIL.sub("〔邮箱〕", text)


def mask_identity(text: str) -> str:
    text = IDENTITY.sub(lambda match: "〔证件号〕" if _is_identity(match[0]) else match[0], text)
    return OLD_IDENTITY.sub(r"\1〔证件号〕", text)


def _is_identity(number: str) -> bool:
    """Whether the last character is the check digit of GB 11643 (ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * weight for digit, weight in zip(number, IDENTITY_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == number[-1].upper()


def mask_phones(text: str) -> str:
    text = LANDLINE.sub("〔电话〕", MOBILE.sub("〔电话〕", text))
    return NAMED_PHONE.sub(r"\1〔电话〕", text)


def mask_qq(text: str) -> str:
    return QQ.sub(r"\1〔QQ〕", text)


def mask_wechat(text: str) -> str:
    return WECHAT_NAME.sub(r"\1〔微信〕", WECHAT_NUMBER.sub(r"\1〔微信〕", text))


def on_lines(suspect: re.Pattern[str], rule: Rule, text: str) -> str:
    """`rule` applied to the lines in which `suspect` is found."""
    if not suspect.search(text):
        return text
    return "\n".join(rule(line) if suspect.search(line) else line for line in text.split("\n"))


# ---------------------------------------------------------------------------------------------------------- tidy

WEB_RULES: Rules = (("HTML", drop_html), ("link to more", drop_more_links))
SPACE_RULES: Rules = (
    ("Unicode NFC", compose),
    ("invisible characters", drop_invisible),
    ("white space", tidy_space),
)
MASK_RULES: Rules = (
    ("full-width numbers", narrow_numbers),
    ("e-mail address", partial(on_lines, AT, mask_emails)),
    ("identity number", partial(on_lines, LONG_NUMBER, mask_identity)),
    ("phone number", partial(on_lines, LONG_NUMBER, mask_phones)),
    ("QQ number", partial(on_lines, LONG_NUMBER, mask_qq)),
    ("WeChat number", partial(on_lines, WECHAT, mask_wechat)),
)
END_RULES: Rules = (("cut off by dots", drop_cut_off),)


class Cleaner:
    """The cleaning of one corpus. Holds only settings and functions of this module, so it pickles to workers."""

    def __init__(self, settings: CleaningSettings):
        self.settings = settings
        self.rules = _chosen_rules(settings)
        self.skims = not (settings.full_width_to_half or settings.traditional_to_simplified)

    def tidy(self, record: Record) -> tuple[Record, tuple[str, ...]]:
        """The record with its texts mended, and the names of the rules that changed something, in their order."""
        rules = self.rules + END_RULES if isinstance(record, Document) else self.rules
        changed: set[str] = set()

        def mend(text: str) -> str:
            return text if self.skims and not _is_suspect(text) else _mended(text, rules, changed)

        return _with_texts(record, mend), tuple(name for name, _ in rules if name in changed)

    def objection(self, record: AnyRecord) -> str | None:
        """Why the record is dropped, in fixed words without numbers or contents; None if it stays."""
        return next(self._objections(record, text_of(record)), None)

    def _objections(self, record: AnyRecord, text: str) -> Iterator[str]:
        settings = self.settings
        yield from _misses(record)
        if isinstance(record, Document) and len(text) < settings.min_characters:
            yield "too short"
        if len(text) > settings.max_characters:
            yield "too long"
        if "\ufffd" in text:
            yield "replacement characters (U+FFFD)"
        yield from self._answer_objections(record)
        yield from self._letter_objections(text)
        if any(_repeated_share(part) > settings.max_repeated_share for part in _taught(record)):
            yield "repeated lines"

    def _answer_objections(self, record: AnyRecord) -> Iterator[str]:
        answers = _answers(record)
        # A turn of a long conversation may be a mere "好"; one of two answers to compare may not.
        measured = min if isinstance(record, Preference) else max
        if answers and measured(map(len, answers)) < self.settings.min_answer_characters:
            yield "answer too short"
        if any(ONLY_LINK.fullmatch(answer) for answer in answers):
            yield "answer is only a link"

    def _letter_objections(self, text: str) -> Iterator[str]:
        counts = _letter_counts(text)
        visible = counts.total() - counts["blank"]
        if counts["symbol"] > self.settings.max_symbol_share * visible:
            yield "mostly symbols"
        letters = counts["zh"] + counts["en"] + counts["other"]
        if 2 * sum(counts[language] for language in self.settings.languages) < letters:
            yield "wrong language"


def _chosen_rules(settings: CleaningSettings) -> Rules:
    rules = WEB_RULES
    if settings.full_width_to_half:
        rules += (("full-width characters", narrow),)
    if settings.traditional_to_simplified:
        rules += (("traditional characters", simplify),)
    rules += SPACE_RULES
    return rules + MASK_RULES if settings.mask_personal_data else rules


# Every text that a rule changes is one of these, or not in NFC, or has blanks or dots at its ends: most texts need no
# closer look. U+3000 and the like are not printable, and neither are line ends.
ODD_CHARACTER = re.compile(
    "[<&\\[@＠０-９\0-\x08\x0b-\x1f\x7f-\xa0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000"
    "\ue000-\uf8ff\ufeff\ufff9-\ufffb\U000f0000-\U0010ffff]"
)
SUSPECTS = (ODD_CHARACTER, LOOSE_SPACE, LONG_NUMBER, WECHAT)


def _is_suspect(text: str) -> bool:
    return (
        any(pattern.search(text) for pattern in SUSPECTS)
        or text.endswith(("...", "…"))
        or text != text.strip()
        or not unicodedata.is_normalized("NFC", text)
    )


def _mended(text: str, rules: Rules, changed: set[str]) -> str:
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


def _with_texts(record: Record, mend: Rule) -> Record:
    match record:
        case Document(id_, text):
            return Document(id_, mend(text))
        case Chat(id_, messages):
            return Chat(id_, _mended_messages(messages, mend))
        case Preference(id_, prompt, chosen, rejected):
            return Preference(id_, _mended_messages(prompt, mend), mend(chosen), mend(rejected))
        case Question(id_, stem, options, answer, explanation, facets):
            options = tuple((letter, mend(text)) for letter, text in options)
            return Question(id_, mend(stem), options, answer, mend(explanation), facets)
    raise TypeError(f"{type(record).__name__} is no record")


def _mended_messages(messages: tuple[Message, ...], mend: Rule) -> tuple[Message, ...]:
    mended = (Message(message.role, mend(message.content)) for message in messages)
    return tuple(message for message in mended if message.content or message.role != "system")


# ----------------------------------------------------------------------------------------------------- objections

ONLY_LINK = re.compile(r"[^\s/]{0,12}?[:：]?\s*<?(?:https?://|www\.)[^\s\u4e00-\u9fff]+\s*", re.IGNORECASE)
COMMON_HAN = re.compile("[\u4e00-\u9fff]+")
ASCII_LETTERS = re.compile("[A-Za-z]+")
SENTENCE_ENDS = re.compile("[\n。！？!?]")
HAN = re.compile("[々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _misses(record: AnyRecord) -> Iterator[str]:
    """What the record lacks to be one of its kind."""
    match record:
        case Document(_, text) if not text.strip():
            yield "too short"
        case Chat(_, messages):
            yield from _empty_messages(messages)
        case Preference(_, prompt, chosen, rejected):
            yield from _empty_messages(prompt)
            if not chosen or not rejected:
                yield "empty answer"
            if chosen == rejected:
                yield "chosen and rejected are the same"
        case Question():
            yield from _exam_misses(record)


def _empty_messages(messages: tuple[Message, ...]) -> Iterator[str]:
    for message in messages:
        if not message.content:
            yield "empty question" if message.role == "user" else "empty answer"


def _exam_misses(question: Question) -> Iterator[str]:
    texts = [text for _, text in question.options]
    letters = {letter for letter, _ in question.options}
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


def _answers(record: AnyRecord) -> tuple[str, ...]:
    match record:
        case Chat(_, messages):
            return tuple(message.content for message in messages if message.role == "assistant")
        case Preference(_, _, chosen, rejected):
            return (chosen, rejected)
    return ()


def _taught(record: AnyRecord) -> tuple[str, ...]:
    """The texts that a model shall learn to write; a rejected answer may be poor."""
    match record:
        case Document(_, text):
            return (text,)
        case Question():
            return (record.explanation,)
        case Preference():
            return (record.chosen,)
    return _answers(record)


def _letter_counts(text: str) -> Counter[str]:
    """Characters by class: the languages "zh" and "en", "other" letters, "digit", "symbol", "blank"."""
    without_han = COMMON_HAN.sub("", text)  # most of the text is counted by length, the rest one by one
    rest = ASCII_LETTERS.sub("", without_han)
    counts = Counter(map(_class_of, rest))
    counts["zh"] += len(text) - len(without_han)
    counts["en"] += len(without_han) - len(rest)
    return counts


@cache
def _class_of(character: str) -> str:
    if character.isspace():
        return "blank"
    if HAN.match(character):
        return "zh"
    if character.isalpha():
        return "en" if "LATIN" in unicodedata.name(character, "") else "other"
    return "digit" if character.isnumeric() else "symbol"


def _repeated_share(text: str) -> float:
    """Share of the characters that lie in lines or sentences that stood before."""
    parts = [part for piece in SENTENCE_ENDS.split(text.replace(". ", "\n")) if (part := piece.strip())]
    if len(set(parts)) == len(parts):
        return 0.0
    return 1 - sum(map(len, set(parts))) / sum(map(len, parts))
