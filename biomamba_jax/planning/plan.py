"""Estimates memory, speed and duration of a training run on a machine, from the real compiler and datasheets."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from biomamba_jax.config import MeshConfig, ModelConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.data.shards import MANIFEST_NAME, Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.object_store import local_copy
from biomamba_jax.planning.ahead_of_time import require_compiler
from biomamba_jax.planning.compile import Compiled, compile_step
from biomamba_jax.planning.kernels import kernel_rates
from biomamba_jax.planning.schedule import Collective, one_call
from biomamba_jax.planning.search import (
    describe,
    guessed_memory,
    nearest_fit,
    remat_policies,
    resolved_mesh,
    search_settings,
    with_mesh,
)
from biomamba_jax.planning.times import Times, step_times
from biomamba_jax.planning.topology import Topology, parse_topology
from biomamba_jax.train.setup import total_steps, with_vocabulary

PUBLISHED_VOCABULARY = 50277
"""Vocabulary size of the GPT-NeoX tokenizer, which the released Mamba-1 and Mamba-2 models use."""
_LLAMA_VOCABULARY = 128256  # of Llama 3.1, for Mamba-3
_SECONDS_PER_DAY = 86400
_SECONDS = ("compute", "memory", "links", "network", "kernels", "step", "floor", "bound")
_SPEED = ("tokens_per_second", "share_of_peak", "run_tokens", "days", "chip_hours")
# Names on the hub without owner, the smallest model first, and their d_model and layers.
_RELEASED: Mapping[Any, Sequence[str]] = {
    "mamba1": ("mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b"),
    "mamba2": ("mamba2-130m", "mamba2-370m", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b"),
    "siso": ("mamba3-siso-187m", "mamba3-siso-443m", "mamba3-siso-893m", "mamba3-siso-1.5b"),
    "mimo": ("mamba3-mimo-187m", "mamba3-mimo-443m", "mamba3-mimo-893m", "mamba3-mimo-1.5b"),
}
_RELEASED_SIZES = ((768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64))
_MAMBA3_SIZES = ((768, 12), (1024, 24), (1536, 24), (2048, 24))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine."""

    config: PlanConfig
    """The config with every size resolved."""
    topology: Topology
    """The machine."""
    compiled: Compiled
    """The compiler's result."""
    times: Times | None
    """Estimated times; None if the config does not fit."""
    run_tokens: float | None
    """Training tokens of the whole run; None if neither config nor shards determine them."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.config.data.batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float | None:
        """Estimated training speed."""
        return None if self.times is None else self.step_tokens / self.times.step

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPs utilization: FLOPs without recomputation over the peak of all devices."""
        flops = training_flops_per_token(self.config.model) * self.step_tokens
        peak = self.topology.chip.flops[product_dtype(self.config.model)] * self.topology.devices
        return None if self.times is None else flops / (peak * self.times.step)

    @property
    def days(self) -> float | None:
        """Days of the whole run."""
        tokens, speed = self.run_tokens, self.tokens_per_second
        return None if tokens is None or speed is None else tokens / speed / _SECONDS_PER_DAY

    @property
    def chip_hours(self) -> float | None:
        """Chip-hours of the whole run."""
        return None if self.days is None else self.days * 24 * self.topology.chips

    def as_json(self) -> dict[str, Any]:
        """Return all figures: bytes, seconds and FLOPs of one device and step unless named otherwise."""
        compiled, times = self.compiled, self.times
        return {
            "estimate": "by the compiler and from datasheets, not measured",
            "model": {key: getattr(self.config.model, key) for key in ("kind", "d_model", "n_layers")},
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "devices": self.topology.devices,
            "mesh": compiled.mesh,
            "remat": self.config.model.remat,
            **{key: getattr(self.config.data, key) for key in ("batch_size", "sequence_length")},
            **{key: getattr(self.config.train, key) for key in ("accumulation", "reduce_dtype", "offload_collectives")},
            "fits": compiled.fits,
            "refused": compiled.refused,
            "needed_bytes": compiled.needed,
            "memory": dataclasses.asdict(compiled.memory) | {"total": compiled.memory.total},
            "available_bytes": self.topology.chip.memory_bytes,
            "flops": compiled.costs.flops,
            "collectives": [self._collective(c) for c in compiled.collectives],
            "seconds": times and {key: getattr(times, key) for key in _SECONDS},
            "unprofiled_kernels": None if times is None else list(times.unprofiled),
            **{key: getattr(self, key) for key in _SPEED},
            "compile_seconds": compiled.seconds,
        }

    def _collective(self, one: Collective) -> dict[str, Any]:
        exposed = None if self.times is None else self.times.exposed.get(one_call(one), 0.0)
        found = dataclasses.asdict(one) | {"sent": one.sent, "exposed_seconds": exposed}
        del found["name"]
        return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """The plan of a config, and alternatives to it."""

    plan: Plan
    """The plan of the config as it is."""
    nearest: Plan | None = None
    """The nearest setting that fits, if the config does not."""
    ranking: tuple[Plan, ...] = ()
    """All settings of a search, the fastest first, those that do not fit last."""


