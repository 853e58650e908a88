"""The Triton kernels on rows of a million tokens, which hold more than 2^31 values: no offset overflows 32 bits, and
CUDA takes the grids. Shown on the kernels' intermediate code, by the range of every integer in it: no GPU is needed."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.triton_static import calls, source
from biomamba_jax.ops.triton_calls import Call
from tests.compilers import needs_traceable_triton

LENGTH = 2**20
SHAPE = {"rows": 2, "length": LENGTH, "channels": 2560, "segments": True}
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)
OPS = ("selective_scan", "ssd", "ssd_mamba3", "causal_conv1d")
Range = tuple[int, int]

RESULT = re.compile(r"(%[\w-]+)(?::\d+)? = ([\w.]+) ?(.*?) ?(?:loc\(.*)?$")
LOOP = re.compile(r"scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step .*?(?:iter_args\((.*?)\) -> \((.*)\))? *: i32")
COMPUTED = {
    "muli": lambda a, b: [x * y for x in a for y in b],
    "addi": lambda a, b: [a[0] + b[0], a[1] + b[1]],
    "subi": lambda a, b: [a[0] - b[1], a[1] - b[0]],
    "minsi": lambda a, b: [min(a[0], b[0]), min(a[1], b[1])],
    "divsi": lambda a, b: [x // y for x in a for y in b],
}


def overflowing(text: str, given: Mapping[str, int], grid: tuple[int, ...]) -> list[str]:
    """Lines with an offset of 32 bits that may leave them, or whose range is not known.

    Args:
      text: a kernel in Triton's intermediate language.
      given: its integer arguments by name.
      grid: its programs.
    """
    ranges: dict[str, Range] = {f"%{name}": (value, value) for name, value in given.items()}
    found = []
    for line in text.splitlines():
        if loop := LOOP.search(line):
            index, first, beyond, carried, _ = loop.groups()
            if first in ranges and beyond in ranges:
                ranges[index] = (ranges[first][0], ranges[beyond][1] - 1)
            for name in re.findall(r"(%[\w-]+) =", carried or ""):
                ranges[name] = (-LENGTH, LENGTH)  # pointers, values, and how many tokens are left
        elif match := RESULT.search(line):
            name, operation, rest = match.groups()
            ranges.pop(name, None)
            operands = re.findall(r"%[\w-]+", rest)
            kind = operation.removeprefix("arith.")
            if operation == "tt.addptr":
                if "i32" in rest.rsplit(",", 1)[1] and not fits(ranges.get(operands[1])):
                    found.append(line)
            elif kind == "constant" and (value := re.match(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d", rest)):
                ranges[name] = (int(value[1]),) * 2
            elif operation == "tt.make_range":
                end, start = (int(n) for n in re.findall(r"= (\d+) : i32", rest))
                ranges[name] = (start, end - 1)
            elif operation == "tt.get_program_id":
                ranges[name] = (0, grid["xyz".index(rest[0])] - 1)
            elif operation == "tt.get_num_programs":
                ranges[name] = (grid["xyz".index(rest[0])],) * 2
            elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") or kind in ("extsi", "select"):
                sources = [ranges.get(o) for o in (operands[1:] if kind == "select" else operands)]
                if None not in sources:
                    ranges[name] = (min(s[0] for s in sources), max(s[1] for s in sources))
            elif kind in COMPUTED and all(o in ranges for o in operands):
                values = COMPUTED[kind](*(ranges[o] for o in operands))
                # What overflowed once is never an offset, whatever is done to it.
                if "i64" in rest or fits((min(values), max(values))):
                    ranges[name] = (min(values), max(values))
    return found


def fits(range_: Range | None) -> bool:
    return range_ is not None and range_[0] >= -(2**31) and range_[1] < 2**31


def intermediate(call: Call, capability: int) -> str:
    """Return one kernel in Triton's intermediate language, functions inlined."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    code, target, given = source(call, capability)
    backend = make_backend(target)
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    tools = backend.get_codegen_implementation(options), backend.get_module_map()
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, code.language)
    return str(stages["ttir"](code.make_ir(target, options, *tools, context), {}))


def integers(call: Call) -> dict[str, int]:
    return {n: v for n, v in zip(call.kernel.arg_names, call.arguments, strict=False) if isinstance(v, int)}


@needs_traceable_triton
@pytest.mark.parametrize("op", OPS)
def test_no_offset_into_a_row_of_more_than_two_billion_values_overflows(op):
    for call in calls(op, 80, **SHAPE):
        assert overflowing(intermediate(call, 80), integers(call), call.grid) == [], call.kernel.__name__


@needs_traceable_triton
@pytest.mark.parametrize("op", OPS)
def test_cuda_takes_the_grid_of_a_row_of_a_million_tokens(op):
    for call in calls(op, 80, **SHAPE):
        assert all(n <= most for n, most in zip(call.grid, MOST_PROGRAMS, strict=False)), call.kernel.__name__


def test_an_overflow_is_seen_where_it_reaches_an_address():
    text = """\
      %wide = arith.constant dense<4096> : tensor<64xi32>
      %0 = tt.get_program_id x : i32
      %1 = tt.splat %0 : i32 -> tensor<64xi32>
      %2 = arith.muli %1, %wide : tensor<64xi32>
      %3 = tt.addptr %x, %2 : tensor<64x!tt.ptr<f32>>, tensor<64xi32> loc(#loc1)
"""
    assert overflowing(text, {}, (2**18,)) == []
    assert len(overflowing(text, {}, (2**20,))) == 1
