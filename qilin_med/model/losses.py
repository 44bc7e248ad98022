"""The formulas: one pure function each. Logits over the whole vocabulary never exist for more than one chunk."""

import torch
import torch.nn.functional as F

_LOGITS_PER_CHUNK = 2**24  # 64 MiB in fp32: 262 positions of a 64k vocabulary


def token_losses(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Next-token negative log-likelihoods, in chunks of positions.

    hidden: [N, H] last hidden states; head: the output layer [V, H]; targets: [N] token ids.
    reduction "sum" -> [], "none" -> [N]. In fp32 this equals cross_entropy(head(hidden), targets).
    """
    if targets.numel() == 0:  # a batch of fillers: no loss, but every rank must reach the backward pass
        zero = hidden.sum() * 0.0 + head.weight.sum() * 0.0
        return zero if reduction == "sum" else zero.expand(0)
    if reduction == "sum" and head.weight.dtype != torch.float32:
        # The library rounds a sum to the weights' dtype, in bf16 by up to 0.4%; single losses average their rounding out.
        return token_losses(hidden, head, targets, "none").float().sum()
    chunk = max(64, _LOGITS_PER_CHUNK // head.weight.shape[0])
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    return F.linear_cross_entropy(
        hidden.to(head.weight.dtype), head.weight, targets,
        linear_bias=head.bias, reduction=reduction, options=options,
    )  # fmt: skip


def target_losses(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """`token_losses` at the target positions alone. hidden: [B, T, H]; labels: [B, T], unshifted, -100 elsewhere."""
    targets = labels[:, 1:]
    scored = targets != -100
    return token_losses(hidden[:, :-1][scored], head, targets[scored], reduction)


def sequence_log_probs(
    hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, sequence_index: torch.Tensor, sequences: int
) -> torch.Tensor:
    """log p(answer | prompt) of each sequence: [sequences]. sequence_index: [B, T], the sequence that a token belongs to;
    else arguments as for `target_losses`."""
    losses = target_losses(hidden, head, labels, reduction="none").float()
    owners = sequence_index[:, 1:][labels[:, 1:] != -100]
    return -torch.zeros(sequences, dtype=torch.float32, device=hidden.device).index_add(0, owners, losses)


def preference_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DPO (Rafailov et al. 2023, eq. 7; the paper's section 3.3). All arguments [B] sequence log-probabilities.

    Returns losses [B], and the rewards of chosen and rejected [B], beta * log(p / p_ref). With policy = reference every
    loss is ln 2 and every reward 0.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()
