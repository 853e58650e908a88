"""The whole training step of the 130m models through the real TPU compiler, on one chip and on sixteen."""

import pytest

from biomamba_jax.config import DataConfig, MeshConfig, ModelConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.planning.compile import Compiled, compile_step
from tests.compilers import needs_libtpu

pytestmark = [pytest.mark.ahead_of_time, needs_libtpu]

KERNELS = {
    "mamba1": {"selective_scan_forward", "selective_scan_backward"},
    "mamba2": {"ssd_forward", "ssd_backward"},
}
CONVOLUTION = {"causal_conv1d_forward", "causal_conv1d_backward"}


def compiled(kind: str, topology: str = "v5e:1x1", batch_size: int = 8, kernels: bool = True, **mesh: int) -> Compiled:
    model = ModelConfig(kind=kind, vocab_size=50277, compute_dtype="bfloat16", remat="full", kernels=kernels)
    data = DataConfig(batch_size=batch_size, sequence_length=2048)
    return compile_step(PlanConfig(topology=topology, model=model, data=data, mesh=MeshConfig(**mesh)))


@pytest.mark.parametrize("kind", KERNELS)
def test_on_one_chip_the_step_has_the_kernels_and_needs_less_memory_than_without(kind):
    with_kernels, without = compiled(kind), compiled(kind, kernels=False)
    assert {call.name for call in with_kernels.costs.kernels} == KERNELS[kind] | CONVOLUTION
    assert not without.costs.kernels
    assert with_kernels.memory.total < without.memory.total


@pytest.mark.parametrize("kind", KERNELS)
def test_on_sixteen_chips_the_sharded_step_has_the_kernels(kind):
    sharded = compiled(kind, "v5e:4x4", batch_size=128, data=4, fsdp=4)
    assert sharded.fits
    assert {call.name for call in sharded.costs.kernels} == KERNELS[kind] | CONVOLUTION
