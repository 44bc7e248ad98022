"""lm-evaluation-harness's Hugging Face model, with shared beginnings of prompts computed once.

The choices of a question are scored in one row, as branches of a tree: the prompt, then every choice, each of which sees
the prompt and itself. Prompts that begin alike (instructions, worked examples) are batched together, and what they share
runs through the model once for all of them. Logits exist only where a choice's token is predicted.
"""

import copy
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from qilin_med.console.progress import progress

Ids = tuple[int, ...]
Answer = tuple[float, bool]

SHARED_TOKENS = 32  # prompts that agree on so many tokens are batched together; shorter beginnings are not shared
POSITIONS_AT_ONCE = 1024  # logits of 256 MiB with a vocabulary of 64k in fp32


@dataclass(frozen=True)
class Tree:
    """A prompt with its choices."""

    context: Ids
    choices: tuple[Ids, ...]
    requests: tuple[tuple[int, ...], ...]
    """For each choice, the requests that ask for it."""

    def __len__(self) -> int:
        """Tokens of the row; the last token of a choice is predicted and never read."""
        return len(self.context) + sum(len(choice) - 1 for choice in self.choices)


class SharedPrefixLM(HFLM):
    """`model` in evaluation mode on its device, `tokenizer` with the chat template that prompts are put into.

    Under `accelerate launch` each rank answers its share of the questions, on CPUs too.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._ids: dict[str, list[int]] = {}
        self._beginning: tuple[Ids, DynamicCache] | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = Accelerator(cpu=model.device.type == "cpu", kwargs_handlers=[_patient()])
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in training: contents are stripped of surrounding white space."""
        stripped = [{**message, "content": message["content"].strip()} for message in chat_history]
        return super().apply_chat_template(stripped, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """As HFLM's, with all texts tokenised in one batch."""
        texts = {text for request in requests for text in (request.args[0], "".join(request.args)) if text}
        self._ids = dict(zip(texts, self.tokenizer(list(texts)).input_ids, strict=True)) if texts else {}
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._ids = {}
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prompt and choice, tokenised apart where a token would span both."""
        context_ids, whole = self._ids[context], self._ids[context + continuation]
        if whole[: len(context_ids)] == context_ids and len(whole) > len(context_ids):
            return context_ids, whole[len(context_ids) :]
        return context_ids, self.tok_encode(continuation, add_special_tokens=False)

    # --------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """(summed log-probability, is greedy) of each (texts, prompt ids, choice ids), in the order asked."""
        answers: list[Answer | None] = [None] * len(requests)
        trees = _plant(requests, self.max_length)
        with progress("scoring answers", len(trees), "prompts") as advance:
            for batch, shared in _in_batches(trees, override_bs or self.batch_size):
                for tree, scores in zip(batch, self._score(batch, shared), strict=True):
                    for number, answer in zip(tree.requests, scores, strict=True):
                        for request in number:
                            answers[request] = answer
                            self._remember("loglikelihood", requests[request][0], answer)
                self._write_cache()
                advance(len(batch))
        return answers

    @torch.no_grad()
    def _score(self, batch: list[Tree], shared: int) -> list[list[Answer]]:
        """Answers for every choice of every tree; the first `shared` tokens of the prompts agree."""
        cache = self._begin(batch[0].context[:shared], len(batch)) if shared else None
        layouts = [_lay_out(tree, shared) for tree in batch]
        inputs = _pad(layouts, shared, self.model.dtype, self.device)
        hidden = self.model.get_decoder()(
            **inputs, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        # (row, position, target) of every token of every choice, row by row
        where = [(row, *pair) for row, layout in enumerate(layouts) for pair in layout.predictions]
        rows, positions, targets = torch.tensor(where, device=self.device).T
        log_probs, greedy = self._log_probs(hidden[rows, positions], targets)
        pairs = iter(zip(log_probs.tolist(), greedy.tolist(), strict=True))
        return [[_sum_up(itertools.islice(pairs, len(choice))) for choice in tree.choices] for tree in batch]

    def _log_probs(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target [N] at its hidden state [N, H], in fp32, and whether it is the likeliest."""
        head, found = self.model.get_output_embeddings(), []
        for states, wanted in zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            logits = head(states).float()
            picked = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            found.append((picked, logits.argmax(1) == wanted))
        log_probs, greedy = zip(*found, strict=True)
        return torch.cat(log_probs), torch.cat(greedy)

    def _begin(self, prefix: Ids, rows: int) -> DynamicCache:
        """Keys and values of a beginning for so many rows. The newest beginning is kept."""
        if self._beginning is None or self._beginning[0] != prefix:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([prefix], device=self.device)
            self.model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
            self._beginning = prefix, cache
        cache = copy.deepcopy(self._beginning[1])
        cache.batch_repeat_interleave(rows)
        return cache

    # ---------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Prompts that begin alike are handed to HFLM together, which batches them by length."""
        answers: list[str | None] = [None] * len(requests)
        with progress("writing answers", len(requests), "prompts") as self._advance:
            for members in self._alike(requests):
                texts = super().generate_until([requests[index] for index in members], disable_tqdm=True)
                for index, text in zip(members, texts, strict=True):
                    answers[index] = text
        self._write_cache()
        return answers

    def _alike(self, requests: list[Instance]) -> list[list[int]]:
        """Groups of requests whose prompts agree on their first tokens; those that are too few for a batch in one."""
        groups, others = defaultdict(list), []
        for index, request in enumerate(requests):
            # Enough characters for the tokens wanted; the rest of a long prompt need not be tokenised.
            groups[tuple(self.tok_encode(request.args[0][: 4 * SHARED_TOKENS])[:SHARED_TOKENS])].append(index)
        large = [members for members in groups.values() if len(members) >= self.batch_size]
        others = [index for members in groups.values() if len(members) < self.batch_size for index in members]
        return [*large, sorted(others)] if others else large

    @torch.no_grad()
    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """HFLM's own, after the beginning that all prompts [B, T] (padded on the left) share."""
        self._write_cache()  # what the last batch answered
        # Room for the whole answer at once: a growing cache is copied for every token, a third of the time on a CPU.
        cache = StaticCache(config=self.model.config, max_cache_len=max_length)
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(context, attention_mask, strict=True)]
        shared = _common_length(rows)
        if shared >= SHARED_TOKENS:
            # The padding moves behind the beginning; positions are counted by the mask, so they do not see it.
            padding = attention_mask.shape[1] - attention_mask.sum(1)
            for row, ids in enumerate(rows):
                pad = int(padding[row])
                beginning = torch.tensor(ids[:shared], device=context.device)
                context[row, : shared + pad] = torch.cat([beginning, context[row, :pad]])
                attention_mask[row] = 1
                attention_mask[row, shared : shared + pad] = 0
            for number, layer in enumerate(self._begin(rows[0][:shared], len(rows)).layers):
                cache.update(layer.keys, layer.values, number)
        settings |= {"past_key_values": cache, "disable_compile": True}
        written = super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **settings)
        self._advance(len(context))
        return written

    # --------------------------------------------------------------------------------------------------- cache

    def _remember(self, kind: str, request: Any, answer: Any) -> None:
        if request is not None:
            self.cache_hook.add_partial(kind, request, answer)

    def _write_cache(self) -> None:
        """Wait until answers are on disk, so that a killed run does not ask for them again."""
        if self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict.commit()


