"""Small made-up shards for tests: documents of a Markov chain, so that there is something to learn."""

from pathlib import Path

import numpy as np

from biomamba_jax.data.shards import Document, Manifest, TokenizerInfo, write_documents

EOS = 0


def write_shards(folder: Path, *, documents: int = 200, vocab_size: int = 31, longest: int = 40, seed: int = 0) -> Path:
    """A folder of shards with a train and a validation split; a token is followed by one of three others."""
    random = np.random.default_rng(seed)
    following = random.integers(1, vocab_size, (vocab_size, 3))
    splits = {}
    for split, count in (("train", documents), ("validation", documents // 10)):
        chains = []
        for pmid in range(count):
            ids = [int(random.integers(1, vocab_size))]
            while len(ids) < random.integers(1, longest):
                ids.append(int(following[ids[-1], random.integers(3)]))
            chains.append(Document(np.array([*ids, EOS]), pmid + 1, 1, 0, 4 * len(ids)))
        splits[split] = write_documents(folder / split, chains)
    tokenizer = TokenizerInfo("made-up", "0" * 64, "none", vocab_size, EOS)
    Manifest(tokenizer, splits, filters={}, sources=[{"name": "made-up", "sha256": "0" * 64}], settings={}).save(folder)
    return folder
