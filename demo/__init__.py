"""The demo's invented world: what can be said about it (words.json), its facts, texts, exams, consultations and raw files."""
