"""The formulas against independent ones: plain cross-entropy, and DPO written out by hand."""

import math

import torch
import torch.nn.functional as F

from qilin_med.model import losses
from qilin_med.model.losses import preference_losses, sequence_log_probs, token_losses


def head_and_hidden(positions: int, vocabulary: int = 300, width: int = 16):
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    return head, torch.randn(positions, width, requires_grad=True), torch.randint(0, vocabulary, (positions,))


def test_chunked_loss_and_gradients_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", 1)  # the smallest chunk, 64 positions: 4 chunks
    head, hidden, targets = head_and_hidden(positions=200)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(plain, [hidden, head.weight])
    for reduction in ("sum", "none"):
        chunked = token_losses(hidden, head, targets, reduction).sum()
        torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-4)
        for found, expected in zip(torch.autograd.grad(chunked, [hidden, head.weight]), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sums_in_bf16_are_not_rounded_to_bf16():
    head, hidden, targets = head_and_hidden(positions=3000)
    exact = token_losses(hidden, head, targets, "sum").item()
    in_bf16 = token_losses(hidden.bfloat16(), head.bfloat16(), targets, "sum")
    assert in_bf16.dtype == torch.float32
    assert math.isclose(in_bf16.item(), exact, rel_tol=5e-4)  # the spacing of bf16 numbers there is 4e-3 of them


def test_no_targets_give_zero_and_still_a_backward_pass():
    head, hidden, _ = head_and_hidden(positions=1)
    nothing = hidden[:0]
    loss = token_losses(nothing, head, torch.zeros(0, dtype=torch.long), "sum")
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().sum() == 0


def test_sequence_log_probs_sum_the_scored_tokens_alone():
    head, hidden, _ = head_and_hidden(positions=8)
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7]])
    owners = torch.tensor([[2, 2, 2, 2], [1, 1, 0, 0]])  # the second row holds two sequences
    log_probs = F.log_softmax(head(hidden.view(2, 4, -1)), dim=-1)
    by_hand = log_probs[0, 0, 5] + log_probs[0, 1, 6]  # position t predicts token t + 1
    found = sequence_log_probs(hidden.view(2, 4, -1), head, labels, owners, 3)
    torch.testing.assert_close(found, torch.stack([log_probs[1, 2, 7], torch.zeros(()), by_hand]))


def test_dpo_by_hand():
    chosen, rejected = torch.tensor([-10.0, -3.0], requires_grad=True), torch.tensor([-12.0, -3.0], requires_grad=True)
    ref_chosen, ref_rejected, beta = torch.tensor([-11.0, -3.0]), torch.tensor([-11.5, -3.0]), 0.5
    loss, chosen_reward, rejected_reward = preference_losses(chosen, rejected, ref_chosen, ref_rejected, beta)
    # 0.5 * (-10 + 11) - 0.5 * (-12 + 11.5) = 0.75, and 0 for the second pair
    assert math.isclose(loss[0].item(), math.log(1 + math.exp(-0.75)), rel_tol=1e-6)
    assert math.isclose(loss[1].item(), math.log(2), rel_tol=1e-6)
    assert (chosen_reward[0].item(), rejected_reward[0].item()) == (0.5, -0.25)
    loss.sum().backward()
    # d/dx -log sigmoid(x) = -sigmoid(-x), times beta
    assert math.isclose(chosen.grad[0].item(), -0.5 / (1 + math.exp(0.75)), rel_tol=1e-6)
    assert math.isclose(rejected.grad[1].item(), 0.25, rel_tol=1e-6)
