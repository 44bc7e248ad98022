"""Passages for a question: the index and its search."""
