"""Which published test set some questions are: by their content, so that neither a file's name nor its format decides.

Of each set known.json keeps how many questions it has and the SKETCH smallest hashes of them. The share of those that two
sets have in common estimates their Jaccard similarity (bottom-k sketch, Broder 1997; standard error below 0.03 here).
"""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from qilin_med.data.folding import fold

KNOWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SKETCH = 64
ALIKE = 0.95  # share of the sketch, and of the number of questions: a few rows that one reader skips make no other set


def recognise(rows: Iterable[dict[str, Any]]) -> str | None:
    """The name of the set that the rows (with stem and options) are, as the paper's tables are headed."""
    count, hashes = sketch(rows)
    for name, known in KNOWN.items():
        shared = len(set(hashes) & set(known["sketch"])) / SKETCH
        if shared >= ALIKE and ALIKE <= count / known["questions"] <= 1 / ALIKE:
            return name
    return None


def sketch(rows: Iterable[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many different questions there are, and the smallest hashes of them. The order of options does not count."""
    texts = {fold(row["stem"]) + "|" + "|".join(sorted(map(fold, row["options"]))) for row in rows}
    return len(texts), sorted(sha256(text.encode()).hexdigest()[:12] for text in texts)[:SKETCH]
