"""Training: text to tokens to batches, the engine, the loop, checkpoints. Brings model and memory together."""
