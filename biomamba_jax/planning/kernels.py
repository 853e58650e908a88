"""Speed of the TPU kernels by the compiler's static profile of their schedule."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model.mamba3 import Mamba3Mixer
from biomamba_jax.ops import causal_conv1d, dispatch, linear_cross_entropy, rotary_embedding, selective_scan, ssd
from biomamba_jax.planning.ahead_of_time import Request, estimates
from biomamba_jax.planning.costs import Operation, program_costs
from biomamba_jax.planning.topology import parse_topology

logger = logging.getLogger(__name__)

D_STATE, SSD_D_STATE, HEADDIM = 16, 128, 64
"""Sizes of the published models: d_state of Mamba-1, d_state and headdim of Mamba-2."""
VOCABULARY = 50288
"""Rows of the embedding of the published Mamba-2 models."""
_VALID_IDS = 50277
_WIDTH = 4
_ANGLES = 32  # of a head of Mamba-3 at its published rope_fraction
_OPS = {"mamba1": ("selective_scan",), "mamba2": ("ssd",), "mamba3": ("ssd_mamba3", "rotary_embedding")}
_LENGTHS = (256, 512)  # multiples of every kernel's chunk
_CHANNELS = 1536  # whole tiles and heads of every kernel


SMALLEST: Mapping[str, str] = {"v5e": "1x1", "v5p": "2x2x1", "v6e": "1x1"}
"""Smallest topology of each generation whose static profile can be trusted."""


def build(
    op: str,
    implementation: str | None,
    rows: int,
    length: int,
    channels: int,
    segments: bool,
    gradient: bool,
    devices: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return an op, or the op with its vector-Jacobian product, and the shapes of its arguments: a `Request.builder`.

    Args:
      op: "selective_scan", "ssd", "ssd_mamba3" (a head's own B and C, decays given), "rotary_embedding", "mamba3" (all
        of its mixer but the projections), "causal_conv1d" or "linear_cross_entropy" (hidden states of half of
        `channels`, `VOCABULARY` ids).
      implementation: its implementation; None for the default.
      rows: batch size.
      length: tokens of a row.
      channels: d_inner; activations are bfloat16.
      segments: pass segment ids.
      gradient: compute the gradients too.
      devices: unused; builders take it.
    """
    bf16, f32 = jnp.bfloat16, jnp.float32

    def shape(*sizes: int, dtype=bf16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    if op == "linear_cross_entropy":
        targets = shape(rows * length, dtype=jnp.int32)
        arguments = shape(rows * length, channels // 2), shape(VOCABULARY, channels // 2, dtype=f32), targets

        def loss(hidden, weight, targets):
            options: dict[str, Any] = {"valid_vocab_size": _VALID_IDS, "implementation": implementation}
            return linear_cross_entropy(hidden, weight, targets, **options).loss

        return jax.value_and_grad(loss, argnums=(0, 1)) if gradient else loss, arguments
    full, heads = shape(rows, length, channels), channels // HEADDIM
    ids = shape(rows, length, dtype=jnp.int32) if segments else None
    run: Callable[..., Any]
    arrays: dict[str, Any]
    options: dict[str, Any] = {"implementation": implementation}
    if op == "selective_scan":
        run, states, vector = selective_scan, shape(rows, length, D_STATE), shape(channels, dtype=f32)
        A = shape(channels, D_STATE, dtype=f32)
        arrays = {"x": full, "dt": full, "A": A, "B": states, "C": states, "D": vector, "z": full, "dt_bias": vector}
    elif op == "ssd":
        run, states, vector = ssd, shape(rows, length, 1, SSD_D_STATE), shape(heads, dtype=f32)
        x = shape(rows, length, heads, HEADDIM)
        dt = shape(rows, length, heads)
        arrays = {"x": x, "dt": dt, "A": vector, "B": states, "C": states, "D": vector, "dt_bias": vector}
    elif op == "ssd_mamba3":
        run = functools.partial(ssd, dt=None)
        x, states = shape(rows, length, heads, HEADDIM), shape(rows, length, heads, SSD_D_STATE)
        arrays = {"x": x, "A": shape(rows, length, heads, dtype=f32), "B": states, "C": states}
    elif op == "rotary_embedding":
        states = shape(rows, length, 1, 1, SSD_D_STATE, dtype=f32)
        bias, angle = shape(1, heads, SSD_D_STATE, dtype=f32), shape(rows, length, heads, _ANGLES, dtype=f32)
        arrays = {"B": states, "C": states, "B_bias": bias, "C_bias": bias, "angle": angle}

        def rotary(segment_ids, implementation, **arrays):
            results = rotary_embedding(**arrays, dtype=bf16, implementation=implementation)
            return tuple(v.reshape(rows, length, -1) for v in results)  # as SSD's kernels read them

        run = rotary
    elif op == "mamba3":
        config = ModelConfig(kind="mamba3", d_model=channels // 2, kernels=implementation != "xla")
        graph, params = nnx.split(nnx.eval_shape(lambda: Mamba3Mixer(config, dtype=bf16, rngs=nnx.Rngs(0))))
        of_head = shape(rows, length, heads)
        arrays = {"params": params, "z": full, "x": full, "dt": of_head, "A": of_head, "trap": of_head}
        arrays |= {"bc": shape(rows, length, 2 * SSD_D_STATE), "angle": shape(rows, length, _ANGLES)}

        def mixer(segment_ids, implementation, params, **arrays):
            return nnx.merge(graph, params).mix(**arrays, state=None, segment_ids=segment_ids)[0]

        run = mixer
    else:
        run = causal_conv1d
        arrays = {"x": full, "weight": shape(channels, _WIDTH, dtype=f32), "bias": shape(channels, dtype=f32)}

    def forward(arrays, ids):
        return run(**arrays, segment_ids=ids, **options)

    def with_gradients(arrays, ids, dy):
        y, pull_back = jax.vjp(lambda v: forward(v, ids), arrays)
        return y, pull_back(dy)

    results = arrays.get("x", (shape(rows, length, heads * SSD_D_STATE),) * 2)
    return (with_gradients, (arrays, ids, results)) if gradient else (forward, (arrays, ids))


@functools.cache
def kernel_rates(kind: str, target: str, timeout: float = 600) -> Mapping[str, float]:
    """Return seconds per byte of operands and results of each kernel of a mixer on one core, by name.

    The slope between two short lengths, which excludes the fixed cost of a call. Empty for targets whose profile
    cannot be trusted (v4, TPU7x, GPUs) and where the compiler produces none.

    Args:
      kind: mixer, "mamba1", "mamba2" or "mamba3".
      target: generation of the TPU.
      timeout: seconds after which the compiler is stopped.
    """
    if target not in SMALLEST:
        return {}
    topology = f"{target}:{SMALLEST[target]}"
    chip = parse_topology(topology).chip
    assert chip.clock is not None  # known for every generation in SMALLEST
    shape = {"rows": 1, "channels": _CHANNELS, "segments": True, "implementation": "pallas_tpu", "gradient": True}
    rates: dict[str, float] = {}
    for op in _OPS[kind]:
        arguments = [{"op": op, "length": length, **shape} for length in _LENGTHS]
        requests = [Request(topology, f"{__name__}:build", a) for a in arguments]
        try:
            short, long = (e.static_cycles for e in estimates(requests, profile=True, timeout=timeout))
        except UserError as error:  # the profile can abort the compiler; the kernels' own cost estimates remain
            reason = f"no profile, so the time of its kernels is a lower bound: {error}"
            logger.warning("%s on %s: %s", op, target, reason)
            continue
        few, many = ({kernel.name: kernel.bytes for kernel in kernel_costs(a)} for a in arguments)
        for name in few:
            cycles = sum(long[key] for key in long if name in key) - sum(short[key] for key in short if name in key)
            if cycles > 0:
                rates[name] = cycles / (many[name] - few[name]) / chip.clock
    return rates


def kernel_costs(arguments: Mapping[str, Any]) -> list[Operation]:
    """Return one call of each kernel that an op's gradient runs on TPU; `arguments` are those of `build`."""
    with dispatch.target_platform("tpu"):
        function, shapes = build(devices=None, **arguments)
        return program_costs(jax.make_jaxpr(function)(*shapes)).kernels
