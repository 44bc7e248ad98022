"""From cached rows to batches: which examples train together, and as what tensors.

An example is a block, a conversation or a preference pair. An optimizer step is a random draw of `global_batch_size` of
them, which depends on seed and epoch only. Ranks, accumulation and packing merely decide how it is computed: its examples
are dealt to micro-batches of about equal tokens, and each micro-batch is laid out in as few positions as its attention
allows.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from qilin_med.prompt.template import IGNORED

COUNTED = ("samples", "tokens", "loss_tokens")
"""Of a batch, and logged of each step: rows, tokens read (a pair's prompt with either answer), tokens with a loss."""
PAD_ID = 0  # any id will do: padding is never seen and never a target
_MODEL_INPUTS = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

Tokens = tuple[Sequence[int], Sequence[int]]
"""Ids and labels (unshifted, IGNORED where nothing is learnt) of one sequence, which sees no other."""


def deal(costs: Sequence[int], bins: int, most: int | None = None) -> list[list[int]]:
    """Indices of `costs` in `bins` groups of about equal cost, at most `most` in each: the largest first, each to the
    group with the least so far (Graham 1969). Deterministic; groups may be empty."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    open_groups = [(0, number) for number in range(bins)]  # (cost, number): a heap
    for index in np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable").tolist():
        cost, number = heapq.heappop(open_groups)
        groups[number].append(index)
        if len(groups[number]) != most:
            heapq.heappush(open_groups, (cost + int(costs[index]), number))
    return groups


@dataclass(eq=False)
class StepSampler(Sampler[list[int]]):
    """One rank's micro-batches of an epoch, `accumulation` for each optimizer step: lists of row indices, which may be
    empty in the epoch's last step."""

    costs: np.ndarray
    """Tokens of each row."""
    batch_size: int
    """Rows of a micro-batch; on average, if they are packed."""
    accumulation: int
    ranks: int
    rank: int
    seed: int
    packing: bool
    epoch: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation * self.ranks

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.costs) // self.global_batch_size) * self.accumulation

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.costs))

    def rows_of_first(self, steps: int) -> np.ndarray:
        """Rows that the first optimizer steps of a run train on, ascending."""
        return np.sort(self.order(epoch=0)[: steps * self.global_batch_size])

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for start in range(0, len(order), self.global_batch_size):
            yield from self.micro_batches(order[start : start + self.global_batch_size])[self.rank :: self.ranks]

    def micro_batches(self, step: np.ndarray) -> list[list[int]]:
        """All micro-batches of an optimizer step: the first of every rank, then the second of every rank."""
        if self.packing:
            parts = [step]
        else:
            # Rows are padded to the longest of their micro-batch, so similar lengths go together, on all ranks alike.
            longest_first = step[np.argsort(-self.costs[step], kind="stable")]
            parts = np.array_split(longest_first, self.accumulation)
        bins, most = self.ranks * self.accumulation // len(parts), None if self.packing else self.batch_size
        return [part[group].tolist() for part in parts for group in deal(self.costs[part], bins, most)]


def lay_out(sequences: Sequence[Tokens], rows: Sequence[Sequence[int]], varlen: bool = False) -> dict[str, Any]:
    """Sequences, by their numbers in `rows`, as [B, T] tensors; T is the longest row's length.

    A sequence's first token is never a target, since it may see no token before it. The rest of a row is padding, a sequence
    of its own. `sequence_index` [B, T] says which sequence a token belongs to. With `varlen`, sequences are kept apart by
    cumulative lengths over all B x T tokens; without, by position_ids that restart at every sequence, from which
    transformers builds a block-diagonal mask (only if no attention mask is passed). Rows of a single sequence need neither:
    the causal mask hides the padding after it.
    """
    # At least two tokens, so that an empty batch still has the shapes of a batch.
    width = max([2, *(sum(len(sequences[index][0]) for index in row) for row in rows)])
    shape = (max(len(rows), 1), width)
    input_ids, labels = np.full(shape, PAD_ID, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    position_ids, sequence_index = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    lengths = []
    for i, row in enumerate(rows or [[]]):
        start = 0
        for index in row:
            ids, targets = sequences[index]
            end = start + len(ids)
            input_ids[i, start:end] = ids
            labels[i, start + 1 : end] = targets[1:]
            position_ids[i, start:end] = np.arange(len(ids))
            sequence_index[i, start:end] = index
            lengths.append(len(ids))
            start = end
        position_ids[i, start:] = np.arange(width - start)
        lengths += [width - start] * (start < width)
    tensors = {"input_ids": input_ids, "labels": labels, "sequence_index": sequence_index}
    if varlen or any(len(row) > 1 for row in rows):
        tensors["position_ids"] = position_ids
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in tensors.items()}
    if varlen:  # the longest as a number spares every layer a wait for the device
        offsets, longest = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), max(lengths)
        batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    return batch


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch that goes into the model."""
    return {name: batch[name] for name in _MODEL_INPUTS if name in batch}


@dataclass(frozen=True)
class Collator:
    """Rows of any stage to a batch, laid out for speed: no sequence ever sees another."""

    packing: bool
    """False: one unit (a sequence, or a block of several) per row, padded to the longest."""
    varlen: bool
    """The attention takes cumulative lengths (FlashAttention), so that all units can lie in one row."""
    hidden_size: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """ "items" counts what the loss is a mean of, targets or pairs; the other counts are those of `COUNTED`."""
        are_pairs = bool(rows) and "prompt_ids" in rows[0]
        if are_pairs:  # the prompts with their chosen answers, then with their rejected ones
            answers = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
            units = [[([*prompt, *answer], [*[IGNORED] * len(prompt), *answer])] for prompt, answer in answers]
        else:
            units = [_segments(row) for row in rows]
        sequences = [sequence for unit in units for sequence in unit]
        lengths = [sum(len(ids) for ids, _ in unit) for unit in units]
        ends = np.cumsum([0, *map(len, units)]).tolist()
        groups = [[i for unit in group for i in range(ends[unit], ends[unit + 1])] for group in self.group(lengths)]
        batch = lay_out(sequences, groups, self.varlen)
        targets = int((batch["labels"] != IGNORED).sum())
        indices = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        counts = dict(zip(COUNTED, (len(rows), sum(lengths), targets), strict=True))
        return {**batch, "rows": indices, "items": len(rows) if are_pairs else targets, **counts}

    def group(self, lengths: Sequence[int]) -> list[list[int]]:
        """Units, by their lengths in tokens, as the rows of a batch."""
        if not self.packing:
            return [[index] for index in range(len(lengths))]
        if self.varlen or not lengths:
            return [list(range(len(lengths)))]

        def work(rows: list[list[int]]) -> int:
            # Of one layer, up to a factor: 12 hidden^2 weights and 2 x width x hidden scores for each position (PaLM, app. B).
            width = max(sum(lengths[index] for index in row) for row in rows)
            return len(rows) * width * (6 * self.hidden_size + width)

        wanted = {-(-sum(lengths) // round(max(lengths) * factor)) for factor in (1, 1.25, 1.5, 2, 3, 4)}
        return min((deal(lengths, number) for number in sorted(wanted)), key=work)


def _segments(row: dict[str, Any]) -> list[Tokens]:
    """The sequences of a pretraining or SFT row, which stay in one row of the batch."""
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    ends = np.cumsum([0, *row.get("lengths", [len(ids)])]).tolist()
    return [(ids[start:end], labels[start:end]) for start, end in pairwise(ends)]
