"""Rules by parameter path, shapes of meshes, and which host reads which rows."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from biomamba_jax.config import MeshConfig, ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model.sharding import sharding_rules
from biomamba_jax.parallel.mesh import AXES, HostShard, make_mesh, rows_per_host, shard_batch, shard_of_host
from biomamba_jax.parallel.sharding import parameter_specs, tree_specs
from biomamba_jax.train.program import abstract_model

PARAMS = {"a": {"kernel": jnp.zeros((6, 8))}, "b": jnp.zeros(3)}


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES)


def test_parameters_are_sharded_by_the_first_rule_that_matches():
    rules = [("a/kernel", PartitionSpec("fsdp", "tensor")), (".*", PartitionSpec())]
    specs = parameter_specs(PARAMS, rules, mesh_of(fsdp=2, tensor=4))
    assert specs == {"a/kernel": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec()}


def test_what_follows_a_parameter_lies_where_it_does():
    specs = {"a/kernel": PartitionSpec("fsdp")}
    state = {"mu": PARAMS, "count": jnp.zeros(()), "average": [PARAMS]}
    found = tree_specs(state, specs)
    assert found["mu"]["a"]["kernel"] == found["average"][0]["a"]["kernel"] == PartitionSpec("fsdp")
    assert found["mu"]["b"] == found["count"] == PartitionSpec()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([(".*", PartitionSpec()), ("c/.*", PartitionSpec())], ["'c/.*'", "a/kernel"]),
        ([("a/.*", PartitionSpec())], ["no rule", "b"]),
        ([(".*", PartitionSpec("tensor"))], ["mesh.tensor = 4", "6", "a/kernel"]),
        ([(".*", PartitionSpec(("fsdp", "tensor")))], ["mesh.fsdp = 2 x mesh.tensor = 4", "6", "a/kernel"]),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_by_name(rules, words):
    with pytest.raises(UserError) as refusal:
        parameter_specs(PARAMS, rules, mesh_of(fsdp=2, tensor=4))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("settings", [{"bias": True}, {"conv_bias": False}, {"tie_embeddings": False}])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_every_parameter_of_every_model_has_a_rule(kind, settings):
    config = ModelConfig(kind=kind, d_model=16, n_layers=2, vocab_size=29, headdim=8, **settings)
    _, layout = abstract_model(config, make_mesh(devices=jax.devices()[:1]))
    assert "layers/mixer/out/kernel" in layout.specs


def test_devices_along_tensor_may_not_cut_through_groups():
    config = ModelConfig(kind="mamba2", n_groups=3, d_model=96)
    with pytest.raises(UserError, match=r"mesh.tensor = 2: must divide model.n_groups = 3"):
        sharding_rules(config, 2)


def test_one_axis_takes_what_the_others_leave():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(fsdp=-1, data=1), devices).shape) == dict.fromkeys(AXES, 1)
    with pytest.raises(UserError, match="data -1 x fsdp 2 x tensor 1 x sequence 1 does not fit 1 devices"):
        make_mesh(MeshConfig(fsdp=2), devices)
    with pytest.raises(UserError, match="at most one axis may be -1"):
        MeshConfig(tensor=-1)
    with pytest.raises(UserError, match=r"mesh.fsdp = 0"):
        MeshConfig(fsdp=0)


@dataclass(frozen=True)
class Chip:
    """The attributes of a JAX device that the mesh is built from."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices_of_sixteen(count: int) -> list[Chip]:
    """Chips in squares of 4 x 4."""
    return [Chip(n, n // 16, (n % 4, n // 4 % 4, 0)) for n in range(16 * count)]


@pytest.mark.parametrize("sizes", [(-1, 1, 1, 1), (2, 16, 1, 1), (2, 4, 4, 1), (4, 2, 2, 2), (2, 1, 1, 16)])
def test_between_slices_there_are_only_copies_of_the_weights(sizes):
    mesh = make_mesh(MeshConfig(*sizes), slices_of_sixteen(2))
    of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    for copy in of:  # fsdp, tensor and sequence stay inside a slice
        assert len(np.unique(copy)) == 1
    first, second = np.split(of, 2)  # a slice's replicas are adjacent: it is reduced first
    assert (first == 0).all() and (second == 1).all()


def test_each_slice_holds_a_whole_copy_of_the_weights():
    with pytest.raises(UserError, match=r"mesh\.data = 1: must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(1, 32), slices_of_sixteen(2))
    with pytest.raises(UserError, match=r"mesh\.data = 16: must be a multiple of the 3 slices"):
        make_mesh(MeshConfig(16, 3), slices_of_sixteen(3))


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert rows_per_host(6, mesh, accumulation=3) == 6
    with pytest.raises(UserError, match=r"data.batch_size = 6: must be a multiple of train.accumulation"):
        rows_per_host(6, mesh, accumulation=4)


def test_rows_arrive_as_they_were_read():
    mesh = make_mesh(devices=jax.devices()[:1])
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(shard_batch({"inputs": rows}, mesh)["inputs"], rows)


def test_each_host_reads_the_rows_of_its_own_devices():
    hosts = np.array([0, 0, 1, 1]).reshape(4, 1)  # 2 hosts of 2 devices, along data
    assert shard_of_host(0, hosts) == HostShard(0, 2, (0, 1))
    assert shard_of_host(1, hosts) == HostShard(1, 2, (2, 3))


def test_rows_need_not_lie_side_by_side_on_a_host():
    hosts = np.array([0, 1, 1, 0]).reshape(4, 1)  # as a network's own order may have it
    assert shard_of_host(0, hosts) == HostShard(0, 2, (0, 3))
    assert shard_of_host(1, hosts) == HostShard(1, 2, (1, 2))


def test_hosts_that_share_rows_read_the_same():
    hosts = np.array([[0, 0, 1, 1], [2, 2, 3, 3]])  # tensor or sequence over 4 devices, hosts of 2
    assert shard_of_host(0, hosts) == shard_of_host(1, hosts) == HostShard(0, 2, (0,))
    assert shard_of_host(2, hosts) == shard_of_host(3, hosts) == HostShard(1, 2, (1,))


def test_hosts_that_share_rows_in_part_are_refused():
    with pytest.raises(UserError, match=r"mesh.tensor x mesh.sequence = 3: must divide"):
        shard_of_host(0, np.array([[0, 0, 0], [0, 1, 1], [1, 1, 1]]))
