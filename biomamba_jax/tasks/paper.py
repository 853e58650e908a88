"""`protocol: paper`: the figures as the published BioMamba code computes them, weaknesses included.

Only for comparison with published figures. After LeoYML/BioMamba at e61db22:

* Perplexity is exp of the mean of batch means of 16 rows: a batch of short documents weighs as much as one of long
  ones. Rows are truncated at 1,024 tokens; there is no start token, so the first token is not predicted, and no end.
  General text is one stream split into full rows, at most 1,000 of them.
* PubMedQA is 200 random questions of the 1,000, official test questions among them. An answer's score is the first
  token of its most likely spelling. When the best two are close, the answer is maybe; how close is tuned on these same
  200 questions.
* BioASQ is its yes/no questions, answered in eight greedy tokens and read leniently; files are pooled.

The prompts are those of the config, not the published ones.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.config.evaluate import YES_NO_MAYBE
from biomamba_jax.ops.cross_entropy import perplexity
from biomamba_jax.tasks import measures, pubmedqa
from biomamba_jax.tasks.answers import score_table
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.question_answering import Questions, TaskResult, labelled_result
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite
from biomamba_jax.tasks.statistics import Resampling

ROW_TOKENS = 1024
BATCH_ROWS = 16
MAX_CHUNKS = 1000
CONTEXT_CHARACTERS = 2400
NEW_TOKENS = 8
MARGINS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
MAYBES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)


def domain_perplexity(
    scorer: Scorer, documents: Sequence[Document], layout: Literal["documents", "chunks"]
) -> dict[str, float]:
    """Compute the published figure of a domain.

    Args:
      scorer: the model.
      documents: the domain's documents.
      layout: one document a row, or the whole text split into full rows.

    Returns:
      {"cross_entropy": mean of batch means in nats, "perplexity", "rows", "seconds"}.

    Raises:
      UserError: a log-likelihood is NaN or infinite.
    """
    start = time.perf_counter()
    ids = scorer.encode([document.text for document in documents])
    if layout == "chunks":
        stream = list(itertools.chain.from_iterable(ids))
        ids = [stream[i : i + ROW_TOKENS] for i in range(0, len(stream) - ROW_TOKENS, ROW_TOKENS)][:MAX_CHUNKS]
        ids = ids or [stream]
    rows = [row[:ROW_TOKENS] for row in ids]
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for index, values in scorer.rows(rows):
        nats[index], tokens[index] = values.sum(), len(values)
    check_finite(scorer, nats)
    cross_entropy = mean_of_batch_means(nats, tokens, BATCH_ROWS)
    figures = {"cross_entropy": cross_entropy, "perplexity": perplexity(cross_entropy), "rows": len(rows)}
    return figures | {"seconds": time.perf_counter() - start}


def mean_of_batch_means(nats: np.ndarray, tokens: np.ndarray, batch_rows: int) -> float:
    """Return the mean over batches of each batch's nats per token, which is not the nats per token of the text."""
    batches = [slice(start, start + batch_rows) for start in range(0, len(nats), batch_rows)]
    return float(np.mean([nats[batch].sum() / tokens[batch].sum() for batch in batches if tokens[batch].any()]))


def read_pubmedqa(config: PubMedQAConfig, _: int) -> tuple[pubmedqa.Split, dict[str, int]]:
    """Read the official development folds, and as test set the published random subset of all questions.

    Returns:
      The split, and the number of questions that are left out, by reason.

    Raises:
      UserError: a file that cannot be read, is damaged or is of another release.
    """
    assert config.path is not None
    questions = pubmedqa.read_questions(config.path)
    split = pubmedqa.official_split(questions, config.test_ids, config.path)._replace(
        test=pubmedqa.random_test(questions)
    )
    return split, {"not in the random subset": len(questions) - len(split.test)}


