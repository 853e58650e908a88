"""Lowers the gradients of the ops with Triton kernels for CUDA, with no GPU; prints the PTX version of each kernel.

A process of its own, since jax-triton changes the environment when it is imported.
"""

import json
import re
import sys
import zlib

import jax

from biomamba_jax.measure.kernels import build
from biomamba_jax.ops import dispatch

SHAPE = {"rows": 2, "length": 128, "channels": 256, "segments": True}


def ptx_versions(op: str, capability: int) -> list[str]:
    """Of the kernels in the module that XLA would get."""
    with dispatch.target_platform("gpu", capability):
        function, arguments = build(op, "triton", gradient=True, devices=None, **SHAPE)
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = []
    for call in re.findall(r"custom_call @triton_kernel_call\w*\(.*", lowered.as_text()):
        found += re.findall(r"\.version (\d+\.\d+)", _kernel(call))
    return found


def _kernel(call: str) -> str:
    """The compiled kernel, which stands compressed in the text of the module."""
    escaped = re.search(r'(?:backend_config|opaque) = "((?:[^"\\]|\\.)*)"', call)
    assert escaped is not None, call[:500]
    data = re.sub(r"\\(\\|[0-9A-F]{2})", lambda m: "\\" if m[1] == "\\" else chr(int(m[1], 16)), escaped[1])
    return zlib.decompress(data.encode("latin-1")).decode("latin-1")


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps({op: ptx_versions(op, capability) for op in ("selective_scan", "ssd", "causal_conv1d")}))
