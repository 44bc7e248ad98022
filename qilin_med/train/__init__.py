"""A stage: prepare, train on the ranks, merge, publish."""
