"""Deduplication after Lee et al. 2022 (arXiv:2107.06499): exact, near (MinHash, verified), and repeated substrings.

The tasks of a step read what earlier steps wrote to the work folder and write their own files whole, so they run in any
order on any number of workers. A task takes one shard, or one part of the hash values: equal things meet in one part,
and memory stays that of one part.

Rank alone (see `Workspace.write`) decides which of several records keeps a text: neither the order of the files nor the
number of workers changes what is kept.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from qilin_med.config.corpus import CorpusSettings, DeduplicationSettings
from qilin_med.config.experiment import StageName
from qilin_med.data import matching
from qilin_med.data.questions import question_in
from qilin_med.data.render import from_row, text_of
from qilin_med.data.shards import (
    ROW_BITS,
    ROW_MASK,
    Row,
    Workspace,
    batched,
    load,
    number_of,
    of_shard,
    row_of,
    save,
    shard_of,
)
from qilin_med.prompt.wording import without_frame

SIGNED_AT_ONCE = 2000  # records
TOKENISED_AT_ONCE = 1 << 20  # characters
EXACT, NEAR = "exact duplicate", "near-duplicate"
DUPLICATE = np.dtype([("record", np.uint64), ("kept", np.uint64), ("similarity", np.float32)])
"""A record that is rejected, the record that is kept for it, and their similarity."""
REPEAT = np.dtype([("record", np.uint64), ("token", np.uint32), ("kept", np.uint64)])
"""A window of tokens, by its first token in a record, that another record keeps."""
KEYED = np.dtype([("key", np.uint64), ("at", np.uint32)])
"""A hash and what it is of: a row of a shard, or the window that begins at a token of a shard."""
LONG_KEYED = np.dtype([("key", np.uint64, 2), ("at", np.uint32)])


def equal_records(
    work: Workspace,
    step: str,
    part: int,
    shards: Iterable[int],
    rows_at: Callable[[int, np.ndarray], tuple[np.ndarray, ...]] = lambda shard, at: (at,),
) -> tuple[np.ndarray, ...]:
    """Group the records with equal keys among what was dealt to a part, in the order of ranks: (members, heads, numbers,
    further columns).

    `rows_at` gives the rows for a shard's column "at", and further columns to order by. `members` and `heads` (see
    `matching.equal_groups`) are positions in the columns returned.
    """
    items = {shard: work.dealt(step, shard, part) for shard in shards}
    # Most keys stand alone: only the others are looked at more closely.
    firsts = [some["key"] if some["key"].ndim == 1 else some["key"][:, 0] for some in items.values()]
    repeated = np.split(matching.repeated(np.concatenate(firsts)), np.cumsum([*map(len, firsts)])[:-1])
    columns = []
    for (shard, some), is_repeated in zip(items.items(), repeated, strict=True):
        rows, *further = rows_at(shard, some["at"][is_repeated])
        columns.append((some["key"][is_repeated], number_of(shard, rows), work.ranks(shard)[rows], *further))
    keys, numbers, ranks, *further = map(np.concatenate, zip(*columns, strict=True))
    if keys.ndim == 2:  # two halves of a key as one: equal rows share an index
        keys = np.unique(keys, axis=0, return_inverse=True)[1]
    index, members, heads = matching.equal_groups(keys, ranks, numbers, *further)
    return members, heads, numbers[index], *(column[index] for column in further)


def in_order(records: np.ndarray, *columns: np.ndarray, dtype: np.dtype = DUPLICATE) -> np.ndarray:
    """Columns as one array in the order of records, in which `Workspace.found` looks."""
    order = np.argsort(records, kind="stable")
    return np.rec.fromarrays([column[order] for column in (records, *columns)], dtype)


# --------------------------------------------------------------------------------------------------------- exact


def exact_key(stage: StageName, text: str) -> bytes:
    """128 bits of a text, normalised, within its training set."""
    return hashlib.blake2b(f"{stage}\n{matching.normalise(text)}".encode(), digest_size=16).digest()


def save_exact_keys(work: Workspace, shard: int, keys: list[bytes]) -> None:
    halves = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    items = np.empty(len(keys), LONG_KEYED)
    items["key"], items["at"] = halves, np.arange(len(keys))
    work.deal("keys", shard, [(items, halves[:, 0] % np.uint64(work.parts))])


def find_exact(work: Workspace, part: int) -> None:
    """Task: the records of one part of the keys that another record equals."""
    members, heads, numbers = equal_records(work, "keys", part, range(len(work.stages)))
    found = in_order(numbers[members], numbers[heads], np.ones(len(members)))
    save(work.path("exact", part), found)


# ---------------------------------------------------------------------------------------------------------- near


def compared_text(stage: StageName, row: Row) -> str:
    """What records of a training set are compared by: prompt and answers, without what many have in common (a system
    text, the words of the exam prompt)."""
    turns = {"conversations": [turn for turn in row.get("conversations", ()) if turn["from"] != "system"]}
    return without_frame(text_of(from_row(stage, {**row, **turns})))


def sign_shard(work: Workspace, settings: DeduplicationSettings, shard: int) -> None:
    """Task: MinHash band keys of a shard's records, with their rows."""
    stage = work.stages[shard]
    gone = set(row_of(work.found("exact", shard)["record"]).tolist())
    left = ((index, row) for index, row in enumerate(work.rows(shard)) if index not in gone)
    rows, keys = [], [np.empty((settings.bands, 0), np.uint64)]
    # Records of different training sets never meet.
    salt = np.uint64(int.from_bytes(hashlib.blake2b(stage.encode(), digest_size=8).digest()))
    salts = matching.mix(np.arange(settings.bands)) ^ salt  # nor do different bands
    for chunk in batched(left, SIGNED_AT_ONCE):
        rows += [index for index, _ in chunk]
        texts = [matching.normalise(compared_text(stage, row)) for _, row in chunk]
        keys.append(matching.sign(texts, settings.shingle, settings.bands, settings.rows_per_band) ^ salts[:, None])
    signatures = np.concatenate(keys, axis=1).ravel()
    items = np.rec.fromarrays([signatures, np.tile(np.array(rows, np.uint32), settings.bands)], KEYED)
    work.deal("near/keys", shard, [(items, signatures % np.uint64(work.parts))])


