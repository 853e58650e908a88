"""Compiling for TPUs that are not there: what the real compiler says about memory, cycles and inner loops.

libtpu compiles for any topology on a CPU-only machine. Its figures are estimates: `static_cycles` walks the final
schedule of a kernel with loops unrolled and leaves out waiting for memory. Every set of compiler flags needs a process
of its own, since they are read once, and the compiler may abort: all of it happens in children, which run this module
with requests on their standard input.
"""

import dataclasses
import glob
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from biomamba_jax.errors import UserError
from biomamba_jax.planning.cycles import kernel_cycles, other_cycles

_CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud machine's metadata server for its TPUs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process fails on libtpu's lock file
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def compiler_environment() -> dict[str, str]:
    """This process's environment for one that compiles for absent devices.

    Without XLA's flags for CPUs: libtpu does not know them all, and ends the process at one that it does not.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu_")]
    return os.environ | _CHILD_ENVIRONMENT | {"XLA_FLAGS": " ".join(flags)}


def tpu_devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of TPUs that are not there, for instance "v5e:4x4"; needs libtpu and `compiler_environment`."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:  # older libtpu expect a host of 2 x 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


@dataclasses.dataclass(frozen=True)
class Request:
    """One program for one topology.

    Attributes:
      topology: as libtpu names it, for instance "v5e:2x2".
      builder: "module:function"; called with `arguments` and the topology's devices it returns (function, arguments),
        the latter a tuple of trees of `jax.ShapeDtypeStruct`; without a sharding they lie on the first device.
      arguments: for the builder; plain JSON values.
    """

    topology: str
    builder: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says about one program.

    Attributes:
      argument_bytes: of one device's arguments, as they lie in its memory.
      output_bytes: of its results.
      temporary_bytes: of everything else it allocates.
      static_cycles: of each Pallas call by name, if the profile was asked for.
      xla_cycles: XLA's own model of all other operations, loops multiplied by their trip counts; up to a few times too
        high. None where a loop does not tell how often it runs.
      error: the compiler's words where it refused the program; all else is 0 then.
    """

    argument_bytes: int = 0
    output_bytes: int = 0
    temporary_bytes: int = 0
    static_cycles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    xla_cycles: int | None = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel: VLIW bundles of one turn, and the share of each kind of slot that they fill."""

    kernel: str
    bundles: int
    filled: Mapping[str, float]


def estimates(requests: Sequence[Request], *, profile: bool = False, timeout: float = 600) -> list[Estimate]:
    """Compiles all programs in one child process.

    Args:
      profile: ask for `static_cycles`: for v5e, v6e and v5p only, in programs with little besides Pallas calls.
      timeout: seconds until the child is ended.

    Raises:
      UserError: libtpu is missing, or the child ended before its work was done.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run(requests, f"--xla_jf_dump_static_llo_profile_to={folder}" if profile else "", timeout)


def inner_loops(request: Request, *, timeout: float = 600) -> list[Loop]:
    """The innermost loops of all Pallas calls of a program, in order. Errors as `estimates`."""
    with tempfile.TemporaryDirectory() as folder:
        _run([request], f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true", timeout)
        return _read_loops(folder)


def _run(requests: Sequence[Request], flags: str, timeout: float) -> list[Estimate]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPU needs libtpu: pip install 'biomamba-jax[tpu-compiler]'")
    environment = compiler_environment() | {"LIBTPU_INIT_ARGS": flags}
    words = json.dumps([dataclasses.asdict(request) for request in requests])
    try:
        child = subprocess.run(
            [sys.executable, "-m", "biomamba_jax.planning.ahead_of_time"],
            input=words,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"compiling for TPU: not done after {timeout:.0f} s") from None
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode or len(lines) < len(requests):
        done = f"{len(lines)} of {len(requests)} programs"
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"compiling for TPU: the compiler's process ended after {done}: {last}")
    return [Estimate(**json.loads(line)) for line in lines]


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
    assert memory is not None and text is not None  # the TPU compiler gives both
    return Estimate(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        static_cycles=kernel_cycles(text),
        xla_cycles=other_cycles(text),
    )


def _read_loops(folder: str) -> list[Loop]:
    """From the compiler's text dump: `*-final_bundles.txt` and the table of slots beside it."""
    loops = []
    for path in sorted(glob.glob(f"{folder}/*-final_bundles.txt")):
        kernel = re.match(r"\d+-(.*)-\d+-final_bundles", os.path.basename(path))
        tables = glob.glob(re.sub(r"-\d+-final_bundles.txt", "-*-final_hlo-static-per-bundle-utilization.txt", path))
        if kernel is None or not tables or re.search(r"schedule-analysis|late-|TLP", path):
            continue
        names, rows = _read_slots(tables[0])
        capacity, used = rows[0], rows[1:]
        with open(path) as f:
            parsed = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2})?)\s*:\s*((?:>\s*)*)\{", f.read(), re.MULTILINE)
        # The grid is the outer loop: a body two deep is a loop inside the kernel.
        depth = [marks.count(">") for _, marks in parsed]
        starts = [i for i, (label, _) in enumerate(parsed) if label == "LB" and depth[i] >= 2]
        for start in starts:
            stop = next((i for i in range(start + 1, len(parsed)) if depth[i] != depth[start]), len(parsed))
            sums = [sum(column) for column in zip(*used[start:stop], strict=True)]
            filled = {n: s / (c * (stop - start)) for n, s, c in zip(names, sums, capacity, strict=True) if s}
            loops.append(Loop(kernel[1], stop - start, filled))
    return loops


def _read_slots(path: str) -> tuple[list[str], list[list[int]]]:
    with open(path) as f:
        lines = f.read().splitlines()
    names = next([name.strip() for name in line.split(",")] for line in lines if "MATMUL" in line)
    return names, [list(map(int, line.split())) for line in lines if re.fullmatch(r"[\d ]+", line.strip() or "-")]


if __name__ == "__main__":
    for words in json.load(sys.stdin):
        print(json.dumps(dataclasses.asdict(_compile(Request(**words)))), flush=True)
