"""Searches settings of a config: the nearest that fits a machine; the fastest on it."""

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
from biomamba_jax.planning.topology import HOP, Topology

POLICIES = ("none", "dots", "full")
"""Remat policies, the one that recomputes least first."""
CHANGES_RESULTS = ("train.reduce_dtype", "data.batch_size")
"""Keys of settings that change what a step computes."""
_CHANGED = (
    *("model.remat", "train.accumulation", "train.offload_collectives", *CHANGES_RESULTS),
    *(f"mesh.{axis}" for axis in AXES),
)
_LARGEST_AXIS = 8  # of tensor and sequence in a search: larger axes are bound by the links inside a slice


def describe(config: PlanConfig, base: PlanConfig) -> str:
    """Return the flags that turn `base` into `config`."""
    return " ".join(f"--{key} {operator.attrgetter(key)(config)}".lower() for key in changed(config, base))


def changed(config: PlanConfig, base: PlanConfig, keys: Sequence[str] = _CHANGED) -> list[str]:
    """Return those of `keys` whose values differ."""
    return [key for key in keys if operator.attrgetter(key)(config) != operator.attrgetter(key)(base)]


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


# --- Settings worth comparing ----------------------------------------------------------------------------------------

_LARGEST_BATCH = 8  # times the configured one
_ROWS = 8  # of a tile of an array on TPU
# Read from compiled steps of Mamba-2 130m and 2.7b for v5e: HBM traffic of everything but matrix products, kernels
# included; passes over a device's shard of the float32 weights in the update.
_TRAFFIC = 100  # bytes per token, layer and channel
_UPDATE_PASSES = 10
_GATHERED = 5  # matrices of a layer


