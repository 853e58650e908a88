"""The adapters of a run, and the weights that they belong to."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from biomamba_jax.errors import UserError
from biomamba_jax.interop.names import Params, flatten
from biomamba_jax.model import lora


@dataclass(frozen=True)
class Base:
    """What adapters were trained on."""

    path: str
    """Folder or hub name, as the run's config has it (`init_from`)."""
    sha256: str
    """`fingerprint` of its weights."""
    scale: float
    """What A B is multiplied by."""


def fingerprint(params: Params) -> str:
    """sha256 of weights, whatever format they are kept in: of every path, shape and float32 value."""
    digest = hashlib.sha256()
    for path, value in sorted(flatten(params).items()):
        value = np.ascontiguousarray(value, "<f4")
        digest.update(f"{path}{list(value.shape)}".encode())
        digest.update(value.data)
    return digest.hexdigest()


def merged(params: Params, trained: Params, base: Base) -> Params:
    """The weights with their adapters, as float32 numpy arrays; see `lora.merge`.

    Raises:
      UserError: the adapters were trained on other weights.
    """
    found = fingerprint(params)
    if found != base.sha256:
        raise UserError(
            f"{base.path}: holds other weights (sha256 {found[:12]}) than those that the adapters were trained on "
            f"({base.sha256[:12]}); put those back, or set init_from in the run's config.yaml to where they are"
        )
    whole: Any = lora.merge(params, trained, base.scale)
    return jax.tree.map(np.asarray, whole)
