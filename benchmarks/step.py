"""Times the real training step of a config on this machine's device."""

import functools
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import numpy as np

from benchmarks import baselines
from benchmarks.contenders import Machine, compare, print_tried, tokens_per_second
from benchmarks.paired_timing import Contender, Spread, fastest, try_out
from biomamba_jax import processor
from biomamba_jax.config import DataConfig, ModelConfig, PretrainConfig
from biomamba_jax.config.checks import Limit, PositiveFloat, PositiveInt
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import peak_memory_bytes
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.model.language_model import compute_dtype
from biomamba_jax.parallel.mesh import make_mesh, rows_per_host, shard_batch
from biomamba_jax.planning.plan import PUBLISHED_VOCABULARY
from biomamba_jax.tables import summary_table
from biomamba_jax.train.program import pretrain_program
from biomamba_jax.train.setup import total_peak_flops


@dataclass(frozen=True)
class StepBenchmark(PretrainConfig):
    """A pretraining config, of which only the sizes matter, and settings of the benchmark."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=PUBLISHED_VOCABULARY))
    """The model; by default the 130m shape."""
    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=1, sequence_length=512))
    """Shape of the batch of random tokens."""
    steps: PositiveInt = 5
    """Timed steps, after one warm-up step."""
    compare: bool = False
    """Compare with transformers' model in paired timing, each contender with its best settings; CPU only."""
    allocators: Annotated[list[Literal["default", "huge-pages"]], Limit("a list of at least one", bool)] = field(
        default_factory=lambda: ["default", "huge-pages"]
    )
    """compare: settings of the C library's allocator to try for each contender."""
    torch_compile: bool = True
    """compare: also try torch.compile."""
    limit_seconds: PositiveFloat = 600
    """compare: time limit for a contender's preparation; slower ones are left out."""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.data.batch_size * self.data.sequence_length


class TrainingStep:
    """The compiled step with its state and one random batch: each call trains once and returns when that is done."""

    def __init__(self, config: StepBenchmark) -> None:
        processor.keep_freed_memory()  # as `pretrain` does; nothing where the allocator's setting is huge-pages
        mesh = make_mesh(config.mesh)
        program = pretrain_program(config, mesh, config.train.steps or 1000)
        shape = rows_per_host(config.data.batch_size, mesh), config.data.sequence_length
        ids = np.random.default_rng(0).integers(1, config.model.known_vocab, (2, *shape), dtype=np.int32)
        rows = {"inputs": ids[0], "targets": ids[1], "segment_ids": np.ones(shape, np.int32)}
        self._batch = shard_batch(rows, mesh)
        self._step = program.step.lower(program.state, program.batch).compile()
        self._state = program.init(None)

    def __call__(self) -> None:
        """Train one step and wait for it."""
        self._state, report = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, report))


def measure_step(config: StepBenchmark) -> None:
    """Time the training step and print a table."""
    if config.compare:
        compare_step(config)
        return
    step = TrainingStep(config)
    step()
    spread = Spread.of(_seconds(step) for _ in range(config.steps))
    peak = total_peak_flops(compute_dtype(config.model))
    flops = training_flops_per_token(config.model) * config.tokens
    share = None if peak is None else f"{flops / spread.median / peak:.1%}"
    memory = f"{peak_memory_bytes() / 1e9:.2f} GB"
    rows = [(_name(config), f"{spread.median:.3f}", *tokens_per_second(config.tokens, spread), memory, share)]
    columns = ("training step", "seconds", "tokens/s", "slowest–fastest", "peak memory", "share of peak")
    device = processor.name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    title = f"{jax.device_count()} x {device}, {config.steps} steps on random tokens"
    summary_table(title, columns, rows)


def compare_step(config: StepBenchmark) -> None:
    """Find the fastest setting of each contender, time both in turns, and print trials and ratio.

    Raises:
      UserError: the device is not a CPU, or transformers is not installed.
    """
    if jax.default_backend() != "cpu":
        raise UserError("compare: transformers is measured on CPU only; set JAX_PLATFORMS=cpu")
    baselines.check_installed(config.model)
    machine = Machine.measured()
    print(machine)
    ours = [Contender("biomamba_jax", a, functools.partial(TrainingStep, config)) for a in config.allocators]
    sizes = config.model, config.data.batch_size, config.data.sequence_length
    step = functools.partial(baselines.TransformersStep, *sizes, config.optimizer)
    theirs = [Contender("transformers", a, step) for a in config.allocators]
    pair = ours[0], theirs[0]
    if len(config.allocators) > 1 or config.torch_compile:
        tried = {c: try_out(c, config.limit_seconds) for c in (*ours, *theirs)}
        if config.torch_compile:
            best = fastest(tried, theirs)
            compiled = Contender("transformers, torch.compile", best.allocator, functools.partial(step, compiled=True))
            theirs.append(compiled)
            tried[compiled] = try_out(compiled, config.limit_seconds)
        pair = fastest(tried, ours), fastest(tried, theirs)
        print_tried(config.tokens, tried, pair)
    floor = training_flops_per_token(config.model) * config.tokens / machine.flops
    compare(_name(config), config.tokens, (floor, floor), pair, config.steps, config.limit_seconds)


def _seconds(step: TrainingStep) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _name(config: StepBenchmark) -> str:
    model, data = config.model, config.data
    shape = f"{data.batch_size} x {data.sequence_length:,}"
    return f"{model.kind}, {model.n_layers} x {model.d_model}, batch {shape}, {compute_dtype(model).name}"
