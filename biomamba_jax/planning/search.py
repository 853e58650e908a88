"""Searches settings of a config: the nearest that fits a machine; meshes and remat policies, ranked."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from biomamba_jax.config import MeshConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.model.flops import matrix_parameters, training_flops_per_token
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.topology import Topology

_POLICIES = ("none", "dots", "full")
_LARGEST_AXIS = 8  # of tensor and sequence in a search: larger axes are bound by the links inside a slice
Compiler = Callable[[PlanConfig], Compiled]


def describe(config: PlanConfig, base: PlanConfig) -> str:
    """Return the flags that turn `base` into `config`."""
    pairs = [
        ("model.remat", config.model.remat, base.model.remat),
        ("train.accumulation", config.train.accumulation, base.train.accumulation),
        ("data.batch_size", config.data.batch_size, base.data.batch_size),
        *(
            (f"mesh.{k}", getattr(config.mesh, k), getattr(base.mesh, k))
            for k in ("data", "fsdp", "tensor", "sequence")
        ),
    ]
    return " ".join(f"--{key} {now}" for key, now, before in pairs if now != before)


def resolved_mesh(config: PlanConfig, devices: int) -> MeshConfig:
    """Return the mesh with its -1 replaced, as far as the sizes divide."""
    known = math.prod(size for size in config.mesh.sizes if size != -1)
    sizes = [devices // known if size == -1 else size for size in config.mesh.sizes]
    return MeshConfig(*sizes)


def with_mesh(config: PlanConfig, mesh: MeshConfig, **model: Any) -> PlanConfig:
    """Return `config` with another mesh and changed fields of its model."""
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, **model))


# --- The nearest setting that fits -----------------------------------------------------------------------------------


def smaller_settings(config: PlanConfig, topology: Topology) -> Iterator[PlanConfig]:
    """Yield settings that need less memory, the nearest to `config` first.

    First more accumulation steps and recomputation, then FSDP over more devices, then a smaller batch.
    """
    mesh = resolved_mesh(config, topology.devices)
    policies = _POLICIES[_POLICIES.index(config.model.remat) :]
    across = mesh.data * mesh.fsdp
    most = max(config.data.batch_size // across, 1)
    seen: set[Any] = {(config.mesh, config.model.remat, config.train.accumulation, config.data.batch_size)}
    for fsdp in _doublings(mesh.fsdp, across // topology.slices):
        if across % fsdp or (across // fsdp) % topology.slices:
            continue
        sharded = dataclasses.replace(mesh, fsdp=fsdp, data=across // fsdp) if fsdp > mesh.fsdp else config.mesh
        for parts in _doublings(config.train.accumulation, most):
            if config.data.batch_size % (parts * across):
                continue
            train = dataclasses.replace(config.train, accumulation=parts)
            for policy in policies:
                yield from _new(seen, dataclasses.replace(with_mesh(config, sharded, remat=policy), train=train))
    rows = config.data.batch_size
    while rows > across and rows % 2 == 0:
        rows //= 2
        data = dataclasses.replace(config.data, batch_size=rows)
        train = dataclasses.replace(config.train, accumulation=max(rows // across, 1))
        least = dataclasses.replace(mesh, fsdp=across // topology.slices, data=topology.slices)
        if rows % (train.accumulation * across) == 0 and across % topology.slices == 0:
            smaller = dataclasses.replace(with_mesh(config, least, remat="full"), data=data, train=train)
            yield from _new(seen, smaller)


def _new(seen: set[Any], config: PlanConfig) -> Iterator[PlanConfig]:
    key = config.mesh, config.model.remat, config.train.accumulation, config.data.batch_size
    if key not in seen:
        seen.add(key)
        yield config


def _doublings(first: int, last: int) -> list[int]:
    return [first * 2**n for n in range(max(last // first, 1).bit_length())]


def nearest_fit(
    config: PlanConfig, topology: Topology, compile_: Compiler, tries: int
) -> tuple[PlanConfig, Compiled] | None:
    """Return the nearest of `smaller_settings` that fits, by bisection; None if the last one does not fit.

    Args:
      config: a setting that does not fit.
      topology: the machine.
      compile_: compiles a setting.
      tries: maximum number of compilations; with few the result may not be the nearest.
    """
    limit = topology.chip.memory_bytes
    settings = [s for s in smaller_settings(config, topology) if guessed_memory(s, topology) < limit]
    if not settings:
        return None
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
    found = []
    sizes = [n for n in _doublings(1, topology.devices) if topology.devices % n == 0]
    for tensor in (n for n in sizes if n <= _LARGEST_AXIS):
        for sequence in (n for n in sizes if n * tensor <= topology.devices // topology.slices and n <= _LARGEST_AXIS):
            across = topology.devices // (tensor * sequence)
            if config.data.batch_size % (across * config.train.accumulation):
                continue
            if config.data.sequence_length % sequence or config.model.d_inner % tensor:
                continue
            for fsdp in (n for n in sizes if across % n == 0 and (across // n) % topology.slices == 0):
                mesh = MeshConfig(across // fsdp, fsdp, tensor, sequence)
                found += [with_mesh(config, mesh, remat=policy) for policy in _POLICIES]
    limit = topology.chip.memory_bytes
    hopeful = [setting for setting in found if guessed_memory(setting, topology) < limit]
    return sorted(hopeful, key=lambda setting: guessed_seconds(setting, topology))


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
    sent = 0.0
    if mesh.data * mesh.sequence > 1:  # all-reduce of the gradients over both axes
        sent += 8 * weights / mesh.fsdp
    if mesh.fsdp > 1:
        sent += (2 + 2 + 4) * weights * config.train.accumulation
    if mesh.tensor > 1:  # two all-reduces of the residual stream per pass, on every device of the group
        sent += 4 * 2 * 4 * model.n_layers * tokens * mesh.tensor * model.d_model
    if mesh.sequence > 1:  # each row's state, in both passes, in log2 steps
        rows = config.data.batch_size / (mesh.data * mesh.fsdp)
        state = 4 * model.d_inner * model.state_size / mesh.tensor
        sent += 2 * math.log2(mesh.sequence) * rows * model.n_layers * state
    network = 8 * weights / mesh.fsdp / topology.kind.network if topology.slices > 1 else 0.0
    return compute + sent / topology.kind.link + network
