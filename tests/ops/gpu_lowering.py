"""Lowers the gradients of the ops with GPU kernels for CUDA, with no GPU; prints each Triton kernel's PTX version, and
how many kernels of Mosaic GPU there are.

A process of its own, since jax-triton changes the environment when it is imported.
"""

import json
import re
import sys
import zlib
from typing import Any

import jax
from jaxlib.mlir import ir

from biomamba_jax.ops import dispatch
from biomamba_jax.planning.kernels import build

SHAPE = {"rows": 2, "length": 128, "channels": 256, "segments": True}
KERNELS = {
    "triton": {"selective_scan": ["8.8"] * 2, "ssd": ["8.8"] * 5, "causal_conv1d": ["8.8"] * 2},
    "pallas_gpu": {"selective_scan": 2, "ssd": 3},
}
"""What is to be printed: versions that CUDA 12.9's assembler knows, and how many kernels there are."""


def _lowered(op: str, implementation: str, capability: int) -> Any:
    with dispatch.target_platform("gpu", capability):
        function, arguments = build(op, implementation, gradient=True, devices=None, **SHAPE)
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def _ptx_versions(op: str, capability: int) -> list[str]:
    """Of the kernels in the module that XLA would get."""
    found: list[str] = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "triton_kernel_call" in str(attributes["call_target_name"]):
            typed = "mhlo.backend_config" in attributes  # jax-triton 0.4
            packed = ir.DictAttr(attributes["mhlo.backend_config"])["opaque"] if typed else attributes["backend_config"]
            kernel = zlib.decompress(ir.StringAttr(packed).value_bytes).decode("latin-1")
            found.extend(re.findall(r"\.version (\d+\.\d+)", kernel))
        return ir.WalkResult.ADVANCE

    _lowered(op, "triton", capability).compiler_ir().operation.walk(visit)
    return found


if __name__ == "__main__":
    capability = int(sys.argv[1])
    printed: dict[str, Any] = {"triton": {op: _ptx_versions(op, capability) for op in KERNELS["triton"]}}
    if capability == 90:
        count = {op: _lowered(op, "pallas_gpu", 90).as_text().count("@mosaic_gpu") for op in KERNELS["pallas_gpu"]}
        printed["pallas_gpu"] = count
    print(json.dumps(printed))
