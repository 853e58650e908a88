"""Text to batches: NLM XML, tokenizers, shards, packing and iterators; never imports JAX, for lean worker processes."""
