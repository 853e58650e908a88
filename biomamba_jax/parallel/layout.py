"""A device mesh and the PartitionSpec of every parameter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from biomamba_jax.parallel.collectives import Collectives
from biomamba_jax.parallel.mesh import BATCH_SPEC, TOKEN_AXES
from biomamba_jax.parallel.sharding import Rules, Specs, mesh_axes, parameter_specs, tree_specs


@dataclass(frozen=True)
class Layout:
    """A device mesh and the PartitionSpec of every parameter; without `specs` all parameters are replicated."""

    mesh: Mesh
    """Devices, with the axes of `mesh.AXES`."""
    specs: Specs = field(default_factory=dict)
    """PartitionSpec of each parameter, by path."""
    reduce_dtype: str = "float32"
    """Dtype in which gradients of parameters that fsdp can shard are summed over devices; the others are small."""

    @classmethod
    def from_rules(cls, mesh: Mesh, params: Any, rules: Rules, reduce_dtype: str = "float32") -> "Layout":
        """Return the layout of parameters, or of their shapes, by `rules`; see `sharding.parameter_specs`."""
        return cls(mesh, parameter_specs(params, rules, mesh), reduce_dtype)

    @property
    def collectives(self) -> Collectives:
        """The collectives that the model runs with."""
        return Collectives.from_specs(self.mesh, self.specs, self.reduce_dtype)

    def shardings(self, tree: Any) -> Any:
        """Return a `NamedSharding` for each array of a tree; see `sharding.tree_specs`."""
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), tree_specs(tree, self.specs), is_leaf=is_spec)

    def sharded_sum(self, function: Callable[..., Any], *, with_gradients: bool = True) -> Callable[..., Any]:
        """Return `function(params, batch, *frozen) -> (sums, gradients)`, run on every device and all-reduced.

        Each device runs the same program on its shard of the batch and of the parameters, so that kernels, which the
        compiler cannot partition, stay whole, and every collective is an explicit one in `Collectives`.

        Args:
          function: returns sums over the local tokens and gradients of the local parameters (or None); those of
            parameters sharded over fsdp are already reduce-scattered. `frozen` is replicated.
          with_gradients: False where the function returns None in their place.

        Returns:
          A function of global arrays: the sums are replicated, the gradients sharded as the parameters are.
        """

        def all_reduce(x: jax.Array, axes: Sequence[str], dtype: DTypeLike | None = None) -> jax.Array:
            axes = tuple(axis for axis in axes if self.mesh.shape[axis] > 1)
            return jax.lax.psum(x.astype(dtype or x.dtype), axes).astype(x.dtype) if axes else x

        def reduce_gradient(g: jax.Array, spec: PartitionSpec) -> jax.Array:
            sharded = mesh_axes(spec)
            rounded = self.reduce_dtype == "bfloat16" and "fsdp" in sharded
            axes = [axis for axis in TOKEN_AXES if axis not in sharded]
            return all_reduce(g, axes, jnp.bfloat16 if rounded else None)

        def local(params: Any, batch: Any, frozen: Any) -> Any:
            sums, gradients = function(params, batch, *frozen)
            sums = jax.tree.map(lambda x: all_reduce(x, TOKEN_AXES), sums)
            if gradients is not None:
                gradients = jax.tree.map(reduce_gradient, gradients, tree_specs(gradients, self.specs))
            return sums, gradients

        def total(params: Any, batch: Any, *frozen: Any) -> Any:
            specs = tree_specs(params, self.specs)
            # Replication is not checked: kernels do not declare over which axes their results vary.
            mapped = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(specs, BATCH_SPEC, PartitionSpec()),
                out_specs=(PartitionSpec(), specs if with_gradients else None),
                check_vma=False,
            )
            return mapped(params, batch, frozen)

        return total
