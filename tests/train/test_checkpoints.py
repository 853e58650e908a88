"""Checkpoints refuse what does not fit, by name, before anything is restored."""

import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.config import CheckpointConfig
from biomamba_jax.errors import UserError
from biomamba_jax.train.checkpoints import Checkpoints


def state(width: int = 3, **more):
    return {"weight": jnp.arange(width, dtype=jnp.float32), "step": jnp.int32(4), **more}


def test_what_was_saved_comes_back_in_another_session(tmp_path):
    loop = {"data": {"row": 12}, "totals": {"nll": 0.1 + 0.2}}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(4, state(), loop)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 4
        restored, saved = checkpoints.restore(state())
    np.testing.assert_array_equal(restored["weight"], state()["weight"])
    assert saved == loop  # floats to the last bit


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (state(width=5), "weight: saved float32[3], expected float32[5]"),
        (state(more=jnp.zeros(2)), "more: saved -, expected float32[2]"),
        ({"weight": jnp.zeros(3)}, "step: saved int32[], expected -"),
        ({**state(), "step": jnp.float32(0)}, "step: saved int32[], expected float32[]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path, expected, message):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(4, state(), {})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(UserError) as refusal:
        checkpoints.restore(expected)
    assert message in str(refusal.value)


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=4)) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, state(), {})
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == [4, 8, 9]


def test_the_best_one_is_kept_however_many_follow(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=1)) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
            checkpoints.save(step, state(), {}, best=best)
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == [2, 4]


def test_an_empty_run_directory_has_none(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoints.restore(state())


def test_training_on_while_a_checkpoint_is_written_does_not_change_it(tmp_path):
    import jax

    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    current = jax.tree.map(jnp.array, state(width=1_000_000))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(0, current, {})
        for _ in range(20):
            current = advance(current)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _ = checkpoints.restore(current)
    np.testing.assert_array_equal(restored["weight"], np.arange(1_000_000, dtype=np.float32))
