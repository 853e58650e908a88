"""Who counts as one of several processes."""

import importlib.util

import pytest

from biomamba_jax.config import DistributedConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.distributed import launched_with_others

SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # inside an allocation, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_a_process_is_one_of_several_where_its_launcher_says_so(environment, several):
    assert launched_with_others({"JAX_PLATFORMS": "cpu"} | environment) == several


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_a_tpu_host_is_one_of_several_where_its_slice_has_more(monkeypatch, environment, several):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert launched_with_others(environment) == several


def test_an_address_comes_with_the_number_of_processes_and_which_this_is():
    DistributedConfig("localhost:1234", 2, 1)
    with pytest.raises(UserError, match=r"distributed\.processes"):
        DistributedConfig("localhost:1234", process_id=0)
    with pytest.raises(UserError, match=r"distributed\.process_id = 2: must be in 0\.\.1"):
        DistributedConfig("localhost:1234", 2, 2)
