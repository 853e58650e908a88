"""`protocol: paper`: the figures as the published BioMamba code computes them, weaknesses included.

To set our figures beside the published ones, and only for that. After LeoYML/BioMamba at e61db22:

* Perplexity is exp of the mean of batch means of 16 rows: a batch of short documents weighs as much as one of long
  ones. Rows are cut at 1,024 tokens and the rest is dropped; there is no start symbol, so the first token is not
  predicted, and no end. General text is one stream cut into full rows, at most 1,000 of them.
* PubMedQA is 200 random questions of the 1,000, official test questions among them. An answer's score is the first
  token of its likeliest spelling. When the best two are close, the answer is maybe; how close is chosen on these same
  200 questions.
* BioASQ is its yes/no questions, answered in eight greedy tokens and read leniently; files are pooled.

The prompts are those of the config, not the published ones.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.tasks import measures, pubmedqa
from biomamba_jax.tasks.answers import Prediction
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.perplexity import exp
from biomamba_jax.tasks.question_answering import Batches, TaskResult, classification_measures
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite
from biomamba_jax.tasks.statistics import Resampling

ROW_TOKENS = 1024
BATCH_ROWS = 16
MOST_CHUNKS = 1000
CONTEXT_CHARACTERS = 2400
NEW_TOKENS = 8
MARGINS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
MAYBES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)


def domain_perplexity(
    scorer: Scorer, documents: Sequence[Document], layout: Literal["documents", "chunks"]
) -> dict[str, float]:
    """The published figure of a domain.

    Returns:
      {"cross_entropy": mean of batch means in nats, "perplexity", "rows", "seconds"}.
    """
    start = time.perf_counter()
    ids = scorer.encode([document.text for document in documents])
    if layout == "chunks":
        stream = [token for row in ids for token in row]
        ids = [stream[i : i + ROW_TOKENS] for i in range(0, len(stream) - ROW_TOKENS, ROW_TOKENS)][:MOST_CHUNKS]
        ids = ids or [stream[:ROW_TOKENS]]
    rows = [row[:ROW_TOKENS] for row in ids]
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for index, values in scorer.rows(rows):
        nats[index], tokens[index] = values.sum(), len(values)
    check_finite(scorer, nats)
    cross_entropy = mean_of_batch_means(nats, tokens)
    seconds = time.perf_counter() - start
    return {"cross_entropy": cross_entropy, "perplexity": exp(cross_entropy), "rows": len(rows), "seconds": seconds}


def mean_of_batch_means(nats: np.ndarray, tokens: np.ndarray, batch: int = BATCH_ROWS) -> float:
    """The mean over batches of each batch's nats per token: not the nats per token of the text."""
    starts = range(0, len(nats), batch)
    of_batch = [(nats[i : i + batch].sum(), tokens[i : i + batch].sum()) for i in starts]
    return float(np.mean([total / count for total, count in of_batch if count]))


def answer_pubmedqa(
    scorer: Scorer, config: PubMedQAConfig, questions: Sequence[pubmedqa.Question], resampling: Resampling
) -> TaskResult:
    """Answers the published subset of all `questions`."""
    start = time.perf_counter()
    subset = pubmedqa.random_test(questions)
    labels = list(config.answers)
    spellings = [spelling for label in labels for spelling in _spellings(label)]
    requests = []
    for question in subset:
        sections = [f"{label}: {text}" if label else text for label, text in question.contexts]
        context = _cut("\n\n".join(sections))
        prompt = config.prompt.format(question=question.question, context=context)
        requests.append(Request(prompt, tuple(spellings)))
    found = scorer.continuations(requests)
    check_finite(scorer, [value for row in found for c in row for value in c.logprobs])
    first = [[c.logprobs[0] if c.logprobs else -math.inf for c in row] for row in found]
    scores = np.array(first).reshape(len(subset), len(labels), -1).max(-1)
    restricted = np.exp(scores - scores.max(-1, keepdims=True))
    restricted /= restricted.sum(-1, keepdims=True)
    truth = [question.answer for question in subset]
    tried = {
        (margin, maybe): [_with_margin(row, labels, margin, maybe) for row in restricted]
        for margin, maybe in itertools.product(MARGINS, MAYBES)
    }
    best = max(tried, key=lambda key: measures.classification(truth, tried[key]).accuracy)  # of equal ones, the first
    predictions = [
        Prediction(q.key, q.answer, answer, q.answer == answer, dict(zip(labels, row, strict=True)))
        for q, answer, row in zip(subset, tried[best], scores.tolist(), strict=True)
    ]
    details: dict[str, Any] = {
        "thresholds": {"margin": best[0], "maybe": best[1], "chosen_by": "accuracy on these same questions"},
        "confusion": measures.classification(truth, tried[best]).confusion,
    }
    return TaskResult(
        classification_measures(truth, tried[best], resampling),
        predictions,
        len(subset),
        time.perf_counter() - start,
        len(subset),
        details,
    )


