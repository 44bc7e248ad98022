"""What a model is worth: held-out losses, exams, consultations; scores, and how sure they are."""
