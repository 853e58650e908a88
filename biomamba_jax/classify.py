"""Classify texts with a model fine-tuned with `finetune --head classifier`.

python -m biomamba_jax.classify --model DIR [--file PROMPTS.jsonl] [--prompt "{prompt}"] > classes.jsonl

The model is the run directory, or what `convert` exported from it. Reads JSON lines from a file or from standard input,
and writes each line again with "label" and "probabilities".
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.data.examples import fill_template
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines

_AT_ONCE = 64
"""Lines read, classified and written at a time."""


@dataclass(frozen=True)
class ClassifyConfig:
    """The texts to classify, and the model."""

    model: str = ""
    """Folder of the model."""
    file: str | None = None
    """JSON lines (.jsonl, .jsonl.gz); default: standard input."""
    prompt: str = "{prompt}"
    """Template of the prompt, as in training; {name} stands for that key of the line."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; default: bfloat16 on TPU and GPU, float32 on CPU."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("--model is missing; name the folder of a model")


def classify(config: ClassifyConfig, source: Iterable[str], out: TextIO) -> None:
    """Classify the lines of a file or of `source`.

    Args:
      config: the texts and the model.
      source: lines to read if the config names no file.
      out: where results are written.

    Raises:
      UserError: the model has no classifier, or a line lacks a key of the template.
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
    for number, record in read_json_lines(name, None if config.file else source):
        yield record, fill_template(config.prompt, record, f"{name}, line {number}", "prompt")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    classify(parse(ClassifyConfig, argv, __doc__), sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
