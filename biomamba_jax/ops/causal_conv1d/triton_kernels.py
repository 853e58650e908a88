"""Triton kernels of the causal convolution, launched by `triton.py`. Importing this module requires triton.

A program computes T tokens of BC channels of one row. It reads the inputs before and after its tokens from the cache.

Shapes: x, y, dy, dx [B L C]; weight [K C], bias [C] float32; initial [B K-1 C], the inputs before the first token;
reach [B L] int32, how many steps back a token may look. `sizes` is a `triton.Sizes`.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(t, c, sizes: tl.constexpr):
    """Return the offsets [tokens, channels] in 64 bits: a long row has more than 2^31 values."""
    return t.to(tl.int64)[:, None] * sizes.C + c[None, :]


@triton.jit
def _inputs(x, initial, t, c, L, sizes: tl.constexpr):
    """Load x at tokens t, which may be before the first token or after the last."""
    at = _offsets(t, c, sizes)
    value = tl.load(x + at, mask=((t >= 0) & (t < L))[:, None] & (c < sizes.C)[None, :], other=0).to(tl.float32)
    if sizes.INITIAL:
        before = ((t < 0) & (t >= 1 - sizes.K))[:, None] & (c < sizes.C)[None, :]
        value += tl.load(initial + at + (sizes.K - 1) * sizes.C, mask=before, other=0).to(tl.float32)
    return value


@triton.jit
def _looks_back(reach, t, back, L, sizes: tl.constexpr):
    """Return which tokens t exist and may look `back` steps back."""
    there = (t >= 0) & (t < L)
    if sizes.SEGMENTED:
        there = there & (tl.load(reach + t, mask=there, other=0) >= back)
    return there


@triton.jit
def _linear(given, t, c, L, sizes: tl.constexpr):
    """Return bias + sum_k weight_k x_{t-K+1+k}; `given` is (x, weight, bias, initial, reach)."""
    x, weight, bias, initial, reach = given
    value = tl.load(bias + c, mask=c < sizes.C, other=0)[None, :]
    for back in tl.static_range(sizes.K - 1, -1, -1):
        tap = tl.load(weight + (sizes.K - 1 - back) * sizes.C + c, mask=c < sizes.C, other=0)[None, :]
        seen = _inputs(x, initial, t - back, c, L, sizes)
        value += tap * tl.where(_looks_back(reach, t, back, L, sizes)[:, None], seen, 0.0)
    return value


@triton.jit
def _d_linear(given, dy, t, c, L, sizes: tl.constexpr):
    """Return the cotangent of the activation's input at tokens t; zero outside the row."""
    there = ((t >= 0) & (t < L))[:, None] & (c < sizes.C)[None, :]
    g = tl.load(dy + _offsets(t, c, sizes), mask=there, other=0).to(tl.float32)
    if sizes.SILU:
        value = _linear(given, t, c, L, sizes)
        gate = 1 / (1 + tl.exp2(-value * _LOG2_E))
        g *= gate * (1 + value * (1 - gate))
    return g


@triton.jit
def _d_inputs(given, dy, t, c, L, sizes: tl.constexpr):
    """Return the cotangent of the inputs at t: each contributes to the K outputs from its own on."""
    _, weight, _, _, reach = given
    for back in tl.static_range(sizes.K - 1, -1, -1):
        later = t + back
        tap = tl.load(weight + (sizes.K - 1 - back) * sizes.C + c, mask=c < sizes.C, other=0)[None, :]
        g = _d_linear(given, dy, later, c, L, sizes)
        part = tap * tl.where(_looks_back(reach, later, back, L, sizes)[:, None], g, 0.0)
        if back == sizes.K - 1:
            total = part
        else:
            total += part
    return total


@triton.jit
def _place(sizes: tl.constexpr):
    """Return a program's channels, tokens and row."""
    c = tl.program_id(1) * sizes.BC + tl.arange(0, sizes.BC)
    return c, tl.program_id(0) * sizes.T + tl.arange(0, sizes.T), tl.program_id(2).to(tl.int64)


@triton.jit
def causal_conv1d_forward(x, weight, bias, initial, reach, L, y, sizes: tl.constexpr):
    """Compute y."""
    c, t, row = _place(sizes)
    x, y, reach = x + row * L * sizes.C, y + row * L * sizes.C, reach + row * L
    given = (x, weight, bias, initial + row * (sizes.K - 1) * sizes.C, reach)
    value = _linear(given, t, c, L, sizes)
    if sizes.SILU:
        value = value / (1 + tl.exp2(-value * _LOG2_E))
    there = (t < L)[:, None] & (c < sizes.C)[None, :]
    tl.store(y + _offsets(t, c, sizes), value.to(y.dtype.element_ty), mask=there)


@triton.jit
def causal_conv1d_backward(
    x, weight, bias, initial, reach, dy, L, dx, d_weight, d_initial, sizes: tl.constexpr, BEFORE: tl.constexpr
):
    """Compute dx, d_weight and d_initial.

    d_weight [B blocks K+1 C] float32 is the program's part of the gradients of the taps and, last, the bias; d_initial
    is [B K-1 C] float32. BEFORE is a power of two of at least K-1.
    """
    c, t, row = _place(sizes)
    x, dx, dy = x + row * L * sizes.C, dx + row * L * sizes.C, dy + row * L * sizes.C
    reach, initial = reach + row * L, initial + row * (sizes.K - 1) * sizes.C
    given = (x, weight, bias, initial, reach)
    d_weight += (row * tl.num_programs(0) + tl.program_id(0)) * (sizes.K + 1) * sizes.C
    d_x = _d_inputs(given, dy, t, c, L, sizes)
    there = (t < L)[:, None] & (c < sizes.C)[None, :]
    tl.store(dx + _offsets(t, c, sizes), d_x.to(dx.dtype.element_ty), mask=there)
    g = _d_linear(given, dy, t, c, L, sizes)
    for back in tl.static_range(sizes.K - 1, -1, -1):
        seen = _inputs(x, initial, t - back, c, L, sizes)
        seen = tl.where(_looks_back(reach, t, back, L, sizes)[:, None], seen, 0.0)
        tl.store(d_weight + (sizes.K - 1 - back) * sizes.C + c, tl.sum(g * seen, axis=0), mask=c < sizes.C)
    tl.store(d_weight + sizes.K * sizes.C + c, tl.sum(g, axis=0), mask=c < sizes.C)
    if sizes.INITIAL:  # noqa: SIM102 (a constexpr; the inner condition is not)
        if tl.program_id(0) == 0:
            i = tl.arange(0, BEFORE)
            d_x = _d_inputs(given, dy, i + 1 - sizes.K, c, L, sizes)
            place = d_initial + row * (sizes.K - 1) * sizes.C + _offsets(i, c, sizes)
            tl.store(place, d_x, mask=(i < sizes.K - 1)[:, None] & (c < sizes.C)[None, :])
