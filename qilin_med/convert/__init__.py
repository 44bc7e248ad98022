"""A published checkpoint that transformers cannot load by itself (Baichuan-7B) -> a Llama folder, once."""
