"""All that devices exchange while they compute one model together: what `model` asks for instead of the plain op.

On one device each of these is the op itself, or nothing. Written for code that runs once on each device
(`Layout.summed`). Gradients follow one convention: a value that all devices along "tensor" hold alike has a gradient
that they hold alike; `enter` and `leave` are the borders of what they compute apart (Shoeybi et al. 2019, arXiv
1909.08053, section 3). Gradients of parameters are summed over tokens at the very end, except where fsdp spreads them:
there each layer's are summed and cut up at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from biomamba_jax import ops
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.parallel import sequence
from biomamba_jax.parallel.sharding import Specs, axes_of


@dataclass(frozen=True)
class Collectives:
    """Over how many devices a model is spread, and what they exchange. See the module."""

    tensor: int = 1
    """Devices that share channels, heads and the vocabulary."""
    sequence: int = 1
    """Devices that share each row's tokens."""
    gathered: Mapping[str, int] = field(default_factory=dict)
    """Parameters spread over fsdp: path -> the axis of the array."""
    continues: Array | None = None
    """[B], with sequence: whether the first token here goes on with the segment of the device to the left."""

    @classmethod
    def of(cls, mesh: Mesh, specs: Specs) -> "Collectives":
        """For parameters that lie on `mesh` as `specs` say."""
        gathered = {}
        if mesh.shape["fsdp"] > 1:
            for name, spec in specs.items():
                if "fsdp" in axes_of(spec):
                    gathered[name] = next(i for i, entry in enumerate(spec) if entry and "fsdp" in entry)
        return cls(mesh.shape["tensor"], mesh.shape["sequence"], gathered)

    @property
    def tensor_axis(self) -> str | None:
        """The name that collectives over tensor take; None where there is nothing to exchange."""
        return "tensor" if self.tensor > 1 else None

    def at(self, segment_ids: Int[Array, "B L"] | None, rows: int) -> "Collectives":
        """The same, for rows of these segments: what all layers need to know of them is exchanged once.

        Args:
          rows: B.
        """
        if self.sequence == 1:
            return self
        return replace(self, continues=sequence.continues(segment_ids, rows, self.sequence))

    # --- Parameters -----------------------------------------------------------------------------------------------

    def gather(self, path: str, x: Array, dtype: DTypeLike) -> Array:
        """The whole of a parameter that is spread over fsdp, in the type that it is computed in."""
        axis = self.gathered.get(path)
        return x if axis is None else _gather(x, axis, jnp.dtype(dtype))

    def gather_layer(self, path: str, layer: Any, dtype: DTypeLike) -> Any:
        """All parameters of one layer of a stack: those of `path`, without their first axis."""
        if not self.gathered:
            return layer

        def whole(keys: tuple[Any, ...], x: Array) -> Array:
            names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
            axis = self.gathered.get("/".join((path, *names)))
            return x if axis is None else _gather(x, axis - 1, jnp.dtype(dtype))

        return jax.tree_util.tree_map_with_path(whole, layer)

    # --- Channels, heads and the vocabulary over tensor -----------------------------------------------------------

    def enter(self, x: Array) -> Array:
        """Into what devices compute apart: their gradients are summed on the way back."""
        return _enter(x) if self.tensor > 1 else x

    def leave(self, x: Array) -> Array:
        """Out again: each device's part of a sum, added up."""
        return _leave(x) if self.tensor > 1 else x

    def own_groups(self, x: Float[Array, "B L G N"]) -> Float[Array, "B L g N"]:
        """The groups whose heads are here: a part of them, or the one that several devices share."""
        if self.tensor == 1:
            return x
        groups = x.shape[2]
        here = max(groups // self.tensor, 1)
        return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * groups // self.tensor, here, axis=2)

    def lookup(self, table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Rows of the embedding, whose vocabulary is spread over tensor."""
        if self.tensor == 1:
            return table[tokens]
        local = tokens - lax.axis_index("tensor") * table.shape[0]
        inside = (local >= 0) & (local < table.shape[0])
        return _leave(jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0))

    def rms_norm(
        self, x: Float[Array, "B L C"], weight: Float[Array, " C"], gate: Array | None, *, eps: float, groups: int
    ) -> Float[Array, "B L C"]:
        """`ops.rms_norm` of channels in `groups` over all devices, of which x holds this device's."""
        if groups % self.tensor == 0:
            return ops.rms_norm(x, weight, gate, eps=eps, groups=groups // self.tensor)
        share = self.tensor // groups
        peers = tuple(tuple(range(first, first + share)) for first in range(0, self.tensor, share))
        return ops.rms_norm(x, weight, gate, eps=eps, axis="tensor", peers=peers)

    # --- Tokens over sequence -------------------------------------------------------------------------------------

    def causal_conv1d(self, x: Array, weight: Array, bias: Array | None, **options: Any) -> tuple[Array, Array]:
        """`ops.causal_conv1d` with its final state; see `sequence.causal_conv1d`."""
        if self.sequence == 1:
            return ops.causal_conv1d(x, weight, bias, return_final_state=True, **options)  # type: ignore[return-value]
        assert self.continues is not None
        return sequence.causal_conv1d(x, weight, bias, self.continues, self.sequence, **options)

    def selective_scan(self, *inputs: Array, **options: Any) -> tuple[Array, Array]:
        """`ops.selective_scan` with its final state; see `sequence.selective_scan`."""
        if self.sequence == 1:
            return ops.selective_scan(*inputs, return_final_state=True, **options)  # type: ignore[return-value]
        assert self.continues is not None
        return sequence.selective_scan(*inputs, continues=self.continues, size=self.sequence, **options)

    def ssd(self, *inputs: Array, **options: Any) -> tuple[Array, Array]:
        """`ops.ssd` with its final state; see `sequence.ssd`."""
        if self.sequence == 1:
            return ops.ssd(*inputs, return_final_state=True, **options)  # type: ignore[return-value]
        assert self.continues is not None
        return sequence.ssd(*inputs, continues=self.continues, size=self.sequence, **options)


UNSHARDED = Collectives()
"""One device, or several that share nothing but sums."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, axis: int, dtype: jnp.dtype) -> Array:
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(x: Array, axis: int, dtype: jnp.dtype) -> tuple[Array, None]:
    return _gather(x, axis, dtype), None


def _gather_backward(axis: int, dtype: jnp.dtype, _: None, g: Array) -> tuple[Array]:
    wide = accumulator_dtype(g.dtype)  # parameters' own type: what is gathered may be narrow, sums of gradients never
    return (lax.psum_scatter(g.astype(wide), "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _enter(x: Array) -> Array:
    return x


_enter.defvjp(lambda x: (x, None), lambda _, g: (lax.psum(g, "tensor"),))


@jax.custom_vjp
def _leave(x: Array) -> Array:
    return lax.psum(x, "tensor")


_leave.defvjp(lambda x: (_leave(x), None), lambda _, g: (g,))


def without_gathered(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy of `jax.checkpoint` that keeps what `policy` does, but gathers parameters again for the backward pass:
    kept, they would take the memory that fsdp is there to save."""

    def saveable(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
        called = parameters.get("call_jaxpr")  # `_gather` comes as a call with a gradient of its own
        if called is not None and any(equation.primitive.name == "all_gather" for equation in called.eqns):
            return False
        return policy(primitive, *arguments, **parameters)

    return saveable
