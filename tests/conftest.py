"""Helpers that several test files share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece
from qilin_med.prompt.template import QILIN_TEMPLATE, ROLE_MARKS

SENTENCES = [
    "发热三天，伴咳嗽、咽痛，应当先量体温再决定是否用药。",
    "头痛多由休息不足引起，若伴呕吐请尽快到神经内科就诊。",
    "患者血压偏高，建议低盐饮食，每天散步三十分钟。",
    "腹泻时要补充水分和盐分，不要随意服用抗生素。",
    "胃痛的病人饭后一小时服药，忌辛辣和冷饮。",
    "这种药每天三次，每次一片，连用七天后复查。",
    "CT scan and blood test are normal, please rest at home.",
    "如果出现胸闷、心慌，立即停药并联系医生。",
]

LONGEST = (
    "test_demo.py",
    "test_training.py",
    "test_build.py",
)  # files to begin with, so that both workers end together


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A SentencePiece BPE tokenizer like Baichuan's: byte fallback, the two role marks, QILIN_TEMPLATE."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=list(ROLE_MARKS),
        minloglevel=2,
    )
    return fast_tokenizer_from_sentencepiece(folder / "small.model", QILIN_TEMPLATE)


@pytest.fixture(scope="session")
def plain(small_tokenizer) -> Callable[[str], list[int]]:
    """Ids of plain text, in which a role mark is text like any other."""
    return lambda text: small_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data in raw formats, which lies beside the repository on development machines."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no folder ../shared with public data")
    return folder


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write values as JSON lines (text as it stands) and return the file."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