def answer_pubmedqa(
    scorer: Scorer, config: PubMedQAConfig, split: pubmedqa.Split, resampling: Resampling
) -> TaskResult:
    """Answer the test questions, with thresholds tuned on these same questions.

    Args:
      scorer: the model.
      config: prompt and answers.
      split: the questions of `read_pubmedqa`.
      resampling: of the intervals.

    Raises:
      UserError: a log-likelihood is NaN or infinite.
    """
    start, questions, labels = time.perf_counter(), split.test, list(config.answers)
    spellings = tuple(space + each for label in labels for space in ("", " ") for each in (label, label.capitalize()))
    requests = []
    for question in questions:
        requests.append(Request(question.prompt(config, _truncated("\n\n".join(question.paragraphs))), spellings))
    found = scorer.continuations(requests)
    check_finite(scorer, [value for row in found for c in row for value in c.logprobs])
    first = [[c.logprobs[0] if c.logprobs else -math.inf for c in row] for row in found]
    scores = np.array(first).reshape(len(questions), len(labels), -1).max(-1)
    restricted = np.exp(scores - scores.max(-1, keepdims=True))
    restricted /= restricted.sum(-1, keepdims=True)
    truth = [question.answer for question in questions]
    tried = {
        (margin, maybe): [_with_margin(row, labels, margin, maybe) for row in restricted]
        for margin, maybe in itertools.product(MARGINS, MAYBES)
    }
    best = max(tried, key=lambda key: measures.classification(truth, tried[key]).accuracy)  # the first of equal ones
    thresholds = {"margin": best[0], "maybe": best[1], "chosen_by": "accuracy on these same questions"}
    seconds, table, details = time.perf_counter() - start, score_table(labels, scores), {"thresholds": thresholds}
    return labelled_result(questions, tried[best], resampling, seconds, len(truth), details, scores=table)


def _truncated(context: str) -> str:
    return context if len(context) <= CONTEXT_CHARACTERS else context[:CONTEXT_CHARACTERS] + "..."


def _with_margin(probabilities: np.ndarray, labels: Sequence[str], margin: float, maybe: float) -> str:
    """Return the most likely label, or maybe if the best two differ by less than `margin` and maybe exceeds `maybe`."""
    order = np.argsort(-probabilities, kind="stable")
    close = probabilities[order[0]] - probabilities[order[1]] < margin
    return "maybe" if close and probabilities[labels.index("maybe")] > maybe else labels[order[0]]


def bioasq_majority(questions: Questions, resampling: Resampling) -> TaskResult:
    """Return the result of always answering yes."""
    return labelled_result(questions, ["yes"] * len(questions), resampling, details={"answer": "yes"})


def answer_bioasq(
    scorer: Scorer, config: BioASQConfig, questions: Questions, development: Questions, resampling: Resampling
) -> TaskResult:
    """Answer the yes/no questions of all files together.

    Args:
      scorer: the model.
      config: the prompt.
      questions: yes/no questions of all files.
      development: not used: there are no thresholds.
      resampling: of the intervals.

    Raises:
      UserError: the model cannot generate.
    """
    start = time.perf_counter()
    contexts = [_truncated("\n\n".join(snippet.strip() for snippet in question.snippets)) for question in questions]
    prompts = [q.prompt(config, context) for q, context in zip(questions, contexts, strict=True)]
    texts = scorer.generate(prompts, NEW_TOKENS, [])
    read, files = [read_leniently(text) for text in texts], [question.batch for question in questions]
    seconds = time.perf_counter() - start
    return labelled_result(questions, read, resampling, seconds, len(questions), text=texts, batch=files)


def read_leniently(text: str) -> str:
    """Return the answer in generated text.

    That is: yes, no or maybe if the first line begins with it (as letters: "nothing" is no) or has it among its first
    five words; else the first word.
    """
    line = text.strip().partition("\n")[0].lower()
    for prefix in ("answer:", "the answer is", "a:", "(yes/no):", "yes/no:"):
        line = line.replace(prefix, "")
    line = line.lstrip(" \t:;,-.")
    words, read = line.split(), {"yes": "yes", "no": "no", "maybe": "maybe", "uncertain": "maybe", "unclear": "maybe"}
    begun = [label for label in YES_NO_MAYBE if line.startswith(label)]
    among = [read[word] for word in (word.strip(".,;:!?()[]{}\"' ") for word in words[:5]) if word in read]
    return next(iter([*begun, *among, *words]), "")
