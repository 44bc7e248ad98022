"""Random models that load and answer in a blink."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_model(folder: Path, tokenizer, seed: int, positions: int = 512) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
