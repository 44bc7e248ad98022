"""A trial before training: does the model's attention really keep packed sequences apart?

Whether it does depends on the architecture, the attention code and the library's version, and a model that lets neighbours
see each other trains on without a word. So each is asked, once, with the tensors that training will hand it.
"""

import torch

from qilin_med.errors import UserError
from qilin_med.model.batches import Layout, lay_out, model_inputs
from qilin_med.model.load import forward_through_head

_LENGTH = 8  # tokens of each of two sequences


@torch.no_grad()
def check_isolation(model: torch.nn.Module, layout: Layout) -> None:
    """UserError if a sequence's hidden states depend on its neighbour in the same row."""
    was_training = model.training
    model.eval()
    before, after = (_second_sequence(model, layout, first_token) for first_token in (5, 6))
    model.train(was_training)
    difference = ((before - after).abs().max() / before.abs().max()).item()
    if difference > 1e-3:
        attention = model.config._attn_implementation
        raise UserError(
            f"{model.config.model_type} with model.attention '{attention}' lets packed sequences see each other (hidden states"
            f" of one change by {difference:.1%} with its neighbour's tokens); set another model.attention, or sft.packing and"
            " dpo.packing (pretraining: isolate_documents) to false"
        )


def _second_sequence(model: torch.nn.Module, layout: Layout, first_token: int) -> torch.Tensor:
    """Hidden states [tokens, H] of the second of two sequences in a row, the first being made of other tokens."""
    texts = [range(first_token, first_token + _LENGTH), range(20, 20 + _LENGTH)]
    batch = lay_out([(text, text) for text in texts], [[0, 1]], layout.varlen)
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in model_inputs(batch).items()}
    hidden = forward_through_head(model, inputs, lambda hidden, _: hidden)
    return hidden[0, _LENGTH:].float()
