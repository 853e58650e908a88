"""Text to batches: NLM XML, tokenizers, shards, packing and iterators. NumPy only: worker processes never load JAX."""
