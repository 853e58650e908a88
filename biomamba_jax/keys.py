"""The dotted keys of a command's settings: found by name, listed in `--help`, and completed in a shell."""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from biomamba_jax.config.checks import accepts, describe_briefly, field_docs, field_types, leaves, mapping_value
from biomamba_jax.errors import UserError

_USAGE = re.compile(r"^(python -m [\w.]+( [a-z]+)?).*\n", re.MULTILINE)


class Setting(NamedTuple):
    """A setting of a command."""

    key: str
    """Dotted key; NAME stands for a name that the user chooses."""
    hint: Any
    """Type of its values."""
    doc: str
    """Docstring below its field."""
    default: Any
    """Its default, None where it has none."""


def settings(schema: Any, given: dict[str, Any] | None = None, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a schema, with the defaults that `given` states for it, or else its own."""
    docs, given = field_docs(schema), defaults(schema) if given is None else given
    for name, hint in field_types(schema).items():
        default, key = given.get(name), prefix + name
        if value := mapping_value(hint):
            hint, default, key = value, None, f"{key}.NAME"
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, default, f"{key}.")
        else:
            yield Setting(key, hint, docs[name], default)


def defaults(schema: Any) -> dict[str, Any]:
    """Return the default of each field that has one; of a dataclass, the dict of its defaults."""
    found = {}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            found[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return found


def find(schema: type, name: str) -> tuple[str, Any]:
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
            raise UserError(unknown(name, schema, "--"))
        key += f".{part}" if key else part
    return key, hint


def unknown(name: str, schema: type, dashes: str) -> str:
    """Return the words that refuse an unknown key, with the nearest known one."""
    parts = name.split(".")  # of which one may be the user's own name of an entry

    def with_name(key: str) -> str:
        known = enumerate(key.split("."))
        return ".".join(parts[i] if part == "NAME" and i < len(parts) else part for i, part in known)

    keys = [with_name(setting.key) for setting in settings(schema)]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name, keys, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(parts[-1], list(by_leaf), 1, 0.75)
    ]
    close = close or [key for key in keys if key.startswith(name)]
    remedy = f"did you mean '{dashes}{close[0]}'?" if close else "--help-all lists all keys"
    return f"unknown key '{dashes}{name}'; {remedy}"


def help_text(schema: Any, doc: str, *, whole: bool) -> str:
    """Return usage, description, and settings with their types, limits and defaults.

    Args:
      schema: the command's settings; `basic`, if it names keys, are those of the short form.
      doc: the command's docstring; a line "python -m NAME ..." holds the program's name, the rest is the description.
      whole: list all settings.
    """
    basic = () if whole else getattr(schema, "basic", "").split()
    prog = _USAGE.search(doc)
    parser = argparse.ArgumentParser(
        usage=f"{prog[1] if prog else ''} [--config FILE.yaml] [--KEY VALUE ...]",
        description=_USAGE.sub("", doc),
        epilog="--help-all lists all settings." if basic else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
        add_help=False,
    )
    sections: dict[str, Any] = {"": parser.add_argument_group("settings")}
    sections[""].add_argument("--config", metavar="FILE", help="A YAML file with any of the keys.")
    listed = {setting.key: setting for setting in settings(schema)}
    for setting in [listed[key] for key in basic] if basic else listed.values():
        name = setting.key.partition(".")[0] if "." in setting.key and not basic else ""
        if name not in sections:
            sections[name] = parser.add_argument_group(name, field_docs(schema)[name])
        facts = [describe_briefly(setting.hint)]
        facts += [] if setting.default in (None, "", [], {}) else [f"default: {json.dumps(setting.default)}"]
        text = f"{setting.doc} ({'; '.join(filter(None, facts))})".removesuffix(" ()")
        sections[name].add_argument(f"--{setting.key}", metavar="", help=text.replace("%", "%%"))
    return parser.format_help().rstrip()


def completions(schema: Any, words: Sequence[str]) -> list[str]:
    """Return what the last word of a command line can become: keys, or the values of the key before it."""
    *before, last = words or [""]
    if last.startswith("-"):
        keys = ["config", "help", "help-all", *(setting.key.partition("NAME")[0] for setting in settings(schema))]
        return [f"--{key}" for key in dict.fromkeys(keys) if f"--{key}".startswith(last)]
    try:
        hint = find(schema, before[-1][2:])[1] if before and before[-1].startswith("--") else None
    except UserError:
        return []
    values = [str(each) for leaf in leaves(hint) if get_origin(leaf) is Literal for each in get_args(leaf)]
    values += ["true", "false"] if accepts(hint, bool) else []
    return [value for value in values if value.startswith(last)]
