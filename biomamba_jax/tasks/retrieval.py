"""Retrieval measured: the first line of a text, such as a title, must find the rest of it among those of all texts.

Recall@k is the share of the relevant documents among the first k, nDCG@k that of Järvelin and Kekäläinen (2002) with
linear gains, as in scikit-learn and trec_eval, and MRR the mean of 1 / rank of the first relevant document. Among equal
scores the relevant documents are ranked last, so a model that scores all alike gets no credit.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from biomamba_jax.config.prepare import TextFields
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.documents import read_documents
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap
from biomamba_jax.tasks.vectors import library, normalized

CUTOFFS = (1, 10, 100)
_QUERIES = 256
"""Queries whose scores are in memory at a time."""
_SAMPLE_SEED = 0

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors [texts D]."""


@dataclass(frozen=True)
class Pair:
    """A query and the document that it must find."""

    key: str
    """Id of the text."""
    query: str
    """Its first line."""
    document: str
    """The rest of it."""


def read_pairs(paths: Iterable[str], split: str, fields: TextFields, left_out: Counter[str]) -> list[Pair]:
    """Return the pairs of texts that have a first line and more; others are counted in `left_out`.

    Raises:
      UserError: a source cannot be read, or there is no such text.
    """
    pairs = []
    for path in paths:
        for document in read_documents(path, split, left_out, fields):
            first, _, rest = document.text.partition("\n")
            if first.strip() and rest.strip():
                pairs.append(Pair(document.key, first, rest))
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


def measure(pairs: Sequence[Pair], score: Callable[[slice], np.ndarray], resampling: Resampling) -> dict[str, Estimate]:
    """Return the mean of each measure over all queries, with its bootstrap interval.

    Args:
      pairs: queries and documents; documents of equal queries are all relevant.
      score: returns the scores [queries, documents] of a slice of the queries.
      resampling: of the intervals.
    """
    queries = _numbered(pairs)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(pairs), _QUERIES):
        block = slice(start, start + _QUERIES)
        for name, values in query_measures(score(block), queries[block, None] == queries).items():
            parts.setdefault(name, []).append(values)
    return {name: bootstrap(np.mean, np.concatenate(each), resampling=resampling) for name, each in parts.items()}


def _numbered(pairs: Sequence[Pair]) -> np.ndarray:
    """Return a number for each query, integers [pairs]; equal queries have the same one."""
    number = {query: index for index, query in enumerate(dict.fromkeys(pair.query for pair in pairs))}
    return np.array([number[pair.query] for pair in pairs])


def by_cosine(pairs: Sequence[Pair], encode: Encode) -> Callable[[slice], np.ndarray]:
    """Return the `score` of a model: the cosine of the embeddings of query and document."""
    queries, documents = (
        normalized(encode(texts)) for texts in ([pair.query for pair in pairs], [pair.document for pair in pairs])
    )
    return lambda block: queries[block] @ documents.T


class Lexical:
    """BM25 (Robertson and Zaragoza 2009) over documents, as Lucene computes it; needs the [search] extra.

    Args:
      documents: texts to search.
    """

    def __init__(self, documents: Sequence[str]):
        self._bm25s = library("bm25s", "search")
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens(documents), show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        return self._bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Return the score of each document, float32 [queries, documents]."""
        return np.stack([self._index.get_scores(tokens) for tokens in self._tokens(queries)])


def by_words(pairs: Sequence[Pair]) -> Callable[[slice], np.ndarray]:
    """Return the `score` of BM25."""
    lexical = Lexical([pair.document for pair in pairs])
    return lambda block: lexical.scores([pair.query for pair in pairs[block]])


def hard_negatives(pairs: Sequence[Pair], number: int) -> list[list[int]]:
    """Return for each pair the indices of the `number` documents of other queries that BM25 ranks first for its own."""
    if not number:
        return [[]] * len(pairs)
    lexical, queries, found = Lexical([pair.document for pair in pairs]), _numbered(pairs), []
    for start in range(0, len(pairs), _QUERIES):
        block = slice(start, start + _QUERIES)
        scores = lexical.scores([pair.query for pair in pairs[block]])
        scores[queries[block, None] == queries] = -np.inf
        found += np.argsort(-scores, -1, kind="stable")[:, :number].tolist()
    return found
