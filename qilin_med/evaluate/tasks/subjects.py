"""C-Eval's 52 subjects, by the names in its files (subjects.json)."""

import json
from pathlib import Path

_OFFICIAL = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MEDICAL, HARD = _OFFICIAL["medical"], _OFFICIAL["hard"]
CATEGORIES: dict[str, dict[str, str]] = _OFFICIAL["categories"]
"""{official category: {subject: Chinese name in the official prompt}}"""
SUBJECTS = {subject: (name, category) for category, names in CATEGORIES.items() for subject, name in names.items()}
"""{subject: (Chinese name, category)}"""
