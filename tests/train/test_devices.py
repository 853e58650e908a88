"""Several devices train as one does, and the TPU kernels compile in a step that spans several chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import write_shards

from biomamba_jax.planning.ahead_of_time import compiler_environment
from biomamba_jax.train.metrics import read_metrics
from tests.compilers import needs_libtpu

ROOT = Path(__file__).parents[2]

COMPILE = """
import sys
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from biomamba_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from biomamba_jax.ops import dispatch
from biomamba_jax.parallel.mesh import BATCH_SPEC, make_mesh
from biomamba_jax.train.optimizer import make_optimizer
from biomamba_jax.train.program import abstract_model, initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step

config = ModelConfig(kind=sys.argv[1], d_model=256, n_layers=2, vocab_size=512, compute_dtype="bfloat16")
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
sizes = map(int, sys.argv[2].split(","))
optimizer = make_optimizer(OptimizerConfig(), config, optax.constant_schedule(1e-3))
graph, layout = abstract_model(config, make_mesh(MeshConfig(*sizes), topology.devices))
state = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, layout.shardings(state))
rows = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(layout.mesh, BATCH_SPEC))
batch = dict.fromkeys(("inputs", "targets", "segment_ids"), rows)
with dispatch.target_platform("tpu"):
    step = make_train_step(language_model_loss(graph, LossConfig(), layout.collectives), optimizer, layout=layout)
    print(jax.jit(step).lower(state, batch).compile().as_text().count("tpu_custom_call"))
"""


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_four_devices_give_the_losses_of_one(tmp_path, kind):
    shards = write_shards(tmp_path / "shards")
    settings = (
        f"--model.kind={kind} --model.d_model=16 --model.n_layers=2 --model.headdim=8 --model.d_state=4 "
        f"--data.path={shards} --data.sequence_length=32 --data.batch_size=8 --data.num_workers=0 --train.log_every=1 "
        "--train.accumulation=2 --optimizer.learning_rate=1e-2 --train.steps=6 --tensorboard=false"
    ).split()
    runs = []
    for devices in (1, 4):
        run = tmp_path / str(devices)
        flags = f"--xla_force_host_platform_device_count={devices}"
        python("-m", "biomamba_jax.pretrain", *settings, f"--run_dir={run}", XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
        runs.append(read_metrics(run))
    for one, four in zip(*runs, strict=True):
        assert (four["step"], four["tokens"]) == (one["step"], one["tokens"])
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)


@needs_libtpu
@pytest.mark.ahead_of_time
@pytest.mark.parametrize(("kind", "mesh"), [("mamba1", "4,1,1,1"), ("mamba2", "4,1,1,1"), ("mamba2", "1,1,2,2")])
def test_a_step_over_several_tpu_chips_compiles_with_the_kernels_in_it(kind, mesh):
    assert int(python("-c", COMPILE, kind, mesh, **compiler_environment()).splitlines()[-1]) > 0
