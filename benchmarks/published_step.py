"""Compares the plan's model of time with the published speed of another program: a dense transformer on v5e-256."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biomamba_jax.config.checks import PositiveFloat, Settings
from biomamba_jax.planning.ahead_of_time import compiler_environment, require_compiler, run_in_child, tpu_devices
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import program_costs
from biomamba_jax.planning.links import Places
from biomamba_jax.planning.program import Program
from biomamba_jax.planning.report import exposed
from biomamba_jax.planning.times import step_times
from biomamba_jax.planning.topology import parse_topology
from biomamba_jax.tables import summary_table

# MaxText's 16B model, from MaxText/configs/v5e/16b.sh and base.yml: global_parameter_scale 16, six rows a chip, fsdp
# over all chips, remat full; "120 TFLOP/s a chip" is the first row of the table in MaxText/configs/v5e/README.md.
LAYERS, D_MODEL, HEADS, D_HEAD, D_MLP, VOCABULARY = 32, 4096, 64, 128, 28672, 32000
ROWS, LENGTH, PUBLISHED = 6, 2048, 120e12


@dataclasses.dataclass(frozen=True)
class PlanBenchmark(Settings):
    """Settings of `python -m benchmarks plan`."""

    limit_seconds: PositiveFloat = 900
    """Time limit of the compiler."""


def _layer(h: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    full = {name: jax.lax.all_gather(x.astype(jnp.bfloat16), "fsdp", axis=0, tiled=True) for name, x in w.items()}
    normed = _normed(h)
    q, k, v = ((normed @ full[name]).reshape(*h.shape[:2], HEADS, D_HEAD).swapaxes(1, 2) for name in "qkv")
    y = flash_attention(q, k, v, causal=True, sm_scale=D_HEAD**-0.5).swapaxes(1, 2)
    h = h + y.reshape(*h.shape[:2], -1) @ full["o"]
    normed = _normed(h)
    return h + (jax.nn.silu(normed @ full["gate"]) * (normed @ full["up"])) @ full["down"], None


def _normed(h: jax.Array) -> jax.Array:
    x = h.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(h.dtype)


def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    table = jax.lax.all_gather(params["embedding"].astype(jnp.bfloat16), "fsdp", axis=0, tiled=True)
    head = jax.lax.all_gather(params["head"].astype(jnp.bfloat16), "fsdp", axis=0, tiled=True)
    layer = jax.checkpoint(_layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    h, _ = jax.lax.scan(layer, table[tokens], params["layers"])
    logits = (_normed(h) @ head).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1))


def _step(state: Any, tokens: jax.Array) -> Any:
    params, first, second = state
    gradients = jax.grad(_loss)(params, tokens)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, gradients)
    params = jax.tree.map(lambda p, m, v: p - 1e-4 * m / (jnp.sqrt(v) + 1e-8), params, first, second)
    return params, first, second


def _compile() -> Compiled:
    topology = parse_topology("v5e-256")
    mesh = Mesh(tpu_devices(topology.compiler_name), ("fsdp",))
    inner = HEADS * D_HEAD
    sizes = {"q": (D_MODEL, inner), "k": (D_MODEL, inner), "v": (D_MODEL, inner), "o": (inner, D_MODEL)}
    sizes |= {"gate": (D_MODEL, D_MLP), "up": (D_MODEL, D_MLP), "down": (D_MLP, D_MODEL)}
    by_layer, by_row = PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")

    def shape(spec: PartitionSpec, *size: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

    params: dict[str, Any] = {"layers": {name: shape(by_layer, LAYERS, *size) for name, size in sizes.items()}}
    params |= {"embedding": shape(by_row, VOCABULARY, D_MODEL), "head": shape(by_row, D_MODEL, VOCABULARY)}
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    step = jax.shard_map(_step, mesh=mesh, in_specs=((specs,) * 3, by_row), out_specs=(specs,) * 3, check_vma=False)
    tokens = shape(by_row, ROWS * mesh.size, LENGTH, dtype=jnp.int32)
    traced = jax.jit(step, donate_argnums=0).trace((params,) * 3, tokens)
    compiled = traced.lower().compile()
    schedule = Program(compiled.as_text() or "", Places.of_devices(list(mesh.devices.flat), topology)).schedule
    return Compiled({"fsdp": mesh.size}, costs=program_costs(traced.jaxpr, mesh.size, LAYERS), schedule=schedule)


def compare_with_published_step(config: PlanBenchmark) -> float:
    """Print the model's time of the step next to the published one; return the error."""
    require_compiler(tpu=True)
    environment, limit = compiler_environment(), config.limit_seconds
    compiled = run_in_child(_compile, subject="compiling for v5e-256", timeout=limit, environment=environment)
    times = step_times(compiled, parse_topology("v5e-256"))
    # As MaxText counted them then: six FLOPs a parameter and token, and attention without its causal half.
    parameters = LAYERS * D_MODEL * (4 * HEADS * D_HEAD + 3 * D_MLP) + 2 * VOCABULARY * D_MODEL
    flops = ROWS * LENGTH * (6 * parameters + 12 * LAYERS * HEADS * D_HEAD * LENGTH)
    published = flops / PUBLISHED
    error = times.step / published - 1
    rows = [
        ("published", f"{published:,.2f}", f"{PUBLISHED / 1e12:,.0f} TFLOP/s a chip"),
        ("plan", f"{times.step:,.2f}", f"{error:+.0%}"),
        ("products at peak", f"{times.compute:,.2f}", None),
        ("waits for collectives", f"{sum(times.exposed.values()):,.2f}", f"ms: {exposed(times)}"),
    ]
    summary_table("MaxText 16B on v5e-256, seconds a step", ("", "seconds", ""), rows)
    return error
