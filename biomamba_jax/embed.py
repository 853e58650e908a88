"""Turn texts into vectors, search among them, train and compare models for it.

python -m biomamba_jax.embed --model DIR --input FILES... --output DIR [--index exact] [--pooling mean]
python -m biomamba_jax.embed search "beta blockers in heart failure" --index DIR
python -m biomamba_jax.embed train --init_from DIR --data.input SHARDS [--run_dir DIR]
python -m biomamba_jax.embed retrieval --models.NAME DIR --input SHARDS [--lexical]

Reads shards, PubMed's XML, JSON lines, tables, Parquet and text. A text of any length is read in rows of `chunk` tokens
with the recurrent state carried, in constant memory. The output folder holds parts that are each written whole; the
same command continues an interrupted run. `search` lists the texts of an index that are nearest to a query;
`train` trains contrastively on pairs such as titles and abstracts; `retrieval` measures how well models find the rest
of a text by its first line.
"""

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from biomamba_jax import folders, processor
from biomamba_jax.command_line import log_to_stderr, parse, run_command, run_subcommand
from biomamba_jax.config.embed import ContrastiveConfig, EmbedConfig, RetrievalConfig, SearchConfig
from biomamba_jax.errors import UserError

_AT_ONCE = 512
"""Texts whose tokens are in memory at a time."""
_PROBE = "Insulin lowers the glucose concentration of plasma."
"""Text whose embedding identifies a model."""
_FREE = ("output", "index", "batch_size", "chunk", "dtype", "model")
"""Settings that do not decide the embeddings; the model is identified by what it makes of `_PROBE`."""


def embed(config: EmbedConfig) -> None:
    """Embed the texts of `config` and print what was done.

    Raises:
      UserError: a model or text that cannot be read, or a folder that holds other embeddings.
    """
    import numpy as np

    from biomamba_jax import files
    from biomamba_jax.data.input_files import identity
    from biomamba_jax.data.records import batched
    from biomamba_jax.data.shards import MANIFEST_NAME
    from biomamba_jax.object_store import local_copy
    from biomamba_jax.tables import summary_table
    from biomamba_jax.tasks import vectors
    from biomamba_jax.tasks.documents import read_documents
    from biomamba_jax.tasks.model import load

    embedder = load(config.model, config.dtype).embedder(config)
    output, left_out, sizes = Path(config.output), Counter[str](), list[int]()
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    sources = [local_copy(path, config.split) for path in config.input]
    settings["input"] = [list(identity(path / MANIFEST_NAME if path.is_dir() else path)) for path in sources]

    documents = read_documents(config.input, config.split, left_out, config)
    start, new = time.perf_counter(), 0
    with folders.locked(output), files.naming_full_disks(output, "free space, then run the same command to continue"):
        folder = vectors.EmbeddingFolder(output, config.format)
        folder.start(config.model, settings, embedder([_PROBE])[0])
        embedder.tokens = 0
        for number, texts in enumerate(batched(documents, config.part_size)):
            sizes.append(len(texts))
            if not folder.has(number):
                found = [embedder([text.text for text in block]) for block in batched(texts, _AT_ONCE)]
                whole = vectors.normalized(np.concatenate(found)) if config.normalize else np.concatenate(found)
                folder.write(number, vectors.Part.of(texts, whole, config.precision))
                new += len(texts)
        if not sizes:
            raise UserError(f"{', '.join(config.input)}: no text to embed; give other files or another --split")
        folder.finish(sizes, dict(left_out))
        seconds = time.perf_counter() - start
        if config.index != "none":
            folder.build_index(len(sizes), config.index)
        folders.write_digests(output)
    rows = [("texts", f"{sum(sizes):,}"), ("of them embedded now", f"{new:,}")]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in sorted(left_out.items())]
    rows += [("tokens per second, compilation included", f"{embedder.tokens / seconds:,.0f}")] if new else []
    summary_table(os.fspath(output), ("", ""), rows)


def search(argv: Sequence[str], doc: str) -> None:
    """List the texts of an index that are nearest to a query, by the cosine of their embeddings."""
    config = parse(SearchConfig, argv, doc, positional="query")
    from biomamba_jax.config.embed import EmbeddingConfig
    from biomamba_jax.tables import Table, print_tables
    from biomamba_jax.tasks import vectors
    from biomamba_jax.tasks.model import load

    folder, about = vectors.EmbeddingFolder.open(Path(config.index))
    name = config.model or about["model"]
    embedder = load(name).embedder(EmbeddingConfig(pooling=about["settings"]["pooling"]))
    probe, query = embedder([_PROBE, config.query])
    if not vectors.same_vector(about["probe"], probe):
        raise UserError(f"{name}: is not the model that made {config.index}; give that one with --model")
    found = folder.search(query, config.k, about["parts"])
    rows = [(f"{score:.4f}", key, title) for score, key, title in found]
    print_tables([Table(("cosine", "id", "title"), rows, config.query, left=(1, 2))])


