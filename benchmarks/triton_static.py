"""Compiles Triton kernels for an absent GPU: registers, shared memory and spills.

Triton includes the assembler and the tool that reads its results, so neither driver nor CUDA is needed.
"""

import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import jax

from biomamba_jax.ops import dispatch, triton_calls
from biomamba_jax.planning.kernels import build

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture."""

    kernel: str
    """Name of the function."""
    programs: int
    """Programs of the grid."""
    warps: int
    """Warps of a program."""
    registers: int
    """Registers of a thread; at most 255."""
    shared_bytes: int
    """Shared memory of a program."""
    spilled_bytes: int
    """Spilled registers of a thread."""
    ptx_version: str
    """For instance "8.8"."""


def calls(op: str, capability: int, *, gradient: bool = True, **shape: Any) -> list[triton_calls.Call]:
    """Return the kernels of `op` in order; `shape` as for `kernels.build`: rows, length, channels, segments."""
    with dispatch.target_platform("gpu", capability), triton_calls.recording() as recorded:
        function, arguments = build(op, "triton", gradient=gradient, devices=None, **shape)
        jax.eval_shape(lambda *a: function(*a), *arguments)  # a new function: traces are cached by function
    return recorded


def source(call: triton_calls.Call, capability: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return what Triton compiles of a call: its code, target and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = call.kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(call.constants, "constexpr")
    attributes = {}
    for i, value in enumerate((*call.arguments, *call.outputs)):
        signature[names[i]] = "i32" if isinstance(value, int) else f"*{_TYPES[str(value.dtype)]}"
        if not isinstance(value, int):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in call.constants.items()}
    code = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": call.launch.warps,
        "num_stages": call.launch.stages,
        "ptx_version": triton_calls.PTX_VERSION,
        "enable_fp_fusion": True,
    }
    return code, GPUTarget("cuda", capability, 32), options


def usage(call: triton_calls.Call, capability: int) -> Usage:
    """Compile one kernel and read its resources."""
    import triton

    code, target, options = source(call, capability)
    compiled = triton.compile(code, target=target, options=options)
    version = re.search(r"\.version (\d+\.\d+)", compiled.asm["ptx"])
    assert version is not None  # every PTX file has a version
    return Usage(
        call.kernel.__name__,
        math.prod(call.grid),
        call.launch.warps,
        _resource(compiled.asm["cubin"], "REG"),
        compiled.metadata.shared,
        _resource(compiled.asm["cubin"], "STACK") + _resource(compiled.asm["cubin"], "LOCAL"),
        version[1],
    )


def _resource(cubin: bytes, name: Literal["REG", "STACK", "LOCAL"]) -> int:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"\b{name}:(\d+)", printed)
    assert found is not None, printed
    return int(found[1])


def usages(ops: Sequence[str], capability: int, **shape: Any) -> list[tuple[str, Usage]]:
    """Return (op, usage) of every kernel of the ops."""
    return [(op, usage(call, capability)) for op in ops for call in calls(op, capability, **shape)]
