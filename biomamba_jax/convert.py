"""Convert a model between Hugging Face transformers, mamba_ssm and the native format, and to llama.cpp's GGUF.

python -m biomamba_jax.convert --input MODEL --output DIR --to native|hf|mamba_ssm|gguf [--push OWNER/NAME ...]

The input's format is recognised from its files. Of a run directory, the best checkpoint is converted if the run keeps
it, else the newest, with EMA weights if the run has them.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.checks import Limit, LocalFolder, Settings
from biomamba_jax.errors import UserError

_HUB_NAME = Limit("a name on the hub: owner/name", lambda name: re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None)


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """The model to convert, and the format to write."""

    input: str
    """Model to read: a folder (Hugging Face, mamba_ssm, native, or a run directory), also gs://bucket/folder, or a name
    on the Hugging Face hub, owner/name or owner/name@revision."""
    output: LocalFolder
    """Folder to write; must not exist."""
    to: Literal["native", "hf", "mamba_ssm", "gguf"] = "hf"
    """Format to write; gguf, for llama.cpp, needs the [gguf] extra."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Dtype of the tensors written; native is always float32, and q8_0 is for gguf."""
    tokenizer: str | None = None
    """Tokenizer to export with the weights: a file, or the name gpt-neox. Where the input has another, see
    new_tokenizer."""
    new_tokenizer: bool = False
    """Take the tokenizer where the input has another: rows of the embedding whose tokens it also has keep their values,
    by spelling; the others are drawn anew."""
    push: Annotated[str, _HUB_NAME] | None = None
    """Also upload the folder to the hub under this name, owner/name, as a private model if it is new. Needs
    `hf auth login` or HF_TOKEN, and the [hub] extra."""
    report: str | None = None
    """report.json of `evaluate`, or its folder: what it measured of the input goes into the model card."""
    license: str | None = None
    """Licence of the weights for the model card, as the hub names it, such as apache-2.0; default: unknown."""
    language: str = "en"
    """Language of the text for the model card."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    convert(parse(ConvertConfig, argv, __doc__))


def convert(config: ConvertConfig) -> list[Path]:
    """Convert a model, print a table of the files written, and return their paths.

    Raises:
      UserError: the input is damaged or doesn't fit its config, or the output exists: nothing is written. Or the hub
        does not take it.
    """
    from biomamba_jax.data.sample import tokenizer_file
    from biomamba_jax.data.tokenizer import load_tokenizer
    from biomamba_jax.interop import dialect_of, hub, read_model, vocabulary, write_model
    from biomamba_jax.interop.model_card import read_results
    from biomamba_jax.interop.models import refuse_existing
    from biomamba_jax.interop.tensors import BIN
    from biomamba_jax.tables import summary_table

    refuse_existing(Path(config.output))
    if config.push:
        hub.require_token(config.push)
    weights = read_model(config.input)
    if config.tokenizer:
        file = tokenizer_file(config.tokenizer)
        if weights.tokenizer_file is not None and config.new_tokenizer:
            weights = vocabulary.with_tokenizer(weights, load_tokenizer(file))[0]
        elif weights.tokenizer_file is not None:
            remedy = "leave it out, or give --new_tokenizer to draw the rows of its other tokens anew"
            ours = load_tokenizer(weights.tokenizer_file)
            vocabulary.require_same(ours, load_tokenizer(file), f"--tokenizer {config.tokenizer}", remedy)
        if (ids := load_tokenizer(file).vocab_size) > weights.config.known_vocab:
            raise UserError(
                f"--tokenizer {config.tokenizer}: has {ids} ids, the model {weights.config.known_vocab}; "
                "give the tokenizer that the model was trained with"
            )
        weights = dataclasses.replace(weights, tokenizer_file=file, token_ids={})
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


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


if __name__ == "__main__":
    run_command(main)
