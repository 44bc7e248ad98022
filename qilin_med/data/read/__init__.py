"""One reader of files, for raw sources and for training data."""
