"""Command-line parsing into frozen dataclasses, and how a command ends.

`parse` fills a dataclass from `--config FILE.yaml` and dotted overrides (`--optimizer.learning_rate 3e-4`), and refuses
unknown and ill-typed keys by name. It imports nothing heavy: a command imports JAX once its arguments are parsed.
"""

import dataclasses
import errno
import io
import logging
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from biomamba_jax import files, folders, keys, processor
from biomamba_jax.config.checks import accepts, describe, field_docs, field_types, fits, leaves, mapping_value
from biomamba_jax.errors import UserError

COMPLETE = "--complete"
"""Last argument of a command line whose last word before it is to be completed."""

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")  # of XLA, and of PyTorch
_NO_BACKEND = "Unable to initialize backend"  # JAX_PLATFORMS names one that is not there
Schema = TypeVar("Schema")
Subcommand = Callable[[Sequence[str], str], None]
"""Runs on its arguments; the text is its documentation, for `--help`."""


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
      doc: the command's docstring, for `--help`.
      positional: key of the first argument if that is not an option.
      verbatim: list keys whose values may begin with a bracket or hyphens.

    Raises:
      UserError: an unknown key, an ill-typed value or a failed check; the message names it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if positional and words and not words[0].startswith("-"):
        words.insert(0, f"--{positional}")
    if words[-1:] == [COMPLETE]:
        print("\n".join(keys.completions(schema, words[:-1])))
        raise SystemExit(0)
    configs, texts = _read_words(schema, words, verbatim, doc or "")
    given = keys.defaults(schema)
    for path in configs:
        _merge(schema, given, files.read_yaml(path))
    for key, value in texts.items():
        *groups, name = key.split(".")
        place: Any = given
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise UserError(f"{group} = {place}: must be a mapping, of which --{key} is an entry")
        hint = keys.find(schema, key)[1]
        if isinstance(value, str) and (dataclasses.is_dataclass(hint) or mapping_value(hint)):
            value = _read_scalar(value)
        _set(hint, place, name, value)
    return _typed(schema, given, "", schema)


def _read_words(
    schema: type, argv: Sequence[str], verbatim: Sequence[str], doc: str
) -> tuple[list[str], dict[str, Any]]:
    """Return the config files, and the text or list of texts of each key; print the help and end if it is asked for."""
    configs: list[str] = []
    texts: dict[str, Any] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        option, equals, value = word.partition("=")
        if option in ("-h", "--help", "--help-all"):
            print(keys.help_text(schema, doc, whole=option == "--help-all"))
            raise SystemExit(0)
        if not option.startswith("--"):
            raise UserError(f"{word!r} is not an option; write --KEY VALUE, or --config FILE for a file of settings")
        key, hint = keys.find(schema, option[2:])
        plain = key in verbatim
        values = [value] if equals else _following(words, hint, plain)
        if not values and not accepts(hint, bool):
            raise UserError(f"--{key}: give a value")
        if key == "config":
            configs += values
        elif accepts(hint, list):
            texts[key] = _listed(key, hint, texts.get(key, []), values, plain)
        else:
            texts[key] = values[0] if values else "true"
    return configs, texts


def _following(words: deque[str], hint: Any, plain: bool) -> list[str]:
    """Remove and return the words that are values of the option before them: of a list all up to the next option."""
    values: list[str] = []
    if words and (plain or not words[0].startswith("--")):
        values.append(words.popleft())
        while accepts(hint, list) and words and not words[0].startswith("--"):
            values.append(words.popleft())
    return values


def _listed(key: str, hint: Any, earlier: Any, values: list[str], plain: bool) -> Any:
    """Return a list's texts: those given earlier and new ones, or one text where the type also accepts that."""
    if not plain and values[0].startswith("["):
        return files.parse_yaml(" ".join(values), f"--{key}", yaml.BaseLoader)  # scalars stay text
    if plain:
        values = [valid_unicode(f"--{key}", text) for text in values]
    values = [*([earlier] if isinstance(earlier, str) else earlier), *values]
    return values[0] if len(values) == 1 and accepts(hint, str) else values


def _merge(schema: Any, given: dict[str, Any], new: Any) -> None:
    """Overwrite settings; those of a group are merged, any other mapping is replaced."""
    for key, value in new.items():
        name, _, rest = key.partition(".")
        _set(field_types(schema).get(name), given, name, {rest: value} if rest else value)


