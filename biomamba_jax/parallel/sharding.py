"""Sharding rules: the PartitionSpec of a parameter, and of all that follows it, by its path.

A rule is a regular expression for whole paths ("layers/mixer/out/kernel") and a PartitionSpec. Optimizer state and
averaged weights follow the parameter that their path ends with.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from biomamba_jax.errors import UserError

Rules = Sequence[tuple[str, PartitionSpec]]
"""Pairs of a regular expression and the PartitionSpec of the parameters whose path it matches."""
Specs = Mapping[str, PartitionSpec]
"""PartitionSpec of each parameter, by path."""


def path_name(path: tuple[Any, ...]) -> str:
    """Return a path of `jax.tree_util` as text, such as "layers/norm/weight"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def path_names(tree: Any) -> Any:
    """Return a tree of the same structure that holds each leaf's path, such as "layers/norm/weight"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as "layers/norm/weight"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def mesh_axes(spec: PartitionSpec) -> list[str]:
    """Return all mesh axes that `spec` names."""
    return [axis for entry in spec for axis in _entry(entry)]


def _entry(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parameter_specs(params: Any, rules: Rules, mesh: Mesh) -> dict[str, PartitionSpec]:
    """Return the PartitionSpec of each parameter: that of the first rule that matches its path.

    Args:
      params: nested dict of arrays or of their shapes.
      rules: see the module.
      mesh: devices to shard over.

    Raises:
      UserError: a rule matches no parameter, no rule matches a parameter, or an axis is not divisible.
    """
    shapes = {name: x.shape for name, x in leaves_by_path(params).items()}
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
                product = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
                raise UserError(f"sharding: {product} does not divide {size}, an axis of {name} {list(shape)}")
        specs[name] = spec
    return specs


def tree_specs(tree: Any, specs: Specs) -> Any:
    """Return the PartitionSpec of each array of a tree: that of the parameter its path ends with, else replicated."""

    def find(name: str) -> PartitionSpec:
        parts = name.split("/")
        suffixes = ("/".join(parts[first:]) for first in range(len(parts)))
        return next((specs[suffix] for suffix in suffixes if suffix in specs), PartitionSpec())

    return jax.tree.map(find, path_names(tree))
