"""`protocol: paper_v1` counts padding as the published code's first version does, next to the same rows' text."""

import math

import numpy as np
import pytest

from biomamba_jax.config import EvaluateConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import paper_v1
from biomamba_jax.tasks.documents import Document


class Letters:
    """A scorer whose tokens are letters, each of 2 nats, and padding of 7 nats."""

    padding_id = 0

    def encode(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def rows(self, rows):
        self.seen = rows
        for index, row in reversed(list(enumerate(rows))):
            yield index, np.array([2.0 if token else 7.0 for token in row[1:]])


def figures(*lengths):
    scorer = Letters()
    return scorer, paper_v1.domain_figures(scorer, [Document(str(i), "a" * length) for i, length in enumerate(lengths)])


def test_rows_are_texts_truncated_or_padded_to_512_tokens_and_their_first_is_not_predicted():
    scorer, found = figures(3, 600)
    assert scorer.seen == [[97] * 3 + [0] * 509, [97] * 512]
    assert found.padding == pytest.approx(509 / 1022)
    assert (found.text_cross_entropy, found.padding_cross_entropy) == (2, 7)
    assert found.cross_entropy == pytest.approx((513 * 2 + 509 * 7) / 1022)
    assert found.perplexity == pytest.approx(math.exp(found.cross_entropy))


def test_the_last_batch_weighs_as_much_as_one_of_32_rows():
    _, found = figures(*[512] * 32, 1)
    assert found.cross_entropy == pytest.approx((2 + 7) / 2)
    assert found.padding == pytest.approx(1 / 33)


def test_the_loss_at_another_share_of_padding_mixes_the_two():
    _, found = figures(100, 300)
    assert found.loss_at(found.padding) == pytest.approx(found.cross_entropy)
    assert found.loss_at(0) == 2 and found.loss_at(1) == 7


def test_learning_to_repeat_padding_lowers_perplexity_54_times_with_no_word_learnt():
    """4.70 nats on text, 7.97 on padding that the model then learns; half of it is padding."""
    general = paper_v1.PaddedFigures(0, 0, 0.5, 4.70, 7.97, 1, 0)
    adapted = paper_v1.PaddedFigures(0, 0, 0.5, 4.70, 0.0, 1, 0)
    assert math.exp(general.loss_at(0.5) - adapted.loss_at(0.5)) == pytest.approx(53.8, abs=0.1)


def test_the_protocol_is_of_text_alone():
    with pytest.raises(UserError, match=r"protocol = 'paper_v1': is of text domains alone"):
        EvaluateConfig(models={"m": "m"}, protocol="paper_v1", pubmedqa=PubMedQAConfig(path="x"))
