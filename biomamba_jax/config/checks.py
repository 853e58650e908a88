"""Types of settings with their limits, and the one form in which a setting is refused."""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from biomamba_jax.errors import UserError


class Limit(NamedTuple):
    """A condition on a setting, as metadata of its type; `--help` shows its words."""

    words: str
    """The condition in words, to follow "must be"."""
    holds: Callable[[Any], bool]
    """Returns True if a value satisfies the condition."""

    def __repr__(self) -> str:
        return self.words


PositiveInt = Annotated[int, Limit("at least 1, below 2^31", lambda x: 1 <= x < 2**31)]
NonNegativeInt = Annotated[int, Limit("0 or more, below 2^31", lambda x: 0 <= x < 2**31)]
Amount = Annotated[int, Limit("at least 1", lambda x: x >= 1)]
"""Number of bytes or tokens that are only counted, however many."""
Seed = Annotated[int, Limit("in 0..2^32 - 1", lambda x: 0 <= x < 2**32)]
PositiveFloat = Annotated[float, Limit("above 0, and finite", lambda x: 0 < x < math.inf)]
Duration = Annotated[float, Limit("above 0 s, and at most a day (86400)", lambda x: 0 < x <= 86400)]
NonNegativeFloat = Annotated[float, Limit("0 or more, and finite", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Limit("in [0, 1]", lambda x: 0 <= x <= 1)]
FractionBelowOne = Annotated[float, Limit("in [0, 1)", lambda x: 0 <= x < 1)]
PositiveFraction = Annotated[float, Limit("in (0, 1]", lambda x: 0 < x <= 1)]
InnerFraction = Annotated[float, Limit("in (0, 1)", lambda x: 0 < x < 1)]
Files = Annotated[
    list[str], Limit("files, each named once", lambda files: isinstance(files, str) or len(set(files)) == len(files))
]
"""Paths of files; a file that is named twice would count twice."""
LocalFolder = Annotated[
    str,
    Limit(
        "a folder of a file system, since files are appended, locked and renamed there, which object stores cannot; "
        "mount a share (such as Filestore), or write to a disk and copy",
        lambda path: "://" not in path,
    ),
]


def check(condition: object, key: str, value: object, remedy: str) -> None:
    """Raise a UserError that names the key, its value and the remedy, unless `condition` holds."""
    if not condition:
        raise UserError(f"{key} = {value!r:.200}: {remedy}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the dataclasses of settings: refuses a value outside the limits of its field's type."""

    section: ClassVar[str] = ""
    """Name of the group that the settings form in a run's config, for messages."""
    basic: ClassVar[str] = ""
    """Keys that a command's short `--help` shows, separated by spaces; none: all."""

    def __init_subclass__(cls, section: str | None = None) -> None:
        """Set the section; a subclass keeps its base's."""
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            limits = (leaf for leaf in leaves(hint) if isinstance(leaf, Limit))
            for limit in limits if value is not None else ():
                check(limit.holds(value), self.key(name), value, f"must be {limit.words}")

    def key(self, name: str) -> str:
        """Return a field's dotted key."""
        return f"{self.section}.{name}".lstrip(".")


def leaves(hint: Any) -> Iterator[Any]:
    """Yield the alternatives of a union, and the type and metadata of an annotated one."""
    if isinstance(hint, type) or get_origin(hint) in (Literal, list, dict):
        yield hint
    elif metadata := getattr(hint, "__metadata__", ()):
        yield from (*leaves(hint.__origin__), *metadata)
    else:
        for part in get_args(hint):
            yield from leaves(part)


_type_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))  # which takes milliseconds


def field_types(schema: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its metadata."""
    hints = _type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def accepts(hint: Any, kind: type) -> bool:
    """Return True if a type, or an alternative of it, is `kind` or of that generic type."""
    return any(kind in (leaf, get_origin(leaf)) for leaf in leaves(hint))


def mapping_value(hint: Any) -> Any:
    """Return the type of the values of a dict[str, ...], None for any other type."""
    return next((get_args(leaf)[1] for leaf in leaves(hint) if get_origin(leaf) is dict), None)


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


def describe(hint: Any, key: str = "") -> str:
    """Return what a type accepts, in words; `key` is that of the setting, for an example."""
    return " or ".join(_words(leaf, key) for leaf in leaves(hint) if not isinstance(leaf, Limit))


def describe_briefly(hint: Any) -> str:
    """Return what a type accepts, with its limits; a string and null go without saying."""
    limits = [leaf.words for leaf in leaves(hint) if isinstance(leaf, Limit)]
    kinds = [_words(leaf, "") for leaf in leaves(hint) if leaf not in (str, NoneType) and not isinstance(leaf, Limit)]
    return ", ".join([" or ".join(kinds), *limits] if kinds else limits)


def _words(leaf: Any, key: str) -> str:
    if get_origin(leaf) is Literal:
        return " or ".join(map(repr, get_args(leaf)))
    if get_origin(leaf) is dict:
        return f"a mapping; write --{key}.NAME VALUE"
    if dataclasses.is_dataclass(leaf):
        known = field_types(leaf)
        return f"a mapping with keys such as {'path' if 'path' in known else next(iter(known))}"
    return _WORDS.get(leaf, "a list")


def fits(kind: Any, value: object) -> bool:
    """Return True if a value is of a plain type or among those of a Literal; an integer is a number, true is not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind or (kind is float and type(value) is int)


def check_type(schema: type, field: str, key: str, value: object) -> None:
    """Raise UserError under the name `key` if `value` isn't of the type of a dataclass's field.

    For values from JSON files; those of a command line are checked when it is parsed.
    """
    hint = field_types(schema)[field]
    check(any(fits(leaf, value) for leaf in leaves(hint)), key, value, f"must be {describe(hint)}")


def field_docs(schema: Any) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases."""
    bases: list[Any] = [base for base in reversed(schema.__mro__) if dataclasses.is_dataclass(base)]
    docs = {}
    for base in bases:
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, doc in itertools.pairwise(getattr(tree, "body", ())):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = inspect.cleandoc(text)
    return docs
