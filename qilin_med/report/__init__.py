"""The report of a run, and a card for every model."""
