"""Who counts as one of several processes."""

import importlib.util
import re

import jax
import pytest

from biomamba_jax.config import DistributedConfig, RunConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.distributed import (
    STOPPED,
    exit_if_stopped,
    from_xpk_environment,
    is_multiprocess_launch,
    processes,
    require_same_config,
)

SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}
XPK = {"JAX_COORDINATOR_ADDRESS": "run-0-0.run", "JAX_COORDINATOR_PORT": "6002", "NNODES": "4", "NODE_RANK": "3"}
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
OPEN_MPI_4 = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
INTEL_MPI = {"PMI_SIZE": "4", "PMI_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # inside an allocation, but not started by srun
        (OPEN_MPI_4, True),
        (OPEN_MPI_4 | SLURM | {"SLURM_NTASKS": "1"}, True),  # started by mpirun, in a job of SLURM
        (INTEL_MPI | SLURM | {"SLURM_NTASKS": "4"}, True),  # started by srun --mpi=pmi2
        ({"PMI_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_a_process_is_one_of_several_where_its_launcher_says_so(environment, several):
    assert is_multiprocess_launch({"JAX_PLATFORMS": "cpu"} | environment) == several


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, True),
    ],
)
def test_a_tpu_host_is_one_of_several_where_its_slice_has_more(monkeypatch, environment, several):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert is_multiprocess_launch(environment) == several


@pytest.mark.parametrize(("environment", "size"), [(OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE"), (INTEL_MPI, "PMI_SIZE")])
def test_an_mpi_that_jax_cannot_ask_is_refused_unless_the_address_is_given(monkeypatch, environment, size):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    remedy = rf"one of 4 processes \({size}\).*coordinator=HOST:PORT.*processes=\${size}.*process_id"
    with pytest.raises(UserError, match=remedy), processes(RunConfig()):
        pass
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: joined.append(given))
    with processes(RunConfig(distributed=DistributedConfig("host:1", 4, 1))):
        assert joined == [("host:1", 4, 1)]


def test_gpu_nodes_of_xpk_join_as_it_tells_them(monkeypatch):
    for name, value in XPK.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **more: joined.append(given))
    with processes(RunConfig(distributed=DistributedConfig(start_timeout=7))):
        assert joined == [("run-0-0.run:6002", 4, 3)]


def test_what_xpk_says_does_not_count_where_there_is_one_node_or_another_address():
    alone, given = DistributedConfig(), DistributedConfig("host:1", 2, 1)
    assert from_xpk_environment(alone, XPK | {"NNODES": "1", "NODE_RANK": "0"}) == alone
    assert from_xpk_environment(alone, {"NNODES": "4", "NODE_RANK": "3"}) == alone
    assert from_xpk_environment(given, XPK) == given


class KeyValueStore(dict):
    """The part of JAX's coordinator that processes compare themselves through."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, timeout_ms):
        return self[key]


def test_a_process_with_other_settings_or_another_version_than_the_first_is_refused(monkeypatch):
    from jax._src import distributed

    store, version = KeyValueStore(), re.escape(jax.__version__)
    monkeypatch.setattr(distributed.global_state, "client", store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    require_same_config({"train": {"steps": 3}})  # as process 0
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    require_same_config({"train": {"steps": 3}})
    with pytest.raises(UserError, match=r"^train\.steps is 4 in this process, 3 in process 0; use the same"):
        require_same_config({"train": {"steps": 4}})
    with pytest.raises(UserError, match=r"^train\.steps is not set in this process, 3 in process 0; use the same"):
        require_same_config({})
    monkeypatch.setattr(jax, "__version__", "0.1")
    with pytest.raises(UserError, match=rf'jax is "0\.1" in this process, "{version}" in process 0'):
        require_same_config({"train": {"steps": 3}})


def test_one_of_several_processes_that_were_stopped_leaves_with_a_status_of_its_own(monkeypatch):
    exit_if_stopped(complete=False)  # a process alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    exit_if_stopped(complete=True)
    with pytest.raises(SystemExit) as left:
        exit_if_stopped(complete=False)
    assert left.value.code == STOPPED == 143


def test_an_address_comes_with_the_number_of_processes_and_which_this_is():
    DistributedConfig("localhost:1234", 2, 1)
    with pytest.raises(UserError, match=r"distributed\.processes"):
        DistributedConfig("localhost:1234", process_id=0)
    with pytest.raises(UserError, match=r"distributed\.process_id = 2: must be in 0\.\.1"):
        DistributedConfig("localhost:1234", 2, 2)
