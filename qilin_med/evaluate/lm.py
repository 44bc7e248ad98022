"""lm-evaluation-harness's Hugging Face model, with shared prefixes of prompts computed once, and its cache of answers.

The choices of a question are scored in one row, as branches of a tree: the prompt, then every choice, each of which sees
the prompt and itself. Prompts that begin alike (instructions, worked examples) are batched together, and what they share
runs through the model once for all of them. Logits exist only where a choice's token is predicted.
"""

import copy
import itertools
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from qilin_med.console.progress import progress

Ids = tuple[int, ...]
Answer = tuple[float, bool]
"""Summed log-probability of a choice, and whether each of its tokens is the most likely one."""

SHARED_TOKENS = 32  # prompts that share this many first tokens are batched together; a shorter prefix is not worth it
POSITIONS_AT_ONCE = 1024  # logits of 256 MiB with a vocabulary of 64k in fp32


class AnswerFile(dict[str, Any]):
    """{hash of a request: answer}, kept in a SQLite file. What `commit` has written survives the process.

    In place of the harness's SqliteDict, which takes a transaction and a walk through the stack for every answer: more
    time than a small model takes to give it.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path)
        self._connection.execute("create table if not exists answers (request text primary key, answer text)")
        rows = self._connection.execute("select request, answer from answers")
        super().__init__((request, json.loads(answer)) for request, answer in rows)
        self._written = len(self)

    def commit(self) -> None:
        """Write what is new; on return it is on disk."""
        new = itertools.islice(self.items(), self._written, None)
        with self._connection:
            rows = ((request, json.dumps(answer)) for request, answer in new)
            self._connection.executemany("insert or replace into answers values (?, ?)", rows)
        self._written = len(self)


class AnsweringLM(CachingLM):
    """The harness's caching model over an AnswerFile."""

    def __init__(self, lm: LM, path: Path):
        self.lm, self.cache_db, self.dbdict = lm, str(path), AnswerFile(path)
        lm.set_cache_hook(self.get_cache_hook())


class Tree(NamedTuple):
    """A prompt, and its choices with the indices of the requests that ask for them."""

    context: Ids
    choices: dict[Ids, list[int]]

    def size(self) -> int:
        """Tokens of the row; the last token of a choice is predicted and never read."""
        return len(self.context) + sum(len(choice) - 1 for choice in self.choices)


