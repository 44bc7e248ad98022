"""Models and their tokenizers: load, adapt, merge; losses and batches; Baichuan-7B converted."""
