"""Near-deduplication of Chinese text: speed, memory at two sizes, precision and recall on planted copies.

    python scripts/benchmark.py dedup
    python scripts/benchmark.py dedup --megabytes 1000 --workers 16

The corpus is made on the spot: characters drawn by Zipf's law, 300 on average in a document. Every hundredth document
has a copy with so many characters changed that its similarity is a known one. Our steps (sign, pair, verify, choose) run
as in scripts/build_chimed.py. datatrove's own signature step gets the same shingles, as its own need a word tokenizer.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.common import Cost, cost_of, describe_moment, fresh_processes
from qilin_med.config.corpus import DeduplicationSettings, ExecutorSettings
from qilin_med.config.experiment import count
from qilin_med.data import deduplicate as deduplication
from qilin_med.data import matching
from qilin_med.data.build import PART_BYTES, near_steps
from qilin_med.data.curate import rank_of
from qilin_med.data.deduplicate import DUPLICATE
from qilin_med.data.shards import Workspace, load, save
from qilin_med.data.steps import run_steps

SHARD_BYTES = 16 * 10**6
CHARACTER_BYTES = 3
MEAN_CHARACTERS = 300
PLANTED_EVERY = 100
SIMILARITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
BINS = (0, 0.75, 0.8, 0.85, 0.9, 0.95, 1)
SETTINGS = DeduplicationSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, meaning in (
        ("megabytes", 200, "size of the corpus"),
        ("workers", 2, "processes"),
        ("sample", 4, "megabytes for the signatures alone"),
    ):
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{meaning} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    print("| signatures, one process | MB/s |\n|---|---|")
    for name, rate in compare_signatures(arguments.sample).items():
        print(f"| {name} | {rate:.1f} |", flush=True)
    print("\n| corpus, MB | documents | MB/s, all steps | peak memory of a process, MiB | removed | precision | recall of"
          " planted copies at their similarity |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for megabytes in (max(arguments.megabytes // 4, 1), arguments.megabytes):
        print(measure(megabytes, arguments.workers), flush=True)
    print(f"\n{describe_moment()}; {arguments.workers} workers")


def documents(size: int, seed: int) -> Iterator[tuple[str, float]]:
    """Documents of so many bytes together, with the similarity to the one before (0: not planted)."""
    draw, rng = np.random.default_rng(seed), Random(seed)
    weights = 1 / np.arange(1, 3001)
    characters = np.array([chr(0x4E00 + index) for index in range(3000)])
    made = number = 0
    while made < size:
        length = int(draw.integers(MEAN_CHARACTERS // 3, MEAN_CHARACTERS * 5 // 3))
        text = "".join(draw.choice(characters, length, p=weights / weights.sum()))
        made, number = made + length * CHARACTER_BYTES, number + 1
        yield text, 0
        if number % PLANTED_EVERY == 0:
            # A changed character spoils `shingle` shingles of either text.
            wanted, width = rng.choice(SIMILARITIES), SETTINGS.shingle
            changes = round((len(text) - width + 1) * (1 - wanted) / (width * (1 + wanted)))
            places = set(rng.sample(range(0, len(text), width + 1), changes))
            copy = "".join("〇" if index in places else character for index, character in enumerate(text))
            yield copy, matching.jaccard(*(matching.shingle_set(t, width) for t in (text, copy)))
            made += length * CHARACTER_BYTES


def write_shard(work: Workspace, shard: int, size: int) -> None:
    planted, ranks = [], []

    def rows() -> Iterator[dict[str, Any]]:
        for number, (text, similarity) in enumerate(documents(size, shard)):
            id_ = f"{shard}-{number}"
            ranks.append(rank_of(0, id_))
            planted.append(similarity)
            yield {"id": id_, "text": text}

    work.write(shard, rows(), ranks)
    save(work.path("planted", shard), np.array(planted, np.float32))


def compare_signatures(megabytes: int) -> dict[str, float]:
    """MB/s of 112 MinHash values a document from normalised text."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    class CharacterShingles(MinhashDedupSignature):
        def get_shingles(self, text: str) -> np.ndarray:
            width = self.config.n_grams
            hashes = (self._hash_func(text[i : i + width].encode()) for i in range(len(text) - width + 1))
            return np.fromiter(hashes, np.uint64).reshape(-1, 1)

    config = MinhashConfig(
        n_grams=SETTINGS.shingle, num_buckets=SETTINGS.bands, hashes_per_bucket=SETTINGS.rows_per_band
    )
    # Any language that datatrove splits at blanks; the tokenizer is not used.
    theirs = CharacterShingles(tempfile.gettempdir(), config, language="aii_Syrc")
    texts = [text for text, _ in documents(megabytes * 10**6, 0)]
    size = sum(len(text) for text in texts) * CHARACTER_BYTES / 1e6

    def ours() -> None:
        for start in range(0, len(texts), deduplication.SIGNED_AT_ONCE):
            some = texts[start : start + deduplication.SIGNED_AT_ONCE]
            matching.sign(some, SETTINGS.shingle, SETTINGS.bands, SETTINGS.rows_per_band)

    def datatrove() -> None:
        for text in texts:
            theirs.get_signature(theirs.get_shingles(text))

    return {"ours (rensa)": size / cost_of(ours).seconds, "datatrove's own": size / cost_of(datatrove).seconds}


def measure(megabytes: int, workers: int) -> str:
    """A line of the table."""
    size = megabytes * 10**6
    shards = max(workers, round(size / SHARD_BYTES))
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
        work = Workspace(Path(folder), ("pretraining",) * shards, max(1, round(size / PART_BYTES)))
        with fresh_processes(workers) as pool:
            list(pool.map(write_shard, [work] * shards, range(shards), [size // shards] * shards))
        with fresh_processes(1) as pool:  # whose children's peak memory is that of the steps alone
            cost = pool.submit(deduplicate, work, workers).result()
        written = sum(len(work.ranks(shard)) for shard in range(shards))
        removed, precision, recall = judge(work)
    rates = ", ".join(f"{low} on: {share:.0%}" for low, share in recall.items())
    spent = f"{megabytes / cost.seconds:.1f} | {cost.peak_mib:.0f}"
    return f"| {megabytes} | {written:,} | {spent} | {removed:,} | {precision:.1%} | {rates} |"


def deduplicate(work: Workspace, workers: int) -> Cost:
    """Of all steps."""
    for part in range(work.parts):
        save(work.path("exact", part), np.empty(0, DUPLICATE))
    settings = ExecutorSettings(workers=workers)
    steps = near_steps(work, SETTINGS, [SETTINGS.threshold] * len(work.stages))
    return cost_of(lambda: run_steps(steps, settings, work.root / "log"))


def judge(work: Workspace) -> tuple[int, float, dict[float, float]]:
    """(removed, precision, recall by the lower end of similarity). Any pair that was not planted counts as wrong."""
    found = load(work.path("near/found", 0))
    planted = {
        (shard, number): similarity
        for shard in range(len(work.stages))
        for number, similarity in enumerate(load(work.path("planted", shard)).tolist())
        if similarity
    }
    pairs = {
        tuple(sorted(divmod(int(number), 1 << 32) for number in pair)) for pair in found[["record", "kept"]].tolist()
    }
    found_copies = [s for place, s in planted.items() if ((place[0], place[1] - 1), place) in pairs]
    all_copies = np.histogram(list(planted.values()), BINS)[0]
    recall = dict(zip(BINS, np.histogram(found_copies, BINS)[0] / np.maximum(all_copies, 1), strict=False))
    return len(pairs), len(found_copies) / max(len(pairs), 1), recall
