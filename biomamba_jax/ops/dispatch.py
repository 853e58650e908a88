"""Selection of an op's implementation: the fastest for the platform, or exactly the one that the caller names.

Every op registers its implementations in its `api.py`. There is no silent fallback: a named implementation that does
not exist or cannot run here raises `UserError` with the reason, and the choice for None is logged once.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from biomamba_jax.errors import UserError
from biomamba_jax.ops.native import library

Implementation = Literal["xla", "native", "pallas_tpu", "pallas_gpu", "triton", "reference"]
Platform = Literal["cpu", "gpu", "tpu"]

# Implementations by platform, the fastest first. Those that an op does not have are skipped; xla runs everywhere.
_PREFERENCE: Mapping[Platform, Sequence[Implementation]] = {
    "cpu": ("native", "xla"),
    "gpu": ("pallas_gpu", "triton", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}
# Compute capabilities of the NVIDIA GPUs that the kernels support, as [first, end).
_CAPABILITIES: Mapping[str, tuple[int, int]] = {
    "triton": (80, 1000),
    "pallas_gpu": (90, 100),  # wgmma exists on Hopper only
}
# jax-triton calls jax's private interfaces. Tested pairs: jax in [first, end), jax-triton in [first, end).
_JAX_TRITON = (
    ((0, 10), (0, 11), (0, 3, 1), (0, 4)),
    ((0, 11), (0, 12), (0, 4, 1), (0, 5)),
)

_LOG = logging.getLogger(__name__)
_target: contextvars.ContextVar[tuple[Platform, int | None] | None] = contextvars.ContextVar("target", default=None)


def platform() -> Platform:
    """Return the platform that programs are traced for: that of `target_platform`, else JAX's default backend."""
    target = _target.get()
    name = target[0] if target else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name  # type: ignore[return-value]


def compute_capability() -> int | None:
    """Return the compute capability of the target NVIDIA GPU (90 for sm_90), or None if there is none or unknown."""
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
    """Select implementations for `name` in programs traced inside the context, whatever devices this process has.

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


def unavailable_reason(implementation: str) -> str | None:
    """Return why the kernels of that name cannot run on the target, or None if they can."""
    if implementation == "native":
        if platform() != "cpu":
            return f"it is for CPUs, and this program is for {platform()}"
        return library.unavailable_reason()
    if implementation == "pallas_tpu" and platform() != "tpu":
        return f"it needs a TPU, and this program is for {platform()}"
    if implementation not in _CAPABILITIES:
        return None
    if platform() != "gpu":
        return f"it needs a GPU, and this program is for {platform()}"
    capability = compute_capability()
    first, end = _CAPABILITIES[implementation]
    if capability is None:
        return "the compute capability of the GPU is unknown"
    if not first <= capability < end:
        supported = f"sm_{first} or newer" if end == 1000 else f"sm_{first} to below sm_{end}"
        return f"it needs a GPU of {supported}, and this one is sm_{capability}"
    return triton_unavailable_reason() if implementation == "triton" else None


@functools.cache
def triton_unavailable_reason() -> str | None:
    """Return why Triton kernels cannot be traced here, whatever the target, or None if they can."""
    remedy = "pip install 'biomamba-jax[gpu]'"
    versions = {}
    for package in ("jax-triton", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {package}: {remedy}"
    return _version_mismatch(jax.__version__, versions["jax-triton"], remedy)


def _version_mismatch(jax_version: str, jax_triton_version: str, remedy: str) -> str | None:
    have, triton_have = _numbers(jax_version), _numbers(jax_triton_version)
    for first_jax, end_jax, first, end in _JAX_TRITON:
        if first_jax <= have < end_jax:
            if first <= triton_have < end:
                return None
            wanted = ".".join(map(str, first))
            return f"jax {jax_version} needs jax-triton {wanted}, and {jax_triton_version} is installed: {remedy}"
    return f"no jax-triton is known to work with jax {jax_version}: {remedy}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def late(module: str, name: str, *first: Any) -> Callable[..., Any]:
    """Return a function of a module that is imported once the function is called, with its first arguments bound.

    Kernels of other platforms need libraries that are a fifth of the time of all imports.
    """
    return lambda *rest: getattr(importlib.import_module(module), name)(*first, *rest)


def choose(
    op: str,
    implementation: str | None,
    implementations: Mapping[str, Callable[..., Any]],
    unsupported: Mapping[str, Callable[[], str | None]] | None = None,
    *,
    prefer: Implementation | None = None,
) -> Callable[..., Any]:
    """Return the function that computes `op`.

    Args:
      op: the op's public name, for messages.
      implementation: the caller's choice, or None for the platform's fastest that exists and can run.
      implementations: name -> function; the implementations of this op.
      unsupported: name -> function that returns why it cannot compute these arrays, or None if it can.
      prefer: for None, choose this one where it can run: it is faster on these arrays than the platform's first.

    Raises:
      UserError: `implementation` is not one of `implementations`, or cannot run on the target or on these arrays.
    """

    def reason_against(name: str) -> str | None:
        return unavailable_reason(name) or (unsupported or {}).get(name, lambda: None)()

    if implementation is None:
        reasons: list[str] = []
        preferred = () if prefer is None else (prefer,)
        for name in dict.fromkeys((*preferred, *_PREFERENCE[platform()])):
            if name in implementations:
                reason = reason_against(name)
                if reason is None:
                    _log_once(op, name, platform(), "; ".join(reasons))
                    return implementations[name]
                reasons.append(f"not {name!r}: {reason}")
        raise AssertionError(f"{op}: nothing runs on {platform()}")
    if implementation not in implementations:
        have = ", ".join(sorted(implementations))
        raise UserError(f"{op}: implementation {implementation!r} does not exist; choose one of: {have}")
    if reason := reason_against(implementation):
        raise UserError(
            f"{op}: implementation {implementation!r} cannot be used: {reason}; "
            "give implementation=None for the best here"
        )
    return implementations[implementation]


@functools.cache
def _log_once(op: str, name: str, platform_name: str, reasons: str) -> None:
    _LOG.info("%s: using implementation %r on %s%s", op, name, platform_name, f" ({reasons})" if reasons else "")
