"""One program in the processes of several hosts: how they find each other, agree, and end together.

JAX's own runtime does the work: its coordinator knows all processes, notices one that dies by its missing heartbeat and
ends the others. Added here is what it leaves out: when to start it, the reason of a failure for everybody, and a check
that all run the same code with the same settings.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import biomamba_jax
from biomamba_jax.config import DistributedConfig
from biomamba_jax.errors import UserError

STOPPED = 128 + signal.SIGTERM
"""Exit status of each of several processes that were stopped before their end, whichever got the SIGTERM."""
_FAILURE = "biomamba_jax/failure"
_VERSIONS = "biomamba_jax/versions"
DATA_TIMEOUT = 24 * 3600
"""Seconds in which one process may do what all others wait for, such as preparing data."""
_TIMEOUT = 300  # seconds for what every process does at once
_LOOK_SECONDS = 2  # between two looks for a failure of another process


@contextlib.contextmanager
def processes(config: DistributedConfig) -> Iterator[bool]:
    """Joins the other processes of this run, if there are any, and ends together with them.

    Where one of several fails, its reason is printed by all and all exit with status 1, at once. Must come before
    anything else that uses JAX.

    Returns:
      Whether this is the first process, which alone writes what is shared.

    Raises:
      UserError: the others did not come within `config.start_timeout`, or nobody says where they are.
    """
    if not _start(from_xpk_environment(config, os.environ)):
        yield True
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    ended = threading.Event()
    threading.Thread(target=_follow_failures, args=(me, ended), name="follow-failures", daemon=True).start()
    try:
        yield jax.process_index() == 0
        wait_for_all("the end", within=DATA_TIMEOUT)
    except (Exception, KeyboardInterrupt) as error:
        # No clean end of JAX's runtime: it would wait for the others, and they for this one's part of a sum.
        ended.set()
        if not isinstance(error, UserError | KeyboardInterrupt):
            traceback.print_exc()
        _exit(f"{me} failed: {_one_line(error)}", publish=True)
    ended.set()
    jax.distributed.shutdown()


def _start(config: DistributedConfig) -> bool:
    """Starts JAX's runtime where this process is one of several; tells whether it is."""
    if not (config.coordinator or launched_with_others(os.environ)):
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
        what = config.coordinator or "the launcher's own settings"
        raise UserError(
            f"distributed: the processes did not meet through {what} within {config.start_timeout} s "
            f"({_one_line(error)[:200]}); check the address, and that all of them were started"
        ) from error
    return jax.process_count() > 1


def from_xpk_environment(config: DistributedConfig, environment: Mapping[str, str]) -> DistributedConfig:
    """The config with what xpk tells the pods of GPU nodes about each other, of which JAX reads a part only."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK")
    address, port, count, rank = (environment.get(name, "") for name in names)
    if config.coordinator or not (address and port and count and rank) or int(count) == 1:
        return config
    return dataclasses.replace(config, coordinator=f"{address}:{port}", processes=int(count), process_id=int(rank))


def launched_with_others(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX can ask started this process as one of several.

    JAX can ask Open MPI up to version 4, SLURM's srun, and the TPU hosts of GKE and Cloud TPU.

    Raises:
      UserError: an MPI that JAX cannot ask started this process as one of several: Open MPI 5, MPICH, Intel MPI.
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
    # A Cloud TPU VM names its hosts in its metadata, which JAX asks; on a single host that comes to one process.
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def _no_address(size: str, rank: str, environment: Mapping[str, str]) -> UserError:
    return UserError(
        f"distributed: this is one of {environment[size]} processes ({size}) of an MPI that does not tell JAX their "
        "address; give all of them --distributed.coordinator=HOST:PORT of the first, "
        f"--distributed.processes=${size} and --distributed.process_id=${rank}"
    )


def require_same_config(settings: Any) -> None:
    """Compares code and settings of all processes, so that a stale worker is found before it does harm.

    Args:
      settings: whatever JSON can hold.

    Raises:
      UserError: this process differs from process 0; says in what.
    """
    if jax.process_count() == 1:
        return
    mine = {
        "biomamba_jax": f"{biomamba_jax.__version__} (code {_code_digest()})",
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12],
    }
    if jax.process_index() == 0:
        _client().key_value_set(_VERSIONS, json.dumps(mine))
    theirs = json.loads(_client().blocking_key_value_get(_VERSIONS, _TIMEOUT * 1000))
    for name, value in mine.items():
        if theirs[name] != value:
            raise UserError(
                f"{name} is {value} here, {theirs[name]} in process 0; install the same version and give the same "
                "config everywhere"
            )


def wait_for_all(name: str, within: float) -> None:
    """A barrier: returns once all processes have come to it.

    Args:
      name: of this barrier alone.
      within: seconds.

    Raises:
      UserError: some did not come in time.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"biomamba_jax/{name}", int(within * 1000))
    except Exception as error:
        raise UserError(f"waited {within:,.0f} s for the other processes at {name!r}: {_one_line(error)}") from error


def exit_if_stopped(complete: bool) -> None:
    """Leaves with status `STOPPED` where this is one of several processes and they were asked to stop.

    One SIGTERM stops all, and only the process that got it would be known to have been stopped: what started the others
    must not take their run for finished. A process alone leaves with status 0. Must come after `processes`, whose end
    all wait for.

    Args:
      complete: whether the run came to its end.
    """
    if not complete and jax.process_count() > 1:
        raise SystemExit(STOPPED)


def _follow_failures(me: str, ended: threading.Event) -> None:
    """Ends this process when another one has published why it failed."""
    client = _client()
    while not ended.wait(_LOOK_SECONDS):
        try:
            reason = client.key_value_try_get(_FAILURE)
        except Exception:  # there is none yet
            continue
        if not ended.is_set():
            _exit(f"{me} ends: {reason}", publish=False)


def _exit(reason: str, publish: bool) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if publish:
        with contextlib.suppress(Exception):  # another one was first, or the coordinator is gone
            _client().key_value_set(_FAILURE, reason)
    if jax.process_index() == 0:  # which holds what was published: the others end first
        threading.Event().wait(2 * _LOOK_SECONDS)
    os._exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _client() -> Any:
    # JAX has no public name for its key-value store and barriers with time-outs; orbax uses this one too.
    from jax._src import distributed

    return distributed.global_state.client


def _code_digest() -> str:
    """A hash of the package's source files."""
    folder = Path(biomamba_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
