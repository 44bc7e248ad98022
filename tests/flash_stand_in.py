"""FlashAttention's two functions, exact and slow on a CPU, in the place where transformers loads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """[B, T, heads, D]; plain (causal) attention of whole rows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(
        1, 2
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """[tokens, heads, D]; each sequence between two cumulative lengths by itself."""
    assert isinstance(max_seqlen_q, int), "a tensor makes every layer wait for the device"
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(q) == cu_seqlens_k[-1]
    assert max_seqlen_q == cu_seqlens_q.diff().max() == max_seqlen_k
    ends = cu_seqlens_q.tolist()
    parts = [slice(start, end) for start, end in pairwise(ends)]
    done = (
        flash_attn_func(*(x[None, part] for x in (q, k, v)), softmax_scale=softmax_scale, causal=causal)[0]
        for part in parts
    )
    return torch.cat(list(done))


@contextmanager
def flash_on_cpu(model: torch.nn.Module) -> Iterator[None]:
    """`model` computes its attention as under "flash_attention_2"."""
    names = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
             "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")  # fmt: skip
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    stand_ins = ("flash_attention_2", flash_attn_func, flash_attn_varlen_func, None, None, None, process, None)
    before = {name: getattr(flash, name, None) for name in names}
    attention = model.config._attn_implementation
    vars(flash).update(zip(names, stand_ins, strict=True))
    model.config._attn_implementation = "flash_attention_2"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        vars(flash).update(before)
