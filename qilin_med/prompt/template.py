"""Messages -> token ids and loss mask: the one place that knows how a prompt becomes tokens.

The format itself lies in the tokenizer, as a Jinja chat template. `{% generation %}` marks in it tell which text is an
answer; without them (most published models) its generation prompt and the end token do. The template is rendered once
per conversation shape, with a sentinel in place of every content, and taken apart at the sentinels. The literal pieces
(role marks, EOS) are tokenised with special tokens parsed, contents always as plain text, so that no text can smuggle
in a control token; and because only contents are ever cut, role marks survive every limit.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeAlias

from qilin_med.errors import UserError
from qilin_med.records import RAW_CHARACTERS, Chat, Message, Preference, Role, Skipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLE_MARKS = ("<reserved_102>", "<reserved_103>")  # before a question, before an answer; as in Baichuan-13B-Chat
QILIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{ROLE_MARKS[0]}{{{{ message['content'] }}}}"
    f"{{% else %}}{ROLE_MARKS[1]}{{% generation %}}{{{{ message['content'] }}}}{{{{ eos_token }}}}{{% endgeneration %}}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{ROLE_MARKS[1]}{{% endif %}}"
)

IGNORED = -100  # Hugging Face's label for positions without loss
SENTINEL = re.compile(
    "\ue0f0([0-9]+)\ue0f1"
)  # private use characters: no template writes them, contents are not rendered

Ids: TypeAlias = list[int]
Piece: TypeAlias = tuple[int, ...] | int
"""Ids of a literal, or the index of the message whose content stands there."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """One training row: `labels` is as long as `input_ids` (unshifted), -100 wherever nothing is learnt."""

    input_ids: Ids
    labels: Ids
    cut_sources: int
    cut_targets: int


@dataclass(frozen=True, slots=True)
class EncodedPreference:
    """A prompt and two answers; an answer ends with EOS unless it was cut."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    cut_sources: int
    cut_targets: int
    dropped_turns: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Ids from which a model answers. `is_cut`: a text of the last question lost its end."""

    ids: Ids
    is_cut: bool
    dropped_turns: int


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """How a template writes one question (with a system text, if any) and its answer."""

    source: tuple[Piece, ...]
    target: tuple[Piece, ...]
    marks: int
    """Tokens of the source's literals."""


@dataclass(frozen=True, slots=True)
class Layout:
    turns: tuple[TurnLayout, ...]
    closing: tuple[int, ...]
    """Literal after the last answer, outside the loss (Qwen's newline); most templates have none."""


