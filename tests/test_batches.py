"""Which examples train together, how they are dealt and laid out, and that no layout changes what a sequence sees."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flash_stand_in import flash_on_cpu
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from qilin_med.errors import UserError
from qilin_med.model.batches import Collator, StepSampler, deal, lay_out, model_inputs
from qilin_med.model.losses import check_isolation
from qilin_med.prompt.template import IGNORED

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_ = IGNORED


def test_deal_gives_the_largest_first_to_the_emptiest():
    # 7, 6, 5 open the groups; 4 joins 5; 3 joins 6; 2 joins 7 and makes all 9
    assert deal([2, 3, 4, 5, 6, 7], 3) == [[5, 0], [4, 1], [3, 2]]
    # at most two each: the ones would all go to the second group
    assert deal([9, 1, 1, 1], 2, most=2) == [[0, 3], [1, 2]]
    assert deal([], 2) == [[], []]


def sampler(costs, rank=0, ranks=1, batch=4, accumulation=1, packing=True, seed=3) -> StepSampler:
    return StepSampler(np.asarray(costs), batch, accumulation, ranks, rank, seed, packing)


def steps_of(costs, ranks, batch, accumulation, packing) -> list[list[int]]:
    """The rows of each optimizer step, over all ranks."""
    every = [list(sampler(costs, rank, ranks, batch, accumulation, packing)) for rank in range(ranks)]
    assert {len(batches) for batches in every} == {len(sampler(costs, 0, ranks, batch, accumulation, packing))}
    cut = range(0, len(every[0]), accumulation)
    return [sorted(i for batches in every for b in batches[at : at + accumulation] for i in b) for at in cut]


def test_a_step_is_the_same_draw_however_it_is_computed():
    costs = 1 + np.arange(29) ** 2 % 17
    expected = steps_of(costs, 1, 8, 1, True)
    assert [len(step) for step in expected] == [8, 8, 8, 5]
    assert sorted(i for step in expected for i in step) == list(range(29))
    ways = [(1, 1, 8), (2, 1, 4), (2, 4, 1), (4, 2, 1), (8, 1, 1)]
    for packing in (True, False):
        assert all(steps_of(costs, *way, packing) == expected for way in ways)
    other = sampler(costs, batch=8)
    other.set_epoch(1)
    assert sorted(i for batch in other for i in batch) == list(range(29))
    assert [sorted(batch) for batch in other] != expected


def test_unpacked_micro_batches_never_exceed_their_size():
    costs = np.random.default_rng(0).integers(1, 500, 97)
    for rank in range(2):
        assert max(map(len, sampler(costs, rank, 2, batch=4, accumulation=3, packing=False))) == 4


def lengths_of_real_rows() -> np.ndarray:
    """Characters of real conversations, cut as tokens are: 256 of a question, 256 of an answer."""
    file = SHARED / "sft_general" / "trainchinese_1m_2K.jsonl"
    files = [file] if file.exists() else sorted((SHARED / "sft_general").glob("*.jsonl"))
    if not files:
        pytest.skip("the real rows of shared/data are not here")
    rows = [json.loads(line) for f in files for line in f.open(encoding="utf-8")]
    rows = [row for row in rows if "output" in row and isinstance(row.get("instruction"), str)]
    return np.array([min(len(row["instruction"]), 256) + min(len(row["output"]), 256) for row in rows])


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_get_equal_tokens_of_real_rows(packing):
    costs = lengths_of_real_rows()
    ranks = [list(sampler(costs, rank, 8, batch=64, packing=packing)) for rank in range(8)]
    for step in range(len(costs) // 512):
        tokens = [costs[batches[step]].sum() for batches in ranks]
        assert min(tokens) > 0.95 * max(tokens)


def test_a_token_weighs_the_same_in_short_and_long_rows():
    costs = lengths_of_real_rows()
    weights = np.zeros(len(costs))  # the weight of each of a row's tokens: one over the tokens of its step
    for seed in range(40):
        for step in sampler(costs, batch=64, seed=seed):
            weights[step] += 1 / costs[step].sum()
    order = np.argsort(costs)
    tenth = len(costs) // 10
    assert 0.95 < weights[order[:tenth]].mean() / weights[order[-tenth:]].mean() < 1.05


# -------------------------------------------------------------------------------------------------------- layout


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits_of_each(model, sequences, rows, varlen) -> list[torch.Tensor]:
    batch = lay_out([(ids, ids) for ids in sequences], rows, varlen)
    with torch.no_grad():
        logits = model(**model_inputs(batch), use_cache=False).logits
    order = [index for row in rows for index in row]
    starts = {}
    for i, row in enumerate(rows):
        start = 0
        for index in row:
            starts[index] = (i, start)
            start += len(sequences[index])
    return [logits[starts[i][0], starts[i][1] : starts[i][1] + len(sequences[i])] for i in sorted(order)]


DOCUMENTS = [[5, 6, 7, 8, 2], [9, 10, 2], [11, 12, 13, 14, 15, 2], [3, 4]]


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[2, 0], [3, 1]], [[0], [1], [2], [3]]])
def test_a_sequence_sees_itself_alone_in_every_layout(varlen, rows):
    model = tiny_model()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in DOCUMENTS]
    with flash_on_cpu(model) if varlen else torch.no_grad():
        found = logits_of_each(model, DOCUMENTS, rows, varlen)
    for logits, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_flash_attention_without_cumulative_lengths_would_see_neighbours():
    """Why they are handed over: the library reads packed rows from position_ids at batch size 1 alone."""
    model = tiny_model()
    batch = lay_out([(ids, ids) for ids in DOCUMENTS], [[0, 1], [2, 3]])
    with torch.no_grad():
        apart = model(**model_inputs(batch), use_cache=False).logits
        with flash_on_cpu(model):
            mixed = model(**model_inputs(batch), use_cache=False).logits
    assert (apart - mixed)[0, 5:].abs().max() > 0.1
    with flash_on_cpu(model):
        check_isolation(model, varlen=True)


def test_a_model_that_cannot_keep_neighbours_apart_is_refused():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))  # ALiBi: no position_ids
    with pytest.raises(UserError, match=r"bloom with model.attention .* lets packed sequences see each other"):
        check_isolation(bloom, varlen=False)
    model = tiny_model()
    check_isolation(model, varlen=False)
    assert not model.training


def test_the_mask_is_dense_only_where_rows_hold_several_sequences():
    single = lay_out([([5, 6, 7], [5, 6, 7]), ([8, 9], [8, 9])], [[0], [1]])
    assert "position_ids" not in single
    assert single["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    packed = lay_out([([5, 6, 7], [_, _, 7]), ([8, 9], [8, 9])], [[1, 0]])
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert packed["labels"].tolist() == [[_, 9, _, _, 7]]
    assert packed["sequence_index"].tolist() == [[1, 1, 0, 0, 0]]
    flash = lay_out([([5, 6, 7], [5, 6, 7]), ([8, 9], [8, 9])], [[0], [1]], varlen=True)
    assert flash["cu_seq_lens_q"].tolist() == [0, 3, 5, 6]  # the last is padding
    assert (flash["max_length_q"], flash["cu_seq_lens_q"].dtype) == (3, torch.int32)


def test_rows_are_packed_where_that_computes_less():
    collator = Collator(packing=True, varlen=False, hidden_size=4096)
    assert collator.group([512, 256, 256, 300, 212]) == [[0], [3, 4], [1, 2]]  # no padding at all
    assert collator.group([]) == [[]]
    assert Collator(True, True, 4096).group([3, 2]) == [[0, 1]]
    assert Collator(False, True, 4096).group([3, 2]) == [[0], [1]]


def test_batches_of_tokens():
    collate = Collator(packing=False, varlen=False, hidden_size=32)
    batch = collate([
        {"input_ids": [5, 6, 2, 7, 2], "lengths": [3, 2], "index": 4},
        {"input_ids": [8, 9, 2], "labels": [_, _, 2], "index": 2},
    ])  # fmt: skip
    assert batch["labels"].tolist() == [[_, 6, 2, _, 2], [_, _, 2, _, _]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert (batch["items"], batch["tokens"], batch["rows"].tolist()) == (4, 8, [4, 2])
    empty = collate([])
    assert (empty["input_ids"].shape, empty["items"], empty["tokens"], len(empty["rows"])) == ((1, 2), 0, 0, 0)


def test_batches_of_pairs():
    collate = Collator(packing=False, varlen=False, hidden_size=32)
    batch = collate([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8], "index": 3}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 6, 8, 0]]
    assert batch["labels"].tolist() == [[_, _, 7, 2], [_, _, 8, _]]
    assert batch["sequence_index"].tolist()[1][:3] == [1, 1, 1]
    assert (batch["items"], batch["tokens"], batch["rows"].tolist()) == (1, 7, [3])
    assert (batch["samples"], batch["loss_tokens"]) == (1, 3)
    assert collate([])["items"] == 0
