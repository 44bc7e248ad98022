"""Raw published files -> training sets -> cached training rows."""
