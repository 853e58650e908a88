"""How fast the TPU kernels are by the compiler's static profile of their schedule."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import causal_conv1d, dispatch, selective_scan, ssd
from biomamba_jax.planning.ahead_of_time import Request, estimates
from biomamba_jax.planning.costs import program_costs
from biomamba_jax.planning.topology import parse_topology

logger = logging.getLogger(__name__)

D_STATE, SSD_D_STATE, HEADDIM = 16, 128, 64
"""Sizes of the published models: of the selective scan, and of SSD."""
_WIDTH = 4
_OPS = {"mamba1": ("selective_scan",), "mamba2": ("ssd",)}
_LENGTHS = (256, 512)  # multiples of every kernel's chunk
_CHANNELS = 1536  # whole tiles and heads of every kernel; what a call costs grows with its bytes


SMALLEST: Mapping[str, str] = {"v5e": "1x1", "v5p": "2x2x1", "v6e": "1x1"}
"""Generations whose static profile can be trusted, and the smallest topology of each."""


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
    """The op at one shape, bfloat16 activations, or with its vector-Jacobian product: a builder for `aot`."""
    bf16, f32 = jnp.bfloat16, jnp.float32

    def shape(*sizes: int, dtype=bf16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    wide = shape(rows, length, channels)
    ids = shape(rows, length, dtype=jnp.int32) if segments else None
    run: Callable[..., Any]
    options: dict[str, Any] = {} if implementation is None else {"implementation": implementation}
    if op == "selective_scan":
        run, narrow, vector = selective_scan, shape(rows, length, D_STATE), shape(channels, dtype=f32)
        A = shape(channels, D_STATE, dtype=f32)
        arrays = {"x": wide, "dt": wide, "A": A, "B": narrow, "C": narrow, "D": vector, "z": wide, "dt_bias": vector}
    elif op == "ssd":
        heads = channels // HEADDIM
        run, narrow, vector = ssd, shape(rows, length, 1, SSD_D_STATE), shape(heads, dtype=f32)
        x = shape(rows, length, heads, HEADDIM)
        dt = shape(rows, length, heads)
        arrays = {"x": x, "dt": dt, "A": vector, "B": narrow, "C": narrow, "D": vector, "dt_bias": vector}
    else:
        run = causal_conv1d
        arrays = {"x": wide, "weight": shape(channels, _WIDTH, dtype=f32), "bias": shape(channels, dtype=f32)}

    def forward(arrays, ids):
        return run(**arrays, segment_ids=ids, **options)

    def with_gradients(arrays, ids, dy):
        y, pull_back = jax.vjp(lambda v: forward(v, ids), arrays)
        return y, pull_back(dy)

    return (with_gradients, (arrays, ids, arrays["x"])) if gradient else (forward, (arrays, ids))


@functools.cache
def kernel_rates(kind: str, target: str, timeout: float = 600) -> Mapping[str, float]:
    """Seconds a byte of operands and results of each kernel of a mixer, by name.

    From the slope between two short lengths, which leaves out what a call costs however little it does. Empty for
    targets whose profile cannot be trusted (v4, TPU7x, GPUs) and where the compiler gives none.

    Args:
      kind: mixer, "mamba1" or "mamba2".
      target: generation of the TPU.
    """
    if target not in SMALLEST:
        return {}
    chip = parse_topology(f"{target}:{SMALLEST[target]}").chip
    assert chip.clock is not None  # of every generation in SMALLEST
    rates: dict[str, float] = {}
    topology = f"{target}:{SMALLEST[target]}"
    for op in _OPS[kind]:
        requests = []
        for length in _LENGTHS:
            shape = {"rows": 1, "length": length, "channels": _CHANNELS, "segments": True}
            arguments: dict[str, Any] = {"op": op, "implementation": "pallas_tpu", "gradient": True, **shape}
            requests.append(Request(topology, f"{__name__}:build", arguments))
        try:
            short, long = estimates(requests, profile=True, timeout=timeout)
        except UserError as error:  # the profile can abort the compiler; kernels' own statements are left
            logger.warning("%s on %s: no profile, so the time of its kernels is a floor: %s", op, target, error)
            continue
        sizes = [_kernel_bytes(request.arguments) for request in requests]
        for name in sizes[0]:
            cycles = [sum(v for key, v in e.static_cycles.items() if name in key) for e in (short, long)]
            if cycles[1] > cycles[0]:  # rows are sharded over the cores
                rates[name] = (
                    (cycles[1] - cycles[0]) / (sizes[1][name] - sizes[0][name]) / chip.clock / chip.cores
                )  # rows are spread over cores
    return rates


def _kernel_bytes(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Of one call of each kernel that an op's gradient runs."""
    with dispatch.target_platform("tpu"):
        function, shapes = build(devices=None, **arguments)
        found = program_costs(jax.make_jaxpr(function)(*shapes)).kernels
    return {kernel.name: kernel.bytes for kernel in found}
