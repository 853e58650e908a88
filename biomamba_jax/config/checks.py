"""The one form in which a setting is refused."""

import dataclasses
import functools
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from biomamba_jax.errors import UserError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def check(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises a UserError that names the key, its value and the remedy, unless `condition` holds."""
    if not condition:
        raise UserError(f"{key} = {value!r}: {remedy}")


def check_at_least(least: int, section: str, settings: object, *keys: str) -> None:
    """`check` of each of these settings of `section` ("": of none) that is not None."""
    remedy = f"must be at least {least}" if least else "must be 0 or more"
    for key in keys:
        value = getattr(settings, key)
        check(value is None or value >= least, f"{section}.{key}".lstrip("."), value, remedy)


def check_folder(key: str, path: str) -> None:
    """`check` of a folder that is written and read as one: what a URL names must be mounted first."""
    check("://" not in path, key, path, "must be a folder of this machine; mount a bucket (gcsfuse) and give its path")


def check_type(schema: type, field: str, key: str, value: object) -> None:
    """Refuses, under the name `key`, a value of another type than a dataclass's field has: of a file, not of a command
    line, whose types are checked when it is parsed."""
    kinds, literals = _accepted(schema)[field]
    exact = type(value) in kinds or (type(value) is int and float in kinds)  # isinstance takes true for a number
    known = [*map(repr, literals), *(_WORDS[kind] for kind in kinds)]
    check(exact or value in literals, key, value, f"must be {' or '.join(known)}")


def check_types(config: Any, section: str) -> None:
    """`check_type` of every field of a dataclass, each under its name in `section`."""
    for field in dataclasses.fields(config):
        check_type(type(config), field.name, f"{section}.{field.name}", getattr(config, field.name))


@functools.cache
def _accepted(schema: type) -> dict[str, tuple[tuple[type, ...], tuple[str, ...]]]:
    """Types and literals that each field may have; of a union, those of all its parts."""

    def parts(hint: Any) -> list[Any]:
        if get_origin(hint) is Literal or not get_args(hint):
            return [hint]
        return [part for each in get_args(hint) for part in parts(each)]

    accepted = {}
    for name, hint in get_type_hints(schema).items():
        literals = [value for part in parts(hint) if get_origin(part) is Literal for value in get_args(part)]
        accepted[name] = tuple(p for p in parts(hint) if get_origin(p) is not Literal), tuple(literals)
    return accepted