def _spellings(label: str) -> tuple[str, ...]:
    return label, label.capitalize(), f" {label}", f" {label.capitalize()}"


def _cut(context: str) -> str:
    return context if len(context) <= CONTEXT_CHARACTERS else context[:CONTEXT_CHARACTERS] + "..."


def _with_margin(probabilities: np.ndarray, labels: Sequence[str], margin: float, maybe: float) -> str:
    """The likeliest label, or maybe where the best two are closer than `margin` and maybe has more than `maybe`."""
    order = np.argsort(-probabilities, kind="stable")
    close = probabilities[order[0]] - probabilities[order[1]] < margin
    return "maybe" if close and probabilities[labels.index("maybe")] > maybe else labels[order[0]]


def bioasq_majority(batches: Batches, resampling: Resampling) -> TaskResult:
    """Always yes."""
    truth = [q.golden[0][0] for questions in batches.values() for q in questions if q.kind == "yesno"]
    found = classification_measures(truth, ["yes"] * len(truth), resampling) if truth else {}
    return TaskResult(found, [], len(truth), 0.0, 0, {"answer": "yes"})


def answer_bioasq(scorer: Scorer, config: BioASQConfig, batches: Batches, resampling: Resampling) -> TaskResult:
    """Answers the yes/no questions of all files together."""
    start = time.perf_counter()
    chosen = [(path, q) for path, questions in batches.items() for q in questions if q.kind == "yesno"]
    prompts = [
        config.yesno_prompt.format(question=q.question, context=_cut("\n\n".join(s.strip() for s in q.snippets)))
        for _, q in chosen
    ]
    texts = scorer.generate(prompts, NEW_TOKENS, [])
    truth, read = [q.golden[0][0] for _, q in chosen], [read_leniently(text) for text in texts]
    predictions = [
        Prediction(q.key, t, r, t == r, text=text, batch=path)
        for (path, q), t, r, text in zip(chosen, truth, read, texts, strict=True)
    ]
    found = classification_measures(truth, read, resampling) if chosen else {}
    return TaskResult(found, predictions, len(chosen), time.perf_counter() - start, len(chosen))


def read_leniently(text: str) -> str:
    """The answer in generated text: yes, no or maybe that the first line begins with (as letters: "nothing" is no), or
    that is among its first five words; else its first word."""
    line = text.strip().partition("\n")[0].lower()
    for prefix in ("answer:", "the answer is", "a:", "(yes/no):", "yes/no:"):
        line = line.replace(prefix, "")
    line = line.lstrip(" \t:;,-.")
    if begins := next((label for label in ("yes", "no", "maybe") if line.startswith(label)), None):
        return begins
    words = line.split()
    for word in (word.strip(".,;:!?()[]{}\"' ") for word in words[:5]):
        if word in ("yes", "no", "maybe"):
            return word
        if word in ("uncertain", "unclear"):
            return "maybe"
    return words[0] if words else ""
