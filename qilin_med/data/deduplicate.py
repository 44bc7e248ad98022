"""Deduplication after Lee et al. 2022 (arXiv:2107.06499): exact, near (MinHash, verified), and repeated substrings.

The tasks of a step read what earlier steps wrote to the work folder and write their own files whole, so they run in any
order on any number of workers. A task takes one shard, or one part of the hash values: equal things meet in one part,
and memory stays that of one part.

Rank alone (see `Workspace.write`) decides which of several records keeps a text: neither the order of the files nor the
number of workers changes what is kept.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from qilin_med.config.corpus import CorpusSettings, DeduplicationSettings
from qilin_med.config.experiment import StageName
from qilin_med.data import matching
from qilin_med.data.render import from_row, text_of
from qilin_med.data.shards import ROW_BITS, Row, Workspace, batched, load, number_of, row_of, save, shard_of
from qilin_med.prompt.wording import without_frame

SIGNED_AT_ONCE = 2000  # records
EXACT, NEAR = "exact duplicate", "near-duplicate"
DUPLICATE = np.dtype([("record", np.uint64), ("kept", np.uint64), ("similarity", np.float32)])
"""A record that is rejected, the record that is kept for it, and their similarity."""
REPEAT = np.dtype([("record", np.uint64), ("token", np.uint32), ("kept", np.uint64)])
"""A window of tokens, by its first token in a record, that another record keeps."""


def equal_records(
    work: Workspace, shards: Iterable[int], keys_of: Callable[[int], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """Group what has equal keys, in the order of ranks: (members, heads, numbers, further columns).

    `keys_of` gives a shard's keys, their rows, and further columns to order by. `members` and `heads` (see
    `matching.equal_groups`) are positions in the columns returned.
    """
    columns = [
        (keys, number_of(shard, rows), work.ranks(shard)[rows.astype(np.int64)], *further)
        for shard in shards
        for keys, rows, *further in [keys_of(shard)]
    ]
    keys, numbers, ranks, *further = map(np.concatenate, zip(*columns, strict=True))
    if keys.ndim == 2:  # two halves of a key as one: equal rows share an index
        keys = np.unique(keys, axis=0, return_inverse=True)[1]
    index, members, heads = matching.equal_groups(keys, ranks, numbers, *further)
    return members, heads, numbers[index], *(column[index] for column in further)


# --------------------------------------------------------------------------------------------------------- exact


def exact_key(stage: StageName, text: str) -> bytes:
    """128 bits of a text, normalised, within its training set."""
    return hashlib.blake2b(f"{stage}\n{matching.normalise(text)}".encode(), digest_size=16).digest()


def save_exact_keys(work: Workspace, shard: int, keys: list[bytes]) -> None:
    save(work.path("keys", shard), np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2))


def find_exact(work: Workspace, part: int) -> None:
    """Task: the records of one part of the keys that another record equals."""

    def keys_of(shard: int) -> tuple[np.ndarray, ...]:
        keys = load(work.path("keys", shard))
        rows = np.flatnonzero(keys[:, 0] % np.uint64(work.parts) == part)
        return keys[rows], rows

    members, heads, numbers = equal_records(work, range(len(work.stages)), keys_of)
    found = np.rec.fromarrays([numbers[members], numbers[heads], np.ones(len(members))], DUPLICATE)
    save(work.path("exact", part), found)


# ---------------------------------------------------------------------------------------------------------- near


def compared_text(stage: StageName, row: Row) -> str:
    """What records of a training set are compared by: prompt and answers, without what many have in common (a system
    text, the words of the exam prompt)."""
    turns = {"conversations": [turn for turn in row.get("conversations", ()) if turn["from"] != "system"]}
    return matching.normalise(without_frame(text_of(from_row(stage, {**row, **turns}))))


def sign_shard(work: Workspace, settings: DeduplicationSettings, shard: int) -> None:
    """Task: MinHash band keys of a shard's records, with their rows."""
    stage = work.stages[shard]
    exact = work.load_parts("exact")["record"]
    gone = set(row_of(exact[shard_of(exact) == shard]).tolist())
    left = ((index, row) for index, row in enumerate(work.rows(shard)) if index not in gone)
    rows, keys = [], [np.empty((settings.bands, 0), np.uint64)]
    # Records of different training sets never meet.
    salt = np.uint64(int.from_bytes(hashlib.blake2b(stage.encode(), digest_size=8).digest()))
    for chunk in batched(left, SIGNED_AT_ONCE):
        rows += [index for index, _ in chunk]
        texts = [compared_text(stage, row) for _, row in chunk]
        keys.append(matching.sign(texts, settings.shingle, settings.bands, settings.rows_per_band) ^ salt)
    save(work.path("near/keys", shard), np.concatenate(keys, axis=1))
    save(work.path("near/rows", shard), np.array(rows, np.uint64))


def pair_candidates(work: Workspace, settings: DeduplicationSettings, task: int) -> None:
    """Task (one for each band and part): pairs of records that agree on a band.

    In a group, each record is paired with the first by rank and with the one before it: pairs stay linear in number.
    """
    band, part = divmod(task, work.parts)

    def keys_of(shard: int) -> tuple[np.ndarray, ...]:
        keys = load(work.path("near/keys", shard))[band]
        chosen = np.flatnonzero(keys % np.uint64(work.parts) == part)
        return keys[chosen], load(work.path("near/rows", shard))[chosen]

    members, heads, numbers = equal_records(work, range(len(work.stages)), keys_of)
    pairs = np.stack([np.concatenate([heads, members - 1]), np.concatenate([members, members])], axis=1)
    save(work.path("near/pairs", task), np.unique(numbers[pairs], axis=0))


