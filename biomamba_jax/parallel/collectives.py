"""Collectives for tensor, sequence and FSDP parallelism; `model` calls these instead of the plain ops.

On one device each is the plain op or the identity. They run inside `Layout.sharded_sum`, once per device. An activation
that is replicated along "tensor" has a gradient that is replicated too; `copy_to_tensor_parallel` and
`reduce_from_tensor_parallel` enclose what devices compute on shards of it (Megatron-LM: Shoeybi et al. 2019, arXiv
1909.08053, section 3). Gradients of parameters are all-reduced over tokens once, after the backward pass; those of
parameters sharded over fsdp are reduce-scattered layer by layer.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from biomamba_jax import ops
from biomamba_jax.ops import numerics
from biomamba_jax.ops.array_typing import Array, Bool, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.parallel import sequence
from biomamba_jax.parallel.sharding import Specs, mesh_axes


@dataclass(frozen=True)
class Collectives:
    """Sizes of the mesh axes that a model is sharded over, and the collectives along them."""

    tensor: int = 1
    """Devices that channels, heads and the vocabulary are sharded over."""
    sequence: int = 1
    """Devices that the tokens of each row are sharded over."""
    fsdp_axes: Mapping[str, int] = field(default_factory=dict)
    """Parameters sharded over fsdp: path -> sharded axis of the array."""
    reduce_dtype: str = "float32"
    """Dtype in which gradients of parameters sharded over fsdp are reduce-scattered."""
    continues_segment: Bool[Array, " B"] | None = None
    """With sequence parallelism: True where the first token continues the segment of the left neighbour."""

    @classmethod
    def from_specs(cls, mesh: Mesh, specs: Specs, reduce_dtype: str = "float32") -> "Collectives":
        """Return the collectives for parameters sharded over `mesh` by `specs`."""
        fsdp_axes = {}
        if mesh.shape["fsdp"] > 1:
            for name, spec in specs.items():
                if "fsdp" in mesh_axes(spec):
                    fsdp_axes[name] = next(i for i, entry in enumerate(spec) if entry and "fsdp" in entry)
        return cls(mesh.shape["tensor"], mesh.shape["sequence"], fsdp_axes, reduce_dtype)

    @property
    def tensor_axis(self) -> str | None:
        """Name of the mesh axis for tensor collectives; None on one device."""
        return "tensor" if self.tensor > 1 else None

    def with_segments(self, segment_ids: Int[Array, "B L"] | None, rows: int) -> "Collectives":
        """Return the collectives for rows of these segments, whose boundaries are communicated once for all layers.

        Args:
          segment_ids: this device's tokens' segments.
          rows: B.
        """
        if self.sequence == 1:
            return self
        return replace(self, continues_segment=sequence.continues_segment(segment_ids, rows, self.sequence))

    def without(self, gathered: Collection[str]) -> "Collectives":
        """Return the collectives of a model whose parameters at these paths are unsharded along fsdp already."""
        return replace(self, fsdp_axes={path: axis for path, axis in self.fsdp_axes.items() if path not in gathered})

    # --- FSDP: parameters ------------------------------------------------------------------------------------------

    def all_gather(self, path: str, x: Array, dtype: DTypeLike) -> Array:
        """Return a parameter unsharded along fsdp, in its compute dtype.

        Forward: all-gather in `dtype`. Backward: reduce-scatter in `reduce_dtype`; the result has the parameter's.
        """
        axis = self.fsdp_axes.get(path)
        return x if axis is None else _all_gather(x, axis, jnp.dtype(dtype), jnp.dtype(self.reduce_dtype))

    def all_gather_layer(self, path: str, layer: Any, dtype: DTypeLike) -> Any:
        """Return `all_gather` of all parameters of one layer, sliced from those stacked at `path`."""

        def gather(keys: tuple[Any, ...], x: Array) -> Array:
            names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
            axis = self.fsdp_axes.get("/".join((path, *names)))
            return x if axis is None else _all_gather(x, axis - 1, jnp.dtype(dtype), jnp.dtype(self.reduce_dtype))

        return jax.tree_util.tree_map_with_path(gather, layer) if self.fsdp_axes else layer

    # --- Tensor parallelism: channels, heads and the vocabulary ----------------------------------------------------

    def copy_to_tensor_parallel(self, x: Array) -> Array:
        """Return x unchanged, as input of a computation sharded over tensor. Backward: all-reduce."""
        return _copy(x) if self.tensor > 1 else x

    def reduce_from_tensor_parallel(self, x: Array) -> Array:
        """Return the sum of x over tensor. Forward: all-reduce. Backward: identity."""
        return _reduce(x) if self.tensor > 1 else x

    def local_groups(self, x: Float[Array, "*batch G N"]) -> Float[Array, "*batch g N"]:
        """Return the groups of this device's heads: its shard of them, or the one it shares with its neighbours."""
        if self.tensor == 1:
            return x
        groups = x.shape[-2]
        count = max(groups // self.tensor, 1)
        return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * groups // self.tensor, count, axis=-2)

    def vocab_parallel_embedding(self, table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Return the embeddings of tokens from a table whose rows are sharded over tensor.

        Forward: all-reduce. Backward: identity.
        """
        if self.tensor == 1:
            return table[tokens]
        local = tokens - lax.axis_index("tensor") * table.shape[0]
        inside = (local >= 0) & (local < table.shape[0])
        return _reduce(jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0))

    def rms_norm(
        self, x: Float[Array, "*batch C"], weight: Float[Array, " C"], gate: Array | None, *, eps: float, groups: int
    ) -> Float[Array, "*batch C"]:
        """Return `ops.rms_norm` of channels sharded over tensor; `groups` counts those of all devices.

        Where devices share a group, forward and backward all-reduce its statistics among them.
        """
        if groups % self.tensor == 0:
            return ops.rms_norm(x, weight, gate, eps=eps, groups=groups // self.tensor)
        share = self.tensor // groups
        peers = tuple(tuple(range(first, first + share)) for first in range(0, self.tensor, share))
        return ops.rms_norm(x, weight, gate, eps=eps, axis="tensor", peers=peers)

    # --- Sequence parallelism: tokens ------------------------------------------------------------------------------

    def causal_conv1d(self, *inputs: Array | None, **options: Any) -> tuple[Array, Array]:
        """Return `ops.causal_conv1d` and its final state; see `sequence.causal_conv1d`."""
        return self._op(ops.causal_conv1d, sequence.causal_conv1d)(*inputs, return_final_state=True, **options)

    def selective_scan(self, *inputs: Array, **options: Any) -> tuple[Array, Array]:
        """Return `ops.selective_scan` and its final state; see `sequence.selective_scan`."""
        return self._op(ops.selective_scan, sequence.selective_scan)(*inputs, return_final_state=True, **options)

    def ssd(self, *inputs: Array | None, **options: Any) -> tuple[Array, Array]:
        """Return `ops.ssd` and its final state; see `sequence.ssd`."""
        return self._op(ops.ssd, sequence.ssd)(*inputs, return_final_state=True, **options)

    def segment_cumsum(self, v: Array, **options: Any) -> Array:
        """Return `numerics.segment_cumsum`; see `sequence.segment_cumsum`."""
        return self._op(numerics.segment_cumsum, sequence.segment_cumsum)(v, **options)

    def next_in_segment(self, v: Array, segment_ids: Array | None) -> Array:
        """Return `numerics.next_in_segment`; see `sequence.next_in_segment`."""
        return self._op(numerics.next_in_segment, sequence.next_in_segment)(v, segment_ids)

    def _op(self, local: Callable[..., Any], sharded: Callable[..., Any]) -> Callable[..., Any]:
        """Return the op for whole rows, or the one for rows whose tokens are sharded over sequence."""
        if self.sequence == 1:
            return local
        assert self.continues_segment is not None  # with_segments was called
        return partial(sharded, continues=self.continues_segment, size=self.sequence)


UNSHARDED = Collectives()
"""The collectives of one device, or of devices that share nothing but the batch."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: Array, axis: int, dtype: jnp.dtype, reduce_dtype: jnp.dtype) -> Array:
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True)


def _reduce_scatter(axis: int, dtype: jnp.dtype, reduce_dtype: jnp.dtype, _: None, g: Array) -> tuple[Array]:
    own = accumulator_dtype(g.dtype)  # of the parameter
    g = g.astype(jnp.bfloat16 if reduce_dtype == jnp.bfloat16 else own)
    return (lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True).astype(own),)


_all_gather.defvjp(lambda x, axis, dtype, reduce: (_all_gather(x, axis, dtype, reduce), None), _reduce_scatter)


@jax.custom_vjp
def _copy(x: Array) -> Array:
    return x


_copy.defvjp(lambda x: (x, None), lambda _, g: (lax.psum(g, "tensor"),))


@jax.custom_vjp
def _reduce(x: Array) -> Array:
    return lax.psum(x, "tensor")


_reduce.defvjp(lambda x: (_reduce(x), None), lambda _, g: (g,))


def recompute_all_gathers(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `jax.checkpoint` policy that saves what `policy` does except all-gathered parameters.

    Saved, they would take the memory that fsdp frees.
    """

    def saveable(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
        called = parameters.get("call_jaxpr")  # `_all_gather` is a call with a gradient of its own
        if called is not None and any(equation.primitive.name == "all_gather" for equation in called.eqns):
            return False
        return policy(primitive, *arguments, **parameters)

    return saveable
