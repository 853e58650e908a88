"""Continue prompts with a model of any format: native, Hugging Face, mamba_ssm, or a run directory.

python -m biomamba_jax.generate --model DIR (--prompt TEXT ... | --file FILE | --jsonl) [--temperature 0.8 ...]

Streams the text of a single prompt to a terminal. With --jsonl, reads lines {"prompt": "..."} from standard input and
writes lines {"prompt", "text", "tokens", "finish_reason"}, a batch at a time.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from biomamba_jax.command_line import parse, run_command, valid_unicode
from biomamba_jax.config.generate import GenerateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines, read_lines

VERBATIM = ("prompt", "stop")
"""Lists of text, in which brackets and leading hyphens have no meaning."""


def generate(config: GenerateConfig, source: TextIO, out: TextIO) -> None:
    """Continue the prompts.

    Args:
      config: prompts, model and sampling.
      source: input of --jsonl.
      out: where results are written; a single prompt's text is streamed if this is a terminal.

    Raises:
      UserError: no model, no tokenizer, or a line without a prompt.
    """
    prompts = _read_jsonl(source) if config.jsonl else config.prompt or _read_lines(Path(config.file or ""))
    from biomamba_jax.tasks.model import load

    model = load(config.model, config.dtype)
    model.tokenizer  # noqa: B018 - raises if there is none
    if len(config.prompt) == 1 and out.isatty():
        _stream(model.generator, config, out)
        return
    for index, result in enumerate(model.generator(prompts, config, batch_size=config.batch_size)):
        if config.jsonl:
            out.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")
        else:
            out.write(("---\n" if index else "") + result.prompt + result.text + "\n")
        out.flush()


def _stream(generator, config: GenerateConfig, out: TextIO) -> None:
    def show(_: int, piece: str) -> None:
        out.write(piece)
        out.flush()

    show(0, config.prompt[0])
    list(generator(config.prompt, config, on_text=show))
    out.write("\n")


def _read_lines(path: Path) -> list[str]:
    if not (prompts := [line for line in read_lines(path) if line.strip()]):
        raise UserError(f"{path}: contains no prompt; write one per line")
    return prompts


def _read_jsonl(source: Iterable[str]) -> Iterator[str]:
    for number, record in read_json_lines("standard input", source):
        if not isinstance(record.get("prompt"), str):
            raise UserError(f'standard input, line {number}: give an object with a text: {{"prompt": "..."}}')
        yield valid_unicode(f"standard input, line {number}", record["prompt"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    generate(parse(GenerateConfig, argv, __doc__, verbatim=VERBATIM), sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