def pair_candidates(work: Workspace, part: int) -> None:
    """Task: pairs of records that agree on a band.

    In a group, each record is paired with the first by rank and with the one before it: pairs stay linear in number.
    """
    members, heads, numbers = equal_records(work, "near/keys", part, range(len(work.stages)))
    pairs = np.stack([np.concatenate([heads, members - 1]), np.concatenate([members, members])], axis=1)
    pairs = np.unique(numbers[pairs], axis=0)
    parts = matching.mix(pairs[:, 0] ^ matching.mix(pairs[:, 1])) % np.uint64(work.parts)
    work.deal("near/pairs", part, [(pairs, parts)])


def verify_pairs(work: Workspace, width: int, thresholds: Sequence[float], part: int) -> None:
    """Task: the candidate pairs of one part whose Jaccard similarity reaches the higher one of their shards' thresholds.

    Exam questions share options, explanation and most of a stem and are different all the same, so two of them must
    also have the same stem and answer. `width`: characters of a shingle.
    """
    pairs = np.unique(np.concatenate([work.dealt("near/pairs", task, part) for task in range(work.parts)]), axis=0)
    record = work.random_access()

    @lru_cache(maxsize=500)  # a record often stands in several pairs in turn; a book has megabytes of shingles
    def compared(number: int) -> tuple[np.ndarray, tuple[str, str] | None]:
        text = compared_text(work.stages[number >> ROW_BITS], record(number))
        asked = question_in(text)
        return matching.shingle_set(matching.normalise(text), width), asked and (asked.stem, asked.answer)

    similarity, same = np.zeros(len(pairs), np.float32), np.zeros(len(pairs), bool)
    for place, (a, b) in enumerate(pairs.tolist()):
        (left, asked), (right, other) = compared(a), compared(b)
        similarity[place] = matching.jaccard(left, right)
        same[place] = asked == other and similarity[place] >= max(thresholds[a >> ROW_BITS], thresholds[b >> ROW_BITS])
    found = np.rec.fromarrays([pairs[same, 1], pairs[same, 0], similarity[same]], DUPLICATE)
    save(work.path("near/verified", part), found)


