"""Choosing the implementation of an op: the best for the platform, or exactly the one that was asked for.

Every op registers its implementations in its `api.py`. There is no silent fallback: a named implementation that does
not exist or cannot run here raises `UserError` with the reason, and what None chooses is logged once.
"""

import contextlib
import contextvars
import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from biomamba_jax.errors import UserError

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "triton", "reference"]
Platform = Literal["cpu", "gpu", "tpu"]

# NVIDIA architectures that the kernels for GPU are written for, as compute capabilities: first, and first beyond.
_CAPABILITIES: Mapping[str, tuple[int, int]] = {
    "triton": (80, 1000),
    "pallas_gpu": (90, 100),  # wgmma, which Hopper alone has
}
# jax-triton calls jax's inner interfaces: (first jax, first beyond, first jax-triton, first beyond), as tried.
_JAX_TRITON = (
    ((0, 10), (0, 11), (0, 3, 1), (0, 4)),
    ((0, 11), (0, 12), (0, 4, 1), (0, 5)),
)

logger = logging.getLogger(__name__)
_target: contextvars.ContextVar[tuple[Platform, int | None] | None] = contextvars.ContextVar("target", default=None)


def platform() -> Platform:
    """The platform that programs are being built for: that of `target_platform`, else JAX's default backend."""
    target = _target.get()
    name = target[0] if target else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name  # type: ignore[return-value]


def compute_capability() -> int | None:
    """Of the NVIDIA GPU that programs are being built for: 90 for sm_90. None where there is none or it is unknown."""
    if target := _target.get():
        return target[1]
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    return _capability_number(str(getattr(jax.local_devices()[0], "compute_capability", "")))


def _capability_number(version: str) -> int | None:
    major, dot, minor = version.partition(".")
    return int(major) * 10 + int(minor) if dot and major.isdigit() and minor.isdigit() else None


@contextlib.contextmanager
def target_platform(name: Platform, compute_capability: int | None = None) -> Iterator[None]:
    """Traces inside the context choose implementations for `name`, whatever device this process has.

    Needed to compile ahead of time for a chip that is not present.

    Args:
      name: the platform.
      compute_capability: of the GPU, 90 for sm_90; without it no kernels are chosen on "gpu".
    """
    token = _target.set((name, compute_capability))
    try:
        yield
    finally:
        _target.reset(token)


def unavailable(implementation: str) -> str | None:
    """Why the GPU kernels of that name cannot be in the program that is being built, or None if they can."""
    if implementation not in _CAPABILITIES:
        return None
    if platform() != "gpu":
        return f"it needs a GPU, and this program is for {platform()}"
    capability = compute_capability()
    first, beyond = _CAPABILITIES[implementation]
    if capability is None:
        return "the compute capability of the GPU is unknown"
    if not first <= capability < beyond:
        wanted = f"sm_{first} or newer" if beyond == 1000 else f"sm_{first} to below sm_{beyond}"
        return f"it needs a GPU of {wanted}, and this one is sm_{capability}"
    return _why_no_triton() if implementation == "triton" else None


@functools.cache
def _why_no_triton() -> str | None:
    remedy = "pip install 'biomamba-jax[gpu]'"
    versions = {}
    for package in ("jax-triton", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {package}: {remedy}"
    return _why_not_together(jax.__version__, versions["jax-triton"], remedy)


def _why_not_together(jax_version: str, jax_triton_version: str, remedy: str) -> str | None:
    have, triton_have = _numbers(jax_version), _numbers(jax_triton_version)
    for first_jax, beyond_jax, first, beyond in _JAX_TRITON:
        if first_jax <= have < beyond_jax:
            if first <= triton_have < beyond:
                return None
            wanted = ".".join(map(str, first))
            return f"jax {jax_version} needs jax-triton {wanted}, and {jax_triton_version} is installed: {remedy}"
    return f"no jax-triton is known to work with jax {jax_version}: {remedy}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def choose(
    op: str,
    implementation: Implementation | None,
    implementations: Mapping[str, Callable[..., Any]],
    preferred: Mapping[Platform, Sequence[str]],
    unsuited: Mapping[str, str | None] | None = None,
) -> Callable[..., Any]:
    """The function that computes `op`.

    Args:
      op: the op's public name, for messages.
      implementation: the user's choice, or None for the first of `preferred[platform()]` that exists and can run.
      implementations: name -> function; what exists for this op.
      preferred: platform -> names, the best first; the last one runs anywhere.
      unsuited: name -> why it cannot compute these arrays.

    Raises:
      UserError: `implementation` is not one of `implementations`, or is one for GPU that cannot run here.
    """

    def why_not(name: str) -> str | None:
        return unavailable(name) or (unsuited or {}).get(name)

    if implementation is None:
        reasons: list[str] = []
        for name in preferred[platform()]:
            if name in implementations:
                reason = why_not(name)
                if reason is None:
                    _log_once(op, name, platform(), "; ".join(reasons))
                    return implementations[name]
                reasons.append(f"not {name!r}: {reason}")
        raise AssertionError(f"{op}: nothing runs on {platform()}")
    if implementation not in implementations:
        have = ", ".join(sorted(implementations))
        raise UserError(f"{op}: implementation {implementation!r} does not exist; choose one of: {have}")
    if reason := why_not(implementation):
        raise UserError(
            f"{op}: implementation {implementation!r} cannot run: {reason}; give implementation=None for the best here"
        )
    return implementations[implementation]


@functools.cache
def _log_once(op: str, name: str, where: str, reasons: str) -> None:
    logger.info("%s: using implementation %r on %s%s", op, name, where, f" ({reasons})" if reasons else "")
