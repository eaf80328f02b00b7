"""Long-term memories for models that exist: transformers models with our banks, in the manner of a recipe (README.md)."""
