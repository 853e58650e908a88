"""The permutation of the shuffle is grain's."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from biomamba_jax.data.permutation import permuted


@pytest.mark.parametrize("total", [1, 2, 3, 7, 2**16, 2**17 + 1, 2**18, 2**19 - 1, 38_000_000, 2**32])
def test_it_equals_grains_for_every_number_of_bits(total):
    positions = np.unique(np.linspace(0, total - 1, 50).astype(np.int64))
    for seed in (0, 1, 77, 2**32 - 1):
        expected = [index_shuffle(int(i), total - 1, seed, 4) for i in positions]
        np.testing.assert_array_equal(permuted(positions, total, seed), expected)


@pytest.mark.parametrize("total", [5, 1000, 2**16 + 1])
def test_every_element_appears_once(total):
    assert np.array_equal(np.sort(permuted(np.arange(total), total, 3)), np.arange(total))
