"""Multi-host start-up: one program in several processes, which start, agree and end together.

JAX's distributed runtime does the work: its coordinator knows all processes, detects a dead one by its missing
heartbeat and ends the others. This module adds when to start it, the reason of a failure on every process, and a check
that all run the same code with the same settings.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

import biomamba_jax
from biomamba_jax import files
from biomamba_jax.config import DistributedConfig, RunConfig
from biomamba_jax.errors import UserError

STOPPED = 128 + signal.SIGTERM
"""Exit status of every process of a multi-process run that was stopped early, whichever got the SIGTERM."""
_FAILURE = "biomamba_jax/failure"
DATA_TIMEOUT = 24 * 3600
"""Seconds that processes wait for the one that prepares the data."""
_TIMEOUT = 300  # seconds for what all processes do at the same time
_POLL_SECONDS = 2  # between checks for a failure of another process
# What Gloo, NCCL and JAX's coordinator say when a process has gone.
_PEER_LOST = re.compile("(closed|reset) by peer|remote process|heartbeat|coordination|unavailable", re.IGNORECASE)


@contextlib.contextmanager
def processes(config: RunConfig) -> Iterator[bool]:
    """Run the block together with the other processes of this run, if there are any.

    If one of them fails, all print its reason and exit with status 1 at once. Must come before any other use of JAX.

    Args:
      config: the run, whose settings must be the same in all processes; how they find each other may differ.

    Yields:
      True in the first process, which alone writes shared files.

    Raises:
      UserError: the others did not start within `distributed.start_timeout`, or their address is not known.
    """
    if not _start(from_xpk_environment(config.distributed, os.environ)):
        yield True
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    ended = threading.Event()
    threading.Thread(target=_watch_for_failures, args=(me, ended), name="watch-for-failures", daemon=True).start()
    try:
        require_same_config(dataclasses.asdict(dataclasses.replace(config, distributed=DistributedConfig())))
        with files.naming_full_disks(config.run_dir, "free space, then run the same command again"):
            yield jax.process_index() == 0
        barrier("the end", timeout=DATA_TIMEOUT)
    except (Exception, KeyboardInterrupt) as error:
        # JAX's runtime is not shut down: it would wait for the others, and they for this process in a collective.
        ended.set()
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEER_LOST.search(str(error)):
            _exit(f"{me} lost another process, whose own output says why ({_one_line(error)[:200]})", publish=True)
        if not isinstance(error, UserError | KeyboardInterrupt):
            traceback.print_exc()
        _exit(f"{me} failed: {_one_line(error)}", publish=True)
    ended.set()
    jax.distributed.shutdown()


def _start(config: DistributedConfig) -> bool:
    """Start JAX's runtime if this process is one of several; return True if it is."""
    if not (config.coordinator or is_multiprocess_launch(os.environ)):
        return False
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=_TIMEOUT,
        )
    except Exception as error:
        address = config.coordinator or "the launcher's settings"
        raise UserError(
            f"distributed: the processes did not connect through {address} within {config.start_timeout} s "
            f"({_one_line(error)[:200]}); check the address, and that all of them were started"
        ) from error
    return jax.process_count() > 1


def from_xpk_environment(config: DistributedConfig, environment: Mapping[str, str]) -> DistributedConfig:
    """Return the config with the addresses that xpk gives to pods of GPU nodes, which JAX does not read whole."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK")
    address, port, count, rank = (environment.get(name, "") for name in names)
    if config.coordinator or not (address and port and count and rank) or int(count) == 1:
        return config
    return dataclasses.replace(config, coordinator=f"{address}:{port}", processes=int(count), process_id=int(rank))


def is_multiprocess_launch(environment: Mapping[str, str]) -> bool:
    """Return True if a launcher that JAX supports started this process as one of several.

    JAX supports Open MPI up to version 4, SLURM's srun, and the TPU hosts of GKE and Cloud TPU.

    Raises:
      UserError: an MPI that JAX does not support started it as one of several: Open MPI 5, MPICH, Intel MPI.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        several = int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
        if several and "OMPI_MCA_orte_hnp_uri" not in environment:
            raise _no_address("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", environment)
        return several
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if int(environment.get("PMI_SIZE") or 1) > 1:
        raise _no_address("PMI_SIZE", "PMI_RANK", environment)
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    if "TPU_WORKER_HOSTNAMES" in environment:
        return "," in environment["TPU_WORKER_HOSTNAMES"]
    # A Cloud TPU VM lists its hosts in its metadata, which JAX reads; a single host has one process.
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def _no_address(size: str, rank: str, environment: Mapping[str, str]) -> UserError:
    return UserError(
        f"distributed: this is one of {environment[size]} processes ({size}) of an MPI that does not give JAX their "
        "address; give all of them --distributed.coordinator=HOST:PORT of the first, "
        f"--distributed.processes=${size} and --distributed.process_id=${rank}"
    )


