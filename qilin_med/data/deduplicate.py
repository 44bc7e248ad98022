"""Deduplication after Lee et al. 2022 (arXiv:2107.06499): exact, near (MinHash, verified), and repeated substrings.

Every step is one or many tasks; a task reads what earlier steps wrote below the work folder and writes its own files
whole, so tasks run in any order on any number of workers. A task takes one shard, or one part of the hash values:
equal things meet in one part, and memory stays that of one part.

Who keeps a text that several records have is decided by rank alone (see Shards), so neither the order of the files nor
the number of workers changes what is kept.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qilin_med.config.corpus import DeduplicationSettings
from qilin_med.config.experiment import StageName
from qilin_med.data import matching
from qilin_med.data.render import from_row, text_of
from qilin_med.data.shards import NUMBERS, ROW_BITS, Shards, chunks, load, number_of, row_of, save, shard_of
from qilin_med.prompt.wording import without_frame

SIGNED_AT_ONCE = 2000  # records
EXACT, NEAR = "exact duplicate", "near-duplicate"
FOUND = np.dtype([("record", np.uint64), ("kept", np.uint64), ("similarity", np.float32)])
"""A record that goes, the record that is kept for it, and how alike they are."""
REPEAT = np.dtype([("record", np.uint64), ("token", np.uint32), ("kept", np.uint64)])
"""A window of tokens, by its first token in a record, that another record keeps."""


@dataclass(frozen=True)
class Workspace:
    """The folder of a build in progress. `stages`: the training set of each shard."""

    root: Path
    stages: tuple[StageName, ...]
    parts: int
    """Parts that hash values are dealt out to."""

    @property
    def shards(self) -> Shards:
        return Shards(self.root / "clean")

    def path(self, step: str, task: int, suffix: str = "npy") -> Path:
        return self.root / step / f"{task:05d}.{suffix}"

    def index_in_stage(self, shard: int) -> int:
        return self.stages[:shard].count(self.stages[shard])

    def load_all(self, step: str, tasks: int, dtype: np.dtype) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *(load(self.path(step, task)) for task in range(tasks))])


def compared_text(stage: StageName, row: dict[str, Any]) -> str:
    """What two records of a training set are compared by: prompt and answers, not what many have in common (a system
    text, the words of the exam prompt)."""
    turns = {"conversations": [turn for turn in row.get("conversations", ()) if turn["from"] != "system"]}
    return matching.normalise(without_frame(text_of(from_row(stage, {**row, **turns}))))


# --------------------------------------------------------------------------------------------------------- exact


def exact_key(stage: StageName, text: str) -> bytes:
    """128 bits of a text, normalised, within its training set."""
    return hashlib.blake2b(f"{stage}\n{matching.normalise(text)}".encode(), digest_size=16).digest()


def save_exact_keys(work: Workspace, shard: int, keys: list[bytes]) -> None:
    save(work.path("keys", shard), np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2))


def find_exact(work: Workspace, part: int) -> None:
    """Task: the records of one part of the keys that another record equals."""
    keys, numbers, ranks = [], [], []
    for shard in range(len(work.stages)):
        mine = load(work.path("keys", shard))
        rows = np.flatnonzero(mine[:, 0] % np.uint64(work.parts) == part)
        keys.append(mine[rows])
        numbers.append(number_of(shard, rows))
        ranks.append(work.shards.ranks(shard)[rows])
    both, number, rank = np.concatenate(keys), np.concatenate(numbers), np.concatenate(ranks)
    # Two halves of a key as one: equal rows of both columns share an index.
    _, key = np.unique(both, axis=0, return_inverse=True)
    index, first, last = matching.group(key, rank, number)
    members, heads = matching.heads_of_groups(first, last)
    found = np.empty(len(members), FOUND)
    found["record"], found["kept"], found["similarity"] = number[index[members]], number[index[heads]], 1
    save(work.path("exact", part), found)


# ---------------------------------------------------------------------------------------------------------- near


def sign_shard(work: Workspace, settings: DeduplicationSettings, shard: int) -> None:
    """Task: MinHash band keys of a shard's records, with their rows."""
    exact = work.load_all("exact", work.parts, FOUND)["record"]
    gone = set(row_of(exact[shard_of(exact) == shard]).tolist())
    rows = ((index, row) for index, row in enumerate(work.shards.rows(shard)) if index not in gone)
    indexes, keys = [], [np.empty((settings.bands, 0), np.uint64)]
    # Records of different training sets never meet.
    salt = np.uint64(int.from_bytes(hashlib.blake2b(work.stages[shard].encode(), digest_size=8).digest()))
    for chunk in chunks(rows, SIGNED_AT_ONCE):
        indexes += [index for index, _ in chunk]
        texts = [compared_text(work.stages[shard], row) for _, row in chunk]
        keys.append(matching.sign(texts, settings.shingle, settings.bands, settings.rows_per_band) ^ salt)
    save(work.path("near/keys", shard), np.concatenate(keys, axis=1))
    save(work.path("near/rows", shard), np.array(indexes, np.uint64))


