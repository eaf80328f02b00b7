"""Writing text with a model: what decoding means, sampling, and a step of its own for one token at a time."""
