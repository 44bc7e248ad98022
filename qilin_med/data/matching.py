"""Arithmetic of similarity: hashes of shingles and token windows, MinHash, Jaccard, groups of equal keys.

Pure functions on arrays; all hashes are 64 bits wide (uint64, arithmetic modulo 2**64).
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

WIDE = [*zip("，：；？！（）～％", ",:;?!()~%", strict=True), ("…", "...")]
BASE = np.uint64(0x9E3779B97F4A7C15)
MODULUS = 1 << 64
SIGNATURE_SEED = 1


def normalise(text: str) -> str:
    """The form in which texts are compared: width (NFKC), case and white space do not count."""
    # NFKC is quick where it has nothing to do, and nearly all that it has to do in Chinese is this.
    for wide, narrow in WIDE:
        text = text.replace(wide, narrow)
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold()


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that leaves no pattern (splitmix64's finaliser)."""
    values = values.astype(np.uint64) + BASE
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_windows(items: np.ndarray, width: int) -> np.ndarray:
    """Hash of items[i : i + width] for every i: the sum of mix(item) * BASE**(number of items after it in the window).

    Takes log2(width) passes: windows double in size, and gain one item for every further 1 in the binary `width`.
    """
    if len(items) < width:
        return np.empty(0, np.uint64)
    hashes, size, power = mix(items), 1, int(BASE)  # power = BASE ** size
    mixed = hashes if width & (width - 1) else None  # not kept for a power of 2
    for bit in f"{width:b}"[1:]:
        doubled = hashes[:-size] * np.uint64(power)
        doubled += hashes[size:]
        hashes, size, power = doubled, 2 * size, power * power % MODULUS
        if bit == "1":
            hashes = hashes[:-1]
            hashes *= BASE
            hashes += mixed[size:]
            size, power = size + 1, power * int(BASE) % MODULUS
    return hashes


def within(ends: np.ndarray, width: int) -> np.ndarray:
    """Which windows of joined sequences lie within one of them. `ends`: cumulative lengths. Shape: one bool per window."""
    total = int(ends[-1]) if len(ends) else 0
    inside = np.ones(max(total - width + 1, 0), bool)
    for back in range(1, width):
        starts = ends[:-1] - back  # a window that starts this close to an end reaches past it
        inside[starts[(starts >= 0) & (starts < len(inside))]] = False
    return inside


def shingle(texts: Sequence[str], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all character shingles of normalised texts, and where each text's begin (with the end appended).

    A text shorter than a shingle is one shingle.
    """
    padded = [text if len(text) >= width else text.ljust(width, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.array([len(text) for text in padded], np.int64)
    hashes = hash_windows(codes, width)[within(np.cumsum(lengths), width)]
    return hashes, np.concatenate(([0], np.cumsum(lengths - width + 1)))


def shingle_set(text: str, width: int) -> np.ndarray:
    """The distinct shingles of a normalised text, sorted."""
    return np.unique(shingle([text], width)[0])


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Jaccard similarity |left & right| / |left | right| of two shingle sets."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def sign(texts: Sequence[str], width: int, bands: int, rows: int) -> np.ndarray:
    """MinHash signatures of normalised texts, one key for each band. Shape: [bands, texts]."""
    from rensa import RMinHash

    hashes, starts = shingle(texts, width)
    starts = starts.astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts, bands * rows, SIGNATURE_SEED)
    digests = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), bands, rows)
    keys = np.zeros((len(texts), bands), np.uint64)
    for row in range(rows):
        keys = keys * BASE + mix(digests[:, :, row])
    return keys.T


def repeated(keys: np.ndarray) -> np.ndarray:
    """Which keys occur more than once. Shape: one bool per key."""
    index = np.argsort(keys)
    ordered = keys[index]
    same = ordered[1:] == ordered[:-1]
    found = np.zeros(len(keys), bool)
    found[index[1:][same]] = True
    found[index[:-1][same]] = True
    return found


def equal_groups(keys: np.ndarray, *order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group items with equal keys: (index, members, heads).

    `index` sorts the items by key, then by `order`. `members` are the positions in it of every item that is not the first
    with its key, `heads` the position of the first for each of them.
    """
    index = np.lexsort((*reversed(order), keys))
    ordered = keys[index]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(keys)])
    sizes = np.diff(starts, append=len(keys))
    is_member = np.ones(len(keys), bool)
    is_member[starts] = False
    return index, np.flatnonzero(is_member), np.repeat(starts, sizes - 1)