def pair_candidates(work: Workspace, settings: DeduplicationSettings, task: int) -> None:
    """Task (one for each band and part): pairs of records that agree on a band.

    In a group, each record is paired with the first by rank and with the one before it: pairs stay linear in number.
    """
    band, part = divmod(task, work.parts)
    keys, numbers, ranks = [], [], []
    for shard in range(len(work.stages)):
        mine = load(work.path("near/keys", shard))[band]
        chosen = np.flatnonzero(mine % np.uint64(work.parts) == part)
        rows = load(work.path("near/rows", shard))[chosen]
        keys.append(mine[chosen])
        numbers.append(number_of(shard, rows))
        ranks.append(work.shards.ranks(shard)[rows.astype(np.int64)])
    number, rank = np.concatenate(numbers), np.concatenate(ranks)
    index, first, last = matching.group(np.concatenate(keys), rank, number)
    members, heads = matching.heads_of_groups(first, last)
    pairs = np.stack([np.concatenate([heads, members - 1]), np.concatenate([members, members])], axis=1)
    save(work.path("near/pairs", task), np.unique(number[index[pairs]], axis=0))


def verify_pairs(work: Workspace, settings: DeduplicationSettings, part: int) -> None:
    """Task: the candidate pairs of one part whose Jaccard similarity reaches the threshold."""
    mine = [np.empty((0, 2), np.uint64)]
    for task in range(settings.bands * work.parts):
        pairs = load(work.path("near/pairs", task))
        mine.append(pairs[matching.mix(pairs[:, 0] ^ matching.mix(pairs[:, 1])) % np.uint64(work.parts) == part])
    shards = work.shards

    @lru_cache(maxsize=10_000)  # a record often stands in several pairs in turn
    def shingles(number: int) -> np.ndarray:
        text = compared_text(work.stages[number >> ROW_BITS], shards.row(number))
        return np.unique(matching.shingle([text], settings.shingle)[0])

    pairs = np.unique(np.concatenate(mine), axis=0)
    alike = np.array([matching.jaccard(shingles(a), shingles(b)) for a, b in pairs.tolist()], np.float32)
    shards.close()
    kept = alike >= settings.threshold
    found = np.empty(int(kept.sum()), FOUND)
    found["kept"], found["record"], found["similarity"] = pairs[kept, 0], pairs[kept, 1], alike[kept]
    save(work.path("near/verified", part), found)


def find_near(work: Workspace) -> None:
    """Task: of every component of near-duplicates, all records but the first by rank go."""
    pairs = work.load_all("near/verified", work.parts, FOUND)
    edges = np.stack([pairs["kept"], pairs["record"]], axis=1)
    alike: dict[int, float] = {}
    for (a, b), value in zip(edges.tolist(), pairs["similarity"].tolist(), strict=True):
        alike[a], alike[b] = max(value, alike.get(a, 0)), max(value, alike.get(b, 0))
    found = []
    for members in matching.components(edges):
        ranks = work.shards.ranks_of(np.array(members, NUMBERS)).tolist()
        kept = min(zip(ranks, members, strict=True))[1]
        found += [(record, kept, alike[record]) for record in members if record != kept]
    save(work.path("near/found", 0), np.array(found, FOUND))


# ------------------------------------------------------------------------------------------------------ substrings


def duplicates_of_shard(
    work: Workspace, settings: DeduplicationSettings, shard: int
) -> dict[int, tuple[str, int, float]]:
    """{row that goes: (kind of duplicate, number of the record kept for it, similarity)}."""
    found = {EXACT: work.load_all("exact", work.parts, FOUND)}
    if settings.near:
        found[NEAR] = load(work.path("near/found", 0))
    return {
        int(row_of(record)): (kind, int(kept), float(similarity))
        for kind, entries in found.items()
        for record, kept, similarity in entries[shard_of(entries["record"]) == shard]
    }


