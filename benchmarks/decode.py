"""Times greedy decoding of random prompts with random weights on this machine's device."""

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import numpy as np
from flax import nnx

from benchmarks import baselines
from benchmarks.contenders import Machine, compare, tokens_per_second
from benchmarks.paired_timing import Contender, Spread
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.checks import PositiveFloat, PositiveInt, Settings
from biomamba_jax.config.generate import Sampling
from biomamba_jax.config.model import InferenceDType
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import peak_memory_bytes
from biomamba_jax.model import init_params
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.model.language_model import compute_dtype
from biomamba_jax.planning.plan import PUBLISHED_VOCABULARY
from biomamba_jax.tables import summary_table
from biomamba_jax.tasks.generation import Generator


@dataclass(frozen=True)
class DecodeBenchmark(Settings):
    """Settings of `python -m benchmarks decode`."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=PUBLISHED_VOCABULARY))
    """The model; by default the 130m shape."""
    dtype: InferenceDType | None = None
    """Compute dtype, or int8 matrices; default: model.compute_dtype."""
    batch_size: PositiveInt = 1
    """Prompts per batch."""
    prompt_length: PositiveInt = 128
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 64
    """Tokens generated for each prompt."""
    rounds: PositiveInt = 5
    """Timed runs, after one warm-up run; each processes the prompts and generates all tokens."""
    compare: bool = False
    """Compare in paired timing, on a CPU: with transformers' generate, or bfloat16 and int8 with our float32."""
    allocator: Literal["default", "huge-pages"] = "huge-pages"
    """compare: setting of the C library's allocator for both contenders."""
    limit_seconds: PositiveFloat = 600
    """compare: time limit for a contender's preparation."""

    @property
    def tokens(self) -> int:
        """New tokens of one run."""
        return self.batch_size * self.new_tokens

    def floor(self, machine: Machine) -> float:
        """Return the seconds that a run would take at the machine's bare speeds.

        They are those of the prompts' products in float32, and for each new token of reading all weights in their dtype
        or of computing with them, whichever is slower.
        """
        flops = training_flops_per_token(self.model) / 3 * self.batch_size
        reading = bytes_read(self) / machine.bandwidth
        return self.prompt_length * flops / machine.flops + self.new_tokens * max(reading, flops / machine.flops)

    def prompts(self) -> np.ndarray:
        """Return random token ids [B L]."""
        shape = self.batch_size, self.prompt_length
        return np.random.default_rng(0).integers(1, self.model.known_vocab, shape)


def random_model(config: DecodeBenchmark) -> InferenceModel:
    """Return our model with random weights."""
    params = jax.jit(lambda: init_params(config.model, nnx.Rngs(0)))()
    return InferenceModel.from_params(config.model, params, config.dtype)


def bytes_read(config: DecodeBenchmark) -> int:
    """Return the bytes of the weights that a token reads: all but an untied embedding."""
    model = jax.eval_shape(lambda: random_model(config))
    read = replace(model, embedding=None) if model.lm_head else model
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))


class Decoding:
    """Our model with its compiled programs; each call continues the prompts once."""

    def __init__(self, config: DecodeBenchmark) -> None:
        self._generator = Generator(random_model(config))
        self._prompts = config.prompts().tolist()
        self._sampling = Sampling(max_new_tokens=config.new_tokens)

    def __call__(self) -> None:
        """Decode once."""
        self._generator.decode(self._prompts, self._sampling)


def measure_decode(config: DecodeBenchmark) -> None:
    """Time decoding and print a table.

    Raises:
      UserError: compare is set, and the device is not a CPU or transformers is not installed.
    """
    if config.compare:
        if jax.default_backend() != "cpu":
            raise UserError("compare: decoding is compared on a CPU only; set JAX_PLATFORMS=cpu")
        contenders = _ours(config), _theirs(config)
        machine = Machine.measured()
        print(machine)
        floors = config.floor(machine), replace(config, dtype="float32").floor(machine)
        compare(_title(config), config.tokens, floors, contenders, config.rounds, config.limit_seconds)
        return
    decode = Decoding(config)
    decode()
    spread = Spread.of(_seconds(decode) for _ in range(config.rounds))
    memory = f"{peak_memory_bytes() / 1e9:.2f} GB"
    columns = ("decoding", "tokens/s", "slowest–fastest", "peak memory")
    summary_table(
        f"1 x {jax.devices()[0].device_kind}, {config.rounds} runs",
        columns,
        [(_title(config), *tokens_per_second(config.tokens, spread), memory)],
    )


def _ours(config: DecodeBenchmark) -> Contender:
    name = f"biomamba_jax, {_weight_dtype(config)}"
    return Contender(name, config.allocator, functools.partial(Decoding, config))


def _theirs(config: DecodeBenchmark) -> Contender:
    """Return what a run is compared with: the next slower thing that computes the same."""
    if _weight_dtype(config) != "float32":
        return _ours(replace(config, dtype="float32"))
    baselines.check_installed(config.model)
    generate = functools.partial(baselines.TransformersDecoding, config.model, config.prompts(), config.new_tokens)
    return Contender("transformers", config.allocator, generate)


def _weight_dtype(config: DecodeBenchmark) -> str:
    return config.dtype or compute_dtype(config.model).name


def _seconds(decode: Decoding) -> float:
    start = time.perf_counter()
    decode()
    return time.perf_counter() - start


def _title(config: DecodeBenchmark) -> str:
    model = config.model
    sizes = f"{model.kind}, {model.n_layers} x {model.d_model}, {_weight_dtype(config)}"
    return f"{sizes}, {config.batch_size} prompts of {config.prompt_length} + {config.new_tokens} tokens"
