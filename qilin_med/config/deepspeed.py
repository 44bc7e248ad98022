"""DeepSpeed's configuration file of a stage."""

import json
from pathlib import Path
from typing import Any

from qilin_med.errors import UserError


def read_deepspeed(path: str | None) -> dict[str, Any] | None:
    """Contents of a DeepSpeed file (None for none); UserError if it cannot be read."""
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed configuration {path} cannot be read: {error}") from None
