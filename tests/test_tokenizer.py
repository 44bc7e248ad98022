"""The fast tokenizer gives SentencePiece's own ids and texts."""

import csv
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece
from qilin_med.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"
BAICHUAN = SHARED / "baichuan7b-tiny-original" / "tokenizer.model"
TEMPLATE = "{% for m in messages %}{{ '<reserved_102>' + m['content'] }}{% endfor %}"

SENTENCES = [
    "高血压患者饮食需要注意什么？应当低盐、低脂饮食，每天食盐不超过5克。",
    "患者，男，45岁，因“反复上腹痛3年，加重1周”入院；查体：腹软，无压痛。",
    "The patient was given aspirin 100 mg qd. Blood pressure: 150/95 mmHg.",
    "糖尿病患者血糖控制不佳，建议到内分泌科就诊，调整胰岛素用量。",
    "哈哈哈哈哈哈，aaaa bbbb ---- ====",
]
ODD_TEXTS = [
    "", " ", "  a  b ", "\t", "\n", "\r\n", "a\r\nb", "\u3000全角　空格", "a" * 3000, "哈" * 3001, "-" * 1001, " " * 1001,
    "；：（）／％", "ＡＢＣ１２３", "㎎ ℃ ① ½ ™️", "e\u0301 Ａ\u0301 a\u0327\u0301 \u0301\u0308\u0301", "=\u0338 <br>\u0338",
    "と\u3099 ｶﾞ ﾊﾟ", "\u1100\u1161\u11a8 각 히ﾯ", "ﷺ مرحبا آ", "\x00", "a\x00b\x07", "\ufeffx\u200by\u200dz\u200c",
    "\ue000\ue001\uf8ff\U000f0000", "\ufff0", "\ufdd0\uffff", "😀👨‍👩‍👧👍🏽🇨🇳", "𠮷𪚥", "▁", "▁▁a ▁", "1234.5!?", "<h2>标题</h2>",
]  # fmt: skip
SMUGGLED = [
    "</s>", "好。</s>。", "<s>。<unk>", "。<0x0A>。", "<0xE4><0xB8><0xAD>", "a<reserved_102>b", "<reserved_103> x",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the traps of Baichuan's: nmt_nfkc, byte fallback, pieces of one and of several characters."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.set_min_log_level(2)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "small"), vocab_size=480, model_type="bpe",
        byte_fallback=True, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=["<reserved_102>", "<reserved_103>", *("<h2>", "</h2>", "<br>", "---", *"\n，。？１")],
    )  # fmt: skip
    return folder / "small.model"


@pytest.fixture(scope="module", params=["trained", "baichuan"])
def pair(
    request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerFast, SentencePieceProcessor]:
    """Our tokenizer, as it comes back from disk, and SentencePiece."""
    file = trained if request.param == "trained" else BAICHUAN
    if not file.is_file():
        pytest.skip("the shared Baichuan-7B tokenizer is not here")
    folder = tmp_path_factory.mktemp(request.param)
    fast_tokenizer_from_sentencepiece(file, TEMPLATE, max_length=4096).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), SentencePieceProcessor(str(file))


def shared_texts() -> Iterator[str]:
    """Some 3,000 real texts: lines of many formats, and cells, which may hold line breaks."""
    for file in sorted(SHARED.glob("data/**/*")):
        if file.suffix in (".json", ".jsonl", ".txt"):
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from (line[:2000] for line in islice(lines, 40))
        elif file.suffix == ".csv":
            with file.open(encoding="gb18030", errors="replace", newline="") as lines:
                yield from (cell[:2000] for row in islice(csv.reader(lines), 15) for cell in row)


def random_texts() -> list[str]:
    """Strings of characters that normalisers treat in unlike ways, put side by side."""
    rng = random.Random(0)
    ranges = [
        (0, 0x250), (0x300, 0x370), (0x600, 0x660), (0x1100, 0x1200), (0x2000, 0x2100), (0x2460, 0x2480), (0x3000, 0x3100),
        (0x4E00, 0x4E20), (0xAC00, 0xAC20), (0xE000, 0xE004), (0xFF00, 0xFFF0), (0x1F1E6, 0x1F400),
    ]  # fmt: skip
    alphabet = [chr(code) for first, last in ranges for code in range(first, last)]
    marks = ["\u0301", "\u0308", "\u0338", "\u3099", "\u11a8"]
    strange = ["<br>", "</h2>", "---", "，", " ", "\n", *"aeiou<=>-▁", *marks] * 40
    return ["".join(rng.choices(alphabet + strange, k=rng.randint(1, 20))) for _ in range(3000)]