def _set(hint: Any, given: dict[str, Any], name: str, value: Any) -> None:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict) and isinstance(given.get(name), dict):
        _merge(hint, given[name], value)
    else:
        given[name] = value


def _typed(hint: Any, value: Any, key: str, schema: type) -> Any:
    """Return what a file or a command line gives for a key of `schema` as the type `hint`.

    Text is read as YAML where the type is not text.

    Raises:
      UserError: the value is of another type, or a group has an unknown key or lacks one.
    """
    kinds = [leaf for leaf in leaves(hint) if isinstance(leaf, type) or get_origin(leaf)]
    read = _read_scalar(value) if isinstance(value, str) and kinds != [str] else value
    if read is None and NoneType in kinds:
        return None
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(read, dict):
            return _group(kind, read, key, schema)
        if get_origin(kind) is dict and isinstance(read, dict):
            values = get_args(kind)[1]
            return {_plain(key, name): _typed(values, each, f"{key}.{name}", schema) for name, each in read.items()}
        if get_origin(kind) is list and isinstance(read, list):
            return [_typed(get_args(kind)[0], each, key, schema) for each in read]
        for candidate in (value, read):
            if fits(kind, candidate):
                return float(candidate) if kind is float else _plain(key, candidate)
    raise UserError(f"{key} = {str(value)[:100]}: must be {describe(hint, key)}")


def _read_scalar(text: str) -> Any:
    """Return the YAML value of text, or the text if it is not YAML or only blank."""
    try:
        return files.parse_yaml(text, "") if text.strip() else text
    except UserError:
        return text


def _group(group: Any, given: dict[str, Any], key: str, schema: type) -> Any:
    types, prefix = field_types(group), f"{key}." if key else ""
    for name in given:
        if name not in types:
            raise UserError(keys.unknown(prefix + name, schema, ""))
    for field in dataclasses.fields(group):
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"--{prefix}{field.name} is missing: {field_docs(group)[field.name]}")
    return group(**{name: _typed(types[name], value, prefix + name, schema) for name, value in given.items()})


def _plain(key: str, value: Any) -> Any:
    """Return a value, unless it is text that no file and no path can hold."""
    if isinstance(value, str) and "\0" in valid_unicode(key, value):
        raise UserError(f"{key} = {value!r:.100}: holds a null character; remove it")
    return value


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

    A `UserError`, a full disk, too little memory and a file that the system refuses become one line on stderr and exit
    status 1, Ctrl-C exit status 130. If the reader of standard output is gone, as after `head`, the command ends
    silently with exit status 141, as a shell reports SIGPIPE. Text is UTF-8 in every locale.
    """
    try:
        keep_compiled_programs()
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # None if it is closed
                stream.reconfigure(encoding="utf-8")
        with files.naming_full_disks("the output", "free space, then run the same command again"):
            command(argv)
            print(end="", flush=True)
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
    except Exception as error:
        reason = _shortage(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}; check the path"
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(1) from None


def run_subcommand(subcommands: Mapping[str, Subcommand], words: Sequence[str], prog: str) -> bool:
    """Run the subcommand that the first word names; return False if there is none of that name."""
    if not words or words[0] not in subcommands:
        return False
    subcommand = subcommands[words[0]]
    subcommand(words[1:], f"{prog} {words[0]}\n\n{subcommand.__doc__}")
    return True


def _shortage(error: Exception) -> str | None:
    """Return the line for an error of too little memory or of a device that is not there, None for any other."""
    reason = f"{error} ".splitlines()[0].strip()[:300]
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if memory or any(mark in reason for mark in _OUT_OF_MEMORY):
        return f"memory ran out ({reason}); give a smaller batch_size or shorter rows"
    return reason if _NO_BACKEND in reason else None


def log_to_stderr() -> None:
    """Print the package's log, a line a message, on stderr."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("biomamba_jax").setLevel(logging.INFO)


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent compilation cache, in the user's cache folder; must come before JAX is imported.

    JAX's own variables win: JAX_ENABLE_COMPILATION_CACHE=false turns it off, JAX_COMPILATION_CACHE_DIR names another
    folder. A home folder may be shared by machines of several kinds, and a program may use any instruction of the CPU
    that compiled it: each kind of CPU has a folder of its own.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with suppress(UserError):  # no home folder, no cache
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folders.cache_folder() / "programs" / processor.kind())
    # The default of a second would leave out most programs of a small model.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


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
