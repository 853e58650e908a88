"""`linear_cross_entropy` against the loss of full logits in float64, against torch, and its memory."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import linear_cross_entropy
from biomamba_jax.ops.cross_entropy import LossSums, token_negative_log_likelihoods
from tests.tolerances import TOLERANCES


class Case(NamedTuple):
    """Few of them, since each is compiled anew."""

    tokens: int
    width: int
    vocabulary: int
    valid: int
    chunk: int | None
    label_smoothing: float
    z_loss: float


CASES = (
    Case(tokens=13, width=8, vocabulary=40, valid=37, chunk=4, label_smoothing=0.1, z_loss=1e-2),
    Case(tokens=8, width=8, vocabulary=24, valid=24, chunk=None, label_smoothing=0.0, z_loss=0.0),
    Case(tokens=9, width=4, vocabulary=16, valid=3, chunk=1, label_smoothing=0.0, z_loss=1e-3),
    Case(tokens=1, width=4, vocabulary=9, valid=9, chunk=64, label_smoothing=1.0, z_loss=0.0),
)


def random_inputs(case: Case, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "hidden": random.standard_normal((case.tokens, case.width)),
        "weight": scale * random.standard_normal((case.vocabulary, case.width)),
        "targets": random.integers(0, case.valid, case.tokens, dtype=np.int32),
        "weights": np.where(random.random(case.tokens) < 0.3, 0, random.random(case.tokens)),
    }


def in_dtype(inputs: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Hidden states in `dtype`, the head in at least float32, as in a model."""
    head = jnp.promote_types(dtype, jnp.float32)
    dtypes = {"hidden": dtype, "weight": head, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jnp.asarray(v, dtypes[name]) for name, v in inputs.items()}


@cache
def sums_and_gradients(case: Case, implementation: str):
    def loss(hidden, weight, targets, weights):
        sums = linear_cross_entropy(
            hidden,
            weight,
            targets,
            weights=weights,
            valid_vocab_size=case.valid,
            label_smoothing=case.label_smoothing,
            z_loss=case.z_loss,
            chunk_size=case.chunk,
            implementation=implementation,
        )
        return 3 * sums.loss, sums

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return lambda inputs: compute(inputs["hidden"], inputs["weight"], inputs["targets"], inputs["weights"])


def assert_close(got, want, tolerance: float) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error, scale = np.max(np.abs(got - want)), np.max(np.abs(want))
    assert error <= tolerance * scale, f"{error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@settings(max_examples=15)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**16))