def make_plan(config: PlanConfig) -> Answer:
    """Compile a config, and alternatives to it if requested or if it does not fit.

    Raises:
      UserError: the topology is unknown, its compiler is not installed, or config and machine do not go together.
    """
    topology = parse_topology(config.topology, config.slices)
    require_compiler(topology.is_tpu)
    config, run_tokens = resolve(config)

    def plan(config: PlanConfig, compiled: Compiled | None = None) -> Plan:
        compiled, times = compiled or compile_step(config), None
        if compiled.fits:
            rates = kernel_rates(config.model.kind, topology.generation, config.limit_seconds)
            times = step_times(compiled, topology, product_dtype(config.model), rates)
        return Plan(config, topology, compiled, times, run_tokens)

    candidates = remat_policies(config, topology) if config.auto_remat else [config]
    for candidate in candidates:
        asked = plan(candidate)
        if asked.compiled.fits:
            break
    config = asked.config
    if config.search:
        ranking = [asked, *_others(asked, plan)]
        return Answer(asked, ranking=tuple(sorted(ranking, key=lambda p: -(p.tokens_per_second or 0.0))))
    if asked.compiled.refused:
        raise UserError(f"{topology}: {asked.compiled.refused}")
    if asked.compiled.fits:
        return Answer(asked)
    nearest = nearest_fit(config, topology, compile_step, config.tries)
    return Answer(asked, None if nearest is None else plan(*nearest))


def _others(asked: Plan, plan: Callable[[PlanConfig], Plan]) -> list[Plan]:
    """Return the plans of the most promising settings other than `asked`, at most `asked.config.tries`.

    What needs more memory than a setting of the same mesh that did not fit is left out.
    """
    config, topology = asked.config, asked.topology
    as_configured = with_mesh(config, resolved_mesh(config, topology.devices))
    found: list[Plan] = []
    too_large: dict[MeshConfig, float] = {}
    for setting in search_settings(config, topology):
        memory = guessed_memory(setting, topology)
        if describe(setting, as_configured) and memory < too_large.get(setting.mesh, math.inf):
            found.append(plan(setting))
            if found[-1].compiled.needed is not None:
                too_large[setting.mesh] = memory
        if len(found) == config.tries:
            break
    return found


def product_dtype(model: ModelConfig) -> str:
    """Return the operand dtype of matrix products on a TPU or GPU."""
    return "bfloat16" if model.compute_dtype == "auto" else model.compute_dtype


def resolve(config: PlanConfig) -> tuple[PlanConfig, float | None]:
    """Return the config with the sizes of its initial weights and a vocabulary, and the run's training tokens."""
    model = released_sizes(config.model, config.init_from) if config.init_from else config.model
    steps = config.train.steps
    if (local_copy(config.data.path, "") / MANIFEST_NAME).exists():
        manifest = Manifest.load(config.data.path)
        model = with_vocabulary(model, manifest)
        steps = total_steps(config, manifest)
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=PUBLISHED_VOCABULARY)
    tokens = None if steps is None else float(steps * config.data.batch_size * config.data.sequence_length)
    return dataclasses.replace(config, model=model, init_from=None), config.tokens or tokens


def released_sizes(model: ModelConfig, init_from: str) -> ModelConfig:
    """Return `model` with the sizes of released weights, by their name.

    Raises:
      UserError: the name is not that of released weights.
    """
    name = init_from.rstrip("/").rsplit("/", 1)[-1].removesuffix("-hf")
    for kind, names in _RELEASED.items():
        if name in names:
            mamba3, mimo = kind in ("siso", "mimo"), kind == "mimo"
            d_model, n_layers = (_MAMBA3_SIZES if mamba3 else _RELEASED_SIZES)[names.index(name)]
            return dataclasses.replace(
                model,
                kind="mamba3" if mamba3 else kind,
                d_model=d_model,
                n_layers=n_layers,
                mimo_rank=4 if mimo else None,
                # MIMO's MLP is narrower by what the projections of its ranks take, so that both have the named size.
                d_intermediate=2 * d_model - 256 * mimo if mamba3 else 0,
                vocab_size=_LLAMA_VOCABULARY if mamba3 else PUBLISHED_VOCABULARY,
                pad_vocab_multiple=8 if kind == "mamba1" else 16,
            )
    known = ", ".join(itertools.chain(*_RELEASED.values()))
    raise UserError(
        f"init_from = {init_from!r}: sizes are known for {known}; for other weights give the sizes as model.* and "
        "--init_from null"
    )
