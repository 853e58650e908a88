"""A mesh together with how the parameters lie on it: what a training needs to know of devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biomamba_jax.parallel.collectives import Collectives
from biomamba_jax.parallel.mesh import BATCH, TOKENS
from biomamba_jax.parallel.sharding import Rules, Specs, axes_of, parameter_specs, tree_specs


@dataclass(frozen=True)
class Layout:
    """Where everything of a training lies. Without `specs` every device holds all parameters."""

    mesh: Mesh
    """Devices, with the axes of `mesh.AXES`."""
    specs: Specs = field(default_factory=dict)
    """How each parameter is spread, by path."""

    @classmethod
    def by_rules(cls, mesh: Mesh, params: Any, rules: Rules) -> "Layout":
        """The layout that `rules` give to parameters, or to their shapes; see `sharding.parameter_specs`."""
        return cls(mesh, parameter_specs(params, rules, mesh))

    @property
    def collectives(self) -> Collectives:
        """What the devices exchange while they compute."""
        return Collectives.of(self.mesh, self.specs)

    def shardings(self, tree: Any) -> Any:
        """A `NamedSharding` for each array of a tree of parameters and what follows them; see `sharding.tree_specs`."""
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), tree_specs(tree, self.specs), is_leaf=is_spec)

    def summed(self, function: Callable[..., Any], *, with_gradients: bool = True) -> Callable[..., Any]:
        """`function(params, batch, *fixed) -> (sums, gradients)` of each device's tokens, summed over all tokens.

        Every device runs the same program on its own part of the batch and of the parameters: kernels, which the
        compiler cannot partition, stay whole, and whatever devices exchange is written down in `Collectives`.

        Args:
          function: works on a device's part; its gradients are of its part of the parameters (or None), already summed
            over fsdp where they are spread over it. What is `fixed` is the same everywhere.
          with_gradients: False where the function returns None in their place.
        """

        def sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
            axes = tuple(axis for axis in axes if self.mesh.shape[axis] > 1)
            return jax.lax.psum(x, axes) if axes else x

        def local(params: Any, batch: Any, fixed: Any) -> Any:
            sums, gradients = function(params, batch, *fixed)
            sums = jax.tree.map(lambda x: sum_over(x, TOKENS), sums)
            if gradients is not None:
                gradients = jax.tree.map(
                    lambda g, spec: sum_over(g, [axis for axis in TOKENS if axis not in axes_of(spec)]),
                    gradients,
                    tree_specs(gradients, self.specs),
                )
            return sums, gradients

        def summed(params: Any, batch: Any, *fixed: Any) -> Any:
            of_params = tree_specs(params, self.specs)
            # Replication is not tracked inside: kernels do not say over which axes their results vary.
            mapped = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(of_params, BATCH, PartitionSpec()),
                out_specs=(PartitionSpec(), of_params if with_gradients else None),
                check_vma=False,
            )
            return mapped(params, batch, fixed)

        return summed
