"""From cached rows to batches: which rows come together, and as what tensors.

The order depends on the seed, the epoch and the rows per update alone, never on how an update is divided among ranks
and accumulation steps, so 1 x 8, 8 x 1 and 2 ranks x 4 train on the same updates. The last update of an epoch is filled
with empty rows (index -1) that carry no loss: nothing is dropped, nothing repeated.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from qilin_med.template import IGNORED

PAD_ID = 0  # any id will do: padding is never seen and never a target
FILLER = -1
_LIKE_LENGTH_UPDATES = 50  # updates sorted by length together: like lengths in a batch, yet random over the epoch


class UpdateSampler(Sampler[int]):
    """Row indices of one epoch, update after update; its length is a multiple of `rows_per_update`.

    With `lengths`, rows of like length share an update (and so a batch), as padding is then small; updates come in
    random order. Without, rows are merely shuffled.
    """

    def __init__(self, rows: int, rows_per_update: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.rows, self.rows_per_update, self.seed, self.epoch, self.lengths = rows, rows_per_update, seed, 0, lengths

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.rows_per_update) * self.rows_per_update

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.rows)
        if self.lengths is not None:
            order = self._group_by_length(order)
        padded = np.concatenate([order, np.full(len(self) - self.rows, FILLER, dtype=order.dtype)])
        updates = padded.reshape(-1, self.rows_per_update)
        if self.lengths is not None:
            updates = updates[random.permutation(len(updates))]
        return iter(updates.ravel().tolist())

    def _group_by_length(self, order: np.ndarray) -> np.ndarray:
        window = self.rows_per_update * _LIKE_LENGTH_UPDATES
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        # Longest first: were memory too small, the first window would show it.
        return np.concatenate([w[np.argsort(-self.lengths[w], kind="stable")] for w in windows])


class FilledRows(torch.utils.data.Dataset):
    """Rows by index, with their index; the filler index gives an empty row."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {} if index == FILLER else self.rows[index]
        return {**row, "index": index}


def collate_packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pretraining and SFT rows to [B, T] tensors, T the longest row's length.

    position_ids restart at every segment: transformers builds the block-diagonal causal mask from them (only if no
    attention mask is passed). Padding is a segment of its own. A segment's first token is never a target, since no
    token before it may be seen. "items" counts the targets, "tokens" those that are no padding.
    """
    # At least two tokens, so that a batch of fillers still has the shapes of a batch.
    width = max(2, max(len(row.get("input_ids", ())) for row in rows))
    input_ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids, lengths = row.get("input_ids", []), row.get("lengths", [])
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = row.get("labels", ids)
        starts = np.cumsum([0, *lengths])[:-1]
        labels[i, starts] = IGNORED
        ends = np.concatenate([np.arange(n) for n in (*lengths, width - len(ids))])
        position_ids[i] = ends
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "labels": torch.from_numpy(labels),
        "rows": torch.tensor([row["index"] for row in rows]),
        "items": int((labels != IGNORED).sum()),
        "tokens": sum(len(row.get("input_ids", ())) for row in rows),
    }


def collate_preferences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Preference rows to [2B, T] tensors: the chosen sequences, then the rejected ones in the same order.

    Fillers become pairs without scored tokens. "items" counts the real pairs, "real" [B] marks them.
    """
    sequences = [
        (row.get("prompt_ids", []), row.get(side, [])) for side in ("chosen_ids", "rejected_ids") for row in rows
    ]
    width = max(2, max(len(prompt) + len(answer) for prompt, answer in sequences))
    input_ids = np.full((len(sequences), width), PAD_ID, dtype=np.int64)
    labels = np.full((len(sequences), width), IGNORED, dtype=np.int64)
    for i, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = [*prompt, *answer]
        labels[i, len(prompt) : end] = answer
    # TRL's pass over the reference hands the rows over without an index; they are all real.
    real = [row.get("index") != FILLER for row in rows]
    batch = {
        # Padding on the right is never seen by the causal mask of what stands before it, so no attention mask.
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "rows": torch.tensor([row.get("index", FILLER) for row in rows]),
        "real": torch.tensor(real),
        "items": sum(real),
        "tokens": sum(len(prompt) + len(answer) for prompt, answer in sequences),
    }
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        if any(side in row for row in rows) or not any(real):
            batch[side] = torch.tensor([row.get(side, 0.0) for row in rows], dtype=torch.float32)
    return batch
