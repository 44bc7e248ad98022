"""Models and their tokenizers: load, adapt, merge; losses and batches."""
