"""A model with its memory as a folder for other people: written whole or not at all, read without running code."""
