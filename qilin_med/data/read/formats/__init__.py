"""The raw formats: each reader yields records."""
