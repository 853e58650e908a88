"""Heads: their losses by hand, texts packed into rows, what each way of reading sees, and fifty sentences by heart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from head_models import LABELS, annotated_for, head_of, model_of, texts
from tiny_models import CONFIGS, train_tokenizer

from biomamba_jax.config import LossConfig
from biomamba_jax.data.examples import encode_texts
from biomamba_jax.data.packing import Piece, RowPlan, fill_row
from biomamba_jax.interop.heads import split
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.model.heads import reversed_order
from biomamba_jax.tasks.annotate import NativeHeadModel
from biomamba_jax.tasks.mining_measures import measure
from biomamba_jax.tasks.statistics import Resampling
from biomamba_jax.train.supervised import head_loss

LENGTH = 96
CASES = [  # each head once, each reading with both kinds of models
    ("token_classifier", "once", "mamba1"),
    ("token_classifier", "echo", "mamba2"),
    ("token_classifier", "bidirectional", "mamba1"),
    ("multi_label", "once", "mamba2"),
    ("regression", "bidirectional", "mamba2"),
    ("span", "echo", "mamba1"),
]
LEARNT = [("token_classifier", "bidirectional", "mamba1"), ("regression", "once", "mamba1")]
READINGS = ("once", "echo", "bidirectional")
EVERY_CASE = [(head, reading, kind) for head in LABELS for reading in READINGS for kind in CONFIGS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def loss_of(config, head, **settings):
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return head_loss(graph, head, LossConfig(**settings))


def rows_of(examples, rows):
    def read(index):
        return examples[index].inputs, examples[index].targets

    filled = [fill_row(row, LENGTH, read) for row in rows]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def whole(examples, *numbers):
    return [Piece(number, 0, len(examples[number].inputs)) for number in numbers]


def predictor(config, params, head, tokenizer, **settings):
    params, found = split(params, head)
    return NativeHeadModel("made-up", InferenceModel.from_params(config, params), found, tokenizer, **settings)


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_each_segment_but_its_first_token_is_reversed():
    segments = np.array([[1, 1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 3, 2, 1, 4, 5, 6, 7, 8], [0, 8, 7, 6, 5, 4, 3, 2, 1]]
    np.testing.assert_array_equal(reversed_order(jnp.asarray(segments)), expected)


@pytest.mark.parametrize(("reading", "sees"), [("once", False), ("echo", True), ("bidirectional", True)])
def test_only_echo_and_bidirectional_states_see_the_words_to_the_right(tokenizer, reading, sees):
    config, params = model_of("mamba2", tokenizer, head_of("token_classifier", reading))
    model = predictor(config, params, head_of("token_classifier", reading), tokenizer)
    one, other = model.logits(tokenizer.encode_batch(["the mice fell", "the mice type"]))
    assert bool(np.abs(one[0] - other[0]).max() > 1e-3) == sees


@pytest.mark.parametrize("reading", ["once", "echo", "bidirectional"])
@pytest.mark.parametrize("kind", ["token_classifier", "multi_label"])
def test_texts_in_batches_and_windows_have_the_logits_of_each_by_itself(tokenizer, reading, kind):
    head = head_of(kind, reading)
    config, params = model_of("mamba1", tokenizer, head)
    ids = tokenizer.encode_batch([text.text * repeats for text, repeats in zip(texts(5), (1, 9, 2, 5, 1), strict=True)])
    ids.append([])
    windows = predictor(config, params, head, tokenizer, rows=4, window=16).logits(ids)
    alone = predictor(config, params, head, tokenizer)
    for own, row in zip(windows, ids, strict=True):
        np.testing.assert_allclose(own, alone.logits([row])[0], atol=1e-5)
        assert own.shape == (max(len(row), 1), len(head.labels))


# --- Losses ----------------------------------------------------------------------------------------------------------


def by_hand(kind, logits, targets):
    """The negative log-likelihood of one text's targets in float64, by its definition."""
    z, counted = logits.astype(np.float64), targets >= 0
    if kind in ("classifier", "token_classifier"):
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        return -sum(np.log(p[i, targets[i]]) for i in np.flatnonzero(counted))
    if kind == "regression":
        return (z[-1, 0] - targets[-1:].view(np.float32)[0]) ** 2
    if kind == "multi_label":
        p = 1 / (1 + np.exp(-z[-1]))
        wanted = [(targets[-1] >> k) & 1 for k in range(len(p))]
        return -sum(np.log(p[k] if bit else 1 - p[k]) for k, bit in enumerate(wanted))
    p = np.exp(z[counted]) / np.exp(z[counted]).sum(0)
    first, last = ((targets[counted] & side) > 0 for side in (1, 2))
    return -np.log(p[first, 0]).sum() - np.log(p[last, 1]).sum()


