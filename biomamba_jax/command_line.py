"""How a command reads its settings and how it ends.

`parse` fills a frozen dataclass from `--config FILE.yaml` and dotted overrides (`--optimizer.learning_rate 3e-4`),
refuses unknown and ill-typed keys by name, and builds `--help` from the docstrings below each field.
"""

import dataclasses
import difflib
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jsonargparse
import yaml

from biomamba_jax.errors import UserError

Schema = TypeVar("Schema")


def _nearest(message: str, keys: Sequence[str]) -> str:
    """Adds the nearest known key to a message of jsonargparse about an unknown one."""
    unknown = re.search(
        r"(?:does not accept (?:option|nested key)|unrecognized arguments:|Key) ['\"]?([\w.-]+)", message
    )
    if unknown is None:
        return message
    name = unknown.group(1).lstrip("-")
    group = re.search(r"Group '([\w.]+)'", message)
    full = f"{group.group(1)}.{name}" if group else name
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(full, keys, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_leaf), 1, 0.75)
    ]
    return f"unknown key {full!r}" + (f"; did you mean {close[0]!r}?" if close else "; --help lists all keys")


def parse(schema: type[Schema], argv: Sequence[str] | None, *, prog: str, description: str) -> Schema:
    """Reads a command line into the dataclass `schema`.

    Args:
      schema: a frozen dataclass whose fields may be dataclasses.
      argv: arguments without the program's name, or None for those of this process.

    Raises:
      UserError: an unknown key, an ill-typed value or a failed check; the message names it.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_class_arguments(schema, as_group=False)
    try:
        settings = parser.parse_args(argv)
        return schema(**{f.name: parser.instantiate(settings)[f.name] for f in dataclasses.fields(schema)})  # type: ignore[arg-type]
    except jsonargparse.ArgumentError as error:
        keys = [action.dest for action in parser._actions]
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        raise UserError(_nearest(" ".join(lines), keys)) from error
    except UnicodeDecodeError as error:
        given = re.findall(r"--config[= ](\S+)", " ".join(sys.argv[1:] if argv is None else argv))
        raise UserError(f"--config {' '.join(given)}: the file is not UTF-8 ({error}); convert it") from None


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's main: a `UserError` becomes one line on stderr and exit status 1, Ctrl-C exit status 130.

    Where the reader of standard output has gone, as `head` does, it ends without a word and with exit status 141, what
    a shell shows of a program that ends so by itself.
    """
    try:
        command(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        raise SystemExit(141) from None
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _reader_is_gone() -> bool:
    """Whether it is standard output that broke; what is still to be written there is then thrown away."""
    try:
        out = sys.stdout.fileno()
    except OSError:  # no file, but a stand-in
        return False
    poll = select.poll()
    poll.register(out, 0)  # errors are told without being asked for
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)  # or Python complains when it closes standard output
    os.close(nowhere)
    return True