def assert_same(tokenizer: PreTrainedTokenizerFast, reference: SentencePieceProcessor, texts: list[str]) -> None:
    expected = reference.encode(texts)
    for text, ids, wanted in zip(texts, tokenizer(texts, split_special_tokens=True).input_ids, expected, strict=True):
        assert ids == wanted, f"{text[:60]!r}: {ids[:20]}, SentencePiece {wanted[:20]}"
    for text, ids, wanted in zip(texts, tokenizer(texts).input_ids, expected, strict=True):
        assert ids == wanted or any(token in text for token in tokenizer.all_special_tokens), repr(text[:60])
    for ids, found in zip(expected, tokenizer.batch_decode(expected), strict=True):
        is_special = not set(ids).isdisjoint(tokenizer.all_special_ids)
        assert is_special or found == reference.decode(ids), f"{ids[:20]}: {found[:60]!r}"


def test_odd_texts(pair):
    assert_same(*pair, ODD_TEXTS + SMUGGLED)


def test_random_texts(pair):
    assert_same(*pair, random_texts())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_real_texts(pair):
    texts = list(dict.fromkeys(shared_texts()))
    assert len(texts) > 1000
    assert_same(*pair, texts)


def test_long_text_in_bounded_time_and_memory_of_the_pattern_engine(pair):
    assert_same(*pair, ["患者血压偏高，e\u0301。" * 20000 + "\u0301" * 20000])


def test_decoding_random_ids(pair):
    tokenizer, reference = pair
    rng = random.Random(0)
    pieces = [i for i in range(len(tokenizer)) if not reference.is_byte(i) and i not in tokenizer.all_special_ids]
    lone_bytes = [tokenizer.convert_tokens_to_ids(name) for name in ("<0x80>", "<0xE4>", "<0x41>")]
    for _ in range(500):
        ids = [i for piece in rng.choices(pieces, k=8) for i in (piece, rng.choice(lone_bytes))]
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_typed_control_names_never_become_control_ids(pair):
    tokenizer, reference = pair
    for text in SMUGGLED:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text == reference.decode(ids)


def test_role_marks_part_the_text_and_can_be_skipped(pair):
    tokenizer, reference = pair
    user, assistant = (reference.piece_to_id(mark) for mark in ("<reserved_102>", "<reserved_103>"))
    ids = tokenizer("<reserved_102>血压高？<reserved_103>低盐饮食。</s>").input_ids
    assert ids == [user, *reference.encode("血压高？"), assistant, *reference.encode("低盐饮食。"), 2]
    assert tokenizer.decode([user, *reference.encode("血压高？"), 2], skip_special_tokens=True) == "血压高？"


def test_settings_survive_saving(pair):
    tokenizer, _ = pair
    assert [getattr(tokenizer, f"{kind}_token_id") for kind in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 0]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 4096)
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.chat_template == TEMPLATE
    assert {"<reserved_102>", "<reserved_103>"} < set(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer("don 't , .").input_ids) == "don 't , ."


def test_same_file_in_every_process(trained, tmp_path):
    """The fingerprint of a model folder holds its tokenizer, so no set's order may show in the file."""
    code = (
        "import sys; from pathlib import Path; from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece as make;"
        " make(Path(sys.argv[1])).save_pretrained(sys.argv[2])"
    )
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, trained, tmp_path / seed]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
    assert (tmp_path / "1/tokenizer.json").read_bytes() == (tmp_path / "2/tokenizer.json").read_bytes()


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nmt_nfkc"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_other_normalisers(tmp_path, rule, squeeze):
    (tmp_path / "text").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=470, model_type="bpe",
        byte_fallback=True, normalization_rule_name=rule, remove_extra_whitespaces=squeeze,
    )  # fmt: skip
    tokenizer = fast_tokenizer_from_sentencepiece(tmp_path / "m.model")
    assert_same(tokenizer, SentencePieceProcessor(str(tmp_path / "m.model")), [*SENTENCES, *ODD_TEXTS, *random_texts()])


def test_refusals(tmp_path):
    (tmp_path / "text").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "u"), vocab_size=370, byte_fallback=True
    )
    with pytest.raises(UserError, match="UNIGRAM"):
        fast_tokenizer_from_sentencepiece(tmp_path / "u.model")
    with pytest.raises(UserError, match="missing"):
        fast_tokenizer_from_sentencepiece(tmp_path / "absent.model")
    (tmp_path / "cut.model").write_bytes((tmp_path / "u.model").read_bytes()[:1001])
    with pytest.raises(UserError, match=r"cut\.model"):
        fast_tokenizer_from_sentencepiece(tmp_path / "cut.model")
