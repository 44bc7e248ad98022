"""Qilin-Med: turn a general language model into a medical one in three stages."""
