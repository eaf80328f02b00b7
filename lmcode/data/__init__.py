"""From text to batches: sources, the tokenizer, the corpus on disk, the streams that read it, and what is replayed."""
