"""LoRA adapters of a run, and the base weights that they were trained on."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from biomamba_jax.errors import UserError
from biomamba_jax.interop.names import Params
from biomamba_jax.model import lora
from biomamba_jax.model.heads import with_reversed
from biomamba_jax.parallel.sharding import leaves_by_path


@dataclass(frozen=True)
class Base:
    """The base weights of adapters."""

    path: str
    """Folder or hub name, `init_from` of the run's config."""
    sha256: str
    """`fingerprint` of the weights."""
    scale: float
    """Factor of the product A B of an adapter."""


def fingerprint(params: Params) -> str:
    """Return the sha256 of weights, over every path, shape and float32 value: the same in every format."""
    digest = hashlib.sha256()
    for path, value in sorted(leaves_by_path(params).items()):
        value = np.ascontiguousarray(value, "<f4")
        digest.update(f"{path}{list(value.shape)}".encode())
        digest.update(value.data)
    return digest.hexdigest()


def merged(params: Params, trained: Params, base: Base, backwards: Params | None = None) -> Params:
    """Return the weights with their adapters merged (see `lora.merge`), as float32 numpy arrays.

    Args:
      params: the base weights.
      trained: adapters, and parameters that replace those of `params` or are added to them.
      base: what the base weights were.
      backwards: layers and norm that read backwards, where the base weights have them.

    Raises:
      UserError: the adapters were trained on different weights.
    """
    found = fingerprint(params)
    if found != base.sha256:
        raise UserError(
            f"{base.path}: holds other weights (sha256 {found[:12]}) than those that the adapters were trained on "
            f"({base.sha256[:12]}); restore those, or set init_from in the run's config.yaml to their folder"
        )
    whole: Any = lora.merge(with_reversed(params, backwards) if "reversed" in trained else params, trained, base.scale)
    return jax.tree.map(np.asarray, whole)
