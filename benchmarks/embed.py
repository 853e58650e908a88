"""Times embeddings of texts of abstracts' lengths, in paired timing with the hidden states of transformers' model."""

import functools
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np
from flax import nnx

from benchmarks import baselines
from benchmarks.contenders import Machine, compare
from benchmarks.paired_timing import Contender
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.checks import PositiveFloat, PositiveInt, Settings
from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model import init_params
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.planning.plan import PUBLISHED_VOCABULARY
from biomamba_jax.tasks.embedding import Embedder


@dataclass(frozen=True)
class EmbedBenchmark(Settings):
    """Settings of `python -m benchmarks embed`."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=PUBLISHED_VOCABULARY))
    """The model, with random weights; by default the 130m shape."""
    texts: PositiveInt = 64
    """Texts of a run, whose lengths are drawn around 300 tokens, half of them between 220 and 400."""
    batch_size: PositiveInt = 8
    """Rows of a batch: ours of packed texts, transformers' of one text each, sorted by length."""
    rounds: PositiveInt = 5
    """Pairs of runs."""
    allocator: Literal["default", "huge-pages"] = "huge-pages"
    """Setting of the C library's allocator for both contenders."""
    limit_seconds: PositiveFloat = 600.0
    """Time limit for a contender's preparation."""

    def ids(self) -> list[list[int]]:
        """Return random token ids of each text."""
        random = np.random.default_rng(0)
        lengths = np.clip(random.lognormal(np.log(300), 0.44, self.texts).astype(int), 8, 2000)
        return [random.integers(1, self.model.known_vocab, length).tolist() for length in lengths]


class Embedding:
    """Our model; each call embeds every text once, by the mean."""

    def __init__(self, config: EmbedBenchmark) -> None:
        params = jax.jit(lambda: init_params(config.model, nnx.Rngs(0)))()
        model = InferenceModel.from_params(config.model, params)
        settings = EmbeddingConfig(batch_size=config.batch_size)
        self._embedder = Embedder(model, None, settings)  # type: ignore[arg-type]  # ids need no tokenizer
        self._ids = config.ids()

    def __call__(self) -> None:
        """Embed once."""
        self._embedder.of_ids(self._ids)


def measure_embed(config: EmbedBenchmark) -> None:
    """Time both contenders in turns and print a table.

    Raises:
      UserError: the device is not a CPU, or transformers is not installed.
    """
    if jax.default_backend() != "cpu":
        raise UserError("embed: transformers is measured on CPU only; set JAX_PLATFORMS=cpu")
    baselines.check_installed(config.model)
    machine, ids, model = Machine.measured(), config.ids(), config.model
    print(machine)
    ours = Contender("biomamba_jax", config.allocator, functools.partial(Embedding, config))
    states = functools.partial(baselines.TransformersEmbedding, model, ids, config.batch_size)
    theirs = Contender("transformers", config.allocator, states)
    tokens = sum(map(len, ids))
    flops = training_flops_per_token(model) / 3 - 2 * model.padded_vocab * model.d_model  # without logits
    sizes = f"{model.kind}, {model.n_layers} x {model.d_model}, {config.texts} texts, {tokens:,} tokens, float32"
    floor = flops * tokens / machine.flops
    compare(sizes, tokens, (floor, floor), (ours, theirs), config.rounds, config.limit_seconds)
