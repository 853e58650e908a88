"""Stand-ins for `mamba_ssm` and `causal_conv1d`: their public functions with the same parameters, as plain loops.

As read in state-spaces/mamba at e9594ce (2.3.2) and Dao-AILab/causal-conv1d at 0d2252d (1.6.1). What their C++ refuses
is refused here.
"""

import importlib.machinery
import math
import sys
import types

import torch
from torch.nn.functional import silu, softplus


def recurrence(decay, inputs, C):
    """Outputs [L ...] and final state; time first, d_state last."""
    state, outputs = torch.zeros(()), []
    for t in range(len(inputs)):
        state = decay[t] * state + inputs[t]
        outputs.append((state * C[t]).sum(-1))
    return torch.stack(outputs), state


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # u, delta, z: [B E L]; A: [E N]; B, C: [B N L]
    assert {v.dtype for v in (delta, B, C, z)} == {u.dtype} and u.shape == delta.shape == z.shape
    assert {v.dtype for v in (A, D, delta_bias)} == {torch.float32}
    assert B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
    step = delta.float() + delta_bias[:, None]
    step = softplus(step) if delta_softplus else step
    inputs = (step * u).movedim(2, 0)[..., None] * B.movedim(2, 0)[:, :, None]  # [L B E N], as the decay
    y, state = recurrence(torch.exp(step.movedim(2, 0)[..., None] * A), inputs, C.movedim(2, 0)[:, :, None])
    y = (y.movedim(0, 2) + D[:, None] * u) * silu(z.float())
    return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)


# fmt: off
def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, math.inf), return_final_states=False, return_varlen_states=False,
    state_dtype=None,
):  # x: [B L H P]; dt: [B L H]; A: [H]; B, C: [B L G N]; seq_idx: [B L]
    # fmt: on
    rows, length, heads, _ = x.shape
    assert dt.shape == (rows, length, heads) and A.shape == D.shape == dt_bias.shape == (heads,)
    assert B.shape == C.shape == (rows, length, B.shape[2], B.shape[3]) and chunk_size >= 16
    assert seq_idx is None or (seq_idx.shape == (rows, length) and seq_idx.dtype == torch.int32)
    step = dt.float() + dt_bias
    step = softplus(step) if dt_softplus else step
    B, C = (v.float().repeat_interleave(heads // v.shape[2], 2) for v in (B, C))
    decay = torch.exp(step * A)[..., None, None].movedim(1, 0)  # [L B H 1 1]
    if seq_idx is not None:
        decay = decay * torch.cat([seq_idx[:, :1] >= 0, seq_idx[:, 1:] == seq_idx[:, :-1]], 1).T[..., None, None, None]
    inputs = (step[..., None] * x)[..., None] * B[:, :, :, None]
    y, state = recurrence(decay, inputs.movedim(1, 0), C.movedim(1, 0)[:, :, :, None])
    y = (y.movedim(0, 1) + D[:, None] * x).to(x.dtype)
    return (y, state) if return_final_states else y


# fmt: off
def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # x: [B C L]; weight: [C K]; seq_idx: [B L]
    # fmt: on
    rows, channels, length = x.shape
    width = weight.shape[1]
    assert 2 <= width <= 4 and bias.dtype == weight.dtype and activation in (None, "silu", "swish")
    assert x.stride(1) == 1 and channels % 8 == 0 and x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert seq_idx is None or (seq_idx.is_contiguous() and seq_idx.dtype == torch.int32)
    token = torch.arange(length)
    y = bias[:, None].expand(rows, channels, length)
    for k in range(width):
        source = token - (width - 1 - k)
        seen = (source >= 0).expand(rows, length)
        if seq_idx is not None:
            seen = seen & (seq_idx[:, source.clamp(min=0)] == seq_idx)
        y = y + weight[:, k, None] * x[:, :, source.clamp(min=0)].float() * seen[:, None]
    return (silu(y) if activation else y).to(x.dtype)


def install(monkeypatch) -> None:
    """Makes both packages importable, and this machine's processor the GPU that torch sees."""
    functions = dict.fromkeys(("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")) | {
        "mamba_ssm.ops.selective_scan_interface": selective_scan_fn,
        "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
        "causal_conv1d": causal_conv1d_fn,
    }
    for name, function in functions.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if function is not None:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("benchmarks.cuda_baselines._DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
