"""Classify texts with a model fine-tuned with `finetune --head classifier` or multi_label.

python -m biomamba_jax.classify --model DIR [--file PROMPTS.jsonl] [--prompt "{prompt}"] > classes.jsonl

The model is the run directory, what `convert` exported from it, or an encoder's Hugging Face folder. Reads JSON lines
from a file or from standard input, and writes each line again with "predicted_label", or the "predicted_labels" of a
multi-label head, and "probabilities".
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.classify import ClassifyConfig
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines

_AT_ONCE = 64
"""Lines read, classified and written at a time."""


def classify(config: ClassifyConfig, source: Iterable[str], out: TextIO) -> None:
    """Classify the lines of a file or of `source`.

    Args:
      config: the texts and the model.
      source: lines to read if the config names no file.
      out: where results are written.

    Raises:
      UserError: the model has no classifier, or a line lacks a key of the template.
    """
    from biomamba_jax.data.examples import fill_template
    from biomamba_jax.data.records import batched
    from biomamba_jax.tasks.model import load_head

    model = load_head(config.model, config.dtype)
    name = config.file or "standard input"
    lines = read_json_lines(name, None if config.file else source)
    for batch in batched(lines, _AT_ONCE):
        for number, line in batch:
            if taken := ", ".join({"predicted_label", "predicted_labels", "probabilities"} & set(line)):
                raise UserError(f"{name}, line {number}: has its own {taken}, which is what is written; rename the key")
        prompts = [fill_template(config.prompt, line, f"{name}, line {number}", "prompt") for number, line in batch]
        for (_, line), found in zip(batch, model.classify(prompts), strict=True):
            one = model.head.kind == "classifier"
            labels = {"predicted_label": found.label} if one else {"predicted_labels": found.labels}
            result = line | labels | {"probabilities": found.probabilities}
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
        out.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    classify(parse(ClassifyConfig, argv, __doc__), sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
