"""Baselines: the authors' CUDA and Triton kernels, if `mamba_ssm` and `causal_conv1d` are installed.

Imports torch only when one of them runs. Signatures as of mamba_ssm 2.3 and causal_conv1d 1.6.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Run = Callable[[], Any]
_Arrays = Mapping[str, jax.Array]

_DEVICE = "cuda"


class Runs(NamedTuple):
    """A baseline op on one set of values."""

    forward: Run
    """Runs the forward pass."""
    both: Run
    """Runs both passes and returns gradients by array name."""
    wait: Callable[[Any], None]
    """Waits for a result."""


class Baseline(NamedTuple):
    """An op of another project."""

    name: str
    """Name of the project."""
    packages: tuple[str, ...]
    """Packages that it needs."""
    build: Callable[..., Runs]
    """Takes the arguments of the functions that `kernels.build` returns."""

    def why_absent(self) -> str | None:
        """Return why it cannot run here, or None."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        if not importlib.import_module("torch").cuda.is_available():
            return "torch sees no GPU"
        return None


def _tensor(v: jax.Array) -> Any:
    """Copy an array to the GPU, with gradients if its dtype is floating."""
    torch: Any = importlib.import_module("torch")
    values = torch.from_numpy(np.array(v.astype("float32") if v.dtype == "bfloat16" else v)).to(_DEVICE)
    if v.dtype == "bfloat16":
        values = values.to(torch.bfloat16)
    return values.requires_grad_(values.is_floating_point())


def _runs(compute: Callable[..., Any], arrays: _Arrays, ids: Any, dy: jax.Array, time_last: Sequence[str] = ()) -> Runs:
    """Build the calls of `compute(arrays, ids)`, those in `time_last` and their gradient transposed beforehand."""
    torch: Any = importlib.import_module("torch")
    inputs = {k: _tensor(v.swapaxes(1, 2) if k in time_last else v) for k, v in arrays.items()}
    seq_idx = None if ids is None else _tensor(ids)
    gradient = _tensor(dy.swapaxes(1, 2) if time_last else dy).detach()

    def forward() -> Any:
        with torch.no_grad():
            return compute(inputs, seq_idx)

    def both() -> Any:
        values = compute(inputs, seq_idx)
        return dict(zip(inputs, torch.autograd.grad(values, list(inputs.values()), gradient), strict=True))

    return Runs(forward, both, lambda _: torch.cuda.synchronize())


def _selective_scan(arrays: _Arrays, ids: Any, dy: jax.Array) -> Runs:
    """Build theirs, which has no resets inside a row and time on the last axis."""
    function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def compute(v: Mapping[str, Any], _: Any) -> Any:
        arguments = (v[k] for k in ("x", "dt", "A", "B", "C", "D", "z"))
        return function(*arguments, delta_bias=v["dt_bias"], delta_softplus=True)

    return _runs(compute, arrays, ids, dy, time_last=("x", "dt", "B", "C", "z"))


def _ssd(arrays: _Arrays, ids: Any, dy: jax.Array) -> Runs:
    function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def compute(v: Mapping[str, Any], seq_idx: Any) -> Any:
        options = {"chunk_size": 256, "seq_idx": seq_idx, "dt_softplus": True, "D": v["D"], "dt_bias": v["dt_bias"]}
        return function(v["x"], v["dt"], v["A"], v["B"], v["C"], **options)

    return _runs(compute, arrays, ids, dy)


def _causal_conv1d(arrays: _Arrays, ids: Any, dy: jax.Array) -> Runs:
    """Build theirs, with time as the last axis and channels last in memory, as its resets need."""
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def compute(v: Mapping[str, Any], seq_idx: Any) -> Any:
        y = function(v["x"].transpose(1, 2), v["weight"], v["bias"], seq_idx=seq_idx, activation="silu")
        return y.transpose(1, 2)

    return _runs(compute, arrays, ids, dy)


CUDA_BASELINES: Mapping[str, Baseline] = {
    "selective_scan": Baseline("mamba_ssm", ("torch", "mamba_ssm"), _selective_scan),
    "ssd": Baseline("mamba_ssm", ("torch", "mamba_ssm"), _ssd),
    "causal_conv1d": Baseline("causal_conv1d", ("torch", "causal_conv1d"), _causal_conv1d),
}
