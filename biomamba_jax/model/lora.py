"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank) A B, where A and B are trained and W is frozen.

The sum is formed in the loss, before the model is called, and by the same function on export. So gradients reach A and
B through the weights that the model computes with: no kernel bypasses an adapter by reading W itself (as fused Mamba
kernels did: peft issue 2274), the model needs no code for adapters, and the exported weights are the trained ones. It
costs `rank` multiply-adds per weight and step, as much as `rank` tokens; steps have thousands. It takes memory for one
more copy of the adapted matrices; LoRA saves the optimizer's state.

Adapters are a nested dict like the parameters, with {"a": [..., in, r], "b": [..., r, out]} in place of a matrix
[..., in, out]. Projections that are one matrix in the released weights and separate here have a pair each.
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
_RELEASED = {f"in_{part}": "in_proj" for part in ("x", "z", "bc", "dt", "A", "trap", "angle")}
_RELEASED |= {"out": "out_proj", "up": "fc1", "gate": "fc1", "down": "fc2"}
"""Names of the projections in the released weights, which `targets` may use too."""


def adapted_paths(params: Params, targets: Sequence[str]) -> list[str]:
    """Return the paths of the matrices that any of `targets` matches, in order.

    Args:
      params: a model's parameters, or their shapes.
      targets: regular expressions, searched in paths ("layers/mixer/in_x/kernel") and in their names in the released
        weights ("layers/mixer/in_proj/kernel").

    Raises:
      UserError: a target is not a regular expression or matches no matrix; the message lists the matrices.
    """
    paths = [path for path in flatten_dict(params, sep="/") if path.rpartition("/")[2] in _MATRICES]
    chosen = set()
    for target in targets:
        try:
            found = [path for path in paths if any(re.search(target, name) for name in (path, _released(path)))]
        except re.error as error:
            raise UserError(f"lora.targets: {target!r} is not a valid regular expression ({error})") from None
        if not found:
            names = ", ".join(dict.fromkeys(name for path in paths for name in (path, _released(path))))
            raise UserError(f"lora.targets: {target!r} matches no matrix of this model; it has {names}")
        chosen |= set(found)
    return [path for path in paths if path in chosen]


def _released(path: str) -> str:
    return "/".join(_RELEASED.get(part, part) for part in path.split("/"))


def init_adapters(params: Params, targets: Sequence[str], rank: int, key: Array) -> Params:
    """Return adapters that do not change the model yet: A is initialised as a linear layer, B to zero.

    While B is zero, A has no gradient: it gets one from the second step on.

    Raises:
      UserError: a target matches no matrix.
    """
    flat, adapters = flatten_dict(params, sep="/"), {}
    for path in adapted_paths(params, targets):
        *layers, d_in, d_out = flat[path].shape
        key, own = jax.random.split(key)
        adapters[f"{path}/a"] = initializers.linear(d_in)(own, (*layers, d_in, rank))
        adapters[f"{path}/b"] = jnp.zeros((*layers, rank, d_out))
    return unflatten_dict(adapters, sep="/")


def merge(params: Params, trained: Params, scale: float) -> Params:
    """Return `params` with W + scale A B for every pair in `trained`, and with its other leaves as they are.

    Args:
      params: frozen weights.
      trained: adapters, and parameters that replace those of `params` or are added to them.
      scale: alpha / rank.
    """
    flat, new = dict(flatten_dict(params, sep="/")), flatten_dict(trained, sep="/")
    for path, value in new.items():
        matrix, _, name = path.rpartition("/")
        if name == "a":
            # Full precision, so that the sum does not depend on the device.
            delta = jnp.matmul(value, new[f"{matrix}/b"], precision=jax.lax.Precision.HIGHEST)
            flat[matrix] = flat[matrix] + scale * delta
        elif name != "b":
            flat[path] = value
    return unflatten_dict(flat, sep="/")


def drop_inputs(trained: Params, rate: float, key: Array) -> Params:
    """Apply dropout to the adapters' inputs: each input channel of a pair is dropped with probability `rate`.

    Since merged weights serve all tokens, a channel is dropped for all of them at once, by its row of A.
    """
    flat = dict(flatten_dict(trained, sep="/"))
    for index, path in enumerate(sorted(path for path in flat if path.endswith("/a"))):
        rows = flat[path].shape[:-1]
        kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, rows)
        flat[path] = flat[path] * (kept / (1 - rate))[..., None]
    return unflatten_dict(flat, sep="/")
