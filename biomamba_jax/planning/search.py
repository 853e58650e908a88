"""Searches settings of a config: the nearest that fits a machine; meshes and remat policies, ranked."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from biomamba_jax.config import MeshConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.model.flops import matrix_parameters, training_flops_per_token
from biomamba_jax.parallel.mesh import AXES
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.topology import Topology

POLICIES = ("none", "dots", "full")
"""Remat policies, the one that recomputes least first."""
_CHANGED = ("model.remat", "train.accumulation", "data.batch_size", *(f"mesh.{axis}" for axis in AXES))
_LARGEST_AXIS = 8  # of tensor and sequence in a search: larger axes are bound by the links inside a slice


def describe(config: PlanConfig, base: PlanConfig) -> str:
    """Return the flags that turn `base` into `config`."""
    values = ((key, operator.attrgetter(key)) for key in _CHANGED)
    return " ".join(f"--{key} {get(config)}" for key, get in values if get(config) != get(base))


def resolved_mesh(config: PlanConfig, devices: int) -> MeshConfig:
    """Return the mesh with its -1 replaced, as far as the sizes divide."""
    known = math.prod(size for size in config.mesh.sizes if size != -1)
    return MeshConfig(*(devices // known if size == -1 else size for size in config.mesh.sizes))


def with_mesh(config: PlanConfig, mesh: MeshConfig, **model: Any) -> PlanConfig:
    """Return `config` with another mesh and changed fields of its model."""
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, **model))


def remat_policies(config: PlanConfig, topology: Topology) -> list[PlanConfig]:
    """Return `config` with each remat policy that may fit, the one that recomputes least first; at least the last."""
    settings = [with_mesh(config, config.mesh, remat=policy) for policy in POLICIES]
    return _hopeful(settings[:-1], topology) + settings[-1:]


# --- The nearest setting that fits -----------------------------------------------------------------------------------


def smaller_settings(config: PlanConfig, topology: Topology) -> list[PlanConfig]:
    """Return settings that need less memory, the nearest to `config` first.

    First more accumulation steps and recomputation, then FSDP over more devices, then a smaller batch.
    """
    found = {describe(config, config): config}
    for setting in _smaller_settings(config, topology):
        found.setdefault(describe(setting, config), setting)
    return list(found.values())[1:]


def _smaller_settings(config: PlanConfig, topology: Topology) -> Iterator[PlanConfig]:
    mesh, rows = resolved_mesh(config, topology.devices), config.data.batch_size
    across = mesh.data * mesh.fsdp
    for fsdp in _doublings(mesh.fsdp, across // topology.slices):
        if across % fsdp or (across // fsdp) % topology.slices:
            continue
        sharded = dataclasses.replace(mesh, fsdp=fsdp, data=across // fsdp) if fsdp > mesh.fsdp else config.mesh
        for parts in _doublings(config.train.accumulation, rows // across):
            if rows % (parts * across):
                continue
            train = dataclasses.replace(config.train, accumulation=parts)
            for policy in POLICIES[POLICIES.index(config.model.remat) :]:
                yield dataclasses.replace(with_mesh(config, sharded, remat=policy), train=train)
    if across % topology.slices:
        return
    least = dataclasses.replace(mesh, fsdp=across // topology.slices, data=topology.slices)
    while rows > across and rows % 2 == 0:
        rows //= 2
        data = dataclasses.replace(config.data, batch_size=rows)
        train = dataclasses.replace(config.train, accumulation=max(rows // across, 1))
        if rows % (train.accumulation * across) == 0:
            yield dataclasses.replace(with_mesh(config, least, remat="full"), data=data, train=train)


def _doublings(first: int, last: int) -> list[int]:
    return [first * 2**n for n in range(max(last // first, 1).bit_length())]


def nearest_fit(
    config: PlanConfig, topology: Topology, compile_: Callable[[PlanConfig], Compiled], tries: int
) -> tuple[PlanConfig, Compiled] | None:
    """Return the nearest of `smaller_settings` that fits, by bisection; None if the last one does not fit.

    Args:
      config: a setting that does not fit.
      topology: the machine.
      compile_: compiles a setting.
      tries: maximum number of compilations; with few the result may not be the nearest.
    """
    settings = _hopeful(smaller_settings(config, topology), topology)
    found: tuple[PlanConfig, Compiled] | None = None
    for _ in range(tries):
        if not settings:
            break
        middle = (len(settings) - 1) // 2 if found else len(settings) - 1
        compiled = compile_(settings[middle])
        if compiled.refused is not None:  # which says nothing about memory
            del settings[middle]
        elif compiled.fits:
            found, settings = (settings[middle], compiled), settings[:middle]
        elif found is None:
            break
        else:
            settings = settings[middle + 1 :]
    return found


# --- Meshes and remat policies worth comparing -----------------------------------------------------------------------


def search_settings(config: PlanConfig, topology: Topology) -> list[PlanConfig]:
    """Return all meshes and remat policies that the batch and the machine allow, the most promising first.

    The order comes from rough formulas; it only decides what is compiled.
    """
    sizes = [n for n in _doublings(1, topology.devices) if topology.devices % n == 0]
    found = [
        with_mesh(config, MeshConfig(data, fsdp, tensor, sequence), remat=policy)
        for tensor, sequence, fsdp in itertools.product(sizes, repeat=3)
        if max(tensor, sequence) <= _LARGEST_AXIS and topology.devices % (tensor * sequence * fsdp) == 0
        if (data := topology.devices // (tensor * sequence * fsdp)) % topology.slices == 0
        if config.data.batch_size % (data * fsdp * config.train.accumulation) == 0
        if config.data.sequence_length % sequence == 0 and config.model.d_inner % tensor == 0
        for policy in POLICIES
    ]
    return sorted(_hopeful(found, topology), key=lambda setting: guessed_seconds(setting, topology))


def _hopeful(settings: Sequence[PlanConfig], topology: Topology) -> list[PlanConfig]:
    return [setting for setting in settings if guessed_memory(setting, topology) < topology.chip.memory_bytes]


def guessed_memory(config: PlanConfig, topology: Topology) -> float:
    """Return a rough size of weights, moments, gradients and saved activations in bytes of one device."""
    mesh, model = resolved_mesh(config, topology.devices), config.model
    copies = 4 + (config.optimizer.ema > 0)
    state = 4 * copies * matrix_parameters(model) / (mesh.fsdp * mesh.tensor)
    rows = config.data.batch_size / (config.train.accumulation * mesh.data * mesh.fsdp)
    tokens = rows * config.data.sequence_length / mesh.sequence
    kept = {"none": 16 * model.d_inner, "dots": 6 * model.d_inner, "full": 0}[model.remat] / mesh.tensor
    return state + tokens * model.n_layers * (kept + 4 * model.d_model)


def guessed_seconds(config: PlanConfig, topology: Topology) -> float:
    """Return a rough time of one step, to rank settings before they are compiled."""
    mesh, model = resolved_mesh(config, topology.devices), config.model
    tokens = config.data.batch_size * config.data.sequence_length / topology.devices
    again = {"none": 1.0, "dots": 1.1, "full": 4 / 3}[model.remat]
    compute = again * tokens * training_flops_per_token(model) / topology.chip.flops["bfloat16"]
    weights = matrix_parameters(model) / mesh.tensor

    def exchange(sent: float, devices: int) -> float:
        """Return the seconds of `sent` bytes among so many devices, which have the links of one axis or of several."""
        axes = len(topology.shape) * math.log(devices, max(topology.devices // topology.slices, 2))
        return sent / (topology.kind.link * (2 * max(round(axes), 1) if topology.is_tpu else 1))

    seconds = compute
    if mesh.data * mesh.sequence > 1:  # all-reduce of the gradients over both axes
        seconds += exchange(8 * weights / mesh.fsdp, mesh.data * mesh.sequence)
    if mesh.fsdp > 1:
        seconds += exchange((2 + 2 + 4) * weights * config.train.accumulation, mesh.fsdp)
    if mesh.tensor > 1:  # two all-reduces of the residual stream per pass, on every device of the group
        seconds += exchange(4 * 2 * 4 * model.n_layers * tokens * mesh.tensor * model.d_model, mesh.tensor)
    if mesh.sequence > 1:  # each row's state, in both passes, in log2 steps
        rows = config.data.batch_size / (mesh.data * mesh.fsdp)
        state = 4 * model.d_inner * model.state_size / mesh.tensor
        seconds += exchange(2 * math.log2(mesh.sequence) * rows * model.n_layers * state, mesh.sequence)
    if topology.slices > 1:
        seconds += 8 * weights / mesh.fsdp / topology.kind.network
    return seconds
