from itertools import groupby

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qilin_med.errors import UserError
from qilin_med.prompt.template import IGNORED, QILIN_TEMPLATE, ROLE_MARKS, ChatTemplate, EncodedChat, EncodedPreference
from qilin_med.records import Chat, Message, Preference, Skipped

TEXTS = [
    "发热三天，伴咳嗽、咽痛，应当先量体温再决定是否用药？",
    "头痛多由休息不足引起，若伴呕吐请尽快就诊。",
    "腹泻时要补充水分和盐分吗？",
    "胃痛的病人饭后一小时服药，忌辛辣和冷饮。",
    "CT scan and blood test are normal?",
    "如果出现胸闷、心慌，立即停药并联系医生。",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*contents: str, system: str = "") -> Chat:
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(contents)]
    return Chat("file:1", tuple([Message("system", system)] * bool(system) + turns))


def as_dicts(messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def rows_of(template: ChatTemplate, record: Chat, max_source: int, max_target: int) -> list[EncodedChat]:
    [rows] = template.encode_chats([record], max_source, max_target)
    return rows


def pair_of(template: ChatTemplate, record: Preference, max_source: int, max_target: int) -> EncodedPreference:
    [pair] = template.encode_preferences([record], max_source, max_target)
    return pair


@pytest.fixture(scope="module")
def template(small_tokenizer) -> ChatTemplate:
    return ChatTemplate(small_tokenizer)


@pytest.fixture(scope="module")
def marks(small_tokenizer) -> list[int]:
    return [*small_tokenizer.convert_tokens_to_ids(list(ROLE_MARKS)), small_tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def unmarked_tokenizer(chatml_tokenizer) -> PreTrainedTokenizerFast:
    """As Qwen's: no marks, a default system text, an empty thought before the newest answer, another EOS token."""
    template = CHATML.replace("{% generation %}", "{% if loop.last %}<think></think>\n{% endif %}")
    template = template.replace("{% endgeneration %}", "")
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    return with_template(chatml_tokenizer, default + template)


@pytest.fixture(params=["small_tokenizer", "chatml_tokenizer"])
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def test_two_turns_give_the_ids_and_mask_worked_out_by_hand(template, plain, marks):
    ask, answer, eos = marks
    q1, a1, q2, a2 = (plain(text) for text in ("发热三天", "先量体温", "如何用药", "每天三次"))
    [row] = rows_of(template, chat("发热三天", "先量体温", "如何用药", "每天三次"), 64, 64)
    assert row.input_ids == [ask, *q1, answer, *a1, eos, ask, *q2, answer, *a2, eos]
    silent = [IGNORED] * (len(q1) + 2), [IGNORED] * (len(q2) + 2)
    assert row.labels == [*silent[0], *a1, eos, *silent[1], *a2, eos]
    assert (row.cut_sources, row.cut_targets) == (0, 0)


@pytest.mark.parametrize("system", ["", "你是一位医生。"])
@pytest.mark.parametrize("contents", [TEXTS[:2], TEXTS[:6], ["  CT \n scan ", "a  b"]])
def test_whole_texts_equal_the_tokenizers_own_template(any_tokenizer, system, contents):
    record = chat(*(text.strip() for text in contents), system=system)
    [row] = rows_of(ChatTemplate(any_tokenizer), record, 1000, 1000)
    own = any_tokenizer.apply_chat_template(
        as_dicts(record.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.input_ids == own["input_ids"]
    assert [int(label != IGNORED) for label in row.labels] == own["assistant_masks"]
    assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))


def test_a_prompt_equals_the_templates_generation_prompt(any_tokenizer):
    messages = chat(*TEXTS[:3], system="你是一位医生。").messages
    own = any_tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=True)
    assert ChatTemplate(any_tokenizer).encode_prompt(messages, 1000).ids == own["input_ids"]


@pytest.mark.parametrize("system", ["", TEXTS[5] * 2])
def test_marks_survive_every_source_limit_and_the_start_of_the_question_stays(template, plain, marks, system):
    ask, answer, _ = marks
    question = plain(TEXTS[0] * 3)
    for limit in range(2, 2 + len(question) + len(plain(system)) * bool(system) + 3):
        [row] = rows_of(template, chat(TEXTS[0] * 3, "好", system=system), limit, 8)
        source = row.input_ids[: row.labels.index(next(label for label in row.labels if label != IGNORED))]
        assert len(source) == min(limit, 2 + len(question) + len(plain(system)) * bool(system))
        assert source[-1] == answer and source.count(ask) == source.count(answer) == 1
        before, kept = source[: source.index(ask)], source[source.index(ask) + 1 : -1]
        assert kept == question[: len(kept)] and before == plain(system)[: len(before)]
        if row.cut_sources:
            assert len(before) <= max((limit - 2) // 2, limit - 2 - len(question))
            assert len(kept) >= min(len(question), (limit - 2) // 2)


def test_answers_are_found_in_a_template_without_marks(unmarked_tokenizer):
    record = chat(*TEXTS[:4])
    [row] = rows_of(ChatTemplate(unmarked_tokenizer), record, 1000, 1000)
    messages = as_dicts(record.messages)
    assert row.input_ids == unmarked_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    answers = [list(group) for learnt, group in groupby(row.labels, lambda label: label != IGNORED) if learnt]
    expected = [f"{TEXTS[1]}<|im_end|>", f"<think></think>\n{TEXTS[3]}<|im_end|>"]
    assert [unmarked_tokenizer.decode(ids) for ids in answers] == expected
    prompt = unmarked_tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)
    assert ChatTemplate(unmarked_tokenizer).encode_prompt(record.messages[:3], 1000).ids == prompt["input_ids"]
    assert ChatTemplate(unmarked_tokenizer).end_id == unmarked_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_limit_below_the_marks_is_refused(template):
    with pytest.raises(UserError, match=r"max_source_length 1 is less than the 2 tokens"):
        rows_of(template, chat("发热", "休息"), 1, 8)


def test_an_answer_has_its_eos_exactly_if_it_is_whole(template, plain, marks):
    answer = plain(TEXTS[1])
    for limit in range(1, len(answer) + 4):
        [row] = rows_of(template, chat("头痛", TEXTS[1]), 32, limit)
        trained = [label for label in row.labels if label != IGNORED]
        assert trained == [*answer, marks[2]] if limit > len(answer) else trained == answer[:limit]
        assert row.cut_targets == (limit <= len(answer))


def test_an_end_of_several_tokens_is_kept_whole_or_left_out(chatml_tokenizer):
    ending = CHATML.replace("<|im_end|>{% endgeneration %}", "<|im_end|><|im_end|>{% endgeneration %}")
    tokenizer = with_template(chatml_tokenizer, ending)
    answer = tokenizer(TEXTS[1]).input_ids
    for limit in range(len(answer) - 1, len(answer) + 4):
        [row] = rows_of(ChatTemplate(tokenizer), chat("头痛", TEXTS[1]), 64, limit)
        trained = [label for label in row.labels if label != IGNORED]
        assert trained == answer[:limit] + [tokenizer.eos_token_id] * 2 * (limit >= len(answer) + 2)


def test_a_long_chat_continues_in_further_rows_and_loses_no_turn(template, plain, marks):
    ask, answer, eos = marks
    turns = [f"第{number}个问题" if place % 2 == 0 else f"答{number}" for number in range(9) for place in range(2)]
    rows = rows_of(template, chat(*turns, system="医生"), 24, 16)
    assert len(rows) > 2 and all(len(row.input_ids) <= 40 for row in rows)
    written = [
        token
        for question, reply in zip(turns[::2], turns[1::2], strict=True)
        for token in [ask, *plain(question), answer, *plain(reply), eos]
    ]
    system = plain("医生")
    assert all(row.input_ids[: len(system) + 1] == [*system, ask] for row in rows)
    assert [token for row in rows for token in row.input_ids[len(system) :]] == written


def test_control_tokens_in_a_text_stay_text_or_are_skipped(template, marks):
    smuggled, harmless, marked = template.encode_chats(
        [chat("发热</s>头痛", "好"), chat("发热<s>", "<unk>好"), chat("发热<reserved_102>", "好")], 64, 64
    )
    assert smuggled[0].input_ids.count(marks[2]) == 1 and smuggled[0].input_ids[-1] == marks[2]
    assert "发热</s>头痛" in template.tokenizer.decode(smuggled[0].input_ids)
    assert template.tokenizer.bos_token_id not in harmless[0].input_ids
    assert isinstance(marked, Skipped) and marked.reason == "contains a role mark" and "发热" in marked.raw
    with pytest.raises(UserError, match="contains a role mark"):
        template.encode_prompt([Message("user", "发热<reserved_103>")], 64)


def test_a_prompt_keeps_the_newest_earlier_turns_that_fit_and_counts_the_others(template, plain, marks):
    ask, answer, eos = marks
    history = chat("一问", "一答", "二问", "二答", "三问").messages
    pair = Preference("f:1", history, "好的答案", "坏的答案")
    whole = pair_of(template, pair, 100, 16)
    lengths = [len(plain(text)) + 2 - place % 2 for place, text in enumerate(("一问", "一答", "二问", "二答"))]
    assert len(whole.prompt_ids) == sum(lengths) + len(plain("三问")) + 2 and whole.dropped_turns == 0
    last = [ask, *plain("三问"), answer]
    for limit in range(len(last), len(whole.prompt_ids)):
        cut = pair_of(template, pair, limit, 16)
        kept_both = limit >= len(last) + sum(lengths[2:])
        assert cut.prompt_ids == whole.prompt_ids[-len(last) - sum(lengths[2:]) * kept_both :]
        assert (cut.dropped_turns, cut.cut_sources) == (2 - kept_both, 0)
        assert cut.prompt_ids == template.encode_prompt(history, limit).ids
    assert whole.chosen_ids == [*plain("好的答案"), eos] and whole.rejected_ids == [*plain("坏的答案"), eos]


def test_prompts_of_preferences_and_chats_are_the_same_also_when_cut(template):
    for limit in (8, 12, 1000):
        [row] = rows_of(template, chat(TEXTS[0], "好", system=TEXTS[2]), limit, 8)
        pair = pair_of(template, Preference("f:1", chat(TEXTS[0], system=TEXTS[2]).messages, "好", "坏"), limit, 8)
        assert row.input_ids == pair.prompt_ids + pair.chosen_ids


def test_answers_that_are_the_same_after_cutting_are_skipped(template, plain):
    limit = len(plain(TEXTS[0]))
    pair = Preference("f:1", chat("问").messages, TEXTS[0] + "甲", TEXTS[0] + "乙")
    [kept] = template.encode_preferences([pair], 32, limit + 8)
    [same] = template.encode_preferences([pair], 32, limit - 2)
    assert kept.chosen_ids != kept.rejected_ids
    assert same.reason == "chosen and rejected are the same after cutting"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, chat_template=template
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no {% generation %} marks"),
        (QILIN_TEMPLATE, "<reserved_102> is not a special token"),
        ("{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}", "does not write a conversation"),
        (CHATML + "{{ messages[0]['content'] }}", "does not write a conversation"),
        (CHATML.replace("{% for", "{{ raise_exception('no system') }}{% for", 1), "refuses a conversation of user"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(chatml_tokenizer, template, message):
    with pytest.raises(UserError) as error:
        rows_of(ChatTemplate(with_template(chatml_tokenizer, template)), chat("问", "答"), 32, 32)
    assert message in str(error.value)