def verify_pairs(work: Workspace, settings: DeduplicationSettings, part: int) -> None:
    """Task: the candidate pairs of one part whose Jaccard similarity reaches the threshold."""
    mine = [np.empty((0, 2), np.uint64)]
    for task in range(settings.bands * work.parts):
        pairs = load(work.path("near/pairs", task))
        mine.append(pairs[matching.mix(pairs[:, 0] ^ matching.mix(pairs[:, 1])) % np.uint64(work.parts) == part])
    pairs = np.unique(np.concatenate(mine), axis=0)
    record = work.random_access()

    @lru_cache(maxsize=10_000)  # a record often stands in several pairs in turn
    def shingles(number: int) -> np.ndarray:
        text = compared_text(work.stages[number >> ROW_BITS], record(number))
        return matching.shingle_set(text, settings.shingle)

    similarity = np.array([matching.jaccard(shingles(a), shingles(b)) for a, b in pairs.tolist()], np.float32)
    same = similarity >= settings.threshold
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
    found = np.rec.fromarrays([numbers[records], numbers[index[heads]], similarity[records]], DUPLICATE)
    save(work.path("near/found", 0), found)


def duplicates_of_shard(
    work: Workspace, settings: DeduplicationSettings, shard: int
) -> dict[int, tuple[str, int, float]]:
    """{row of a duplicate: (its kind, number of the record kept for it, similarity)}."""
    found = {EXACT: work.load_parts("exact")}
    if settings.near:
        found[NEAR] = load(work.path("near/found", 0))
    return {
        int(row_of(record)): (kind, int(kept), float(similarity))
        for kind, duplicates in found.items()
        for record, kept, similarity in duplicates[shard_of(duplicates["record"]) == shard]
    }


# ------------------------------------------------------------------------------------------------------ substrings


def tokenise_shard(work: Workspace, settings: CorpusSettings, shard: int) -> None:
    """Task: tokens of the documents of a shard that are left, with the characters where they begin and end."""
    tokenizer = Tokenizer.from_file(f"{settings.tokenizer}/tokenizer.json")
    gone = duplicates_of_shard(work, settings.deduplication, shard)
    left = ((index, row["text"]) for index, row in enumerate(work.rows(shard)) if index not in gone)
    ids, offsets, rows, lengths = [np.empty(0, np.uint32)], [np.empty((0, 2), np.uint32)], [], []
    for chunk in batched(left, SIGNED_AT_ONCE):
        encodings = tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False)
        ids.append(np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.uint32))
        spans = chain.from_iterable(encoding.offsets for encoding in encodings)
        offsets.append(np.fromiter(spans, np.dtype((np.uint32, 2))))
        rows += [index for index, _ in chunk]
        lengths += [len(encoding.ids) for encoding in encodings]
    save(work.path("tokens/ids", shard), np.concatenate(ids))
    save(work.path("tokens/offsets", shard), np.concatenate(offsets))
    save(work.path("tokens/rows", shard), np.array(rows, np.uint64))
    save(work.path("tokens/lengths", shard), np.array(lengths, np.int64))


def find_repeats(work: Workspace, width: int, part: int) -> None:
    """Task: windows of `width` tokens, of one part of their hashes, that a record earlier by rank has as well.

    Finds the same repeats as a suffix array does (a run of `width` or more tokens stands twice exactly if each of its
    windows does), in memory for one part, and in parallel.
    """

    def windows_of(shard: int) -> tuple[np.ndarray, ...]:
        ends = np.cumsum(load(work.path("tokens/lengths", shard)))
        windows = matching.hash_windows(load(work.path("tokens/ids", shard)), width)
        chosen = np.flatnonzero((windows % np.uint64(work.parts) == part) & matching.within(ends, width))
        document = np.searchsorted(ends, chosen, side="right")
        tokens = (chosen - np.concatenate(([0], ends))[document]).astype(np.uint32)
        return windows[chosen], load(work.path("tokens/rows", shard))[document], tokens

    pretraining = [shard for shard, stage in enumerate(work.stages) if stage == "pretraining"]
    members, heads, numbers, tokens = equal_records(work, pretraining, windows_of)
    # What a record repeats of itself stays; that is for the cleaning rules to judge.
    other = numbers[members] != numbers[heads]
    members, heads = members[other], heads[other]
    save(work.path("repeats", part), np.rec.fromarrays([numbers[members], tokens[members], numbers[heads]], REPEAT))


def cuts_of_shard(work: Workspace, width: int, shard: int) -> dict[int, list[tuple[int, int]]]:
    """{row: spans of characters to cut out}, joined and in order, of the documents of a shard."""
    repeats = work.load_parts("repeats")
    repeats = np.sort(repeats[shard_of(repeats["record"]) == shard], order=("record", "token"))
    rows, lengths, offsets = (load(work.path(f"tokens/{name}", shard)) for name in ("rows", "lengths", "offsets"))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    cuts: dict[int, list[tuple[int, int]]] = {}
    for record, token in zip(repeats["record"], repeats["token"].astype(np.int64), strict=True):
        row = int(row_of(record))
        first = starts[np.searchsorted(rows, np.uint64(row))] + token
        span = int(offsets[first, 0]), int(offsets[first + width - 1, 1])
        spans = cuts.setdefault(row, [])
        if spans and span[0] <= spans[-1][1]:
            span = spans.pop()[0], span[1]
        spans.append(span)
    return cuts


def cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the spans; a line break takes the place of each."""
    borders = [0, *chain.from_iterable(spans), len(text)]
    pieces = (text[a:b].strip() for a, b in zip(borders[::2], borders[1::2], strict=True))
    return "\n".join(piece for piece in pieces if piece)