def require_same_config(settings: Mapping[str, Any]) -> None:
    """Compare code, versions and settings of all processes, so that a stale worker is found at the start.

    Args:
      settings: JSON values, nested.

    Raises:
      UserError: this process differs from process 0; names the differences.
    """
    if jax.process_count() == 1:
        return
    versions = {
        "biomamba_jax": f"{biomamba_jax.__version__} (code {_code_digest()})",
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    require_same("config", versions | flatten_dict(settings, sep="."))


def require_same(what: str, values: Mapping[str, Any]) -> None:
    """Compare values of all processes with those of process 0.

    Args:
      what: unique name of the comparison.
      values: JSON values by what they are, for messages.

    Raises:
      UserError: this process differs from process 0; names both values of the first differences.
    """
    if jax.process_count() == 1:
        return
    mine = {name: json.dumps(value, default=str) for name, value in values.items()}
    if jax.process_index() == 0:
        _client().key_value_set(f"biomamba_jax/{what}", json.dumps(mine))
    theirs = json.loads(_client().blocking_key_value_get(f"biomamba_jax/{what}", _TIMEOUT * 1000))
    different = [
        f"{name} is {mine.get(name, 'not set')} in this process, {theirs.get(name, 'not set')} in process 0"
        for name in [*mine, *(theirs.keys() - mine)]
        if mine.get(name) != theirs.get(name)
    ]
    if different:
        rest = "; ..." if len(different) > 3 else ""
        raise UserError(f"{'; '.join(different[:3])}{rest}; use the same version, config and data everywhere")


def barrier(name: str, timeout: float) -> None:
    """Return once all processes have reached the barrier.

    Args:
      name: unique name of the barrier.
      timeout: seconds.

    Raises:
      UserError: a process did not reach it in time.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"biomamba_jax/{name}", int(timeout * 1000))
    except Exception as error:
        raise UserError(f"waited {timeout:,.0f} s for the other processes at {name!r}: {_one_line(error)}") from error


def exit_if_stopped(complete: bool) -> None:
    """Exit with status `STOPPED` if this is one of several processes and the run was stopped early.

    One SIGTERM stops all processes; the launchers of those that did not get it must not take the run for finished. A
    single process exits with status 0. Must come after `processes`, whose end all wait for.

    Args:
      complete: True if the run reached its end.
    """
    if not complete and jax.process_count() > 1:
        raise SystemExit(STOPPED)


def _watch_for_failures(me: str, ended: threading.Event) -> None:
    """End this process when another one has published why it failed."""
    client = _client()
    while not ended.wait(_POLL_SECONDS):
        try:
            reason = client.key_value_try_get(_FAILURE)
        except Exception:  # no failure so far
            continue
        if not ended.is_set():
            _exit(f"{me} exits: {reason}", publish=False)


def _exit(reason: str, publish: bool) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if publish:
        with contextlib.suppress(Exception):  # another process was first, or the coordinator is gone
            _client().key_value_set(_FAILURE, reason)
    if jax.process_index() == 0:  # the coordinator, which serves the reason to the others: they exit first
        threading.Event().wait(2 * _POLL_SECONDS)
    os._exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _client() -> Any:
    # JAX has no public API for its key-value store and barriers with timeouts; orbax uses this one too.
    from jax._src import distributed

    return distributed.global_state.client


def _code_digest() -> str:
    """Return a hash of the package's source files."""
    folder = Path(biomamba_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
