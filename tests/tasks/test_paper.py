"""`protocol: paper` computes as the published code does; these are its weaknesses, kept on purpose."""

import math

import numpy as np
import pytest

from biomamba_jax.config import PubMedQAConfig
from biomamba_jax.tasks import paper
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.pubmedqa import Question, Split, random_test
from biomamba_jax.tasks.scoring import Continuation
from biomamba_jax.tasks.statistics import Resampling


class Counting:
    """A scorer whose tokens are characters, each of as many nats as its code modulo 7."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def rows(self, rows):
        self.seen = rows
        for index, row in enumerate(rows):
            yield index, np.array([token % 7 for token in row[1:]], float)

    def continuations(self, requests):
        logp = {"yes": -1.0, "no": -1.1, "maybe": -1.05}
        return [
            [
                Continuation((logp[text.strip().lower()] - (text != text.lower()), -9.0), False)
                for text in r.continuations
            ]
            for r in requests
        ]

    def generate(self, prompts, max_new_tokens, stop):
        return [" Nothing is known" for _ in prompts]


def test_perplexity_is_the_mean_of_means_of_16_rows():
    texts = ["ab" * 50] * 16 + ["zz"]
    nats = [sum(ord(letter) % 7 for letter in text[1:]) for text in texts]
    found = paper.domain_perplexity(Counting(), [Document("", text) for text in texts], "documents")
    means = [sum(nats[:16]) / (16 * 99), nats[16] / 1]
    assert found["cross_entropy"] == pytest.approx(np.mean(means))
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(means)))


def test_rows_end_after_1024_tokens_and_a_stream_drops_its_rest():
    scorer = Counting()
    paper.domain_perplexity(scorer, [Document("", "a" * 3000)], "documents")
    assert [len(row) for row in scorer.seen] == [1024]
    paper.domain_perplexity(scorer, [Document("", "a" * 1500), Document("", "b" * 1500)], "chunks")
    assert [len(row) for row in scorer.seen] == [1024, 1024]


def test_close_answers_become_maybe_where_that_pays_on_the_very_questions_that_are_reported():
    questions = [Question(str(i), "?", (("", "c"),), "maybe", "") for i in range(50)]
    split = Split([], random_test(questions))
    result = paper.answer_pubmedqa(Counting(), PubMedQAConfig(), split, Resampling(resamples=20))
    assert result.questions == 10 and result.measures["accuracy"].value == 1
    assert {prediction.prediction for prediction in result.predictions} == {"maybe"}


def test_an_answer_counts_by_its_first_token_behind_2400_characters_of_context():
    scorer, seen = Counting(), []
    logp = {"yes": (-1.0, -9.0), "no": (-2.0, 0.0), "maybe": (-99.0, 0.0)}

    def continuations(requests):
        seen.extend(request.context for request in requests)
        return [[Continuation(logp[text.strip().lower()], False) for text in r.continuations] for r in requests]

    scorer.continuations = continuations
    split = Split([], [Question("1", "?", (("", "x" * 3000),), "yes", "")])
    result = paper.answer_pubmedqa(scorer, PubMedQAConfig(prompt="{context}{question}"), split, Resampling())
    assert result.predictions[0].prediction == "yes" and result.predictions[0].scores["no"] == -2
    assert seen == ["x" * 2400 + "...?"]


def test_an_answer_that_is_ahead_of_maybe_is_not_maybe():
    scorer, logp = Counting(), {"yes": math.log(0.6), "no": math.log(0.05), "maybe": math.log(0.35)}
    scorer.continuations = lambda requests: [
        [Continuation((logp[text.strip().lower()],), False) for text in r.continuations] for r in requests
    ]
    split = Split([], [Question("1", "?", (), "yes", "")])
    result = paper.answer_pubmedqa(scorer, PubMedQAConfig(), split, Resampling())
    assert result.predictions[0].prediction == "yes"
    assert result.details["thresholds"]["margin"] == 0.05


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Yes.", "yes"),
        ("nothing", "no"),
        ("It is probably unclear", "maybe"),
        ("The answer is: no\nyes", "no"),
        ("Perhaps later", "perhaps"),
        ("", ""),
    ],
)
def test_answers_are_read_leniently(text, answer):
    assert paper.read_leniently(text) == answer
