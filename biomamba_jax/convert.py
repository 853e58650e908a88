"""Convert a model between Hugging Face transformers, mamba_ssm and the native format, and to llama.cpp's GGUF.

python -m biomamba_jax.convert --input MODEL --output DIR --to native|hf|mamba_ssm|gguf [--push OWNER/NAME ...]

The input's format is recognised from its files. Of a run directory, the best checkpoint is converted if the run keeps
it, else the newest, with EMA weights if the run has them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.convert import ConvertConfig
from biomamba_jax.errors import UserError

if TYPE_CHECKING:
    from biomamba_jax.interop import Weights


def convert(config: ConvertConfig) -> list[Path]:
    """Convert a model, print a table of the files written, and return their paths.

    Raises:
      UserError: the input is damaged or doesn't fit its config, or the output exists: nothing is written. Or the hub
        does not take it.
    """
    from biomamba_jax.data.sample import tokenizer_file
    from biomamba_jax.interop import dialect_of, hub, read_model, write_model
    from biomamba_jax.interop.model_card import read_results
    from biomamba_jax.interop.models import refuse_existing
    from biomamba_jax.interop.tensors import BIN
    from biomamba_jax.tables import summary_table

    refuse_existing(Path(config.output))
    if config.push:
        hub.require_token(config.push)
    weights = read_model(config.input)
    if config.tokenizer:
        weights = _with_tokenizer(weights, tokenizer_file(config.tokenizer), config)
    weights.about |= {"language": config.language} if config.language != "en" else {}
    weights.about |= {"license": config.license} if config.license else {}
    weights.about |= {"results": read_results(Path(config.report), config.input)} if config.report else {}
    written = write_model(weights, config.output, config.to, config.dtype, name=config.push)
    rows = [(path.name, f"{_bytes(path) / 1e6:,.2f} MB") for path in written]
    summary_table(f"{config.input} ({dialect_of(config.input)}) to {config.to}", ("written", "size"), rows)
    if config.to == "mamba_ssm" and not (Path(config.output) / BIN).exists():
        print(f"torch is not installed: {BIN}, the file that mamba_ssm loads, was not written")
    if config.to == "gguf" and weights.head is not None:
        print("the head was left out: GGUF has no place for it; --to hf or native keeps it")
    if weights.tokenizer_file is None:
        print("the input has no tokenizer; --tokenizer FILE adds one (gpt-neox for the released models)")
    if config.push:
        print(f"pushed: {hub.push(Path(config.output), config.push)}")
    return written


def _with_tokenizer(weights: "Weights", file: Path, config: ConvertConfig) -> "Weights":
    """Return the weights with the tokenizer in `file`.

    Raises:
      UserError: its ids are not those of the weights' own tokenizer, without new_tokenizer, or more than they have.
    """
    from biomamba_jax.data.tokenizer import load_tokenizer
    from biomamba_jax.interop import vocabulary

    theirs = load_tokenizer(file)
    if weights.tokenizer_file is not None and config.new_tokenizer:
        weights = vocabulary.with_tokenizer(weights, theirs)[0]
    elif weights.tokenizer_file is not None:
        remedy = "leave it out, or give --new_tokenizer to draw the rows of its other tokens anew"
        ours = load_tokenizer(weights.tokenizer_file)
        vocabulary.require_same(ours, theirs, f"--tokenizer {config.tokenizer}", remedy)
    if theirs.vocab_size > weights.config.known_vocab:
        raise UserError(
            f"--tokenizer {config.tokenizer}: has {theirs.vocab_size} ids, the model {weights.config.known_vocab}; "
            "give the tokenizer that the model was trained with"
        )
    return dataclasses.replace(weights, tokenizer_file=file, token_ids={})


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    convert(parse(ConvertConfig, argv, __doc__))


if __name__ == "__main__":
    run_command(main)