class SharedPrefixLM(HFLM):
    """`model` in evaluation mode on its device, `tokenizer` with the chat template that prompts are put into.

    Under `accelerate launch` each rank answers its share of the questions, on CPUs too.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._prefilled: tuple[Ids, DynamicCache] | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Ranks wait for the slowest one, which may be measuring something else.
            patient = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
            self.accelerator = Accelerator(cpu=model.device.type == "cpu", kwargs_handlers=[patient])
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in training: contents are stripped of surrounding white space."""
        stripped = [{**message, "content": message["content"].strip()} for message in chat_history]
        return super().apply_chat_template(stripped, add_generation_prompt)

    def _write_cache(self) -> None:
        """Wait until answers are on disk, so that a killed run does not ask for them again."""
        if self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict.commit()

    def _prefill(self, prefix: Ids, rows: int) -> DynamicCache:
        """Keys and values of a prefix, repeated for `rows` rows. The latest prefix is kept."""
        if self._prefilled is None or self._prefilled[0] != prefix:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([prefix], device=self.device)
            self.model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
            self._prefilled = prefix, cache
        cache = copy.deepcopy(self._prefilled[1])
        cache.batch_repeat_interleave(rows)
        return cache

    # --------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """The answer to each (prompt, choice), in the order asked; all texts are tokenised together."""
        texts = {text for request in requests for text in (request.args[0], "".join(request.args))}
        ids = self._encode(texts, begun=True) | self._encode(texts, begun=False)
        asked = []
        for prompt, choice in (request.args for request in requests):
            before, whole = ids[prompt] or [self.prefix_token_id], ids[prompt + choice]
            if whole[: len(before)] == before and len(whole) > len(before):
                asked.append((tuple(before), tuple(whole[len(before) :])))
            else:  # a token would span both
                asked.append((tuple(before), tuple(self.tok_encode(choice, add_special_tokens=False))))
        trees = _plant(asked, self.max_length)
        answers: list[Answer | None] = [None] * len(requests)
        with progress("scoring answers", len(trees), "prompts") as advance:
            for batch, shared in _in_batches(trees, self.batch_size):
                for tree, scores in zip(batch, self._score(batch, shared), strict=True):
                    for indices, answer in zip(tree.choices.values(), scores, strict=True):
                        for index in indices:
                            answers[index] = answer
                            self.cache_hook.add_partial("loglikelihood", requests[index].args, answer)
                self._write_cache()
                advance(len(batch))
        return answers

    def _encode(self, texts: set[str], begun: bool) -> dict[str, list[int]]:
        """Ids of those texts that begin with BOS, written by the chat template (`begun`), or of the others, to which the
        tokenizer may add it."""
        some = [text for text in texts if has_bos_prefix(text, self.tokenizer.bos_token) == begun]
        encoded = self.tokenizer(some, add_special_tokens=not begun).input_ids if some else []
        return dict(zip(some, encoded, strict=True))

    @torch.no_grad()
    def _score(self, batch: list[Tree], shared: int) -> list[list[Answer]]:
        """Answers for every choice of every tree; the first `shared` tokens of the prompts agree."""
        cache = self._prefill(batch[0].context[:shared], len(batch)) if shared else None
        ids, positions, branches, predictions = (tensor.to(self.device) for tensor in _lay_out(batch, shared))
        mask = _mask(branches, shared, self.model.dtype)
        read = self.model.get_decoder()(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=bool(shared)
        )
        rows, indices, targets = predictions
        hidden, log_probs, greedy = read.last_hidden_state[rows, indices], [], []
        for states, wanted in zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            logits = self.model.get_output_embeddings()(states).float()
            log_probs += (logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)).tolist()
            greedy += (logits.argmax(1) == wanted).tolist()
        # Token by token of every choice of every tree, as they were laid out.
        tokens = iter(zip(log_probs, greedy, strict=True))
        chosen = [
            [zip(*itertools.islice(tokens, len(choice)), strict=True) for choice in tree.choices] for tree in batch
        ]
        return [[(sum(log_probs), all(greedy)) for log_probs, greedy in choices] for choices in chosen]

    # ---------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Prompts that begin alike are handed to HFLM together, which batches them by length."""
        answers: list[str | None] = [None] * len(requests)
        # Enough characters for the tokens wanted; the rest of a long prompt need not be tokenised.
        starts = [tuple(self.tok_encode(r.args[0][: 4 * SHARED_TOKENS])[:SHARED_TOKENS]) for r in requests]
        with progress("writing answers", len(requests), "prompts") as self._advance:
            for members in _alike(starts, self.batch_size):
                texts = super().generate_until([requests[index] for index in members], disable_tqdm=True)
                for index, text in zip(members, texts, strict=True):
                    answers[index] = text
        self._write_cache()
        return answers

    @torch.no_grad()
    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """HFLM's own, after the prefix that all prompts [B, T] (padded on the left) share."""
        self._write_cache()  # what the last batch answered
        # Room for the whole answer from the start: a growing cache is copied for every token, a third of the time on a CPU.
        cache = StaticCache(config=self.model.config, max_cache_len=max_length)
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(context, attention_mask, strict=True)]
        if shared := _shared_length(rows):
            # The padding moves behind the prefix; positions are counted by the mask, so they do not see it.
            prefix = torch.tensor(rows[0][:shared], device=context.device)
            for row, pad in enumerate((attention_mask.shape[1] - attention_mask.sum(1)).tolist()):
                context[row, : shared + pad] = torch.cat([prefix, context[row, :pad]])
                attention_mask[row] = 1
                attention_mask[row, shared : shared + pad] = 0
            for number, layer in enumerate(self._prefill(rows[0][:shared], len(rows)).layers):
                cache.update(layer.keys, layer.values, number)
        settings |= {"past_key_values": cache, "disable_compile": True}
        written = super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **settings)
        self._advance(len(context))
        return written


