"""Retrieval measured: the first line of a text, such as a title, must find the rest of it among those of all texts.

Recall@k is the share of the relevant documents among the first k, nDCG@k that of Järvelin and Kekäläinen (2002) with
linear gains, as in scikit-learn and trec_eval, and MRR the mean of 1 / rank of the first relevant document. Among equal
scores the relevant documents are ranked last, so a model that scores all alike gets no credit.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from biomamba_jax.config.prepare import TextFields
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.tasks.documents import read_documents
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap
from biomamba_jax.tasks.vectors import normalized

CUTOFFS = (1, 10, 100)
_QUERIES = 256
"""Queries whose scores are in memory at a time."""
_SAMPLE_SEED = 0

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors [texts D]."""
Score = Callable[[slice], np.ndarray]
"""Slice of the queries -> score of each document for each of them, [queries, documents]."""


class Pair(NamedTuple):
    """A query and the document that it must find."""

    query: str
    """First line of a text."""
    document: str
    """The rest of it."""


def read_pairs(paths: Iterable[str], split: str, fields: TextFields, left_out: Counter[str]) -> list[Pair]:
    """Return the pairs of texts that have a first line and more; others are counted in `left_out`.

    Raises:
      UserError: a source cannot be read, or there is no such text.
    """
    pairs = []
    for document in read_documents(paths, split, left_out, fields):
        first, _, rest = document.text.partition("\n")
        if first.strip() and rest.strip():
            pairs.append(Pair(first, rest))
        else:
            left_out["of one line"] += 1
    if not pairs:
        raise UserError(f"{', '.join(paths)}: no text has a title or first line and more; name it with --title")
    return pairs


def sample(pairs: Sequence[Pair], number: int | None) -> list[Pair]:
    """Return a random sample of pairs in their order, always the same one."""
    chosen = np.random.default_rng(_SAMPLE_SEED).permutation(len(pairs))[:number]
    return [pairs[index] for index in sorted(chosen.tolist())]


def query_measures(scores: np.ndarray, relevance: np.ndarray) -> dict[str, np.ndarray]:
    """Return the measures of each query, float64 [queries] by name.

    Args:
      scores: of each document for each query, [queries, documents]; a higher one ranks first.
      relevance: of each document to each query, at least 0, [queries, documents]; each query has a relevant one.
    """
    order = np.lexsort((relevance, -scores))  # the last key comes first
    ranked = np.take_along_axis(relevance, order, -1).astype(np.float64)
    ideal = -np.sort(-relevance.astype(np.float64), -1)
    discounts = 1 / np.log2(np.arange(2, ranked.shape[1] + 2))
    found = {f"recall_at_{k}": (ranked[:, :k] > 0).sum(-1) / (ranked > 0).sum(-1) for k in CUTOFFS}
    found["ndcg_at_10"] = ranked[:, :10] @ discounts[:10] / (ideal[:, :10] @ discounts[:10])
    found["mrr"] = 1 / (1 + (ranked > 0).argmax(-1))
    return found


def measure(pairs: Sequence[Pair], score: Score, resampling: Resampling) -> dict[str, Estimate]:
    """Return the mean of each measure over all queries, with its bootstrap interval.

    Args:
      pairs: queries and documents; documents of equal queries are all relevant.
      score: of a model.
      resampling: of the intervals.
    """
    parts = [query_measures(scores, relevant) for scores, relevant in _scored(pairs, score)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: bootstrap(np.mean, values, resampling=resampling) for name, values in found.items()}


def _scored(pairs: Sequence[Pair], score: Score) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield scores and relevance, bool, of all documents [queries, documents] for a few queries at a time."""
    number: dict[str, int] = {}
    queries = np.array([number.setdefault(pair.query, len(number)) for pair in pairs])
    for start in range(0, len(pairs), _QUERIES):
        block = slice(start, start + _QUERIES)
        yield score(block), queries[block, None] == queries


def by_cosine(pairs: Sequence[Pair], encode: Encode) -> Score:
    """Return the `score` of a model: the cosine of the embeddings of query and document."""
    queries, documents = (normalized(encode(texts)) for texts in map(list, zip(*pairs, strict=True)))
    return lambda block: queries[block] @ documents.T


def by_words(pairs: Sequence[Pair]) -> Score:
    """Return the `score` of BM25 (Robertson and Zaragoza 2009) as Lucene computes it; needs the [search] extra."""
    bm25s = extra("search", "bm25s", "bm25s is needed")
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    tokens = partial(bm25s.tokenize, stopwords="en", return_ids=False, show_progress=False)
    index = bm25s.BM25()
    index.index(tokens([pair.document for pair in pairs]), show_progress=False)
    return lambda block: np.stack([index.get_scores(each) for each in tokens([pair.query for pair in pairs[block]])])


def hard_negatives(pairs: Sequence[Pair], number: int) -> list[list[int]]:
    """Return for each pair the indices of the `number` documents of other queries that BM25 ranks first for its own."""
    if not number:
        return [[]] * len(pairs)
    found = []
    for scores, relevant in _scored(pairs, by_words(pairs)):
        ranked = np.where(relevant, -np.inf, scores)
        found += np.argsort(-ranked, -1, kind="stable")[:, :number].tolist()
    return found
