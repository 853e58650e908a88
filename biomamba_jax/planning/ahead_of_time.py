"""Compiles for TPUs that are not attached: the real compiler's figures for memory and cycles.

libtpu compiles for any topology on a CPU-only machine. Its figures are estimates: `static_cycles` walks the static
schedule of a kernel with loops unrolled and leaves out stalls on memory. libtpu reads its flags once per process and
may abort, so everything is compiled in child processes, which run this module.
"""

import dataclasses
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomamba_jax.errors import UserError
from biomamba_jax.planning.cycles import kernel_cycles, other_cycles

_CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not query a cloud machine's metadata server for its TPUs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process fails on libtpu's lock file
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def require_compiler(tpu: bool) -> None:
    """Raise UserError if the compiler for TPUs, or the one for GPUs, is not installed."""
    package, extra = ("libtpu", "tpu-compiler") if tpu else ("jax_cuda12_plugin", "gpu")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"compiling for {'TPU' if tpu else 'GPU'} needs {package}: pip install 'biomamba-jax[{extra}]'")


def compiler_environment() -> dict[str, str]:
    """Return this process's environment, changed for a process that compiles for absent devices.

    XLA's flags for CPUs are dropped: libtpu aborts at a flag that it does not know.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu_")]
    return os.environ | _CHILD_ENVIRONMENT | {"XLA_FLAGS": " ".join(flags)}


def run_in_child(
    function: Callable[..., Any], *arguments: Any, subject: str, timeout: float, environment: Mapping[str, str]
) -> Any:
    """Return `function(*arguments)`, computed in a new process.

    Args:
      function: a function at the top level of a module.
      *arguments: its arguments; like the result they are pickled.
      subject: what is being done, for error messages.
      timeout: seconds after which the child is ended.
      environment: environment variables of the child.

    Raises:
      UserError: the child took too long or ended before its work was done.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [sys.executable, "-m", "biomamba_jax.planning.ahead_of_time", str(result)]
        words = pickle.dumps((function, arguments))
        try:
            child = subprocess.run(command, input=words, capture_output=True, env=environment, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"{subject}: not done after {timeout:.0f} s") from None
        if child.returncode:
            last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{subject}: the compiler's process ended: {last}")
        return pickle.loads(result.read_bytes())


def tpu_devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """Return the devices of an absent TPU, for instance "v5e:4x4"; needs libtpu and `compiler_environment`."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:  # older libtpu expect a host of 2 x 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


@dataclasses.dataclass(frozen=True)
class Request:
    """One program for one topology."""

    topology: str
    """As libtpu names it, for instance "v5e:2x2"."""
    builder: str
    """"module:function"; called with `arguments` and the topology's devices it returns (function, arguments), the
    arguments as a tuple of trees of `jax.ShapeDtypeStruct`; those without a sharding are placed on the first device."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the builder."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's figures for one program on one device."""

    argument_bytes: int = 0
    """Bytes of the arguments in device memory, padding included."""
    output_bytes: int = 0
    """Bytes of the results."""
    temporary_bytes: int = 0
    """Bytes of everything else that is allocated."""
    static_cycles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Cycles of each Pallas call by name, if the static profile was requested."""
    xla_cycles: int | None = 0
    """XLA's cost model of all other operations, loops multiplied by their trip counts; up to a few times too high.
    None if the trip count of a loop is unknown."""
    error: str | None = None
    """The compiler's message if it refused the program; all figures are 0 then."""


def estimates(
    requests: Sequence[Request], *, profile: bool = False, timeout: float = 600, flags: str = ""
) -> list[Estimate]:
    """Compile all programs in one child process.

    Args:
      requests: the programs.
      profile: compute `static_cycles`: for v5e, v6e and v5p only, in programs with little else than Pallas calls.
      timeout: seconds after which the child is ended.
      flags: further flags for libtpu.

    Raises:
      UserError: libtpu is missing, or the child ended before its work was done.
    """
    require_compiler(tpu=True)
    with tempfile.TemporaryDirectory() as folder:
        if profile:
            flags = f"--xla_jf_dump_static_llo_profile_to={folder} {flags}"
        environment = compiler_environment() | {"LIBTPU_INIT_ARGS": flags}
        return run_in_child(
            _compile_all, list(requests), subject="compiling for TPU", timeout=timeout, environment=environment
        )


def _compile_all(requests: Sequence[Request]) -> list[Estimate]:
    return [_compile(request) for request in requests]


def _compile(request: Request) -> Estimate:
    import jax

    from biomamba_jax.ops import dispatch

    devices = tpu_devices(request.topology)
    module, function_name = request.builder.split(":")
    build = getattr(importlib.import_module(module), function_name)
    first = jax.sharding.SingleDeviceSharding(devices[0])

    def place(v):
        return v if v.sharding is not None else jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=first)

    with dispatch.target_platform("tpu"):
        function, arguments = build(devices=devices, **request.arguments)
        try:
            compiled = jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()
        except jax.errors.JaxRuntimeError as e:
            return Estimate(error=str(e).splitlines()[0])
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # the TPU compiler reports both
    return Estimate(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        static_cycles=kernel_cycles(text),
        xla_cycles=other_cycles(text),
    )


if __name__ == "__main__":
    called, its_arguments = pickle.load(sys.stdin.buffer)
    Path(sys.argv[1]).write_bytes(pickle.dumps(called(*its_arguments)))
