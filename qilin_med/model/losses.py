"""The formulas, one pure function each, and the forward pass that computes them in the output head.

Logits over the whole vocabulary never exist for more than one chunk of positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from qilin_med.errors import UserError
from qilin_med.model.batches import lay_out, model_inputs

_LOGITS_PER_CHUNK = 2**24  # 64 MiB in fp32: 262 positions of a 64k vocabulary
_TRIAL_LENGTH = 8  # tokens of each of two sequences


def token_losses(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Next-token negative log-likelihoods, in chunks of positions.

    hidden: [N, H] last hidden states; head: the output layer [V, H]; targets: [N] token ids.
    reduction "sum" -> [], "none" -> [N]. In fp32 this equals cross_entropy(head(hidden), targets).
    """
    if targets.numel() == 0:  # a batch of fillers: no loss, but every rank must reach the backward pass
        zero = hidden.sum() * 0.0 + head.weight.sum() * 0.0
        return zero if reduction == "sum" else zero.expand(0)
    if reduction == "sum" and head.weight.dtype != torch.float32:
        # The library rounds a sum to the weights' dtype, in bf16 by up to 0.4%. Over single losses, rounding averages out.
        return token_losses(hidden, head, targets, "none").float().sum()
    chunk = max(64, _LOGITS_PER_CHUNK // head.weight.shape[0])
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    return F.linear_cross_entropy(
        hidden.to(head.weight.dtype), head.weight, targets,
        linear_bias=head.bias, reduction=reduction, options=options,
    )  # fmt: skip


def target_losses(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """`token_losses` at the target positions only. hidden: [B, T, H]; labels: [B, T], unshifted, -100 elsewhere."""
    targets = labels[:, 1:]
    scored = targets != -100
    return token_losses(hidden[:, :-1][scored], head, targets[scored], reduction)


def sequence_log_probs(
    hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, sequence_index: torch.Tensor, sequences: int
) -> torch.Tensor:
    """log p(answer | prompt) of each sequence: [sequences]. sequence_index: [B, T], the sequence that a token belongs to;
    other arguments as for `target_losses`."""
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


# --------------------------------------------------------------------------------------------------- forward pass


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside DeepSpeed, DDP and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


HeadFunction = Callable[[torch.Tensor, torch.nn.Linear], torch.Tensor]


def forward_through_head(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], compute: HeadFunction
) -> torch.Tensor:
    """One forward pass in which the output head returns compute(hidden [B, T, H], head) instead of logits.

    The full logits never exist, and the head's weight is read inside the head's own call, where ZeRO-3 gathers it, in the
    backward pass too.
    """
    head = unwrap(model).get_output_embeddings()

    def compute_in_weights_dtype(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return compute(hidden, head)

    head.forward = compute_in_weights_dtype
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        del head.forward  # the class's own again


def pair_log_probs(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(answer | prompt) of the chosen and of the rejected answers of a batch of pairs: [pairs] each."""
    pairs = len(batch["rows"])
    score = partial(
        sequence_log_probs, labels=batch["labels"], sequence_index=batch["sequence_index"], sequences=2 * pairs
    )
    scores = forward_through_head(model, model_inputs(batch), score)
    return scores[:pairs], scores[pairs:]


@torch.no_grad()
def check_isolation(model: torch.nn.Module, varlen: bool) -> None:
    """A trial before training: UserError if a sequence's hidden states depend on its neighbour in the same row.

    Whether attention keeps packed sequences apart depends on the architecture, the attention implementation and the
    library's version, and a model that lets neighbours see each other would train on without a warning.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    seconds = []
    for first_token in (5, 6):  # the second of two sequences stays the same, the first changes
        texts = [range(start, start + _TRIAL_LENGTH) for start in (first_token, 20)]
        batch = lay_out([(text, text) for text in texts], [[0, 1]], varlen)
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in model_inputs(batch).items()}
        hidden = forward_through_head(model, inputs, lambda hidden, _: hidden)
        seconds.append(hidden[0, _TRIAL_LENGTH:].float())
    model.train(was_training)
    difference = ((seconds[0] - seconds[1]).abs().max() / seconds[0].abs().max()).item()
    if difference > 1e-3:
        attention = model.config._attn_implementation
        raise UserError(
            f"{model.config.model_type} with model.attention '{attention}' lets packed sequences see each other (hidden states"
            f" of one change by {difference:.1%} with its neighbour's tokens); set another model.attention, or sft.packing and"
            " dpo.packing (pretraining: isolate_documents) to false"
        )