# ---------------------------------------------------------------------------------------------------------- trees


def _plant(asked: Sequence[tuple[Ids, Ids]], max_length: int) -> list[Tree]:
    """A tree for each prompt, or several if its choices are longer than the model together. A prompt that is too long for
    the model loses its start."""
    by_context: dict[Ids, dict[Ids, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (context, choice) in enumerate(asked):
        by_context[context][choice].append(index)
    trees = []
    for context, choices in by_context.items():
        room = max_length + 1 - max(map(len, choices))
        kept = context[max(len(context) - room, 0) :]
        ends = itertools.accumulate(map(len, choices))
        numbered = zip(choices.items(), ends, strict=True)
        for _, part in itertools.groupby(numbered, key=lambda pair: (pair[1] - 1) // max_length):
            trees.append(Tree(kept, dict(choice for choice, _ in part)))
    return trees


def _in_batches(trees: list[Tree], size: int) -> Iterator[tuple[list[Tree], int]]:
    """(trees, length of the prefix that their prompts share), longest first within a group that begins alike."""
    for members in _alike([tree.context[:SHARED_TOKENS] for tree in trees], size):
        group = sorted((trees[index] for index in members), key=Tree.size, reverse=True)
        shared = _shared_length([tree.context for tree in group])  # one for the group: it is computed once
        for start in range(0, len(group), size):
            yield group[start : start + size], shared


def _alike(starts: Sequence[Ids], size: int) -> list[list[int]]:
    """Indices of those that start alike, where they fill a batch of this size, and of all others together."""
    groups: dict[Ids, list[int]] = defaultdict(list)
    for index, start in enumerate(starts):
        groups[start].append(index)
    large = [members for members in groups.values() if len(members) >= size]
    others = sorted(set(range(len(starts))).difference(*large))
    return [*large, others] if others else large


def _shared_length(rows: Sequence[Ids]) -> int:
    """Length of the prefix that all rows share, less than the shortest row, whose last token must be read again. 0 where
    it is too short to be worth it."""
    first, last = min(rows), max(rows)  # whatever these agree on, those between agree on too
    agreeing = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    shared = min(agreeing, min(map(len, rows)) - 1)
    return shared if shared >= SHARED_TOKENS and len(rows) > 1 else 0


def _lay_out(batch: list[Tree], shared: int) -> tuple[torch.Tensor, ...]:
    """Ids, positions and branches (0: the prompt, n: the n-th choice, -1: padding) [B, T] after the shared prefix, and
    (row, index in it, token that comes next) [3, N] of all that is to be predicted, choice by choice."""
    ids, positions, branches, predictions = [], [], [], []
    for row, tree in enumerate(batch):
        end = len(tree.context)
        read, places, branch = list(tree.context[shared:]), list(range(shared, end)), [0] * (end - shared)
        for number, choice in enumerate(tree.choices, 1):
            before = [end - shared - 1, *range(len(read), len(read) + len(choice) - 1)]
            predictions += [(row, index, token) for index, token in zip(before, choice, strict=True)]
            read += choice[:-1]
            places += range(end, end + len(choice) - 1)
            branch += [number] * (len(choice) - 1)
        for rows, values in ((ids, read), (positions, places), (branches, branch)):
            rows.append(torch.tensor(values))
    padded = [pad_sequence(rows, True, fill) for rows, fill in ((ids, 0), (positions, 0), (branches, -1))]
    return *padded, torch.tensor(predictions).T


def _mask(branches: torch.Tensor, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive [B, 1, T, shared + T] for `branches` [B, T]: a choice sees the prefix, its prompt and itself."""
    rows, width = branches.shape
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    earlier = torch.ones(width, width, dtype=torch.bool, device=branches.device).tril()
    mask = torch.zeros(rows, 1, width, shared + width, dtype=dtype, device=branches.device)
    mask[..., shared:].masked_fill_(~(seen & earlier)[:, None], torch.finfo(dtype).min)
    return mask
