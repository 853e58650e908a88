"""Compiles a config's training step for an absent machine, in a child process.

libtpu and jax's CUDA plugin contain the real compilers; neither needs the hardware.
"""

import dataclasses
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.parallel.mesh import make_mesh
from biomamba_jax.planning.ahead_of_time import compiler_environment, require_compiler, run_in_child, tpu_devices
from biomamba_jax.planning.costs import Costs, Operation, program_costs
from biomamba_jax.planning.links import Places
from biomamba_jax.planning.program import Program
from biomamba_jax.planning.schedule import Collective, Schedule, collectives, operations
from biomamba_jax.planning.topology import Topology, parse_topology
from biomamba_jax.train.program import pretrain_program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes."""

    parameters: int = 0
    """Float32 weights."""
    optimizer: int = 0
    """Moments, and the averaged weights if they are enabled."""
    kept: int = 0
    """Activations that the forward pass saves for the backward pass."""
    temporary: int = 0
    """All other temporary buffers of a step, gradients included; with `kept` the size that the compiler reports."""
    rest: int = 0
    """Batch, counters, results."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.optimizer + self.kept + self.temporary + self.rest


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled training step, or the reason why there is none."""

    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    """Size of each mesh axis."""
    memory: Memory = Memory()
    """Memory of one device; if the program is too large, as far as it is known."""
    costs: Costs = dataclasses.field(default_factory=Costs)
    """Costs on one device, from the jaxpr."""
    schedule: Schedule = ()
    """Items that a device runs, in order."""
    refused: str | None = None
    """Why config and machine do not go together."""
    needed: int | None = None
    """Bytes that one device would need, if that is more than it has; 0 if the compiler did not say."""
    seconds: float = 0.0
    """Compile time."""

    @property
    def work(self) -> list[Operation]:
        """Operations of the compiled program other than kernels."""
        return operations(self.schedule)

    @property
    def collectives(self) -> list[Collective]:
        """Collectives of the compiled program, each kind and shape once."""
        return collectives(self.schedule)

    @property
    def fits(self) -> bool:
        """True if the program compiled and fits device memory."""
        return self.refused is None and self.needed is None


def compile_step(config: PlanConfig) -> Compiled:
    """Compile the training step of `config`, whose vocabulary is known, for its topology.

    Raises:
      UserError: the compiler is not installed, took too long or broke.
    """
    require_compiler(parse_topology(config.topology, config.slices).is_tpu)
    with tempfile.TemporaryDirectory() as folder:
        environment = compiler_environment()
        environment["XLA_FLAGS"] += f" --xla_dump_to={folder} --xla_dump_hlo_as_text"
        subject = f"compiling for {config.topology}"
        return run_in_child(
            _compile, config, Path(folder), subject=subject, timeout=config.limit_seconds, environment=environment
        )


def _compile(config: PlanConfig, folder: Path) -> Compiled:
    """Compile in the child process; the compiler dumps the program's text into `folder`."""
    topology = parse_topology(config.topology, config.slices)
    platform = ("tpu", None) if topology.is_tpu else ("gpu", 90)
    with dispatch.target_platform(*platform):
        try:
            mesh = make_mesh(config.mesh, _devices(topology))
            program = pretrain_program(config, mesh, config.train.steps or 1000)
        except UserError as refusal:
            return Compiled(refused=str(refusal))
        sizes = dict(mesh.shape)
        parameters, optimizer = (_device_bytes(tree) for tree in (program.state.params, program.state.optimizer))
        start = time.perf_counter()
        try:
            traced = program.step.trace(program.state, program.batch)
            costs = program_costs(traced.jaxpr, mesh.size, config.model.n_layers)
            compiled = traced.lower().compile()
        except UserError as refusal:
            return Compiled(mesh=sizes, refused=str(refusal))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if reason := _on_chip_shortage(str(error)):
                return Compiled(mesh=sizes, refused=reason)
            return Compiled(mesh=sizes, memory=Memory(parameters, optimizer), needed=_needed(str(error)))
        seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None  # both compilers report it
    kept = min(int(costs.saved_bytes), analysis.temp_size_in_bytes)
    rest = analysis.argument_size_in_bytes - parameters - optimizer
    rest += analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.generated_code_size_in_bytes
    memory = Memory(parameters, optimizer, kept, analysis.temp_size_in_bytes - kept, rest)
    places = Places.of_devices(list(mesh.devices.flat), topology)
    schedule = Program(_text(compiled, folder), places).schedule
    needed = memory.total if memory.total > topology.chip.memory_bytes else None
    return Compiled(sizes, memory, costs, schedule, None, needed, seconds)


def _text(compiled: Any, folder: Path) -> str:
    """Return the text of the optimized program."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # jaxlib fails on some programs for TPUs with SparseCores; their dump exists
        return max(folder.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()


def _devices(topology: Topology) -> Any:
    if topology.is_tpu:
        return tpu_devices(topology.compiler_name, topology.slices)
    options = {"target_config": Path(__file__).with_name(f"{topology.generation}.textproto").read_text()}
    return topologies.get_topology_desc(topology.generation, "cuda", topology=topology.compiler_name, **options).devices


def _device_bytes(tree: Any) -> int:
    """Return the bytes of one device's shards of all arrays of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _on_chip_shortage(message: str) -> str | None:
    """Return why an operation exceeds on-chip memory, which a smaller batch does not change; None if none does."""
    space = re.search(r"memory space (vmem|smem|cmem|sflag)\b", message)
    if space is None:
        return None
    operation = re.search(r"while allocating on stack for %?([\w.\-]+)", message)
    name = operation[1] if operation else "an operation"
    return f"{name} needs more on-chip memory ({space[1]}) than there is; mesh.tensor divides what it holds"


def _needed(message: str) -> int:
    """Return the bytes that a refused program would have used; 0 if the message does not say."""
    used = re.search(r"(?:Used |memory required [^(]*\()([\d.]+)([KMGT]?)i?B?(?: of|\))", message)
    return int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")) if used else 0
