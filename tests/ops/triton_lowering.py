"""Lowers the gradients of the ops with Triton kernels for CUDA, with no GPU; prints the PTX version of each kernel.

A process of its own, since jax-triton changes the environment when it is imported.
"""

import json
import re
import sys
import zlib

import jax
from jaxlib.mlir import ir

from biomamba_jax.measure.kernels import build
from biomamba_jax.ops import dispatch

SHAPE = {"rows": 2, "length": 128, "channels": 256, "segments": True}


def ptx_versions(op: str, capability: int) -> list[str]:
    """Of the kernels in the module that XLA would get."""
    with dispatch.target_platform("gpu", capability):
        function, arguments = build(op, "triton", gradient=True, devices=None, **SHAPE)
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found: list[str] = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "triton_kernel_call" in str(attributes["call_target_name"]):
            typed = "mhlo.backend_config" in attributes  # jax-triton 0.4
            packed = ir.DictAttr(attributes["mhlo.backend_config"])["opaque"] if typed else attributes["backend_config"]
            kernel = zlib.decompress(ir.StringAttr(packed).value_bytes).decode("latin-1")
            found.extend(re.findall(r"\.version (\d+\.\d+)", kernel))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps({op: ptx_versions(op, capability) for op in ("selective_scan", "ssd", "causal_conv1d")}))
