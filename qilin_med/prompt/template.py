"""Messages -> token ids and loss mask: the one place that knows how a prompt becomes tokens.

The format itself is the tokenizer's Jinja chat template. Its `{% generation %}` marks say which text is an answer; if it
has none, like most published models, its generation prompt and the end token do. The template is rendered once for each
sequence of roles, with a sentinel in place of every content, and taken apart at the sentinels. The literals between them
(role marks, EOS) are tokenised with special tokens parsed, contents always as plain text, so that no text can smuggle in
a control token; and because only contents are ever cut, role marks survive every limit.
"""

import json
import re
from collections.abc import Iterator, Sequence
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
SENTINEL = "\ue0f0{}\ue0f1"  # around a message's index; private-use characters, which no template writes

Ids: TypeAlias = list[int]
Piece: TypeAlias = tuple[int, ...] | int
"""Ids of a literal, or the index of the message whose content belongs there."""
Skeleton: TypeAlias = tuple[list[tuple[list[Piece], list[Piece]]], Ids]
"""How a template writes a conversation: for each turn the question (with the system text, if any) and the answer; then the
literal after the last answer, outside the loss (Qwen's newline; most templates have none)."""


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


def encode_texts(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[Ids]:
    """Ids of plain texts, without BOS or EOS; what looks like a special token stays text. Uses all cores."""
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

    `max_source_length` limits a question: its content and all literals before the answer (role marks), in the first turn
    also the system text. A question keeps its start. If system text and question together are too long, the system text is
    cut first, to no less than half of the tokens that the marks leave, then the question. `max_target_length` limits an
    answer with its EOS: a longer one is cut to exactly that many tokens and has no EOS. Role marks are never cut. White
    space around contents is stripped, as by the readers.

    If nothing is cut, ids and loss mask equal those of `tokenizer.apply_chat_template`, provided that the tokenizer treats
    the text between special tokens separately (as SentencePiece does, and where marks are special tokens or line ends).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        """UserError: the tokenizer has no chat template, or QILIN_TEMPLATE's role marks or the EOS are no single tokens
        of this tokenizer."""
        if not tokenizer.chat_template:
            raise UserError(
                'this tokenizer has no chat template; set model.template to "qilin", or save one as chat_template.jinja '
                "in the model folder"
            )
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._skeleton = cache(self._build_skeleton)
        self._controls = control_ids(tokenizer)
        if self.template != QILIN_TEMPLATE:
            return
        if tokenizer.eos_token_id is None:
            raise UserError("this tokenizer has no EOS token, so a model could not learn to stop; set eos_token")
        for mark in ROLE_MARKS:
            ids = tokenizer(mark, add_special_tokens=False).input_ids
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or ids[0] not in self._controls:
                raise UserError(
                    f"the role mark {mark} is not a special token of this tokenizer (it gives {len(ids)} tokens); use a "
                    'Baichuan model converted by scripts/convert_baichuan.py, or set model.template to "own"'
                )

    # ------------------------------------------------------------------------------------------------- records

    def encode_chats(
        self, chats: Sequence[Chat], max_source_length: int, max_target_length: int
    ) -> list[list[EncodedChat] | Skipped]:
        """Rows of each chat: usually one. A chat longer than both limits together continues in further rows of whole
        turns, each with the system text, so that no turn vanishes."""
        limits = max_source_length, max_target_length
        conversations = [chat.messages for chat in chats]
        encoded: list[list[EncodedChat] | Skipped] = []
        for chat, (system, turns, reason) in zip(chats, self._tokenise(conversations), strict=True):
            rows = []
            while turns and not reason:  # each row takes as many of the remaining turns as fit
                row, taken = self._row(system, turns[:1], *limits), 1
                while taken < len(turns):
                    longer = self._row(system, turns[: taken + 1], *limits)
                    if len(longer.input_ids) > sum(limits):
                        break
                    row, taken = longer, taken + 1
                rows.append(row)
                turns = turns[taken:]
            encoded.append(_skipped(chat.id, chat.messages, reason) if reason else rows)
        return encoded

    def encode_preferences(
        self, preferences: Sequence[Preference], max_source_length: int, max_target_length: int
    ) -> list[EncodedPreference | Skipped]:
        """Prompt and answers of each preference. The prompt holds system text and last question, and as many whole
        earlier turns as fit into `max_source_length`, the newest first; the others are counted as dropped."""
        answers = [[Message("assistant", text) for text in (pair.chosen, pair.rejected)] for pair in preferences]
        conversations = [[*pair.prompt, *both] for pair, both in zip(preferences, answers, strict=True)]
        tokenised = self._tokenise(conversations)
        encoded: list[EncodedPreference | Skipped] = []
        for pair, messages, (system, turns, reason) in zip(preferences, conversations, tokenised, strict=True):
            if not reason:
                *earlier, [question, chosen], [rejected] = turns
                prompt = self._prompt(system, [*earlier, [question]], max_source_length)
                [(_, target)], _ = self._skeleton(("user", "assistant"))
                chosen, chosen_is_cut = _fill_target(target, [[], chosen], max_target_length)
                rejected, rejected_is_cut = _fill_target(target, [[], rejected], max_target_length)
                cut = int(prompt.is_cut), chosen_is_cut + rejected_is_cut
                if chosen == rejected:
                    reason = "chosen and rejected are the same after cutting"
            encoded.append(
                _skipped(pair.id, messages, reason)
                if reason
                else EncodedPreference(prompt.ids, chosen, rejected, *cut, prompt.dropped_turns)
            )
        return encoded

    @property
    def end_id(self) -> int:
        """The token that ends an answer: not always the tokenizer's EOS, which in base models ends a document."""
        [(_, target)], _ = self._skeleton(("user", "assistant"))
        return target[-1][-1]

    def encode_prompt(self, messages: Sequence[Message], max_source_length: int) -> EncodedPrompt:
        """The prompt to which a model answers the last question: exactly the prompt part of a training row.

        Earlier turns as in `encode_preferences`. UserError: a text contains a role mark, or the last message is no
        question."""
        if not messages or messages[-1].role != "user":
            raise UserError("a prompt must end with a question: expected the last message to have the role user")
        [(system, turns, reason)] = self._tokenise([messages])
        if reason:
            raise UserError(f"this prompt cannot be used: {reason}")
        return self._prompt(system, turns, max_source_length)

    # ----------------------------------------------------------------------------------------------- assembling

    def _tokenise(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Iterator[tuple[list[Ids], list[list[Ids]], str | None]]:
        """For each conversation, all tokenised in one batch: the system text (none or one), the turns of a question and at most
        one answer, and why they cannot be used, as far as only their tokens show."""
        texts = [message.content.strip() for messages in conversations for message in messages]
        ids = iter(encode_texts(self.tokenizer, texts))
        for messages in conversations:
            contents, start = [next(ids) for _ in messages], int(messages[0].role == "system")
            reason = next((_EMPTY[m.role] for m, text in zip(messages, contents, strict=True) if not text), None)
            if not self._controls.isdisjoint(chain.from_iterable(contents)):
                reason = "contains a role mark"
            yield contents[:start], [contents[i : i + 2] for i in range(start, len(contents), 2)], reason

    def _row(self, system: list[Ids], turns: list[list[Ids]], max_source: int, max_target: int) -> EncodedChat:
        """A row of these turns, of which the last may lack its answer."""
        contents = [*system, *chain.from_iterable(turns)]
        skeleton, closing = self._skeleton(("system",) * len(system) + ("user", "assistant") * len(turns))
        ids, labels, cut_sources, cut_targets, is_whole = [], [], 0, 0, False
        for (source, target), turn in zip(skeleton, turns, strict=True):
            asked, source_is_cut = _fill_source(source, contents, max_source)
            answered, is_cut = _fill_target(target, contents, max_target) if turn[1:] else ([], False)
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
            cut_sources += source_is_cut
            cut_targets += is_cut
            is_whole = bool(answered) and not is_cut
        if is_whole and len(ids) + len(closing) <= max_source + max_target:
            ids += closing
            labels += [IGNORED] * len(closing)
        return EncodedChat(ids, labels, cut_sources, cut_targets)

    def _prompt(self, system: list[Ids], turns: list[list[Ids]], max_source: int) -> EncodedPrompt:
        """The last question after as many whole earlier turns as fit."""
        kept, row = 1, self._row(system, turns[-1:], max_source, max_source)
        while kept < len(turns):
            longer = self._row(system, turns[-kept - 1 :], max_source, max_source)
            if longer.cut_sources or len(longer.input_ids) > max_source:
                break
            kept, row = kept + 1, longer
        return EncodedPrompt(row.input_ids, bool(row.cut_sources), len(turns) - kept)

    # -------------------------------------------------------------------------------------------------- skeletons

    def _build_skeleton(self, roles: tuple[Role, ...]) -> Skeleton:
        """Render a conversation of sentinels and take it apart: source, target, source, target, ..., closing."""
        text, spans = self._render(roles)
        if not self._is_marked:
            spans = self._find_answers(text, roles)
        sections: list[list[Piece]] = []
        for start, end in pairwise([0, *chain.from_iterable(spans), len(text)]):
            parts = re.split(SENTINEL.format("([0-9]+)"), text[start:end])  # literals and, at odd places, indices
            sections.append([
                int(part) if place % 2 else tuple(self.tokenizer(part, add_special_tokens=False).input_ids)
                for place, part in enumerate(parts)
                if part
            ])  # fmt: skip
        # Every content must occur once, in order, and answers must have a place of their own.
        first = roles.count("system")
        expected = [*([index] for index in range(first, len(roles))), []]
        expected[0] = list(range(first + 1))
        if [[piece for piece in section if isinstance(piece, int)] for section in sections] != expected:
            raise UserError(
                f"the chat template does not write a conversation of {', '.join(roles)} message by message with each "
                "answer in a place of its own: correct chat_template.jinja"
            )
        *sections, closing = sections
        return list(zip(sections[::2], sections[1::2], strict=True)), list(chain.from_iterable(closing))

    def _render(self, roles: tuple[Role, ...], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """A conversation of sentinels in the template, and the spans of its `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": SENTINEL.format(index)} for index, role in enumerate(roles)]
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

        A model begins after the template's own generation prompt, so whatever the template writes between that prompt and the
        content (an empty thought, for example) is learnt as part of the answer, since the model has to write it.
        """
        question = self._render(("user",), add_generation_prompt=False)[0]
        opening = self._render(("user",), add_generation_prompt=True)[0].removeprefix(question)
        ends = sorted((t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len)
        for index in (place for place, role in enumerate(roles) if role == "assistant"):
            content = SENTINEL.format(index)
            before, found, after = text.partition(content)
            end = next((token for token in reversed(ends) if after.startswith(token)), "")
            if not (opening and opening in before and found and end):
                raise UserError(
                    "this tokenizer's chat template has no {% generation %} marks, and its answers do not stand between"
                    " its generation prompt and a special token, so they cannot be told from questions; put"
                    " {% generation %} ... {% endgeneration %} around the answer and its end token in chat_template.jinja"
                )
            yield before.rindex(opening) + len(opening), len(before) + len(content) + len(end)


_EMPTY = {"system": "empty system text", "user": "empty question", "assistant": "empty answer"}


def _filled(pieces: Sequence[Piece], contents: Sequence[Ids] | dict[int, Ids]) -> Ids:
    return [token for piece in pieces for token in (contents[piece] if isinstance(piece, int) else piece)]


def _fill_source(source: list[Piece], contents: list[Ids], limit: int) -> tuple[Ids, bool]:
    """Ids of a question with its marks, at most `limit`, and whether a text was cut."""
    indices = [piece for piece in source if isinstance(piece, int)]
    marks = sum(len(piece) for piece in source if not isinstance(piece, int))
    room = limit - marks
    if room < 0:
        raise UserError(f"max_source_length {limit} is less than the {marks} tokens of the role marks; raise it")
    if sum(len(contents[index]) for index in indices) <= room:
        return _filled(source, contents), False
    *system, question = indices
    # Cutting the system text below half would lose the rules; cutting the question first would lose what is asked.
    for_system = max(room - len(contents[question]), room // 2)
    cut = {index: contents[index][:for_system] for index in system}
    cut[question] = contents[question][: room - sum(map(len, cut.values()))]
    return _filled(source, cut), True


def _fill_target(target: list[Piece], contents: list[Ids], limit: int) -> tuple[Ids, bool]:
    """Ids of an answer with its EOS, at most `limit`, and whether it was cut (then it has no EOS)."""
    ids = _filled(target, contents)
    if len(ids) <= limit:
        return ids, False
    last = max(place for place, piece in enumerate(target) if isinstance(piece, int))
    return _filled(target[: last + 1], contents)[:limit], True


def _skipped(record_id: str, messages: Sequence[Message], reason: str) -> Skipped:
    raw = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return Skipped(record_id, reason, raw[:RAW_CHARACTERS])