def _patient() -> InitProcessGroupKwargs:
    """Ranks wait for the slowest one, which may be measuring something else."""
    from datetime import timedelta

    return InitProcessGroupKwargs(timeout=timedelta(weeks=1))


# ------------------------------------------------------------------------------------------------------ trees


@dataclass(frozen=True)
class Layout:
    """One row: what is read, where, after whom, and what is to be predicted where."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    """0 for the prompt, n for the n-th choice."""
    predictions: list[tuple[int, int]]
    """(index in the row, token that comes next), choice by choice."""


def _plant(requests: Sequence[tuple[Any, list[int], list[int]]], max_length: int) -> list[Tree]:
    """A tree for each prompt, or several if its choices are longer than the model together. A prompt that is too long for
    the model loses its beginning."""
    by_context: dict[Ids, dict[Ids, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (_, context, choice) in enumerate(requests):
        by_context[tuple(context)][tuple(choice)].append(index)
    trees = []
    for context, choices in by_context.items():
        room = max_length + 1 - max(map(len, choices))
        kept = context[max(len(context) - room, 0) :]
        for part in _split(list(choices), max_length):
            trees.append(Tree(kept, part, tuple(tuple(choices[choice]) for choice in part)))
    return trees


def _split(choices: list[Ids], most: int) -> Iterator[tuple[Ids, ...]]:
    """The choices in order, in parts of at most so many tokens."""
    ends = itertools.accumulate(map(len, choices))
    for _, part in itertools.groupby(zip(choices, ends, strict=True), key=lambda pair: (pair[1] - 1) // most):
        yield tuple(choice for choice, _ in part)


def _in_batches(trees: list[Tree], size: int) -> Iterator[tuple[list[Tree], int]]:
    """(trees, length of the beginning that their prompts share), longest first within a group that begins alike."""
    starts = Counter(tree.context[:SHARED_TOKENS] for tree in trees)
    groups: dict[Ids, list[Tree]] = defaultdict(list)
    for tree in trees:
        start = tree.context[:SHARED_TOKENS]
        groups[start if starts[start] >= size else ()].append(tree)
    for group in groups.values():
        group.sort(key=len, reverse=True)
        # Of one group's length, so that its batches share one computation. The last token of each prompt is read anew.
        shared = min(_common_length([tree.context for tree in group]), min(len(tree.context) for tree in group) - 1)
        for start in range(0, len(group), size):
            yield group[start : start + size], shared if shared >= SHARED_TOKENS else 0


def _common_length(rows: Sequence[Ids]) -> int:
    """Tokens at the start in which all rows agree, less than the shortest row has."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # whatever these agree on, those between agree on too
    agreeing = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(sum(1 for _ in agreeing), min(map(len, rows)) - 1)


