"""Small corpora for the tests of preparing text, and what was made of them."""

import dataclasses
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import build_shards
from biomamba_jax.data.shards import Document, Manifest, ShardReader, SplitInfo, join_shards, write_documents
from biomamba_jax.data.tokenizer import load_tokenizer

WORDS = [
    "tumour",
    "cells",
    "grew in mice",
    "inhibited by",
    "the drug",
    "at 25 mg",
    "per kg",
    "p53 expression",
    "rose",
    "3.5 fold",
]
DEFAULTS = PrepareConfig()
SMALL = PrepareConfig(validation_fraction=0.1, test_fraction=0.2, train_tokenizer=300)


def make_shards(
    inputs: Sequence[str],
    output: Path,
    tokenizer: str | os.PathLike[str] | None = None,
    settings: PrepareConfig = DEFAULTS,
    **changes,
) -> Manifest:
    """`build_shards` of some files, with a tokenizer file or the one that the settings train."""
    given = None if tokenizer is None else str(tokenizer)
    changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
    return build_shards(
        dataclasses.replace(settings, input=list(inputs), output=str(output), tokenizer=given, **changes)
    )


def write_split(folder: Path, documents: Sequence[Sequence[int]], per_shard: int, **options) -> SplitInfo:
    """Write token lists as a split of several shards; document i has PMID 1000 + i, source i % 2 and 10 * i bytes."""
    parts, infos = [], []
    for start in range(0, len(documents), per_shard):
        parts.append(folder.with_name(f"part-{start}"))
        own = enumerate(documents[start : start + per_shard], start)
        stored = (Document(np.array(ids), 1000 + i, None, i % 2, 10 * i) for i, ids in own)
        infos.append(write_documents(parts[-1], stored, **options))
    join_shards(parts, folder)
    for part in parts:
        shutil.rmtree(part)
    return SplitInfo.total(infos)


def abstract(seed: object) -> str:
    text = " ".join(random.Random(str(seed)).choices(WORDS, k=60))
    return f"<AbstractText>{text}.</AbstractText>"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(folder: Path) -> dict[int | None, str]:
    """PMID to text, read back from the shards of all splits."""
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    found = {}
    for split in manifest.splits:
        reader = ShardReader(folder / split)
        for i in range(len(reader)):
            assert reader[i].ids[-1] == tokenizer.eos_id
            text = tokenizer.decode(reader[i].ids[:-1])
            assert len(text.encode()) == reader[i].num_bytes
            found[reader[i].pmid] = text
    return found