@pytest.mark.parametrize(("kind", "reading", "model"), CASES)
def test_the_loss_of_a_packed_row_is_that_of_each_text_by_hand_and_so_are_its_gradients(
    tokenizer, kind, reading, model
):
    head = head_of(kind, reading)
    config, params = model_of(model, tokenizer, head)
    examples = encode_texts(annotated_for(kind, texts(4)), tokenizer, LENGTH, head, source="made-up")
    inference, expected = predictor(config, params, head, tokenizer), 0.0
    for example in examples._examples:
        # One reading without the start token: what `logits` returns a row for.
        count = len(example.inputs) // (2 if reading == "echo" else 1) - 1
        [logits] = inference.logits([example.inputs[1 : count + 1].tolist()])
        expected += by_hand(kind, logits, example.targets[-count:])
    gradient = jax.jit(jax.value_and_grad(loss_of(config, head), has_aux=True))
    packed_rows = [whole(examples, 0, 1), whole(examples, 2, 3)]
    (packed, sums), packed_gradient = gradient(params, rows_of(examples, packed_rows))
    np.testing.assert_allclose(packed, expected, rtol=1e-5)
    assert sums.weight == (sum((e.targets >= 0).sum() for e in examples._examples) if kind == "token_classifier" else 4)
    single = jax.device_get([gradient(params, rows_of(examples, [whole(examples, i), []])) for i in range(4)])
    np.testing.assert_allclose(packed, sum(value for (value, _), _ in single), rtol=1e-5)
    assert sums.correct == sum(each.correct for (_, each), _ in single)
    summed = jax.tree.map(lambda *parts: sum(parts), *(part for _, part in single))
    for ours, theirs in zip(*map(jax.tree.leaves, (packed_gradient, summed)), strict=True):
        np.testing.assert_allclose(
            ours, theirs, atol=2e-4 * max(1, float(np.abs(theirs).max())), rtol=1e-3, equal_nan=False
        )


# --- Fifty sentences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reading", "model"),
    [pytest.param(*case, marks=[] if case in LEARNT else pytest.mark.long) for case in EVERY_CASE],
)
def test_fifty_sentences_are_learnt_by_heart(tokenizer, kind, reading, model):
    head = head_of(kind, reading)
    config, params = model_of(model, tokenizer, head)
    gold = annotated_for(kind, texts(50))
    examples = encode_texts(gold, tokenizer, LENGTH, head, source="made-up")
    plan = RowPlan(examples.lengths, LENGTH, seed=None)
    batch = jax.tree.map(jnp.asarray, rows_of(examples, [plan[row] for row in range(plan.rows_in_epoch())]))
    loss, optimizer = loss_of(config, head), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        gradients = jax.tree.map(lambda g: g / sums.weight, gradients)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, sums

    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for _ in range(40):
        for _ in range(10):
            params, state, sums = step(params, state)
        if sums.correct == sums.weight and sums.nll < (0.002 if kind == "regression" else 0.02) * sums.weight:
            break
    params = jax.tree.map(np.asarray, params)
    found = measure(head, gold, predictor(config, params, head, tokenizer).annotate(gold), Resampling(200))
    if kind == "regression":
        assert found["pearson"] > 0.99
    elif kind == "span":
        assert found["exact_match"] == found["strict"] == 1.0
    else:
        assert found["f1"] == 1.0