def find_near(work: Workspace, _: int = 0) -> None:
    """Task: of every component of near-duplicates, all records but the first by rank are rejected."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = work.load_parts("near/verified")
    numbers, edges = np.unique([pairs["kept"], pairs["record"]], return_inverse=True)
    left, right = edges.reshape(2, -1)
    similarity = np.zeros(len(numbers), np.float32)
    for side in (left, right):
        np.maximum.at(similarity, side, pairs["similarity"])
    ranks = np.empty(len(numbers), np.uint64)
    for shard in np.unique(shard_of(numbers)):
        mine = shard_of(numbers) == shard
        ranks[mine] = work.ranks(int(shard))[row_of(numbers[mine])]
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(numbers), len(numbers)))
    component = connected_components(graph, directed=False)[1] if len(pairs) else np.empty(0, np.int32)
    index, members, heads = matching.equal_groups(component, ranks, numbers)
    records = index[members]
    found = in_order(numbers[records], numbers[index[heads]], similarity[records])
    save(work.path("near/found", 0), found)


def duplicates_of_shard(
    work: Workspace, settings: DeduplicationSettings, shard: int
) -> dict[int, tuple[str, int, float]]:
    """{row of a duplicate: (its kind, number of the record kept for it, similarity)}."""
    found = {EXACT: work.found("exact", shard)}
    if settings.near:
        found[NEAR] = of_shard(load(work.path("near/found", 0)), shard)
    return {
        int(row_of(record)): (kind, int(kept), float(similarity))
        for kind, duplicates in found.items()
        for record, kept, similarity in duplicates
    }


# ------------------------------------------------------------------------------------------------------ substrings


@lru_cache(maxsize=1)  # a worker has many tasks
def load_tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def tokenise_shard(work: Workspace, settings: CorpusSettings, shard: int) -> None:
    """Task: lengths in tokens of the documents of a shard that are left, and their windows of tokens by hash.

    Takes 12 bytes on the disk for each token.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    gone = duplicates_of_shard(work, settings.deduplication, shard)
    left = ((index, row["text"]) for index, row in enumerate(work.rows(shard)) if index not in gone)

    def pieces() -> Iterator[tuple[list[int], list[list[int]]]]:
        for some in batched(left, TOKENISED_AT_ONCE, lambda one: len(one[1])):
            rows, texts = zip(*some, strict=True)
            yield rows, [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    save_windows(work, settings.deduplication.substring_tokens, shard, pieces())


def save_windows(
    work: Workspace, width: int, shard: int, pieces: Iterable[tuple[Sequence[int], list[list[int]]]]
) -> None:
    """`pieces` of a shard: rows, and the token ids of each."""
    rows: list[int] = []
    lengths: list[int] = []

    def windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for some, ids in chain([((), [])], pieces):  # nothing may be left of a shard
            ends, before = np.cumsum([*map(len, ids)], dtype=np.int64), sum(lengths)
            at = np.flatnonzero(matching.within(ends, width))
            items = np.empty(len(at), KEYED)
            items["key"] = matching.hash_windows(np.fromiter(chain.from_iterable(ids), np.uint32), width)[at]
            items["at"] = at + before
            rows.extend(some)
            lengths.extend(map(len, ids))
            yield items, items["key"] % np.uint64(work.parts)

    work.deal("windows", shard, windows())
    save(work.path("tokens/rows", shard), np.array(rows, np.uint32))
    save(work.path("tokens/ends", shard), np.cumsum(lengths, dtype=np.int64))


def find_repeats(work: Workspace, part: int) -> None:
    """Task: windows of tokens, of one part of their hashes, that a record earlier by rank has as well.

    Finds the same repeats as a suffix array does (a run of so many or more tokens stands twice exactly if each of its
    windows does), in memory for one part, and in parallel.
    """

    def rows_at(shard: int, at: np.ndarray) -> tuple[np.ndarray, ...]:
        ends = load(work.path("tokens/ends", shard))
        document = np.searchsorted(ends, at, side="right")
        tokens = (at - np.concatenate(([0], ends))[document]).astype(np.uint32)
        return load(work.path("tokens/rows", shard))[document], tokens

    pretraining = [shard for shard, stage in enumerate(work.stages) if stage == "pretraining"]
    members, heads, numbers, tokens = equal_records(work, "windows", part, pretraining, rows_at)
    # What a record repeats of itself stays; that is for the cleaning rules to judge.
    other = numbers[members] != numbers[heads]
    members, heads = members[other], heads[other]
    save(work.path("repeats", part), in_order(numbers[members], tokens[members], numbers[heads], dtype=REPEAT))


def lengths_of_shard(work: Workspace, shard: int) -> dict[int, int]:
    """{row: tokens} of the documents of a shard that are left."""
    lengths = np.diff(load(work.path("tokens/ends", shard)), prepend=0)
    return dict(zip(load(work.path("tokens/rows", shard)).tolist(), lengths.tolist(), strict=True))


def repeats_of_shard(work: Workspace, shard: int) -> dict[int, list[int]]:
    """{row: first tokens of its windows that other records keep} of a shard."""
    found: dict[int, list[int]] = {}
    for record, token, _ in work.found("repeats", shard).tolist():
        found.setdefault(record & ROW_MASK, []).append(token)
    return found


def spans_of(repeats: list[int], width: int, fewest: int, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters that windows of `width` tokens cover, joined and in order, of at least `fewest` tokens.

    `repeats`: first tokens of the windows. `offsets`: where each token begins and ends.
    """
    runs: list[tuple[int, int]] = []
    for token in sorted(repeats):
        joins = runs and offsets[token][0] <= offsets[runs[-1][1] - 1][1]
        runs.append((runs.pop()[0] if joins else token, token + width))
    return [(offsets[first][0], offsets[end - 1][1]) for first, end in runs if end - first >= fewest]


def cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the spans; a line break takes the place of each."""
    borders = [0, *chain.from_iterable(spans), len(text)]
    pieces = (text[a:b].strip() for a, b in zip(borders[::2], borders[1::2], strict=True))
    return "\n".join(piece for piece in pieces if piece)
