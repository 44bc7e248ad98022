"""Deduplication against brute force: what is rejected, what is kept, and that neither order nor shards change it."""

import re
import tracemalloc
import unicodedata
from itertools import combinations
from random import Random

import numpy as np
import pytest

from qilin_med.config.corpus import DeduplicationSettings
from qilin_med.data import deduplicate as dedup
from qilin_med.data import matching
from qilin_med.data.curate import rank_of
from qilin_med.data.shards import Workspace

CHARACTERS = [chr(0x4E00 + index) for index in range(2000)]
SETTINGS = DeduplicationSettings()


def text(rng: Random, length: int) -> str:
    return "".join(rng.choices(CHARACTERS, k=length))


def with_changes(rng: Random, base: str, count: int) -> str:
    """The text with `count` characters replaced, far enough apart to spoil five shingles each."""
    places = rng.sample(range(5, len(base) - 5, 11), count)
    return "".join("〇" if index in places else character for index, character in enumerate(base))


def shingles(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(len(text) - 4, 1))}


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """160 distinct texts; exact copies, near copies of every similarity, and a chain of small changes."""
    rng = Random(1)
    texts = [text(rng, rng.randrange(60, 400)) for _ in range(160)]
    texts += [f" {base}\n" for base in texts[:20]]
    texts += [with_changes(rng, base, count) for base in texts[20:90] if len(base) > 200 for count in (1, 3, 5, 8)]
    chain = text(rng, 300)
    for _ in range(6):
        texts.append(chain)
        chain = with_changes(rng, chain, 2)
    return texts


def run(tmp_path, texts: list[str], shards: int, parts: int) -> Workspace:
    """All steps but the repeats, over documents dealt out to shards."""
    work = Workspace(tmp_path, ("pretraining",) * shards, parts)
    for shard in range(shards):
        mine = texts[shard::shards]
        rows = ({"id": f"x-{matching.normalise(t)}", "text": t} for t in mine)
        work.write(shard, rows, [rank_of(0, f"x-{matching.normalise(t)}") for t in mine])
        dedup.save_exact_keys(work, shard, [dedup.exact_key("pretraining", t) for t in mine])
    for part in range(parts):
        dedup.find_exact(work, part)
    for shard in range(shards):
        dedup.sign_shard(work, SETTINGS, shard)
    for part in range(parts):
        dedup.pair_candidates(work, part)
    for part in range(parts):
        dedup.verify_pairs(work, SETTINGS.shingle, [SETTINGS.threshold] * shards, part)
    dedup.find_near(work)
    return work


def kept_texts(work: Workspace) -> list[str]:
    kept = []
    for shard in range(len(work.stages)):
        gone = dedup.duplicates_of_shard(work, SETTINGS, shard)
        kept += [matching.normalise(r["text"]) for i, r in enumerate(work.rows(shard)) if i not in gone]
    return sorted(kept)


def brute_force(texts: list[str]) -> list[str]:
    """Of each component of texts with similarity 0.8 or more, the one with the smallest rank."""
    left = sorted({matching.normalise(t) for t in texts}, key=lambda t: rank_of(0, f"x-{t}"))
    component, sets = {t: t for t in left}, {t: shingles(t) for t in left}
    for a, b in combinations(left, 2):
        if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b]):
            old, new = component[b], component[a]
            component = {t: new if c == old else c for t, c in component.items()}
    firsts: dict[str, str] = {}
    for t in left:
        firsts.setdefault(component[t], t)
    return sorted(firsts.values())


def test_what_is_kept_is_what_brute_force_keeps(tmp_path, planted):
    kept = kept_texts(run(tmp_path, planted, shards=3, parts=2))
    expected = brute_force(planted)
    # What MinHash removes is verified; a pair at the very threshold it may miss (at 0.8 it finds 1 - (1 - 0.8^8)^14,
    # 93%).
    assert 0 <= len(kept) - len(expected) <= 3
    assert len(set(kept) ^ set(expected)) <= 6
    assert len(planted) - len(kept) > 100


def test_neither_order_nor_shards_nor_parts_change_what_is_kept(tmp_path, planted):
    shuffled = planted.copy()
    Random(2).shuffle(shuffled)
    first = run(tmp_path / "a", planted, shards=1, parts=1)
    second = run(tmp_path / "b", shuffled, shards=5, parts=3)
    assert kept_texts(first) == kept_texts(second)


def test_the_earlier_source_keeps_a_text(tmp_path):
    work = Workspace(tmp_path, ("sft", "sft", "dpo"), 1)
    same = {"conversations": [{"from": "input", "value": "问" * 30}, {"from": "output", "value": "答" * 30}]}
    pair = {"question": "问" * 30, "response_chosen": "答" * 30, "response_rejected": "不" * 30}
    for shard, (source, row) in enumerate([(1, same), (0, same), (0, pair)]):
        work.write(shard, [{"id": "x", **row}], [rank_of(source, "x")])
        dedup.save_exact_keys(work, shard, [dedup.exact_key(work.stages[shard], "同一段文字")])
    dedup.find_exact(work, 0)
    gone = [set(dedup.duplicates_of_shard(work, DeduplicationSettings(near=False), shard)) for shard in range(3)]
    # The dpo record has the same key text, but training sets do not meet.
    assert gone == [{0}, set(), set()]


