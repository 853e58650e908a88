"""How parameters, and all that follows them, are spread over a mesh: rules by parameter path.

A rule is a regular expression for whole paths ("layers/mixer/out/kernel") and the mesh axes of each of the array's
axes. Optimizer state and averaged weights follow the parameter that their path ends with.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from biomamba_jax.errors import UserError

Rules = Sequence[tuple[str, PartitionSpec]]
Specs = Mapping[str, PartitionSpec]
"""How each parameter is spread, by path."""


def path_names(tree: Any) -> Any:
    """A tree of the same structure that holds each leaf's path, as "layers/norm/weight"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def axes_of(spec: PartitionSpec) -> list[str]:
    """All mesh axes that `spec` names."""
    return [axis for entry in spec for axis in _entry(entry)]


def _entry(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parameter_specs(params: Any, rules: Rules, mesh: Mesh) -> dict[str, PartitionSpec]:
    """How each parameter is spread: by the first rule that matches its path.

    Args:
      params: nested dict of arrays or of their shapes.

    Raises:
      UserError: a rule matches no parameter, no rule matches a parameter, or an axis does not divide.
    """
    shapes = {
        name: x.shape for name, x in zip(jax.tree.leaves(path_names(params)), jax.tree.leaves(params), strict=True)
    }
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(f"sharding: rule {pattern!r} matches no parameter; paths: {', '.join(shapes)}")
    specs = {}
    for name, shape in shapes.items():
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise UserError(f"sharding: no rule matches parameter {name}")
        for size, entry in zip(shape, spec, strict=False):
            axes = _entry(entry)
            if size % math.prod(mesh.shape[axis] for axis in axes):
                asked = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
                raise UserError(f"sharding: {asked} does not divide {size}, an axis of {name} {list(shape)}")
        specs[name] = spec
    return specs


def tree_specs(tree: Any, specs: Specs) -> Any:
    """How each array of a tree is spread: like the parameter that its path ends with; whatever is none, everywhere."""

    def find(name: str) -> PartitionSpec:
        parts = name.split("/")
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        return next((specs[end] for end in ends if end in specs), PartitionSpec())

    return jax.tree.map(find, path_names(tree))
