"""python -m biomamba_jax.classify --model DIR [--file PROMPTS.jsonl] [--prompt "{prompt}"] > classes.jsonl

Names the class of texts with a model that `finetune --head classifier` made: its run directory, or what `convert` made
of it. Reads JSON lines from a file or from standard input, and writes each line again with "label" and "probabilities".
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.data.examples import fill_template, read_records
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines

_AT_ONCE = 64
"""Lines read, classified and written together."""


@dataclass(frozen=True)
class ClassifyConfig:
    """What to classify, and with which model."""

    model: str = ""
    """Folder of the model."""
    file: str | None = None
    """JSON lines (.jsonl, .jsonl.gz); left out: standard input."""
    prompt: str = "{prompt}"
    """What the model reads; {name} stands for that key of the line. Give the template of the training."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrices and activations; left out: bfloat16 on TPU and GPU, float32 on CPU."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("--model is missing; name the folder of a model")


def classify(config: ClassifyConfig, source: Iterable[str], out: TextIO) -> None:
    """Does what `config` says.

    Args:
      source: lines to read where the config names no file.
      out: where results go.

    Raises:
      UserError: a model without a classifier, or a line that the template does not fit.
    """
    from biomamba_jax.tasks.model import load

    model = load(config.model, config.dtype)
    records = _prompts(config, source)
    while batch := list(itertools.islice(records, _AT_ONCE)):
        for (record, _), found in zip(batch, model.classify([prompt for _, prompt in batch]), strict=True):
            result = record | {"label": found.label, "probabilities": found.probabilities}
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
        out.flush()


def _prompts(config: ClassifyConfig, source: Iterable[str]) -> Iterator[tuple[dict[str, Any], str]]:
    name = config.file or "standard input"
    for where, record in read_records(name, read_lines(config.file) if config.file else source):
        yield record, fill_template(config.prompt, record, where, "prompt")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    description = (__doc__ or "").partition("\n\n")[2]
    config = parse(ClassifyConfig, argv, prog="python -m biomamba_jax.classify", description=description)
    classify(config, sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