def test_sums_and_gradients_match_full_logits(dtype, case, seed):
    tolerance = TOLERANCES["linear_cross_entropy", dtype]
    with jax.enable_x64(True):
        inputs = in_dtype(random_inputs(case, seed), dtype)
        exact = inputs | {name: inputs[name].astype(jnp.float64) for name in ("hidden", "weight")}
        (_, want), want_gradients = sums_and_gradients(case, "reference")(exact)
        (_, got), gradients = sums_and_gradients(case, "xla")(inputs)
        assert [g.dtype for g in gradients] == [inputs["hidden"].dtype, inputs["weight"].dtype]
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected, tolerance.value)
    for gradient, expected in zip(gradients, want_gradients, strict=True):
        assert_close(gradient, expected, tolerance.gradient)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_torch(label_smoothing):
    torch = pytest.importorskip("torch")
    case = CASES[0]._replace(label_smoothing=label_smoothing, z_loss=0.0)
    inputs = random_inputs(case, 1) | {"weights": np.ones(case.tokens)}
    hidden = torch.tensor(inputs["hidden"], requires_grad=True)
    weight = torch.tensor(inputs["weight"], requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        hidden @ weight[: case.valid].T,
        torch.tensor(inputs["targets"]).long(),
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    (3 * loss).backward()
    with jax.enable_x64(True):
        (_, sums), gradients = sums_and_gradients(case, "xla")(in_dtype(inputs, "float64"))
    tolerance = TOLERANCES["linear_cross_entropy", "float64"]
    assert_close(sums.loss, loss.item(), tolerance.value)
    assert_close(gradients[0], hidden.grad, tolerance.gradient)
    assert_close(gradients[1], weight.grad, tolerance.gradient)


def test_padding_of_the_vocabulary_takes_no_part():
    case = CASES[0]
    inputs = in_dtype(random_inputs(case, 2), "float32")
    (_, sums), gradients = sums_and_gradients(case, "xla")(inputs)
    inputs["weight"] = inputs["weight"].at[case.valid :].set(1e3)
    (_, changed), changed_gradients = sums_and_gradients(case, "xla")(inputs)
    jax.tree.map(np.testing.assert_array_equal, (sums, gradients), (changed, changed_gradients))
    assert np.all(gradients[1][case.valid :] == 0)


def test_tokens_of_weight_zero_take_no_part():
    case = CASES[0]
    inputs = in_dtype(random_inputs(case, 3), "float32")
    ignored = np.asarray(inputs["weights"]) == 0
    (_, sums), gradients = sums_and_gradients(case, "xla")(inputs)
    inputs["hidden"] = jnp.where(ignored[:, None], 7.0, inputs["hidden"])
    inputs["targets"] = jnp.where(ignored, 0, inputs["targets"])
    (_, changed), changed_gradients = sums_and_gradients(case, "xla")(inputs)
    jax.tree.map(np.testing.assert_array_equal, (sums, gradients), (changed, changed_gradients))
    assert np.all(gradients[0][ignored] == 0)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    inputs = in_dtype(random_inputs(CASES[0], 4), "float32")
    whole = linear_cross_entropy(**inputs)
    parts = [
        linear_cross_entropy(**{name: v if name == "weight" else v[cut] for name, v in inputs.items()})
        for cut in (slice(0, 5), slice(5, None))
    ]
    added = jax.tree.map(jnp.add, *parts)
    assert isinstance(added, LossSums)
    np.testing.assert_allclose(added, whole, rtol=TOLERANCES["linear_cross_entropy", "float32"].value)


def test_only_the_loss_has_a_gradient():
    inputs = in_dtype(random_inputs(CASES[0], 5), "float32")

    def others(hidden, weight, weights):
        sums = linear_cross_entropy(hidden, weight, inputs["targets"], weights=weights, label_smoothing=0.1)
        return sums.nll + sums.correct + sums.weight

    gradients = jax.grad(others, argnums=(0, 1, 2))(inputs["hidden"], inputs["weight"], inputs["weights"])
    assert all(np.all(gradient == 0) for gradient in gradients)


def test_huge_logits_stay_finite():
    case = CASES[0]
    inputs = in_dtype(random_inputs(case, 6, scale=1e5), "float32")
    result = sums_and_gradients(case._replace(z_loss=0.0), "xla")(inputs)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(result))


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_likelihoods_of_tokens_are_those_of_a_softmax(chunk):
    case = CASES[0]
    inputs = in_dtype(random_inputs(case, 7), "float32")
    got = token_negative_log_likelihoods(
        inputs["hidden"], inputs["weight"], inputs["targets"], valid_vocab_size=case.valid, chunk_size=chunk
    )
    log_probabilities = jax.nn.log_softmax(inputs["hidden"] @ inputs["weight"][: case.valid].T)
    assert got.shape == (case.tokens,)
    want = -log_probabilities[np.arange(case.tokens), inputs["targets"]]
    assert_close(got, want, TOLERANCES["linear_cross_entropy", "float32"].value)


def test_the_logits_of_the_whole_batch_never_exist():
    """8,192 tokens, 50,288 ids: 223 MB, the head's gradient included; full logits alone take 1.6 GB."""
    hidden = jax.ShapeDtypeStruct((8192, 256), jnp.float32)
    weight = jax.ShapeDtypeStruct((50288, 256), jnp.float32)
    targets = jax.ShapeDtypeStruct((8192,), jnp.int32)

    @jax.jit
    def gradients(hidden, weight, targets):
        def loss(hidden, weight):
            return linear_cross_entropy(hidden, weight, targets, valid_vocab_size=50277).loss

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, weight)

    memory = gradients.lower(hidden, weight, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 300e6


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((13, 7), np.float32)}, "hidden must be"),
        ({"targets": np.zeros(12, np.int32)}, r"targets has shape \(12,\), expected \(13,\)"),
        ({"weights": np.zeros(12, np.float32)}, r"weights has shape \(12,\), expected \(13,\)"),
        ({"valid_vocab_size": 41}, "valid_vocab_size must be in 1..40, not 41"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, message):
    inputs = in_dtype(random_inputs(CASES[0], 8), "float32")
    with pytest.raises(UserError, match=message):
        linear_cross_entropy(**(inputs | change))


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_implementation_that_does_not_exist_is_refused():
    inputs = in_dtype(random_inputs(CASES[0], 9), "float32")
    with pytest.raises(UserError, match="implementation 'triton' does not exist"):
        linear_cross_entropy(**inputs, implementation="triton")