def tokenise_shard(work: Workspace, settings: DeduplicationSettings, tokenizer_file: Path, shard: int) -> None:
    """Task: tokens of the documents of a shard that are left, with the characters where they begin and end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    gone = duplicates_of_shard(work, settings, shard)
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.uint32)] for name in ("ids", "begins", "ends")}
    rows, lengths = [], []
    left = ((index, row["text"]) for index, row in enumerate(work.shards.rows(shard)) if index not in gone)
    for chunk in chunks(left, SIGNED_AT_ONCE):
        for (index, _), encoding in zip(
            chunk, tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False), strict=True
        ):
            offsets = np.array(encoding.offsets, np.uint32).reshape(-1, 2)
            for name, values in zip(parts, (np.array(encoding.ids, np.uint32), *offsets.T), strict=True):
                parts[name].append(values)
            rows.append(index)
            lengths.append(len(encoding.ids))
    for name, arrays in parts.items():
        save(work.path(f"tokens/{name}", shard), np.concatenate(arrays))
    save(work.path("tokens/rows", shard), np.array(rows, np.uint64))
    save(work.path("tokens/lengths", shard), np.array(lengths, np.int64))


def find_repeats(work: Workspace, width: int, part: int) -> None:
    """Task: windows of `width` tokens, of one part of their hashes, that a record earlier by rank has as well.

    Finds the same repeats as a suffix array does (a run of `width` or more tokens stands twice exactly if each of its
    windows does), in memory for one part, and in parallel.
    """
    hashes, numbers, positions, ranks = [], [], [], []
    for shard in _pretraining(work):
        ends = np.cumsum(load(work.path("tokens/lengths", shard)))
        windows = matching.hash_windows(load(work.path("tokens/ids", shard)), width)
        chosen = np.flatnonzero((windows % np.uint64(work.parts) == part) & matching.within(ends, width))
        document = np.searchsorted(ends, chosen, side="right")
        rows = load(work.path("tokens/rows", shard))[document]
        hashes.append(windows[chosen])
        numbers.append(number_of(shard, rows))
        positions.append((chosen - np.concatenate(([0], ends))[document]).astype(np.uint32))
        ranks.append(work.shards.ranks(shard)[rows.astype(np.int64)])
    key, number, position, rank = (
        np.concatenate([np.empty(0, np.uint64), *a]) for a in (hashes, numbers, positions, ranks)
    )
    index, first, last = matching.group(key, rank, number, position)
    members, heads = matching.heads_of_groups(first, last)
    # What a record repeats of itself stays; that is for the cleaning rules to judge.
    other = number[index[members]] != number[index[heads]]
    members, heads = index[members[other]], index[heads[other]]
    found = np.empty(len(members), REPEAT)
    found["record"], found["token"], found["kept"] = number[members], position[members], number[heads]
    save(work.path("repeats", part), found)


def cuts_of_shard(work: Workspace, width: int, shard: int) -> dict[int, list[tuple[int, int]]]:
    """{row: spans of characters to cut out}, joined and in order, of the documents of a shard."""
    repeats = work.load_all("repeats", work.parts, REPEAT)
    repeats = np.sort(repeats[shard_of(repeats["record"]) == shard], order=("record", "token"))
    rows, lengths = load(work.path("tokens/rows", shard)), load(work.path("tokens/lengths", shard))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    begins, ends = load(work.path("tokens/begins", shard)), load(work.path("tokens/ends", shard))
    cuts: dict[int, list[tuple[int, int]]] = {}
    for record, token in zip(repeats["record"], repeats["token"].astype(np.int64), strict=True):
        row = int(row_of(record))
        at = starts[np.searchsorted(rows, np.uint64(row))] + token
        span = int(begins[at]), int(ends[at + width - 1])
        spans = cuts.setdefault(row, [])
        if spans and span[0] <= spans[-1][1]:
            span = spans.pop()[0], span[1]
        spans.append(span)
    return cuts


def cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the spans; what lay on both sides of one goes on in a new line."""
    borders = [0, *chain.from_iterable(spans), len(text)]
    pieces = (text[a:b].strip() for a, b in zip(borders[::2], borders[1::2], strict=True))
    return "\n".join(piece for piece in pieces if piece)


def _pretraining(work: Workspace) -> list[int]:
    return [shard for shard, stage in enumerate(work.stages) if stage == "pretraining"]
