"""A conversation with one model: earlier turns and a question -> a prompt as in training and evaluation -> the answer as it
grows, greedily, which is how evaluation asks."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

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
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    ids: list[int]
    until: str | None
    """Text that ends the answer, beside EOS."""
    note: str
    """What did not fit, for the reader; "" if nothing."""


class ChatModel:
    """A loaded model with its way of being asked: in its chat template or, by `evaluation.chat`, in plain text."""

    def __init__(self, experiment: Experiment, name: str, folder: Path, max_new_tokens: int):
        """UserError: the folder holds no model, its tokenizer no usable template, or answers leave no room."""
        check_model_folder(folder)
        positions = max_positions(folder) or POSITIONS
        if not 1 <= max_new_tokens <= (most := positions - LEAST_ROOM):
            raise UserError(
                f"--max-new-tokens is {max_new_tokens}; {folder} has {positions} positions for question and answer: expected"
                f" 1 to {most}"
            )
        self._room, self._max_new_tokens = positions - max_new_tokens, max_new_tokens
        self.tokenizer = load_tokenizer(folder, experiment.model.template)
        self._template = ChatTemplate(self.tokenizer) if name in experiment.evaluation.chat else None
        self._model = load_for_inference(folder, experiment.model, experiment.launch.device)

    def prompt(self, turns: Sequence[Turn], asked: Prompt) -> ChatPrompt:
        """The question, with its passages, after as many of the newest turns as there is room for. A turn without an answer,
        stopped at once, is left out.

        UserError: it holds a role mark, or passages crowd it out."""
        encode = self._encode_chat if self._template else self._encode_plain
        turns = [(question, answer) for question, answer in turns if answer.strip()]
        encoded = encode(turns, asked.text)
        if encoded.is_cut and asked.passages:
            raise UserError(
                f"question and passages are longer than the {self._room} tokens that the model has for them; lower"
                " retrieval.max_context_tokens or --max-new-tokens"
            )
        goes_on = not self._template and len(turns) > encoded.dropped_turns
        return ChatPrompt(encoded.ids, "\n\n" if goes_on else None, _note(encoded))

    def stream(self, prompt: ChatPrompt) -> Iterator[str]:
        """The answer so far, again and again until it is whole. Closing the iterator stops the model."""
        streamer, stopped = _GrowingText(self.tokenizer), Event()
        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(self._generate, prompt.ids, streamer, stopped)
            try:
                for text in streamer:
                    answer, end, _ = text.partition(prompt.until) if prompt.until else (text, "", "")
                    yield answer
                    if end:
                        return
            finally:
                stopped.set()
            generation.result()  # raises what went wrong over there

    def _encode_chat(self, turns: Sequence[Turn], question: str) -> EncodedPrompt:
        roles = ("user", "assistant")
        earlier = [Message(role, text) for turn in turns for role, text in zip(roles, turn, strict=True)]
        return self._template.encode_prompt([*earlier, Message("user", question)], self._room)

    def _encode_plain(self, turns: Sequence[Turn], question: str) -> EncodedPrompt:
        for dropped in range(len(turns) + 1):
            text = plain_dialogue(turns[dropped:], question)
            ids = self.tokenizer(text, split_special_tokens=True).input_ids
            if len(ids) <= self._room:
                return EncodedPrompt(ids, False, dropped)
        return EncodedPrompt(ids[-self._room :], True, len(turns))  # the end, as evaluation cuts it

    def _ends(self) -> list[int]:
        """The token that ends an answer in the template, and those that the model's folder names."""
        own = self._model.generation_config.eos_token_id
        return [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])]

    def _generate(self, ids: list[int], streamer: "_GrowingText", stopped: Event) -> None:
        inputs = torch.tensor([ids], device=self._model.device)
        try:
            self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([lambda *_, **__: stopped.is_set()]),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        finally:
            streamer.end()


def look_up(retriever: Retriever | None, question: str) -> Prompt:
    """The question after what the retriever, if any, finds for it."""
    if retriever is None:
        return Prompt(question, ())
    [passages] = retriever.search([question])
    return retriever.fill_prompt(question, passages)


def _note(encoded: EncodedPrompt) -> str:
    notes = ["the question is longer than the model can read and was cut"] if encoded.is_cut else []
    if encoded.dropped_turns:
        notes.append(f"no room for the oldest turns, {encoded.dropped_turns} left out")
    return "; ".join(notes)


class _GrowingText(TextIteratorStreamer):
    """Iterates over the text so far, which the base class does in pieces that need not add up to the whole decoded text (a
    space after a line end, characters made of several byte tokens)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache += value.tolist()
        text = self._decoded()
        # Bytes become a character, or not, with those that follow.
        if not text.endswith("\ufffd") and not BYTE.fullmatch(
            self.tokenizer.convert_ids_to_tokens(self.token_cache[-1])
        ):
            self.on_finalized_text(text)

    def end(self) -> None:
        self.on_finalized_text(self._decoded(), stream_end=True)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
