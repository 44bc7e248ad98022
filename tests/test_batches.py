"""Which rows come together, and that packed rows equal rows alone."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qilin_med.batches import FILLER, IGNORED, UpdateSampler, collate_packed, collate_preferences


def updates_of(sampler: UpdateSampler) -> list[list[int]]:
    order = list(sampler)
    size = sampler.rows_per_update
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_an_epoch_has_every_row_once_and_fills_the_last_update():
    for lengths in (None, np.arange(29) % 17):
        sampler = UpdateSampler(29, 8, seed=3, lengths=lengths)
        order = [i for update in updates_of(sampler) for i in update]
        assert len(order) == len(sampler) == 32
        assert sorted(i for i in order if i != FILLER) == list(range(29))
        assert list(sampler) == order
        sampler.set_epoch(1)
        assert list(sampler) != order


def test_updates_hold_rows_of_like_length_in_random_order():
    lengths = 1 + np.arange(1000) % 100
    updates = updates_of(UpdateSampler(1000, 10, seed=0, lengths=lengths))
    spread = [max(lengths[i] for i in update) - min(lengths[i] for i in update) for update in updates]
    assert max(spread) <= 3
    longest = [max(lengths[i] for i in update) for update in updates]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_packed_logits_equal_those_of_each_document_alone():
    documents = [[5, 6, 7, 8, 2], [9, 10, 2], [11, 12, 13, 14, 15, 2]]
    row = {"input_ids": [t for d in documents for t in d], "lengths": [len(d) for d in documents], "index": 0}
    shorter = {"input_ids": [3, 4], "lengths": [2], "index": 1}
    batch = collate_packed([row, shorter])
    model = tiny_model()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        start = 0
        for document in documents:
            alone = model(input_ids=torch.tensor([document])).logits[0]
            torch.testing.assert_close(packed[0, start : start + len(document)], alone, rtol=0, atol=1e-5)
            start += len(document)
        torch.testing.assert_close(packed[1, :2], model(input_ids=torch.tensor([[3, 4]])).logits[0], rtol=0, atol=1e-5)


def test_labels_of_packed_rows():
    batch = collate_packed([
        {"input_ids": [5, 6, 2, 7, 2], "lengths": [3, 2], "index": 4},
        {"input_ids": [8, 9, 2], "labels": [-100, -100, 2], "lengths": [3], "index": 2},
        {"index": FILLER},
    ])  # fmt: skip
    _ = IGNORED
    assert batch["labels"].tolist() == [[_, 6, 2, _, 2], [_, _, 2, _, _], [_, _, _, _, _]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert (batch["items"], batch["tokens"], batch["rows"].tolist()) == (4, 8, [4, 2, FILLER])


def test_preference_batches():
    batch = collate_preferences([
        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8], "index": 0,
         "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
        {"index": FILLER},
    ])  # fmt: skip
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [0] * 4, [5, 6, 8, 0], [0] * 4]
    assert batch["labels"].tolist()[0] == [-100, -100, 7, 2]
    assert batch["labels"].tolist()[2] == [-100, -100, 8, -100]
    assert batch["real"].tolist() == [True, False]
    assert (batch["items"], batch["tokens"]) == (1, 7)
