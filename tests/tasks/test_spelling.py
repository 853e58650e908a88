"""The share of a text that a tokenizer does not spell."""

import pytest

from biomamba_jax.tasks.spelling import unspelled_share


class Spelling:
    """A scorer whose tokens spell what a function makes of a text."""

    def __init__(self, spelled):
        self._spelled = spelled

    def spell(self, texts):
        return [self._spelled(text) for text in texts]


TEXTS = ["β-cell mass fell", "in naïve mice"]  # 17 + 14 bytes, 15 + 12 without white space


@pytest.mark.parametrize(
    ("spelled", "share"),
    [
        (lambda text: text, 0),
        (lambda text: text.replace(" ", ""), 0),  # white space aside
        (lambda text: text.replace("-", " - "), 0),
        (lambda text: "", 1),
        (lambda text: "[UNK] " * 3, 1),
        (lambda text: text.replace("β", ""), 2 / 27),  # of two bytes
        (lambda text: text.replace("fell", "FELL"), 4 / 27),
        (lambda text: text.replace("ss", "s"), 1 / 27),
        (lambda text: text.replace("ï", "i\u0308"), 0),  # the same letter, composed
    ],
)
def test_bytes_whose_letters_are_not_spelled_are_counted(spelled, share):
    assert unspelled_share(Spelling(spelled), TEXTS) == pytest.approx(share)


def test_every_text_counts_by_its_length():
    texts = ["a" * 30, "b" * 10] * 1500  # more than are spelled together
    assert unspelled_share(Spelling(lambda text: text.replace("b", "")), texts) == pytest.approx(0.25)