def _lay_out(tree: Tree, shared: int) -> Layout:
    """The row of a tree after its first `shared` tokens."""
    length = len(tree.context)
    ids, positions = list(tree.context[shared:]), list(range(shared, length))
    branches, predictions = [0] * len(ids), []
    last = len(ids) - 1
    for number, choice in enumerate(tree.choices, 1):
        predictions.append((last, choice[0]))
        predictions += [(len(ids) + offset, token) for offset, token in enumerate(choice[1:])]
        ids += choice[:-1]
        positions += range(length, length + len(choice) - 1)
        branches += [number] * (len(choice) - 1)
    return Layout(ids, positions, branches, predictions)


def _pad(layouts: list[Layout], shared: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs [B, T] and an additive mask [B, 1, T, shared + T] in which a choice sees its prompt and itself."""
    width = max(len(layout.ids) for layout in layouts)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], device=device)

    branches = padded([layout.branches for layout in layouts], -1)
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = ((branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])) & earlier
    beginning = torch.ones(len(layouts), width, shared, dtype=torch.bool, device=device)
    mask = torch.zeros(len(layouts), 1, width, shared + width, dtype=dtype, device=device)
    mask.masked_fill_(~torch.cat([beginning, seen], dim=2)[:, None], torch.finfo(dtype).min)
    return {
        "input_ids": padded([layout.ids for layout in layouts], 0),
        "position_ids": padded([layout.positions for layout in layouts], 0),
        "attention_mask": mask,
    }


def _sum_up(tokens: Iterator[tuple[float, bool]]) -> Answer:
    log_probs, greedy = zip(*tokens, strict=True)
    return sum(log_probs), all(greedy)
