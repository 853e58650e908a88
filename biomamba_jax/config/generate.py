"""Settings of `generate`, and of how tokens are chosen wherever text is generated."""

import dataclasses
import math
from typing import Annotated, ClassVar

from biomamba_jax.config.checks import Fraction, Limit, PositiveFraction, PositiveInt, Seed, Settings, check
from biomamba_jax.config.model import InferenceConfig
from biomamba_jax.errors import UserError

_SMALLEST = 1e-30
"""Smallest divisor of logits: below it quotients overflow float32."""
_TEMPERATURES = Limit(f"0, or finite and at least {_SMALLEST:g}", lambda t: t == 0 or _SMALLEST <= t < math.inf)
_PENALTIES = Limit(f"in [{_SMALLEST:g}, {1 / _SMALLEST:g}]", lambda x: _SMALLEST <= x <= 1 / _SMALLEST)


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
    """Settings of how tokens are chosen and when generation stops."""

    max_new_tokens: PositiveInt = 128
    """Maximum number of tokens to generate for each prompt."""
    temperature: Annotated[float, _TEMPERATURES] = 0.0
    """Divides the logits; 0 is greedy: always the most likely token."""
    top_k: Annotated[int, Limit("in 0..2^31 - 1", lambda k: 0 <= k < 2**31)] = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: PositiveFraction = 1.0
    """Sample from the fewest most likely tokens whose probabilities sum to at least this; 1: from all."""
    min_p: Fraction = 0.0
    """Sample from tokens at least this probable relative to the most likely one; 0: from all."""
    repetition_penalty: Annotated[float, _PENALTIES] = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that the prompt or the text contains."""
    seed: Seed = 0
    """Random seed. A prompt's text does not depend on the rest of its batch; a repeated prompt is sampled anew."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Strings that end the text; it is truncated before the one that is completed first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = not isinstance(self.stop, str) and all(self.stop)
        check(valid, "stop", self.stop, "must be a list of non-empty strings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling, InferenceConfig):
    """The prompts to continue, the model, and how tokens are chosen."""

    basic: ClassVar[str] = "model prompt file jsonl max_new_tokens temperature top_p seed stop"

    prompt: list[str] = dataclasses.field(default_factory=list)
    """Texts to continue."""
    file: str | None = None
    """A text file with one prompt per line, instead of --prompt."""
    jsonl: bool = False
    """Prompts and results as JSON lines on standard input and output, instead of --prompt."""
    batch_size: PositiveInt = 8
    """Prompts continued at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.prompt) + bool(self.file) + self.jsonl != 1:
            raise UserError("give one of --prompt, --file and --jsonl")
        if ".jsonl" in (self.file or ""):
            raise UserError(f"file = {self.file!r}: is not a prompt a line; give JSON lines as --jsonl < {self.file}")
