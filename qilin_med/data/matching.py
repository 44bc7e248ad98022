"""Arithmetic of likeness: hashes of shingles and token windows, groups of equal keys, similarity, components.

Pure functions on arrays; all hashes are 64 bits wide (uint64, arithmetic modulo 2**64).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

SPACE = re.compile(r"\s+")
BASE = np.uint64(0x9E3779B97F4A7C15)
MODULUS = 1 << 64
SIGNATURE_SEED = 1


def normalise(text: str) -> str:
    """What two texts are compared by: compatibility forms (full width and half width alike), case and blanks do not
    count."""
    return SPACE.sub("", unicodedata.normalize("NFKC", text)).casefold()


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that leaves no pattern (splitmix64's finaliser)."""
    values = values.astype(np.uint64) + BASE
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_windows(items: np.ndarray, width: int) -> np.ndarray:
    """Hash of items[i : i + width] for every i that has so many: a polynomial over mixed items, in log2(width) passes.

    A window's hash is put together from hashes of windows of 1, 2, 4, ... items.
    """
    if len(items) < width:
        return np.empty(0, np.uint64)
    doubled, size, power = mix(items), 1, int(BASE)  # power = BASE ** size
    whole, covered, covered_power = None, 0, 1
    while True:
        if width & size:
            if whole is None:
                whole = doubled
            else:
                # A window of size + covered items: `size` of them, then the covered ones.
                count = len(items) - covered - size + 1
                whole = doubled[:count] * np.uint64(covered_power) + whole[size : size + count]
            covered, covered_power = covered + size, covered_power * power % MODULUS
        if covered == width:
            return whole
        count = len(items) - 2 * size + 1
        doubled = doubled[:count] * np.uint64(power) + doubled[size : size + count]
        size, power = 2 * size, power * power % MODULUS


def within(ends: np.ndarray, width: int) -> np.ndarray:
    """Which windows of joined sequences lie within one of them. `ends`: cumulative lengths. Shape: one bool per window."""
    total = int(ends[-1]) if len(ends) else 0
    inside = np.ones(max(total - width + 1, 0), bool)
    for back in range(1, width):
        starts = ends[:-1] - back  # a window that starts so shortly before an end reaches over it
        inside[starts[(starts >= 0) & (starts < len(inside))]] = False
    return inside


def shingle(texts: Sequence[str], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all character shingles of normalised texts, and where each text's begin (with the end appended).

    A text shorter than a shingle is one shingle.
    """
    padded = [text if len(text) >= width else text.ljust(width, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.array([len(text) for text in padded], np.int64)
    ends = np.cumsum(lengths)
    hashes = hash_windows(codes, width)[within(ends, width)] if len(texts) else np.empty(0, np.uint64)
    return hashes, np.concatenate(([0], np.cumsum(lengths - width + 1)))


def sign(texts: Sequence[str], width: int, bands: int, rows: int) -> np.ndarray:
    """MinHash signatures of normalised texts, one key for each band. Shape: [bands, texts]."""
    from rensa import RMinHash

    hashes, starts = shingle(texts, width)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, starts.astype(np.uint64), bands * rows, SIGNATURE_SEED
    )
    digests = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), bands, rows)
    keys = np.zeros((len(texts), bands), np.uint64)
    for row in range(rows):
        keys = keys * BASE + mix(digests[:, :, row])
    return keys.T


def similarity(left: str, right: str, width: int) -> float:
    """Jaccard similarity of the shingle sets of two normalised texts."""
    sets = [np.unique(shingle([text], width)[0]) for text in (left, right)]
    return jaccard(*sets)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|left & right| / |left | right| of sorted distinct values."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def runs_of_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last index of every run of two or more equal values in sorted keys."""
    borders = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1], [True])))
    long = np.diff(borders) > 1
    return borders[:-1][long], borders[1:][long]


def group(keys: np.ndarray, *order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items with equal keys: (index of the items, sorted by key then `order`; first and past-the-last of each group in
    that index). Items whose key is alone are left out of the groups."""
    index = np.lexsort((*reversed(order), keys))
    return index, *runs_of_equal(keys[index])


def heads_of_groups(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each member of each group but its first: (the member's position, the position of the group's first)."""
    sizes = last - first
    heads = np.repeat(first, sizes - 1)
    members = np.concatenate([np.arange(a + 1, b) for a, b in zip(first, last, strict=True)] or [np.empty(0, np.int64)])
    return members, heads


def components(pairs: np.ndarray) -> Iterator[list[int]]:
    """Connected components of the graph with edges `pairs` ([n, 2]), members in ascending order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return
    nodes, edges = np.unique(pairs, return_inverse=True)
    edges = edges.reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    for part in np.split(nodes[order], np.flatnonzero(np.diff(labels[order])) + 1):
        yield part.tolist()
