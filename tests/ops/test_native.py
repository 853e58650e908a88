"""Native code is compiled once; where that fails, XLA's form runs and the log says why, and a named native raises."""

import functools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from devices import on_devices

from biomamba_jax.errors import UserError
from biomamba_jax.ops import selective_scan
from biomamba_jax.ops.native import library
from biomamba_jax.ops.selective_scan import native
from tests.ops.oracles import assert_close, in_dtype, require_native
from tests.ops.test_selective_scan import ACTIVATIONS, Shape, random_inputs
from tests.ops.test_selective_scan_pallas_tpu import gradient_of_layers
from tests.tolerances import TOLERANCES


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder without a library, and a process that has not looked for one."""
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "unavailable_reason", functools.cache(library.unavailable_reason.__wrapped__))
    return monkeypatch


def compiler(folder, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def scan(**options):
    x, states = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 4))
    return selective_scan(x, x, -jnp.ones((2, 4)), states, states, **options)


def no_compiler(monkeypatch, folder) -> str:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return "no C\\+\\+ compiler was found"


def broken_compiler(monkeypatch, folder) -> str:
    monkeypatch.setenv("CXX", compiler(folder, "echo 'error: no such option' >&2; exit 3"))
    return "compiler failed with status 3: error: no such option"


def unwritable_cache(monkeypatch, folder) -> str:
    (folder / "file").touch()
    monkeypatch.setenv("BIOMAMBA_CACHE", str(folder / "file" / "cache"))
    return "Not a directory"


def useless_library(monkeypatch, folder) -> str:
    monkeypatch.setenv("CXX", compiler(folder, 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done'))
    return "file too short"


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("fault", [no_compiler, broken_compiler, unwritable_cache, useless_library])
def test_without_a_library_xla_computes_it_and_a_named_native_is_refused_with_the_reason(
    fresh, tmp_path, caplog, fault
):
    reason = fault(fresh, tmp_path)
    with caplog.at_level(logging.INFO):
        y, again = scan(), scan()
    assert jnp.array_equal(y, again) and jnp.array_equal(y, scan(implementation="xla"))
    said = [record.message for record in caplog.records if "using implementation" in record.message]
    assert len(said) == 1 and "using implementation 'xla' on cpu (not 'native': " in said[0]
    with pytest.raises(UserError, match=f"implementation 'native' cannot be used: .*{reason}"):
        scan(implementation="native")


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_library_is_compiled_once_and_again_for_other_flags(fresh, tmp_path):
    calls = tmp_path / "calls"
    written = 'case "$*" in *" -o "*) while [ "$1" != -o ]; do shift; done; : > "$2";; *) exec c++ "$@";; esac'
    fresh.setenv("CXX", compiler(tmp_path, f'echo "$@" >> {calls}; {written}'))  # what it writes, other tests load
    fresh.setenv("CXXFLAGS", "-O0")
    first = library.build()
    assert library.build() == first and first.parent.parent == tmp_path / "cache"
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert sum(" -o " in line for line in calls.read_text().splitlines()) == 1
    fresh.setenv("CXX", compiler(tmp_path, 'case "$*" in *" -o "*) exit 1;; esac; exec c++ "$@"'))
    fresh.setenv("CXXFLAGS", "-O0 -DOTHER")
    with pytest.raises(subprocess.SubprocessError):
        library.build()


def test_the_best_on_a_cpu_is_native_where_it_can_be_compiled():
    text = jax.jit(scan).lower().as_text()
    assert ("selective_scan_forward" in text) == (library.unavailable_reason() is None)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    found = [
        subprocess.check_output(["c++", f"-print-file-name=lib{name}.so"], text=True) for name in ("asan", "ubsan")
    ]
    if not all("/" in path for path in found):
        pytest.skip("the compiler has no sanitizers")
    sanitized = {
        "BIOMAMBA_CACHE": str(tmp_path),
        "CXXFLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = [f"tests/ops/test_{op}.py" for op in ("selective_scan", "causal_conv1d", "ssd", "mixed_matmul")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native and not extreme", *tests]
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(command, cwd=root, env=os.environ | sanitized, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout


@on_devices(8)
def test_rows_and_channels_sharded_over_a_mesh_equal_one_device():
    require_native()
    inputs = in_dtype(random_inputs(Shape(rows=2, length=16, channels=24, d_state=4), 5), "float32", ACTIVATIONS)
    names = ("dt", "A", "B", "C", "D", "z", "dt_bias")
    stacked = tuple(jnp.stack([inputs[n], 0.5 * inputs[n]]) for n in names)
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), automatic, devices=jax.devices()[:4])
    want, got = (gradient_of_layers(native.selective_scan, m, True)(inputs["x"], stacked) for m in (None, mesh))
    assert_close({"x": got[0]}, {"x": want[0]}, TOLERANCES["selective_scan", "float32"].gradient)
    arrays = [dict(zip(names, each[1], strict=True)) for each in (got, want)]
    assert_close(*arrays, TOLERANCES["selective_scan", "float32"].gradient)