def search_settings(config: PlanConfig, topology: Topology) -> list[PlanConfig]:
    """Return the settings that batch and machine allow, the most promising first.

    They differ in mesh, remat policy, accumulation and offloaded collectives; in the batch and the dtype that gradients
    are reduced in only if `config.vary` names them. The order comes from rough formulas; it only decides what is
    compiled.
    """
    rows = config.data.batch_size
    batches = _doublings(rows, _LARGEST_BATCH * rows) if "data.batch_size" in config.vary else [rows]
    dtypes = dict.fromkeys([config.train.reduce_dtype, *(["bfloat16"] if "train.reduce_dtype" in config.vary else [])])
    found: list[PlanConfig] = []
    for mesh, batch in itertools.product(_meshes(config, topology), batches):
        across = mesh.data * mesh.fsdp
        data = dataclasses.replace(config.data, batch_size=batch)
        offload = config.train.offload_collectives or (topology.chip.sparse_cores and mesh.fsdp > 1)
        for parts, dtype in itertools.product(_doublings(1, batch // across), dtypes):
            if batch % (parts * across) or (dtype != config.train.reduce_dtype and across * mesh.sequence == 1):
                continue
            train = dataclasses.replace(
                config.train, accumulation=parts, reduce_dtype=dtype, offload_collectives=offload
            )
            setting = dataclasses.replace(config, mesh=mesh, data=data, train=train)
            found += [with_mesh(setting, mesh, remat=policy) for policy in POLICIES]

    def seconds_per_token(setting: PlanConfig) -> float:
        return guessed_seconds(setting, topology) / setting.data.batch_size

    return sorted(_hopeful(found, topology), key=seconds_per_token)


def _meshes(config: PlanConfig, topology: Topology) -> list[MeshConfig]:
    sizes = [n for n in _doublings(1, topology.devices) if topology.devices % n == 0]
    return [
        MeshConfig(data, fsdp, tensor, sequence)
        for tensor, sequence, fsdp in itertools.product(sizes, repeat=3)
        if max(tensor, sequence) <= _LARGEST_AXIS and topology.devices % (tensor * sequence * fsdp) == 0
        if (data := topology.devices // (tensor * sequence * fsdp)) % topology.slices == 0
        if config.data.batch_size % (data * fsdp) == 0
        if config.data.sequence_length % sequence == 0 and config.model.d_inner % tensor == 0
    ]


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
    """Return a rough time of one step, to rank settings before they are compiled.

    Products, memory traffic and collectives one after the other; all-gathers that XLA overlaps (on v5e, and where
    SparseCores run them, there with the reduce-scatters) count only as far as they take longer than the rest.
    """
    mesh, model, chip = resolved_mesh(config, topology.devices), config.model, topology.chip
    tokens = config.data.batch_size * config.data.sequence_length / topology.devices
    weights = matrix_parameters(model) / mesh.tensor
    again = {"none": 0.0, "dots": 0.1, "full": 1.0}[model.remat]
    work = tokens * training_flops_per_token(model) * (3 + again) / 3 / chip.flops["bfloat16"]
    work += tokens * model.n_layers * model.d_inner * _TRAFFIC / chip.bandwidth
    work += 4 * weights / mesh.fsdp * _UPDATE_PASSES / chip.bandwidth

    exposed, hidden = _guessed_collectives(config, topology, weights)
    return max(work, hidden) + exposed - hidden


def _guessed_collectives(config: PlanConfig, topology: Topology, weights: float) -> tuple[float, float]:
    """Return rough seconds of a step's collectives: of all of them, and of those that XLA overlaps.

    Args:
      config: the setting.
      topology: the machine.
      weights: parameters of a device before they are sharded over fsdp.
    """
    mesh, model, train = resolved_mesh(config, topology.devices), config.model, config.train

    def seconds(sent: float, devices: int, calls: float = 0) -> float:
        return _collective_seconds(topology, sent, devices, calls)

    exposed = hidden = 0.0
    itemsize = 2 if train.reduce_dtype == "bfloat16" else 4
    if mesh.data * mesh.sequence > 1:  # all-reduce of the gradients over both axes
        exposed += seconds(2 * itemsize * weights / mesh.fsdp, mesh.data * mesh.sequence)
    if mesh.fsdp > 1:
        calls, sent = train.accumulation * model.n_layers * _GATHERED, train.accumulation * weights
        gather = seconds(4 * sent, mesh.fsdp, 2 * calls)  # bfloat16, in both passes
        # A shard that is not whole tiles is all-reduced instead of reduce-scattered.
        whole = 1 if not topology.is_tpu or model.d_model % (_ROWS * mesh.fsdp) == 0 else 2
        reduce = seconds(whole * itemsize * sent, mesh.fsdp, calls)
        hidden += gather if train.offload_collectives or topology.generation == "v5e" else 0
        hidden += reduce if train.offload_collectives else 0
        exposed += gather + reduce
    if mesh.tensor > 1:  # two all-reduces of the residual stream per pass, on every device of the group
        tokens = config.data.batch_size * config.data.sequence_length / topology.devices
        exposed += seconds(4 * 2 * 4 * model.n_layers * tokens * mesh.tensor * model.d_model, mesh.tensor)
    if mesh.sequence > 1:  # each row's state, in both passes, in log2 steps
        rows = config.data.batch_size / (mesh.data * mesh.fsdp)
        state = 4 * model.d_inner * model.state_size / mesh.tensor
        exposed += seconds(2 * math.log2(mesh.sequence) * rows * model.n_layers * state, mesh.sequence)
    if topology.slices > 1:
        exposed += 2 * itemsize * weights / mesh.fsdp / topology.kind.network
    return exposed, hidden


def _collective_seconds(topology: Topology, sent: float, devices: int, calls: float) -> float:
    """Return the seconds of `sent` bytes among devices: two links along a whole axis, one along a part."""
    if not topology.is_tpu:
        return sent / topology.kind.link
    links, hops, left = 0, 0.0, devices
    for size in sorted(topology.shape, reverse=True):
        if left >= size > 1:
            links, hops, left = links + 2, hops + size / 2, left // size
    if left > 1 or not links:
        links, hops = links + 1, hops + left - 1
    return sent / (topology.kind.link * links) + calls * hops * HOP
