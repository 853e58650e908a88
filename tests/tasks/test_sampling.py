"""Each filter of the next token against the formula that defines it, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.config.generate import Sampling
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.sampling import Steps, Values, filtered, next_tokens, penalized

LOGITS = 3 * np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)


def kept(logits=LOGITS, **settings) -> np.ndarray:
    """Which tokens the filters leave."""
    sampling = Sampling(temperature=1.0, **settings)
    return np.isfinite(np.asarray(filtered(jnp.asarray(logits), Values.of(sampling), Steps.of(sampling))))


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    order = np.argsort(-p, axis=-1)
    before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    result = np.zeros(p.shape, bool)
    np.put_along_axis(result, order, before < mass, -1)
    return result


@pytest.mark.parametrize("k", [1, 2, 50, 299, 300, 1000])
def test_top_k_keeps_the_k_likeliest(k):
    kth = np.sort(LOGITS, -1)[:, [-min(k, 300)]]
    np.testing.assert_array_equal(kept(top_k=k), kth <= LOGITS)


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_have_the_mass(mass):
    np.testing.assert_array_equal(kept(top_p=mass), nucleus(softmax(LOGITS), mass))


@pytest.mark.parametrize("share", [1e-3, 0.1, 1.0])
def test_min_p_compares_with_the_likeliest(share):
    p = softmax(LOGITS)
    np.testing.assert_array_equal(kept(min_p=share), p >= share * p.max(-1, keepdims=True) * (1 - 1e-6))


def test_top_p_sees_only_what_top_k_left():
    first = kept(top_k=10)
    p = softmax(np.where(first, LOGITS, -np.inf))
    np.testing.assert_array_equal(kept(top_k=10, top_p=0.7), nucleus(p, 0.7) & first)


def test_filters_never_bring_back_a_token_that_was_ruled_out():
    logits = np.where(np.arange(300) < 5, LOGITS, -np.inf).astype(np.float32)
    assert not kept(logits, top_k=50, top_p=0.99)[:, 5:].any()


def test_the_penalty_lowers_what_was_seen_whatever_its_sign():
    seen = np.random.default_rng(1).random(LOGITS.shape) < 0.5
    expected = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.3, LOGITS * 1.3), LOGITS)
    np.testing.assert_allclose(penalized(jnp.asarray(LOGITS), seen, jnp.float32(1.3)), expected, rtol=1e-6)


def draws(number: int, logits, **settings) -> np.ndarray:
    sampling = Sampling(**settings)
    keys = jax.random.split(jax.random.key(0), number)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (number, len(logits)))
    return np.asarray(next_tokens(rows, None, keys, Values.of(sampling), Steps.of(sampling)))


def test_temperature_zero_takes_the_likeliest():
    assert (draws(3, [0.0, 2.0, 1.0], temperature=0) == 1).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    shares = np.bincount(draws(20_000, logits, temperature=temperature), minlength=4) / 20_000
    np.testing.assert_allclose(shares, softmax(logits / temperature), atol=0.015)


@pytest.mark.parametrize(
    "setting", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"stop": [""]}, {"stop": "ab"}]
)
def test_a_setting_out_of_range_is_refused_by_name(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)
