"""Experiences: texts that are kept word for word, found again, and read by the model."""
