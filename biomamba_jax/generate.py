"""python -m biomamba_jax.generate --model DIR (--prompt TEXT ... | --file FILE | --jsonl) [--temperature 0.8 ...]

Continues prompts with a model of any format: native, Hugging Face, mamba_ssm, or a run directory of `pretrain`. Shows
the text of a single prompt on a terminal as it grows. With --jsonl, reads lines {"prompt": "..."} from standard input
and writes lines {"prompt", "text", "tokens", "finish_reason"}, a batch at a time.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import yaml

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.sampling import Sampling


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    """What to continue, with which model, and how."""

    model: str = ""
    """Folder of the model."""
    prompt: list[str] = field(default_factory=list)
    """Text to continue; may be given several times."""
    file: str | None = None
    """A text file with one prompt a line, instead of --prompt."""
    jsonl: bool = False
    """Prompts and results as JSON lines on standard input and output, instead of --prompt."""
    batch_size: int = 8
    """Prompts continued at one time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrices and activations; left out: bfloat16 on TPU and GPU, float32 on CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing; name the folder of a model")
        if bool(self.prompt) + bool(self.file) + self.jsonl != 1:
            raise UserError("give one of --prompt, --file and --jsonl")
        if self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: must be at least 1")


def generate(config: GenerateConfig, source: TextIO, out: TextIO) -> None:
    """Does what `config` says.

    Args:
      source: where --jsonl reads from.
      out: where results go; text is shown as it grows if this is a terminal.

    Raises:
      UserError: no model, no tokenizer, or a line that holds no prompt.
    """
    prompts = _read_jsonl(source) if config.jsonl else config.prompt or _read_lines(Path(config.file or ""))
    from biomamba_jax.tasks.model import load

    model = load(config.model, config.dtype)
    model.tokenizer  # noqa: B018 - says what is missing
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
    try:  # other line ends of Unicode, which splitlines knows, are characters of a prompt
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); check --file") from None
    if not (prompts := [line for line in lines if line.strip()]):
        raise UserError(f"{path}: holds no prompt; put one on each line")
    return prompts


def _read_jsonl(source: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(_decoded(source), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"standard input, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'standard input, line {number}: give an object with a text: {{"prompt": "..."}}')
        yield _checked(f"standard input, line {number}", record["prompt"])


def _decoded(source: Iterable[str]) -> Iterator[str]:
    try:
        yield from source
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: is not UTF-8 ({error}); convert it") from None


def _checked(where: str, text: str) -> str:
    """`text`, unless it holds half a character, as Python makes of an argument that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text!r} is no valid Unicode; give text in UTF-8") from None
    return text


def _as_settings(argv: Sequence[str]) -> list[str]:
    """Repeated --prompt and --stop as the lists that the schema has, and a bare --jsonl as true."""
    lists: dict[str, list[str]] = {"--prompt": [], "--stop": []}
    settings, words = [], list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name in lists:
            if not equals and not words:
                raise UserError(f"{name}: give a text")
            lists[name].append(_checked(name, value if equals else words.pop(0)))
        else:
            settings.append(f"{name}=true" if name == "--jsonl" and not equals else name + equals + value)
    return settings + [f"{name}={_as_yaml(texts)}" for name, texts in lists.items() if texts]


def _as_yaml(texts: list[str]) -> str:
    """One line that YAML reads as these texts; it would read JSON's pairs of surrogates as two halves."""
    return yaml.safe_dump(texts, default_style='"', default_flow_style=True, width=math.inf).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    config = parse(
        GenerateConfig,
        _as_settings(sys.argv[1:] if argv is None else argv),
        prog="python -m biomamba_jax.generate",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    generate(config, sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
