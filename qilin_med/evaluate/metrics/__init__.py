"""Scores of generated texts and of exam answers, and how sure they are."""
