"""Compiling for H100s that are not there, with JAX's CUDA plugin and its assembler, and what they say of a kernel.

Run as a program it compiles one builder's function in a process of its own, since the assembler's words go to the
process's own output: `python -m tests.h100 module:function '{"argument": 1}'`.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.compilers import require_cuda_compiler

ROOT = Path(__file__).parents[1]
# What comes out of a cache is not assembled, and nothing is said of it.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
# An H100 SXM as XLA's text format has it; figures from NVIDIA's datasheet and the programming guide's table of limits.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Kernel(NamedTuple):
    """What the assembler says of one Mosaic GPU kernel."""

    name: str
    registers: int
    spilled_bytes: int


class Program(NamedTuple):
    """What the compiler says of one program."""

    kernels: tuple[Kernel, ...]
    mosaic_calls: int  # in the optimised module
    temporary_bytes: int


def compiled(builder: str, **arguments: Any) -> Program:
    """Compiles for H100s; skips the test where the compiler is not installed.

    Args:
      builder: "module:function"; called with `arguments` and eight of the topology's devices it returns (function,
        arguments), the latter trees of `jax.ShapeDtypeStruct`; without a sharding they lie on the first device.
    """
    require_cuda_compiler()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.h100", builder, json.dumps(arguments)],
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    return Program(_kernels(done.stdout + done.stderr), **facts)


def _kernels(words: str) -> tuple[Kernel, ...]:
    """From the assembler's lines: the kernel's name, its spills, then its registers."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        words,
        re.DOTALL,
    )
    return tuple(Kernel(name, int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found)


def _compile(builder: str, arguments: dict[str, Any]) -> dict[str, int]:
    import jax
    from jax.experimental import topologies

    from biomamba_jax.ops import dispatch

    topology = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology="1x1x8")
    module, name = builder.split(":")
    first = jax.sharding.SingleDeviceSharding(topology.devices[0])
    with dispatch.target_platform("gpu", 90):
        function, inputs = getattr(importlib.import_module(module), name)(devices=topology.devices, **arguments)
        inputs = jax.tree.map(lambda v: v if v.sharding is not None else v.update(sharding=first), inputs)
        done = jax.jit(function).lower(*inputs).compile()
    memory = done.memory_analysis()
    return {
        "mosaic_calls": done.as_text().count('custom_call_target="mosaic_gpu'),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    facts = _compile(sys.argv[1], json.loads(sys.argv[2]))
    print(f"\n{json.dumps(facts)}")
