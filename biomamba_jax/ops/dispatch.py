"""Choosing the implementation of an op: the best for the platform, or exactly the one that was asked for.

Every op registers its implementations in its `api.py`. There is no silent fallback: a named implementation that does
not exist or cannot run here raises `UserError` with the reason.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax

from biomamba_jax.errors import UserError

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "triton", "reference"]
Platform = Literal["cpu", "gpu", "tpu"]

logger = logging.getLogger(__name__)
_target: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("target_platform", default=None)


def platform() -> Platform:
    """The platform that programs are being built for: that of `target_platform`, else JAX's default backend."""
    name = _target.get() or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name  # type: ignore[return-value]


@contextlib.contextmanager
def target_platform(name: Platform) -> Iterator[None]:
    """Traces inside the context choose implementations for `name`, whatever device this process has.

    Needed to compile ahead of time for a chip that is not present.
    """
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def choose(
    op: str,
    implementation: Implementation | None,
    implementations: Mapping[str, Callable[..., Any]],
    preferred: Mapping[Platform, str],
) -> Callable[..., Any]:
    """The function that computes `op`.

    Args:
      op: the op's public name, for messages.
      implementation: the user's choice, or None for `preferred[platform()]`.
      implementations: name -> function; what exists for this op.
      preferred: platform -> name of the best implementation there.

    Raises:
      UserError: `implementation` is not one of `implementations`.
    """
    if implementation is None:
        name = preferred[platform()]
        _log_once(op, name, platform())
        return implementations[name]
    if implementation not in implementations:
        have = ", ".join(sorted(implementations))
        raise UserError(f"{op}: implementation {implementation!r} does not exist; choose one of: {have}")
    return implementations[implementation]


@functools.cache
def _log_once(op: str, name: str, where: str) -> None:
    logger.info("%s: using implementation %r on %s", op, name, where)
