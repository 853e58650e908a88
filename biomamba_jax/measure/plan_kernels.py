"""How fast the TPU kernels are by the compiler's static profile of their schedule."""

import functools
import logging
from collections.abc import Mapping
from typing import Any, cast

import jax

from biomamba_jax.errors import UserError
from biomamba_jax.measure import kernels
from biomamba_jax.measure.aot import Request, estimates
from biomamba_jax.measure.plan_costs import program_costs
from biomamba_jax.ops import dispatch

logger = logging.getLogger(__name__)

_OPS = {"mamba1": ("selective_scan",), "mamba2": ("ssd",)}
_LENGTHS = (256, 512)  # multiples of every kernel's chunk
_CHANNELS = 1536  # whole tiles and heads of every kernel; what a call costs grows with its bytes


@functools.cache
def kernel_rates(kind: str, target: str, timeout: float = 600) -> Mapping[str, float]:
    """Seconds a byte of operands and results of each kernel of a mixer, by name.

    From the slope between two short lengths, which leaves out what a call costs however little it does. Empty for
    targets whose profile cannot be trusted (v4, TPU7x, GPUs) and where the compiler gives none.

    Args:
      kind: mixer, "mamba1" or "mamba2".
      target: generation of the TPU.
    """
    if target not in kernels.CHIPS:
        return {}
    chip = kernels.CHIPS[cast(kernels.Target, target)]
    rates: dict[str, float] = {}
    cores = 2 if target == "v5p" else 1  # the kernels' first grid axis, rows, is spread over a chip's cores
    topology = f"{target}:{kernels.SMALLEST[cast(kernels.Target, target)]}"
    for op in _OPS[kind]:
        requests = []
        for length in _LENGTHS:
            shape = {"rows": 1, "length": length, "channels": _CHANNELS, "segments": True}
            arguments: dict[str, Any] = {"op": op, "implementation": "pallas_tpu", "gradient": True, **shape}
            requests.append(Request(topology, "biomamba_jax.measure.kernels:build", arguments))
        try:
            short, long = estimates(requests, profile=True, timeout=timeout)
        except UserError as error:  # the profile can abort the compiler; kernels' own statements are left
            logger.warning("%s on %s: no profile, so the time of its kernels is a floor: %s", op, target, error)
            continue
        sizes = [_kernel_bytes(request.arguments) for request in requests]
        for name in sizes[0]:
            cycles = [sum(v for key, v in e.static_cycles.items() if name in key) for e in (short, long)]
            if cycles[1] > cycles[0]:
                rates[name] = (cycles[1] - cycles[0]) / (sizes[1][name] - sizes[0][name]) / chip.clock / cores
    return rates


def _kernel_bytes(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Of one call of each kernel that an op's gradient runs."""
    with dispatch.target_platform("tpu"):
        function, shapes = kernels.build(devices=None, **arguments)
        found = program_costs(jax.make_jaxpr(function)(*shapes)).kernels
    return {kernel.name: kernel.bytes for kernel in found}