# ----------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 50])
def test_window_hashes_are_equal_exactly_where_windows_are(width):
    items = np.random.default_rng(0).integers(0, 2, 400).astype(np.uint32)
    hashes = matching.hash_windows(items, width).tolist()
    windows = [tuple(items[i : i + width]) for i in range(len(items) - width + 1)]
    assert len(hashes) == len(windows)
    assert len(set(zip(windows, hashes, strict=True))) == len(set(windows)) == len(set(hashes))


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [("一二三四五六七八九十", "一二三四五六七八九百", 5 / 7), ("短", "短", 1), ("短", "长", 0)],
)
def test_similarity_worked_by_hand(left, right, shared):
    assert matching.jaccard(matching.shingle_set(left, 5), matching.shingle_set(right, 5)) == pytest.approx(shared)


def test_normalising_hides_width_case_and_blanks_alone():
    assert matching.normalise("ＣＴ 检查\n阳性") == matching.normalise("ct检查阳性")
    assert matching.normalise("血压1.5") != matching.normalise("血压15")
    # What it does by itself for speed changes nothing: signs that combine with what follows included.
    rng = Random(4)
    for _ in range(2000):
        odd = "".join(rng.choices("，：；？！（）～％…<=\u0338\u0301\u3099か℃①\u3000\x1cＡß ", k=8))
        assert matching.normalise(odd) == re.sub(r"\s+", "", unicodedata.normalize("NFKC", odd)).casefold()


# ----------------------------------------------------------------------------------------------------- substrings


def repeated_windows(documents: list[list[int]], ranks: list[int], width: int) -> set[tuple[int, int]]:
    """(document, first token) of each window that another document, earlier by rank, has; by definition."""
    keeper: dict[tuple[int, ...], int] = {}
    for document in sorted(range(len(documents)), key=lambda d: ranks[d]):
        for i in range(len(documents[document]) - width + 1):
            keeper.setdefault(tuple(documents[document][i : i + width]), document)
    return {
        (d, i)
        for d, tokens in enumerate(documents)
        for i in range(len(tokens) - width + 1)
        if keeper[tuple(tokens[i : i + width])] != d
    }


def test_repeats_are_those_of_the_definition(tmp_path):
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 3, rng.integers(1, 60)).tolist() for _ in range(40)]
    ranks = rng.permutation(40).tolist()
    work = Workspace(tmp_path, ("pretraining", "pretraining"), 3)
    numbers = [(d % 2, d // 2) for d in range(40)]
    for shard in (0, 1):
        mine = range(shard, 40, 2)
        work.write(shard, [{"id": str(d)} for d in mine], [ranks[d] for d in mine])
        pieces = [(0, 20)] if shard else [(0, 7), (7, 8), (8, 20)]
        dedup.save_windows(work, 6, shard, ((range(a, b), [documents[d] for d in mine[a:b]]) for a, b in pieces))
    for part in range(3):
        dedup.find_repeats(work, part)
    found = work.load_parts("repeats")
    places = {(r >> 32, r & 0xFFFFFFFF, t) for r, t in found[["record", "token"]].tolist()}
    expected = {(*numbers[d], i) for d, i in repeated_windows(documents, ranks, 6)}
    assert places == expected and len(expected) > 100


def test_a_shard_of_any_length_is_tokenised_in_the_memory_of_a_piece(tmp_path):
    work, peaks = Workspace(tmp_path, ("pretraining",), 3), []
    for number in (0, 2, 20):
        pieces = (([n], [[n] * 10_000]) for n in range(number))
        tracemalloc.start()
        dedup.save_windows(work, 6, 0, pieces)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        dealt = [work.dealt("windows", 0, part) for part in range(3)]
        assert sum(map(len, dealt)) == number * 9995
        assert sorted(at for some in dealt for at in some["at"].tolist()) == [
            n * 10_000 + i for n in range(number) for i in range(9995)
        ]
    assert peaks[0] < peaks[1] and peaks[2] < 1.1 * peaks[1]


def test_cutting_leaves_what_lies_around():
    assert dedup.cut_out("前面，重复的一段。后面", [(3, 9)]) == "前面，\n后面"
    assert dedup.cut_out("重复的一段", [(0, 5)]) == ""


def test_shards_give_any_record_back(tmp_path):
    work = Workspace(tmp_path, ("sft", "sft"), 1)
    rows = [{"id": str(i), "text": "字" * i} for i in range(5)]
    work.write(1, rows, list(range(5)))
    record = work.random_access()
    assert [record((1 << 32) | i) for i in (4, 0, 2)] == [rows[4], rows[0], rows[2]]
