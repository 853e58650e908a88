"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank) A B, where A and B are trained and W stays as it is.

The sum is formed in the loss, before the model is called, and by the same function where weights are exported. So
gradients reach A and B through the very weights that are computed with: no projection can go past its adapter by
reading W itself (as fused Mamba kernels did: peft issue 2274), the model knows nothing of adapters, and what is
exported is what was trained. It costs `rank` multiply-adds a weight and step, as much as `rank` tokens; steps have
thousands. The price is memory for one more copy of the adapted matrices; what LoRA saves is the optimizer's state.

Adapters are a nested dict like the parameters', with {"a": [..., in, r], "b": [..., r, out]} where a matrix
[..., in, out] would be. Projections that are one matrix in the released weights and apart here have a pair each.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from biomamba_jax.errors import UserError
from biomamba_jax.model import initializers
from biomamba_jax.ops.array_typing import Array

Params = dict[str, Any]

_MATRICES = ("kernel", "embedding", "lm_head")
_RELEASED = {"in_x": "in_proj", "in_z": "in_proj", "in_bc": "in_proj", "in_dt": "in_proj", "out": "out_proj"}
"""Names of our projections in the released weights, which `targets` may use as well."""


def adapted_paths(params: Params, targets: Sequence[str]) -> list[str]:
    """Paths of the matrices that any of `targets` matches, in order.

    Args:
      params: a model's parameters, or their shapes.
      targets: regular expressions, searched in paths ("layers/mixer/in_x/kernel") and in the names that the released
        weights have for them ("layers/mixer/in_proj/kernel").

    Raises:
      UserError: one of them matches nothing; lists the matrices.
    """
    paths = [path for path in flatten_dict(params, sep="/") if path.rpartition("/")[2] in _MATRICES]
    chosen = set()
    for target in targets:
        try:
            found = [path for path in paths if any(re.search(target, name) for name in (path, _released(path)))]
        except re.error as error:
            raise UserError(f"lora.targets: {target!r} is no regular expression ({error})") from None
        if not found:
            names = ", ".join(dict.fromkeys(name for path in paths for name in (path, _released(path))))
            raise UserError(f"lora.targets: {target!r} matches no matrix of this model; there are {names}")
        chosen |= set(found)
    return [path for path in paths if path in chosen]


def _released(path: str) -> str:
    return "/".join(_RELEASED.get(part, part) for part in path.split("/"))


def init_adapters(params: Params, targets: Sequence[str], rank: int, key: Array) -> Params:
    """Adapters that change nothing yet: A as a linear layer's weights begin, B zero.

    B's zero keeps A without a gradient at the very first step; from the second on both have one.

    Raises:
      UserError: a target matches nothing.
    """
    flat, adapters = flatten_dict(params, sep="/"), {}
    for path in adapted_paths(params, targets):
        *stack, d_in, d_out = flat[path].shape
        key, own = jax.random.split(key)
        adapters[f"{path}/a"] = initializers.linear(d_in)(own, (*stack, d_in, rank))
        adapters[f"{path}/b"] = jnp.zeros((*stack, rank, d_out))
    return unflatten_dict(adapters, sep="/")


def merge(params: Params, trained: Params, scale: float) -> Params:
    """`params` with W + scale A B for every pair in `trained`; any other leaf of it is put in as it is.

    Args:
      scale: alpha / rank.
    """
    flat, new = dict(flatten_dict(params, sep="/")), flatten_dict(trained, sep="/")
    for path, value in new.items():
        matrix, _, name = path.rpartition("/")
        if name == "a":
            # Full precision: the sum must not depend on the device.
            delta = jnp.matmul(value, new[f"{matrix}/b"], precision=jax.lax.Precision.HIGHEST)
            flat[matrix] = flat[matrix] + scale * delta
        elif name != "b":
            flat[path] = value
    return unflatten_dict(flat, sep="/")


def drop_inputs(trained: Params, rate: float, key: Array) -> Params:
    """Dropout of what adapters see: each input channel of a pair is left out with probability `rate`.

    A merged weight is one for all tokens, so a channel is dropped for all of them at once, by its row of A.
    """
    flat = dict(flatten_dict(trained, sep="/"))
    for index, path in enumerate(sorted(path for path in flat if path.endswith("/a"))):
        rows = flat[path].shape[:-1]
        kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, rows)
        flat[path] = flat[path] * (kept / (1 - rate))[..., None]
    return unflatten_dict(flat, sep="/")