def encode_texts(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[Ids]:
    """Ids of plain texts: no BOS or EOS, and what looks like a special token stays text. Uses all cores."""
    if not texts:
        return []
    settings = {"add_special_tokens": False, "split_special_tokens": True}
    return tokenizer(
        texts, **settings, return_attention_mask=False, return_token_type_ids=False, verbose=False
    ).input_ids


def control_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Ids that no text may contain: BOS, EOS, role marks. (Not the unknown token: any text may give it.)"""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


class ChatTemplate:
    """Applies a tokenizer's own chat template to records, within token limits.

    `max_source_length` limits a question: its content and all literals before the answer (role marks), for the first
    turn with the system text. A question keeps its start. Where system text and question are too long together, the
    system text is cut first, to no less than half of the limit's tokens that the marks leave, then the question.
    `max_target_length` limits an answer with its EOS: a longer one is cut to exactly that many tokens and has no EOS.
    Role marks are never cut. Contents are stripped of surrounding white space, as the readers do.

    For texts that were not cut, ids and loss mask equal `tokenizer.apply_chat_template`, provided that the tokenizer
    treats the text between special tokens on its own (SentencePiece-like ones do, and templates whose marks are special
    tokens or line ends).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        """UserError: the tokenizer has no chat template, or QILIN_TEMPLATE's role marks or the EOS are no single tokens
        of this tokenizer."""
        self.tokenizer = tokenizer
        self.template = checked_template(tokenizer)
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._layout = cache(self._build_layout)
        self._controls = control_ids(tokenizer)

    # ------------------------------------------------------------------------------------------------- records

    def encode_chat(self, chat: Chat, max_source_length: int, max_target_length: int) -> list[EncodedChat]:
        """As `encode_chats`, for one chat; UserError says why it cannot be used."""
        [encoded] = self.encode_chats([chat], max_source_length, max_target_length)
        return _usable(encoded)

    def encode_chats(
        self, chats: Sequence[Chat], max_source_length: int, max_target_length: int
    ) -> list[list[EncodedChat] | Skipped]:
        """Rows of each chat: usually one. A chat longer than both limits together continues in further rows of whole
        turns, each with the system text, so that no turn vanishes."""
        contents = self._encode_contents([chat.messages for chat in chats])
        encoded: list[list[EncodedChat] | Skipped] = []
        for chat, ids in zip(chats, contents, strict=True):
            reason = self._reason_against(chat.messages, ids)
            rows = [] if reason else self._chat_rows(chat.messages, ids, max_source_length, max_target_length)
            encoded.append(_skipped(chat, chat.messages, reason) if reason else rows)
        return encoded

    def encode_preference(
        self, preference: Preference, max_source_length: int, max_target_length: int
    ) -> EncodedPreference:
        """As `encode_preferences`, for one; UserError says why it cannot be used."""
        [encoded] = self.encode_preferences([preference], max_source_length, max_target_length)
        return _usable(encoded)

    def encode_preferences(
        self, preferences: Sequence[Preference], max_source_length: int, max_target_length: int
    ) -> list[EncodedPreference | Skipped]:
        """Prompt and answers of each preference. The prompt holds system text and last question, and as many whole
        earlier turns, newest first, as fit into `max_source_length`; the others are counted as dropped."""
        conversations = [_with_answers(preference) for preference in preferences]
        encoded: list[EncodedPreference | Skipped] = []
        for preference, messages, ids in zip(
            preferences, conversations, self._encode_contents(conversations), strict=True
        ):
            reason = self._reason_against(messages, ids)
            pair = None if reason else self._pair(messages, ids, max_source_length, max_target_length)
            if pair and pair.chosen_ids == pair.rejected_ids:
                reason = "chosen and rejected are the same after cutting"
            encoded.append(_skipped(preference, messages, reason) if reason else pair)
        return encoded

    @property
    def end_id(self) -> int:
        """The token that ends an answer: not always the tokenizer's EOS, which in base models ends a document."""
        return self._layout(("user", "assistant")).turns[0].target[-1][-1]

    def encode_prompt(self, messages: Sequence[Message], max_source_length: int) -> EncodedPrompt:
        """What a model answers the last question from: exactly the prompt part of a training row.

        Earlier turns as in `encode_preferences`. UserError: the text holds a role mark, or the last message is no
        question."""
        if not messages or messages[-1].role != "user":
            raise UserError("a prompt must end with a question: expected the last message to have the role user")
        [ids] = self._encode_contents([messages])
        if reason := self._reason_against(messages, ids):
            raise UserError(f"this prompt cannot be used: {reason}")
        return self._prompt(messages, ids, max_source_length)

    # ------------------------------------------------------------------------------------------------ contents

    def _encode_contents(self, conversations: Iterable[Sequence[Message]]) -> list[list[Ids]]:
        """Ids of every content of every conversation, tokenised in one batch."""
        conversations = list(conversations)
        texts = [message.content.strip() for messages in conversations for message in messages]
        ids = iter(encode_texts(self.tokenizer, texts))
        return [[next(ids) for _ in messages] for messages in conversations]

    def _reason_against(self, messages: Sequence[Message], contents: list[Ids]) -> str | None:
        """Why texts cannot be used, known only from their tokens."""
        if not self._controls.isdisjoint(chain.from_iterable(contents)):
            return "contains a role mark"
        empty = next((message.role for message, ids in zip(messages, contents, strict=True) if not ids), None)
        return {None: None, "system": "empty system text", "user": "empty question", "assistant": "empty answer"}[empty]

    # ----------------------------------------------------------------------------------------------- assembling

    def _chat_rows(
        self, messages: Sequence[Message], contents: list[Ids], max_source: int, max_target: int
    ) -> list[EncodedChat]:
        """Greedy: each row takes as many of the remaining turns as fit."""
        system, turns = _split_system(contents, messages)
        rows, start = [], 0
        while start < len(turns):
            row = self._chat_row(system, turns[start : start + 1], max_source, max_target)
            taken = 1
            while start + taken < len(turns):
                longer = self._chat_row(system, turns[start : start + taken + 1], max_source, max_target)
                if len(longer.input_ids) > max_source + max_target:
                    break
                row, taken = longer, taken + 1
            rows.append(row)
            start += taken
        return rows

    def _chat_row(self, system: list[Ids], turns: list[list[Ids]], max_source: int, max_target: int) -> EncodedChat:
        contents = [*system, *chain.from_iterable(turns)]
        layout = self._layout(("system",) * len(system) + ("user", "assistant") * len(turns))
        ids, labels, cut_sources, cut_targets, is_cut = [], [], 0, 0, False
        for turn in layout.turns:
            source, source_is_cut = _fill_source(turn, contents, max_source)
            target, is_cut = _fill_target(turn, contents, max_target)
            ids += source + target
            labels += [IGNORED] * len(source) + target
            cut_sources += source_is_cut
            cut_targets += is_cut
        if not is_cut and len(ids) + len(layout.closing) <= max_source + max_target:
            ids += layout.closing
            labels += [IGNORED] * len(layout.closing)
        return EncodedChat(ids, labels, cut_sources, cut_targets)

    def _pair(self, messages: Sequence[Message], contents: list[Ids], max_source: int, max_target: int):
        prompt = self._prompt(messages[:-2], contents[:-2], max_source)
        [turn] = self._layout(("user", "assistant")).turns
        chosen, rejected = (_fill_target(turn, [[], answer], max_target) for answer in contents[-2:])
        cut_targets = chosen[1] + rejected[1]
        return EncodedPreference(
            prompt.ids, chosen[0], rejected[0], int(prompt.is_cut), cut_targets, prompt.dropped_turns
        )

    def _prompt(self, messages: Sequence[Message], contents: list[Ids], max_source: int) -> EncodedPrompt:
        system, turns = _split_system(contents, messages)
        earlier, [question] = turns[:-1], turns[-1]
        kept, (prompt, is_cut) = 0, self._prompt_with(system, [], question, max_source)
        while kept < len(earlier):
            longer, longer_is_cut = self._prompt_with(system, earlier[-kept - 1 :], question, max_source)
            if longer_is_cut or len(longer) > max_source:
                break
            kept, prompt = kept + 1, longer
        return EncodedPrompt(prompt, is_cut, len(earlier) - kept)

    def _prompt_with(self, system: list[Ids], earlier: list[list[Ids]], question: Ids, max_source: int):
        contents = [*system, *chain.from_iterable(earlier), question]
        layout = self._layout(("system",) * len(system) + ("user", "assistant") * (len(earlier) + 1))
        ids: Ids = []
        for turn in layout.turns[:-1]:
            ids += _filled(turn.source, contents) + _filled(turn.target, contents)
        last, is_cut = _fill_source(layout.turns[-1], contents, max_source)
        return ids + last, is_cut

    # -------------------------------------------------------------------------------------------------- layouts

    def _build_layout(self, roles: tuple[Role, ...]) -> Layout:
        """Render a conversation of sentinels and take it apart: source, target, source, target, ..., closing."""
        *sections, closing = self._sections(roles)
        pieces = [self._pieces(section) for section in sections]
        self._check_places(roles, pieces)
        turns = tuple(
            TurnLayout(tuple(source), tuple(target), _literal_tokens(source))
            for source, target in zip(pieces[::2], pieces[1::2], strict=True)
        )
        return Layout(turns, tuple(chain.from_iterable(self._pieces(closing))))

    def _sections(self, roles: tuple[Role, ...]) -> list[str]:
        """The rendered text, cut where answers begin and end."""
        text, spans = self._render(roles)
        if not self._is_marked:
            spans = self._find_answers(text, roles)
        borders = [0, *chain.from_iterable(spans), len(text)]
        return [text[start:end] for start, end in pairwise(borders)]

    def _render(self, roles: tuple[Role, ...], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """A conversation of sentinels in the template, and the spans of its `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": f"\ue0f0{index}\ue0f1"} for index, role in enumerate(roles)]
        options = options or {"return_assistant_tokens_mask": self._is_marked}
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=self.template, **options, **self.tokenizer.special_tokens_map
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise UserError(f"the chat template refuses a conversation of {', '.join(roles)}: {error}") from error
        return texts[0], spans[0] if spans else []

    def _find_answers(self, text: str, roles: tuple[Role, ...]) -> Iterator[tuple[int, int]]:
        """Spans of the answers in a text without marks: from where a model begins to write to the end token.

        A model begins after the template's own prompt for an answer, so whatever the template writes between that
        prompt and the content (an empty thought, for example) is learnt as part of the answer, as it has to be written.
        """
        question = self._render(("user",), add_generation_prompt=False)[0]
        opening = self._render(("user",), add_generation_prompt=True)[0].removeprefix(question)
        ends = sorted((t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len)
        for index in (place for place, role in enumerate(roles) if role == "assistant"):
            content = f"\ue0f0{index}\ue0f1"
            before, found, after = text.partition(content)
            end = next((token for token in reversed(ends) if after.startswith(token)), "")
            if not (opening and opening in before and found and end):
                raise UserError(
                    "this tokenizer's chat template has no {% generation %} marks, and its answers do not stand between"
                    " its generation prompt and a special token, so they cannot be told from questions; put"
                    " {% generation %} ... {% endgeneration %} around the answer and its end token in chat_template.jinja"
                )
            yield before.rindex(opening) + len(opening), len(before) + len(content) + len(end)

    def _pieces(self, section: str) -> list[Piece]:
        parts = SENTINEL.split(section)  # literals at even places, message indices at odd ones
        pieces: list[Piece] = []
        for place, part in enumerate(parts):
            if place % 2:
                pieces.append(int(part))
            elif part:
                pieces.append(tuple(self.tokenizer(part, add_special_tokens=False).input_ids))
        return pieces

    def _check_places(self, roles: tuple[Role, ...], pieces: list[list[Piece]]) -> None:
        """Every content must stand once, in order, answers alone inside `{% generation %}`."""
        found = [[piece for piece in section if isinstance(piece, int)] for section in pieces]
        first = roles.count("system")
        expected = [[index] for index in range(first, len(roles))]
        if first:
            expected[0] = [0, 1]
        if found != expected:
            raise UserError(
                f"the chat template does not write a conversation of {', '.join(roles)} message by message with each "
                "answer in a place of its own: mend chat_template.jinja"
            )


def checked_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The tokenizer's chat template; UserError if it cannot be trained with."""
    if not tokenizer.chat_template:
        raise UserError(
            'this tokenizer has no chat template; set model.template to "qilin", or save one as chat_template.jinja '
            "in the model folder"
        )
    template = tokenizer.get_chat_template()
    if template == QILIN_TEMPLATE:
        _check_qilin_marks(tokenizer)
    return template


def _check_qilin_marks(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.eos_token_id is None:
        raise UserError("this tokenizer has no EOS token, so a model could not learn to stop; set eos_token")
    for mark in ROLE_MARKS:
        ids = tokenizer(mark, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or ids[0] not in control_ids(tokenizer):
            raise UserError(
                f"the role mark {mark} is no special token of this tokenizer (it gives {len(ids)} tokens); use a "
                'Baichuan model converted by scripts/convert_baichuan.py, or set model.template to "own"'
            )


def _literal_tokens(pieces: Iterable[Piece]) -> int:
    return sum(len(piece) for piece in pieces if not isinstance(piece, int))


def _filled(pieces: Iterable[Piece], contents: list[Ids]) -> Ids:
    ids: Ids = []
    for piece in pieces:
        ids += contents[piece] if isinstance(piece, int) else piece
    return ids


def _fill_source(turn: TurnLayout, contents: list[Ids], limit: int) -> tuple[Ids, bool]:
    """Ids of a question with its marks, at most `limit`, and whether a text was cut."""
    room = limit - turn.marks
    if room < 0:
        raise UserError(f"max_source_length {limit} is less than the {turn.marks} tokens of the role marks; raise it")
    indices = [piece for piece in turn.source if isinstance(piece, int)]
    total = sum(len(contents[index]) for index in indices)
    if total <= room:
        return _filled(turn.source, contents), False
    question = indices[-1]
    # Cutting the system text below half would lose the rules, cutting the question first would lose what is asked.
    for_system = max(room - len(contents[question]), room // 2)
    cut = {index: contents[index][:for_system] for index in indices[:-1]}
    used = sum(map(len, cut.values()))
    cut[question] = contents[question][: room - used]
    return _filled(turn.source, cut), True


def _fill_target(turn: TurnLayout, contents: list[Ids], limit: int) -> tuple[Ids, bool]:
    """Ids of an answer with its EOS, at most `limit`, and whether it was cut (then it has no EOS)."""
    ids = _filled(turn.target, contents)
    if len(ids) <= limit:
        return ids, False
    last = max(place for place, piece in enumerate(turn.target) if isinstance(piece, int))
    return _filled(turn.target[: last + 1], contents)[:limit], True


def _split_system(contents: list[Ids], messages: Sequence[Message]) -> tuple[list[Ids], list[list[Ids]]]:
    """System text (none or one) and turns of one question and at most one answer."""
    start = int(messages[0].role == "system")
    return contents[:start], [contents[index : index + 2] for index in range(start, len(contents), 2)]


def _with_answers(preference: Preference) -> tuple[Message, ...]:
    answers = (Message("assistant", text) for text in (preference.chosen, preference.rejected))
    return (*preference.prompt, *answers)


def _skipped(record: Chat | Preference, messages: Sequence[Message], reason: str) -> Skipped:
    raw = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return Skipped(record.id, reason, raw[:RAW_CHARACTERS])


def _usable(encoded):
    if isinstance(encoded, Skipped):
        raise UserError(f"{encoded.id}: {encoded.reason}")
    return encoded
