"""Checkpoints refuse what does not fit, by name, before anything is restored."""

import os
import time
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.config import CheckpointConfig
from biomamba_jax.errors import UserError
from biomamba_jax.folders import check_digests
from biomamba_jax.train.checkpoints import Checkpoints


def state(width: int = 3, **more):
    return {"weight": jnp.arange(width, dtype=jnp.float32), "step": jnp.int32(4), **more}


def test_what_was_saved_comes_back_in_another_session(tmp_path):
    loop = {"data": {"row": 12}, "totals": {"nll": 0.1 + 0.2}}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(4, state(), loop)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.start == 4
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


def save(run_dir, *steps, config=CheckpointConfig(keep_last=9)):  # noqa: B008
    with Checkpoints(run_dir, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(weight=jnp.full(3, step, jnp.float32)), {"data": {"row": step}})


def damage(run_dir, step, file="state/_METADATA"):
    path = run_dir / "checkpoints" / str(step) / file
    path.write_bytes(b"?" + path.read_bytes()[1:])


def test_every_file_of_a_checkpoint_has_a_digest_when_it_gets_its_name(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "3"
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert listed == found - {"SHA256SUMS"}
    assert check_digests(folder)


def test_a_checkpoint_waits_for_the_file_that_orbax_writes_in_a_thread(tmp_path, monkeypatch):
    from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl

    def late(*arguments, write=_MetadataStoreImpl.write):
        time.sleep(0.5)  # a loaded machine
        write(*arguments)

    monkeypatch.setattr(_MetadataStoreImpl, "write", late)
    save(tmp_path, 3)
    assert "  _CHECKPOINT_METADATA" in (tmp_path / "checkpoints" / "3" / "SHA256SUMS").read_text()


@pytest.mark.parametrize("file", ["state/_METADATA", "loop/metadata", "_CHECKPOINT_METADATA", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(tmp_path, file):
    save(tmp_path, 3, 4, 5, 6)
    for step in (5, 6):
        damage(tmp_path, step, file)
    remedy = "the newest whole checkpoint is of step 4: resume with --resume_from 4, or move 6 elsewhere"
    with pytest.raises(UserError, match=f"checkpoint 6: .*{file}.* is damaged.*; {remedy}"):
        Checkpoints(tmp_path, CheckpointConfig())
    for step in (3, 4):
        damage(tmp_path, step, file)
    with pytest.raises(UserError, match="no other checkpoint is whole"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_resume_from_goes_back_once_and_loses_nothing(tmp_path):
    save(tmp_path, 3, 4, 5)
    damage(tmp_path, 5)
    with Checkpoints(tmp_path, CheckpointConfig(), resume_from=3) as checkpoints:
        assert checkpoints.start == 3
        restored, loop = checkpoints.restore(state())
        assert (restored["weight"][0], loop) == (3, {"data": {"row": 3}})
        checkpoints.save(4, state(), {})
    assert sorted(path.name for path in (tmp_path / "replaced_after_3").iterdir()) == ["4", "5"]
    with Checkpoints(tmp_path, CheckpointConfig(), resume_from=3) as checkpoints:  # the same command, requeued
        assert checkpoints.start == 4
    with pytest.raises(UserError, match=r"resume_from = 7: .* has checkpoints of steps \[3, 4\]"):
        Checkpoints(tmp_path, CheckpointConfig(), resume_from=7)


def test_going_back_is_gone_on_with_after_a_kill_in_the_middle(tmp_path, monkeypatch):
    save(tmp_path, 3, 4, 5)
    rename = os.rename
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        moves = iter([rename])
        patch.setattr(os, "rename", lambda *paths: next(moves, Mock(side_effect=KeyboardInterrupt))(*paths))
        Checkpoints(tmp_path, CheckpointConfig(), resume_from=3)
    with Checkpoints(tmp_path, CheckpointConfig(), resume_from=3) as checkpoints:
        assert checkpoints.start == 3
    assert sorted(path.name for path in (tmp_path / "replaced_after_3").iterdir()) == ["4", "5"]


def test_digests_can_be_left_to_the_user(tmp_path):
    save(tmp_path, 3)
    damage(tmp_path, 3, "commit_success.txt")  # which nobody reads
    with Checkpoints(tmp_path, CheckpointConfig(verify=False)) as checkpoints:
        assert checkpoints.restore(state())[0]["weight"][0] == 3


def test_damage_in_a_checkpoint_without_digests_is_named_where_it_is_found(tmp_path):
    save(tmp_path, 3, 4)
    (tmp_path / "checkpoints" / "4" / "SHA256SUMS").unlink()  # as checkpoints of version 0.1
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(state())[0]["weight"][0] == 4
    (tmp_path / "checkpoints" / "4" / "loop" / "metadata").write_text("{")
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(UserError, match=r"checkpoint 4: .*loop: cannot be read .*; the newest whole .* is of step 3"),
    ):
        checkpoints.restore(state())


def test_an_empty_run_directory_has_none(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.start is None
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
