"""Programs that test_ssd_pallas_tpu.py compiles for TPU, in the process of `biomamba_jax.planning.ahead_of_time`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biomamba_jax.ops import ssd


def sharded_layers(devices: Any) -> tuple[Any, tuple[Any, ...]]:
    """Gradients through three layers under `lax.scan` and `jax.checkpoint`; rows and heads sharded over 2 x 2 chips."""
    mesh = Mesh([devices[:2], devices[2:4]], ("data", "model"))
    rows, heads, of_tokens = PartitionSpec("data"), PartitionSpec("model"), PartitionSpec("data", None, "model")
    specs = dict.fromkeys(("x", "dt"), of_tokens) | dict.fromkeys(("A", "D", "dt_bias"), heads)
    specs |= dict.fromkeys(("B", "C"), rows)
    sharded = jax.shard_map(
        lambda arrays, ids: ssd(**arrays, segment_ids=ids, implementation="pallas_tpu"),
        mesh=mesh,
        in_specs=(specs, rows),
        out_specs=of_tokens,
    )

    def gradients(arrays: dict[str, jax.Array], ids: jax.Array) -> dict[str, jax.Array]:
        def loss(arrays: dict[str, jax.Array]) -> jax.Array:
            def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return sharded({**arrays, "x": x}, ids), None

            y, _ = jax.lax.scan(jax.checkpoint(layer), arrays["x"], None, length=3)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss)(arrays)

    batch, length, n_heads, d_state = 8, 1024, 48, 128
    shapes: dict[str, tuple[int, ...]] = {"x": (batch, length, n_heads, 64), "dt": (batch, length, n_heads)}
    shapes |= dict.fromkeys(("B", "C"), (batch, length, 1, d_state)) | dict.fromkeys(("A", "D", "dt_bias"), (n_heads,))

    def place(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arrays = {
        name: place(shape, jnp.bfloat16 if len(shape) > 1 else jnp.float32, specs[name])
        for name, shape in shapes.items()
    }
    return gradients, (arrays, place((batch, length), jnp.int32, rows))
