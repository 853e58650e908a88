"""A run may go on in another precision: only what is computed in changes, not the weights nor what they learn from."""

import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from synthetic import write_shards

from biomamba_jax.pretrain import main
from biomamba_jax.train import loop
from biomamba_jax.train.metrics import read_metrics

SAVED, LAST = 3, 6
SMALL = (
    "--model.d_model=16 --model.n_layers=1 --model.headdim=8 --model.d_state=4 --data.sequence_length=32 "
    "--data.batch_size=4 --data.num_workers=0 --train.log_every=1 --train.eval_every=0 --train.eval_batches=1 "
    "--optimizer.learning_rate=1e-2 --optimizer.ema=0.9 --schedule.kind=constant --schedule.warmup_fraction=0 "
    f"--tensorboard=false --data.path=shards --train.steps={LAST} --checkpoint.every={SAVED}"
).split()


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """The batches of all steps of all runs, in order."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards")
    given = []

    def note(batch, mesh):
        given.append({name: rows.copy() for name, rows in batch.items()})
        return shard_batch(batch, mesh)

    shard_batch = loop.shard_batch
    monkeypatch.setattr(loop, "shard_batch", note)
    return given


def train(run: str, precision: str) -> list[float]:
    """Trains, from the newest checkpoint where there is one; losses of all steps."""
    main([*SMALL, f"--run_dir={run}", f"--model.compute_dtype={precision}"])
    return [line["loss"] for line in read_metrics(run) if line["split"] == "train"]


def checkpoint(run: str, step: int) -> dict:
    with ocp.CheckpointManager(Path(run, "checkpoints").absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


@pytest.mark.long
def test_a_checkpoint_goes_on_in_another_precision_with_the_same_batches(batches, capsys):
    same = train("same", "float32")
    shutil.copytree("same", "other")
    shutil.rmtree(Path("other", "checkpoints", str(LAST)))
    other = train("other", "bfloat16")

    assert "changed since this run began: model.compute_dtype was 'float32', is 'bfloat16'" in capsys.readouterr().err
    assert len(batches) == LAST + LAST - SAVED
    for one, two in zip(batches[SAVED:LAST], batches[LAST:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert other[SAVED:] != same[SAVED:]
    np.testing.assert_allclose(other[SAVED:], same[SAVED:], rtol=2**-7)  # bfloat16's rounding
    state = checkpoint("other", LAST)
    for name in ("params", "optimizer"):  # the averaged weights among it
        assert {str(x.dtype) for x in jax.tree.leaves(state[name])} <= {"float32", "int32"}
