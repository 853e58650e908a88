"""Settings shared by all tests: repeatable examples, and where sample data may lie."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Compilers for other chips may be installed too (`make test-long`): they are no devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compiling takes most of the time of most tests; unoptimized machine code by one thread, without LLVM's expensive
# passes and the fusion emitters, compiles in a fifth of it and gives the same values. XLA_FLAGS= (empty) tests what
# users run. jaxlib ends the process at a flag that it does not know: those of a version are given to that one alone.
_FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_llvm_disable_expensive_passes=true"]
    _FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# JAX makes many small objects that live long, which are looked through again and again.
gc.set_threshold(200_000, 20, 100)

# A shell's background jobs ignore Ctrl-C, and hand that down: the programs that tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Many tests build the same small programs; a run of the suite compiles each of them once, subprocesses included.
_COMPILED = tempfile.mkdtemp(prefix="biomamba-compiled-") if "JAX_COMPILATION_CACHE_DIR" not in os.environ else None
if _COMPILED:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED  # read by jax, imported later, and handed down to workers
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.15")

import flax.struct  # noqa: E402  (JAX reads the variables above when it is imported)

# Shapes in signatures are executed: every call of a module that annotates arrays is checked. `tasks` is left out: its
# tests pass values of wrong types on purpose.
_PACKAGE = Path(__file__).resolve().parents[1] / "biomamba_jax"
_ANNOTATED = [
    ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
    for room in ("ops", "parallel", "model", "train")
    for path in (_PACKAGE / room).rglob("*.py")
    if "array_typing import" in path.read_text(encoding="utf-8")
]
jaxtyping.install_import_hook(_ANNOTATED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
_dataclass = flax.struct.dataclass


def _unchecked_dataclass(cls: type, **options: bool) -> type:
    """A pytree, which may hold shapes, shardings or specifications in place of its arrays."""
    made = _dataclass(cls, **options)
    made.__init__.__no_type_check__ = True
    return made


flax.struct.dataclass = _unchecked_dataclass


def pytest_unconfigure() -> None:
    """Removes what was compiled, in the process that made the folder."""
    if _COMPILED:
        shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Calls without the shape checker, for tests of what the package itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Pretraining runs of equal settings share their programs and draw no curves: what is tested is what a run does."""
    from markupsafe import Markup

    from biomamba_jax import html
    from biomamba_jax.train import loop

    make, evaluator = loop.pretrain_program, loop.held_out_evaluator

    def program(config, mesh, steps):
        constant = config.schedule.kind == "constant" and not config.schedule.warmup_fraction
        train, rows = config.train, (config.data.batch_size, config.data.sequence_length)
        options = (train.accumulation, train.reduce_dtype, train.offload_collectives, train.compiler_options)
        of_program = (config.model, config.loss, config.optimizer, config.schedule, None if constant else steps)
        key = repr((*of_program, rows, train.seed, options, mesh))
        if key not in _PROGRAMS:
            _PROGRAMS[key] = make(config, mesh, steps)
        return _PROGRAMS[key]

    def held_out_evaluator(graph, data, layout, count):
        made = evaluator(graph, data, layout, count)
        made._sums = _SUMS.setdefault(id(layout), made._sums)  # the layout is kept, with its program
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pretrain_program", program)
        patch.setattr(loop, "held_out_evaluator", held_out_evaluator)
        patch.setattr(html, "plot", lambda title, draw: html.Plot(title, Markup("")))
        yield


_PROGRAMS: dict[str, Any] = {}
_SUMS: dict[int, Any] = {}


hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of sample data that is not part of the project; tests that use it skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    data = Path(os.environ.get("BIOMAMBA_SHARED", beside)) / "data"
    if not data.is_dir():
        pytest.skip("no sample data: set BIOMAMBA_SHARED to the folder that holds data/")
    return data