def train(argv: Sequence[str], doc: str) -> None:
    """Train a model so that a text's first line, such as a title, is near the rest of it (InfoNCE)."""
    log_to_stderr()
    config = parse(ContrastiveConfig, argv, doc)
    processor.keep_freed_memory()
    from biomamba_jax.parallel.distributed import exit_if_stopped, processes

    with processes(config) as first, folders.locked(config.run_dir) if first else nullcontext():
        from biomamba_jax.data.examples import EncodedExamples, held_out_share
        from biomamba_jax.interop import read_model
        from biomamba_jax.tasks import retrieval
        from biomamba_jax.train.contrastive import encode_pairs, train_embeddings
        from biomamba_jax.train.setup import with_execution_settings

        weights, data = read_model(config.init_from or ""), config.data
        tokenizer, left_out = weights.tokenizer(config.init_from), Counter[str]()
        pairs = retrieval.sample(retrieval.read_pairs(data.input, data.split, data, left_out), data.max_pairs)

        def encoded(chosen: Sequence[retrieval.Pair]) -> EncodedExamples:
            if len(chosen) <= data.hard_negatives:
                raise UserError(f"data.input: {len(pairs)} pairs are too few to train on and to hold out; give more")
            negatives = retrieval.hard_negatives(chosen, data.hard_negatives)
            texts = [pair.query for pair in chosen], [pair.document for pair in chosen]
            return encode_pairs(*texts, negatives, tokenizer, data.sequence_length)

        for reason, count in sorted(left_out.items()):
            print(f"left out: {count:,} {reason}")
        config = dataclasses.replace(config, model=with_execution_settings(weights.config, config.model))
        parts = held_out_share(pairs, data.development_fraction, lambda pair: pair.query)
        complete = train_embeddings(config, weights, *map(encoded, parts))
    exit_if_stopped(complete=complete)


def retrieval(argv: Sequence[str], doc: str) -> None:
    """Measure how well models find the rest of each text by its first line: recall, nDCG and MRR."""
    config = parse(RetrievalConfig, argv, doc)
    from biomamba_jax import files
    from biomamba_jax.interop.hub import local_folder
    from biomamba_jax.tables import Table, print_tables
    from biomamba_jax.tasks import retrieval as task
    from biomamba_jax.tasks.architectures import TRANSFORMERS_PREFIX
    from biomamba_jax.tasks.evaluation_report import estimates_row
    from biomamba_jax.tasks.model import load
    from biomamba_jax.tasks.pretrained import Encoder
    from biomamba_jax.tasks.statistics import Estimate, Resampling

    left_out, resampling = Counter[str](), Resampling(config.resamples, config.confidence)
    pairs = task.sample(task.read_pairs(config.input, config.split, config, left_out), config.max_documents)
    found, cut = dict[str, dict[str, Estimate]](), dict[str, str]()
    for name, path in config.models.items():
        if path.startswith(TRANSFORMERS_PREFIX):
            encode: Any = Encoder(name, local_folder(path.removeprefix(TRANSFORMERS_PREFIX)), config)
        else:
            encode = load(path, config.dtype).embedder(config)
        found[name] = task.measure(pairs, task.by_cosine(pairs, encode), resampling)
        if isinstance(encode, Encoder):
            cut[name] = f"{encode.cut:,} at {encode.limit:,} tokens"
    if config.lexical:
        found["BM25"] = task.measure(pairs, task.by_words(pairs), resampling)

    rows: list[Sequence[Any]] = [
        estimates_row(measure.replace("_", " "), [each[measure] for each in found.values()], "{:.3f}".format)
        for measure in next(iter(found.values()))
    ]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in sorted(left_out.items())]
    rows += [("queries and documents cut", *map(cut.get, found))] if cut else []
    print_tables([Table(("", *found), rows, f"{len(pairs):,} texts, each found by its first line")])
    if config.output:
        models = {name: {key: vars(value) for key, value in each.items()} for name, each in found.items()}
        report = {"texts": len(pairs), "left_out": dict(left_out), "cut": cut, "models": models}
        files.write_json(config.output, report)


SUBCOMMANDS = {"search": search, "train": train, "retrieval": retrieval}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not run_subcommand(SUBCOMMANDS, words, "python -m biomamba_jax.embed"):
        config = parse(EmbedConfig, words, __doc__)
        processor.keep_freed_memory()
        embed(config)


if __name__ == "__main__":
    run_command(main)
