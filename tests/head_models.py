"""Heads of random weights, and sentences with everything that a head can learn of them."""

import dataclasses

import numpy as np
from random_weights import random_weights
from tiny_models import CONFIGS, WORDS

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText, Span, tag_names
from biomamba_jax.interop.heads import shapes
from biomamba_jax.model.heads import with_reversed

TYPES = {"insulin": "Chemical", "glucose": "Chemical", "diabetes": "Disease", "mice": "Species"}
LABELS = {
    "classifier": ("diabetes", "glucose", "insulin"),
    "multi_label": ("diabetes", "glucose", "insulin", "mice"),
    "regression": ("score",),
    "token_classifier": tuple(tag_names(["Chemical", "Disease", "Species"])),
    "span": ("start", "end"),
}


def texts(count):
    """Sentences of five words, all different, with everything that a head can learn of them."""
    random, made = np.random.default_rng(0), {}
    while len(made) < count:
        words = random.choice(WORDS, 5).tolist()
        text, spans, place = " ".join(words), [], 0
        for word in words:
            if word in TYPES:
                spans.append(Span(place, place + len(word), TYPES[word]))
            place += len(word) + 1
        number = len(made)
        found = tuple(word for word in LABELS["multi_label"] if word in words)
        score = len(text) / 10
        made[text] = AnnotatedText(str(number), text, tuple(spans), found, score=score)
    return list(made.values())


def annotated_for(kind, texts):
    """The same texts with one class, or with a question whose answer is the first word behind the longest one."""
    if kind == "classifier":
        return [dataclasses.replace(t, labels=(LABELS[kind][int(t.key) % 3],)) for t in texts]
    if kind != "span":
        return texts
    made = []
    for text in texts:
        first = WORDS[int(text.key) % 4]
        start = text.text.index(max(text.text.split(), key=len))
        answer = Span(start, start + len(text.text[start:].split()[0].rstrip(",.)")), "answer")
        made.append(dataclasses.replace(text, spans=(answer,), question=f"{first}?", labels=()))
    return made


def model_of(kind, tokenizer, head):
    """A configuration and random parameters, those of the head included."""
    config = dataclasses.replace(CONFIGS[kind], vocab_size=tokenizer.vocab_size)
    params, random = random_weights(config).params, np.random.default_rng(1)
    if head.reading == "bidirectional":
        params = with_reversed(params, {n: random_weights(config, seed=2).params[n] for n in ("layers", "norm_f")})
    own = {name: shape for name, shape in shapes(head, config).items() if name.startswith("head/")}
    weight, bias = (0.3 * random.standard_normal(own[f"head/{name}"], np.float32) for name in ("weight", "bias"))
    return config, params | {"head": {"weight": weight, "bias": bias}}


def head_of(kind, reading):
    return HeadConfig(kind, LABELS[kind], reading)
