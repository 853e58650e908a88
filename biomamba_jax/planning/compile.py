"""Compiles a config's real train step for a machine that is not there, in a process of its own.

    python -m biomamba_jax.planning.compile CONFIG.yaml FOLDER        prints its findings as one line of JSON

FOLDER is where the compiler leaves the program's text (XLA_FLAGS says so too).

libtpu, or the CUDA plugin of jax, holds the real compiler; neither needs the hardware.
"""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from biomamba_jax.command_line import parse, to_yaml
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.errors import UserError
from biomamba_jax.planning.ahead_of_time import compiler_environment, tpu_devices
from biomamba_jax.planning.costs import Costs, KernelCall, program_costs
from biomamba_jax.planning.program import Collective, Work, read_program
from biomamba_jax.planning.topology import GPU_TARGETS, Topology, parse_topology

_PLUGIN = "jax_plugins.xla_cuda12"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: float32 weights.
      optimizer: moments, and the averaged weights where they are kept.
      kept: activations that the forward pass keeps for the backward pass.
      temporary: everything else that a step allocates, gradients among it; with `kept` what the compiler reports.
      rest: batch, counters, results.
    """

    parameters: int
    optimizer: int
    kept: int
    temporary: int
    rest: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.kept + self.temporary + self.rest


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a config, or why it made nothing.

    Attributes:
      mesh: size of each axis.
      memory: of one device; where the program is too large, as far as it is known.
      costs: of one device, from the trace.
      work: operations of the program, kernels apart.
      collectives: what devices exchange.
      refused: why config and machine do not go together.
      needed: bytes that one device would need, where that is more than it has; 0 if the compiler did not say.
      seconds: that the compiler took.
    """

    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: Memory = Memory(0, 0, 0, 0, 0)
    costs: Costs = dataclasses.field(default_factory=Costs)
    work: list[Work] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    refused: str | None = None
    needed: int | None = None
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.refused is None and self.needed is None


def check_compiler(topology: Topology) -> None:
    """
    Raises:
      UserError: the compiler for this machine is not installed.
    """
    if topology.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for TPU needs libtpu: pip install 'biomamba-jax[tpu-compiler]'")
    if not topology.is_tpu and (
        importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec(_PLUGIN) is None
    ):
        raise UserError("planning for GPU needs the CUDA plugin of jax: pip install 'biomamba-jax[gpu]'")


def compile_step(config: PlanConfig) -> Compiled:
    """Compiles the train step of `config`, whose vocabulary is known, for its topology.

    Raises:
      UserError: the compiler is not installed, took too long or broke.
    """
    check_compiler(parse_topology(config.topology, config.slices))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        environment = compiler_environment()
        environment["XLA_FLAGS"] += f" --xla_dump_to={folder} --xla_dump_hlo_as_text"
        try:
            child = subprocess.run(
                [sys.executable, "-m", "biomamba_jax.planning.compile", str(path), folder],
                capture_output=True,
                text=True,
                env=environment,
                timeout=config.limit_seconds,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"compiling for {config.topology}: not done after {config.limit_seconds:.0f} s") from None
    lines = [line for line in child.stdout.splitlines() if line.startswith('{"mesh"')]
    if child.returncode or not lines:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"compiling for {config.topology}: the compiler's process ended: {last}")
    return _from_json(lines[-1])


def _from_json(line: str) -> Compiled:
    found = json.loads(line)
    costs = found["costs"]
    return Compiled(
        **found
        | {
            "memory": Memory(**found["memory"]),
            "costs": Costs(**costs | {"kernels": [KernelCall(**kernel) for kernel in costs["kernels"]]}),
            "work": [Work(*item) for item in found["work"]],
            "collectives": [Collective(**item) for item in found["collectives"]],
        }
    )


def _to_json(compiled: Compiled) -> str:
    return json.dumps(dataclasses.asdict(compiled) | {"work": [dataclasses.astuple(item) for item in compiled.work]})


def _compile(config: PlanConfig, folder: Path) -> Compiled:
    """In the child."""
    import time

    import jax

    from biomamba_jax.ops import dispatch
    from biomamba_jax.parallel.mesh import make_mesh
    from biomamba_jax.train.program import pretrain_program

    topology = parse_topology(config.topology, config.slices)
    capability = None if topology.is_tpu else 90
    with dispatch.target_platform("tpu" if topology.is_tpu else "gpu", capability):
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
            if reason := _no_room_on_chip(str(error)):
                return Compiled(mesh=sizes, refused=reason)
            return Compiled(mesh=sizes, memory=Memory(parameters, optimizer, 0, 0, 0), needed=_needed(str(error)))
        seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None  # both compilers give it
    kept = min(int(costs.kept_bytes), analysis.temp_size_in_bytes)
    rest = analysis.argument_size_in_bytes - parameters - optimizer
    rest += analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.generated_code_size_in_bytes
    memory = Memory(parameters, optimizer, kept, analysis.temp_size_in_bytes - kept, rest)
    found = read_program(_text(compiled, folder), mesh.size, topology.slices)
    needed = memory.total if memory.total > topology.chip.memory_bytes else None
    return Compiled(sizes, memory, costs, found.work, found.collectives, None, needed, seconds)


def _text(compiled: Any, folder: Path) -> str:
    """The optimised program."""
    import jax

    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read some programs for TPUs with SparseCores; their text it can
        return max(folder.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()


def _devices(topology: Topology) -> Any:
    if topology.is_tpu:
        return tpu_devices(topology.compiler_name, topology.slices)
    from jax.experimental import topologies

    target = GPU_TARGETS[topology.generation]
    shape = topology.compiler_name
    return topologies.get_topology_desc(topology.generation, "cuda", target_config=target, topology=shape).devices


def _device_bytes(tree: Any) -> int:
    """Of one device's part of all arrays of a tree."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _no_room_on_chip(message: str) -> str | None:
    """Why an operation does not fit the chip's own memory, if that is the compiler's reason: a smaller batch helps
    nothing there."""
    space = re.search(r"memory space (vmem|smem|cmem|sflag)\b", message)
    if space is None:
        return None
    operation = re.search(r"while allocating on stack for %?([\w.\-]+)", message)
    name = operation[1] if operation else "an operation"
    return f"{name} needs more {space[1]}, the chip's own memory, than there is; mesh.tensor would divide what it holds"


def _needed(message: str) -> int:
    """Bytes that the compiler would have used, from its refusal; 0 where it does not say."""
    used = re.search(r"(?:Used |memory required [^(]*\()([\d.]+)([KMGT]?)i?B?(?: of|\))", message)
    return int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")) if used else 0


if __name__ == "__main__":
    given = parse(PlanConfig, ["--config", sys.argv[1]])
    print(_to_json(_compile(given, Path(sys.argv[2]))), flush=True)
