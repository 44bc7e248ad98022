"""A conversation with one model: earlier turns and a question -> a prompt as in training and evaluation -> the answer as it
grows, greedily, which is how evaluation asks, or drawn with a seed."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple, TypeAlias

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper, TopPLogitsWarper

from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError
from qilin_med.model.folder import check_model_folder, max_positions
from qilin_med.model.load import load_for_inference, load_tokenizer
from qilin_med.prompt.template import ChatTemplate, EncodedPrompt
from qilin_med.prompt.wording import plain_dialogue
from qilin_med.records import Message
from qilin_med.retrieve.retriever import Prompt, Retriever

Turn: TypeAlias = tuple[str, str]
"""A question as it was asked, without passages, and its answer."""

NOTICE = "For research only. Answers can be wrong: they are no medical advice. 仅供研究，回答可能有误，不构成医疗建议。"
POSITIONS = 4096  # tokens of a conversation where the model's configuration names no limit
LEAST_ROOM = 16  # tokens; a shorter question is none
MERGES = 2  # tokens that a question may have more behind passages than alone
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Manner:
    """How models are asked; at temperature 0 greedily. UserError: temperature or top_p is out of range."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            asked = f"temperature is {self.temperature} and top-p {self.top_p}"
            raise UserError(f"{asked}; expected 0 (greedy) or more, and more than 0 to 1")

    def sampling(self, device: torch.device) -> LogitsProcessorList:
        """Scores whose greatest one is a draw from the softmax of those given (the Gumbel-max trick): with random numbers of
        its own, an answer does not depend on what else the process draws, such as the one that grows beside it."""
        if not self.temperature:
            return LogitsProcessorList()
        generator = torch.Generator(device).manual_seed(self.seed)

        def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores - torch.empty_like(scores).exponential_(generator=generator).log()

        return LogitsProcessorList([TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p), draw])


GREEDY = Manner()


class ChatPrompt(NamedTuple):
    ids: list[int]
    until: str | None
    """Text that ends the answer, as EOS does."""
    note: str
    """What did not fit, for the reader; "" if nothing."""


class ChatModel:
    """A loaded model that is asked in its chat template or, if evaluation.chat does not name it, in plain text."""

    def __init__(self, experiment: Experiment, name: str, folder: Path, max_new_tokens: int):
        """UserError: the folder holds no model, its tokenizer no usable template, or answers leave no room."""
        check_model_folder(folder)
        positions = max_positions(folder) or POSITIONS
        if not 1 <= max_new_tokens <= (most := positions - LEAST_ROOM):
            raise UserError(
                f"--max-new-tokens is {max_new_tokens}; {folder} has {positions} positions for question and answer:"
                f" expected 1 to {most}"
            )
        self._room, self._max_new_tokens = positions - max_new_tokens, max_new_tokens
        self.tokenizer = load_tokenizer(folder, experiment.model.template)
        self._template = ChatTemplate(self.tokenizer) if name in experiment.evaluation.chat else None
        self._model = load_for_inference(folder, experiment.model, experiment.launch.device)

    def prompt(self, turns: Sequence[Turn], asked: Prompt, system: str = "") -> ChatPrompt:
        """The question, with its passages, after the system text, if any, and as many of the newest turns as there is room
        for. A turn without an answer, stopped at once, is left out. UserError: it holds a role mark."""
        turns = [(question, answer) for question, answer in turns if answer.strip()]
        if self._template:
            before = [Message("system", system)] if system.strip() else []
            conversation = [*before, *messages(turns), Message("user", asked.text)]
            encoded = self._template.encode_prompt(conversation, self._room)
        else:
            for dropped in range(len(turns) + 1):
                text = f"{system.strip()}\n\n".lstrip() + plain_dialogue(turns[dropped:], asked.text)
                ids = self.tokenizer(text, split_special_tokens=True).input_ids
                if len(ids) <= self._room:
                    break
            # The end is kept, as in evaluation.
            encoded = EncodedPrompt(ids[-self._room :], len(ids) > self._room, dropped)
        notes = ["the question is longer than the model can read and was cut"] if encoded.is_cut else []
        if asked.shortened:
            notes.append("no room for all passages that were found")
        if encoded.dropped_turns:
            notes.append(f"no room for the oldest turns, {encoded.dropped_turns} left out")
        # A model that continues text would go on with a question of its own after a blank line, as in the turns before.
        continues = not self._template and len(turns) > encoded.dropped_turns
        return ChatPrompt(encoded.ids, "\n\n" if continues else None, "; ".join(notes))

    def room_beside(self, question: str, system: str) -> int:
        """Tokens left for passages before a question; 0 or less if it fills the model alone."""
        return self._room - len(self.prompt([], Prompt(question, ()), system).ids) - MERGES

    def stream(self, prompt: ChatPrompt, manner: Manner = GREEDY) -> Iterator[str]:
        """The answer so far, again and again until it is whole. Closing the iterator stops the model."""
        texts, stopped = SimpleQueue(), Event()
        inputs = torch.tensor([prompt.ids], device=self._model.device)
        own_ends = self._model.generation_config.eos_token_id
        own_ends = own_ends if isinstance(own_ends, list) else [own_ends] if own_ends is not None else []

        def decode(ids: torch.Tensor) -> str:
            return self.tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True)

        def watch(ids: torch.Tensor, *_, **__) -> bool:
            # Decoded as a whole: pieces need not add up to it. Bytes become a character, or not, with those that follow.
            text, newest = decode(ids), self.tokenizer.convert_ids_to_tokens(int(ids[0, -1]))
            if not text.endswith("\ufffd") and not BYTE.fullmatch(newest):
                texts.put(text)
            return stopped.is_set()

        def generate() -> None:
            try:
                ids = self._model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), stopping_criteria=StoppingCriteriaList([watch]),
                    max_new_tokens=self._max_new_tokens, do_sample=False, use_cache=True,
                    logits_processor=manner.sampling(self._model.device),
                    eos_token_id=[self.tokenizer.eos_token_id, *own_ends], pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
                texts.put(decode(ids))
            finally:
                texts.put(None)

        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(generate)
            try:
                for text in iter(texts.get, None):
                    answer, end, _ = text.partition(prompt.until) if prompt.until else (text, "", "")
                    yield answer
                    if end:
                        return
            finally:
                stopped.set()
            generation.result()  # raises what went wrong over there


def messages(turns: Iterable[Turn]) -> list[Message]:
    return [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def look_up(retriever: Retriever | None, question: str, models: Sequence[ChatModel] = (), system: str = "") -> Prompt:
    """The question after what the retriever, if any, finds for it and every model has room for."""
    if retriever is None:
        return Prompt(question, ())
    [passages] = retriever.search([question])
    room = min((model.room_beside(question, system) for model in models), default=None)
    return retriever.fill_prompt(question, passages, room)
