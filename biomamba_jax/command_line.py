"""Command-line parsing into frozen dataclasses, and how a command ends.

`parse` fills a dataclass from `--config FILE.yaml` and dotted overrides (`--optimizer.learning_rate 3e-4`), refuses
unknown and ill-typed keys by name, and builds `--help` from the docstrings below each field.
"""

import dataclasses
import difflib
import math
import os
import re
import select
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jsonargparse
import yaml

from biomamba_jax.config.checks import accepts, describe, field_types, mapping_value
from biomamba_jax.errors import UserError

Schema = TypeVar("Schema")


def parse(
    schema: type[Schema],
    argv: Sequence[str] | None,
    doc: str | None = "",
    *,
    positional: str = "",
    verbatim: Sequence[str] = (),
) -> Schema:
    """Read a command line into the dataclass `schema`.

    Lists are written `--key a b c`, `--key a --key b` or `--key '[a, b]'`; a boolean key alone means true; hyphens in
    keys are underscores. Overrides win over `--config` files, wherever they stand.

    Args:
      schema: a frozen dataclass whose fields may be dataclasses.
      argv: arguments without the program's name, or None for those of this process.
      doc: the command's docstring; holds "python -m NAME", the program's name. The rest is the description in `--help`.
      positional: key of the first argument if that is not an option.
      verbatim: list keys whose values may begin with a bracket or hyphens.

    Raises:
      UserError: an unknown key, an ill-typed value or a failed check; the message names it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    usage = re.compile(r"^(python -m [\w.]+( [a-z]+)?).*\n", re.MULTILINE)
    prog = usage.search(doc or "")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog and prog[1], description=usage.sub("", doc or ""), exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_class_arguments(schema, as_group=False)
    if positional and words and not words[0].startswith("-"):
        words[:1] = [f"--{positional}", words[0]]
    try:
        settings = parser.parse_args(_as_assignments(schema, words, verbatim))
        _require_groups(schema, settings)
        return schema(**{f.name: parser.instantiate(settings)[f.name] for f in dataclasses.fields(schema)})  # type: ignore[arg-type]
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), schema)) from error
    except UnicodeDecodeError as error:
        given = re.findall(r"--config[= ](\S+)", " ".join(words))
        raise UserError(f"--config {' '.join(given)}: the file is not UTF-8 ({error}); convert it") from None


def _as_assignments(schema: type, argv: Sequence[str], verbatim: Sequence[str]) -> list[str]:
    """Rewrite arguments as `--key=value`, with lists as YAML; config files first, so that overrides win."""
    files: list[str] = []
    settings: list[str] = []
    lists: dict[str, list[str]] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        option, equals, value = word.partition("=")
        if re.fullmatch(r"-h|--([\w.]+\.)?help|--print_config", option):
            settings.append(word)
            continue
        if not option.startswith("--"):
            raise UserError(f"{word!r} is not an option; write --KEY VALUE, or --config FILE for a file of settings")
        key, hint = _find(schema, option[2:])
        is_list, plain = accepts(hint, list), key in verbatim
        values = [value] if equals else []
        if not equals and words and (plain or not words[0].startswith("--")):
            values.append(words.popleft())
            while is_list and words and not words[0].startswith("--"):
                values.append(words.popleft())
        if not values and not accepts(hint, bool):
            raise UserError(f"--{key}: give a value")
        if is_list and (plain or len(values) > 1 or not values[0].startswith("[")):
            lists.setdefault(key, []).extend(valid_unicode(f"--{key}", text) if plain else text for text in values)
        else:
            lists.pop(key, None)
            (files if key == "config" else settings).append(f"--{key}={values[0] if values else 'true'}")
    for key, texts in lists.items():
        one = len(texts) == 1 and accepts(_find(schema, key)[1], str)  # of a key that takes a text or a list of texts
        settings.append(f"--{key}={texts[0] if one else _as_yaml(texts)}")
    return files + settings


def _find(schema: type, name: str) -> tuple[str, Any]:
    """Return a key as the schema spells it, and its type.

    Raises:
      UserError: there is no such key; names the nearest.
    """
    if name == "config":
        return name, str
    key: str = ""
    hint: Any = schema
    for part in name.split("."):
        if dataclasses.is_dataclass(hint):
            part = part.replace("-", "_")
            hint = field_types(hint).get(part)
        else:
            hint = mapping_value(hint)
        if hint is None:
            raise UserError(_unknown(name, schema, "--"))
        key += f".{part}" if key else part
    return key, hint


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting; NAME stands for a name that the user chooses."""
    if dataclasses.is_dataclass(schema):
        for name, hint in field_types(schema).items():
            yield from _keys(hint, f"{prefix}.{name}".lstrip("."))
    elif value := mapping_value(schema):
        yield from _keys(value, f"{prefix}.NAME")
    else:
        yield prefix


def _unknown(name: str, schema: type, dashes: str) -> str:
    keys = list(_keys(schema))
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(name, keys, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_leaf), 1, 0.75)
    ]
    close = close or [key for key in keys if key.startswith(name)]
    remedy = f"did you mean '{dashes}{close[0]}'?" if close else "--help lists all keys"
    return f"unknown key '{dashes}{name}'; {remedy}"


def _explain(message: str, schema: type) -> str:
    """Reword an error of jsonargparse: the key, its value and what it takes."""
    unknown = re.search(r"(?:does not accept (?:option|nested key)|Key|Option) ['\"]?([\w.-]+)", message)
    if unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        return _unknown(f"{group[1]}.{unknown[1]}" if group else unknown[1], schema, "")
    keys = re.findall(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got value:|Given value:|Unable to load config|string:) (.*)", message)
    if not keys or not value:
        return " ".join(line.strip(" -") for line in message.splitlines())
    key, hint = keys[0], _find(schema, keys[0])[1]
    for inner in keys[1:]:
        if inner != key and (entry := mapping_value(hint)):  # which of the entries is not in the message
            key, hint = f"{key}.NAME.{inner}", field_types(entry)[inner]
    return f"{key} = {value[1]}: must be {describe(hint, key)}"


def _require_groups(schema: type, settings: Any, prefix: str = "") -> None:
    """Raise UserError if a group of settings is not a mapping, as after a slip of indentation in YAML."""
    for name, hint in field_types(schema).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            group = settings[name]
            if not isinstance(group, jsonargparse.Namespace | dict):
                raise UserError(f"{prefix}{name} = {group!r}: must be {describe(hint, prefix + name)}")
            _require_groups(hint, group, f"{prefix}{name}.")


def _as_yaml(texts: list[str]) -> str:
    """Return one line that YAML reads as these texts; JSON's surrogate pairs would be read as two characters."""
    return yaml.safe_dump(texts, default_style='"', default_flow_style=True, width=math.inf).strip()


def valid_unicode(where: str, text: str) -> str:
    """Return `text`, unless it holds lone surrogates, as which Python represents the bytes of a non-UTF-8 argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text!r} is not valid Unicode; give text in UTF-8") from None
    return text


def to_yaml(config: Any) -> str:
    """Return the configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a command's main.

    A `UserError` becomes one line on stderr and exit status 1, Ctrl-C exit status 130. If the reader of standard output
    is gone, as after `head`, the command ends silently with exit status 141, as a shell reports SIGPIPE.
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
    """Return True if stdout's reader is gone, after redirecting stdout to the null device."""
    try:
        out = sys.stdout.fileno()
    except OSError:  # not a file but a stand-in
        return False
    poll = select.poll()
    poll.register(out, 0)  # errors are always reported
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)  # or Python complains when it closes standard output
    os.close(nowhere)
    return True
