"""Triton kernels of the causal convolution, launched by `triton.py`. Importing this module requires triton.

A program computes T tokens of BC channels of one row. It reads the inputs before and after its tokens from the cache.

Shapes: x, y, dy, dx [B L C]; weight [K C], bias [C] float32; initial [B K-1 C], the inputs before the first token;
reach [B L] int32, how many steps back a token may look.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(t, c, C: tl.constexpr):
    """Return the offsets [tokens, channels] in 64 bits: a long row has more than 2^31 values."""
    return t.to(tl.int64)[:, None] * C + c[None, :]


@triton.jit
def _inputs(x, initial, t, c, L, C: tl.constexpr, K: tl.constexpr, INITIAL: tl.constexpr):
    """Load x at tokens t, which may be before the first token or after the last."""
    at = _offsets(t, c, C)
    value = tl.load(x + at, mask=((t >= 0) & (t < L))[:, None] & (c < C)[None, :], other=0).to(tl.float32)
    if INITIAL:
        before = ((t < 0) & (t >= 1 - K))[:, None] & (c < C)[None, :]
        value += tl.load(initial + at + (K - 1) * C, mask=before, other=0).to(tl.float32)
    return value


@triton.jit
def _looks_back(reach, t, back, L, SEGMENTED: tl.constexpr):
    """Return which tokens t exist and may look `back` steps back."""
    there = (t >= 0) & (t < L)
    if SEGMENTED:
        there = there & (tl.load(reach + t, mask=there, other=0) >= back)
    return there


@triton.jit
def _linear(given, t, c, L, C: tl.constexpr, K: tl.constexpr, SEGMENTED: tl.constexpr, INITIAL: tl.constexpr):
    """Return bias + sum_k weight_k x_{t-K+1+k}; `given` is (x, weight, bias, initial, reach)."""
    x, weight, bias, initial, reach = given
    value = tl.load(bias + c, mask=c < C, other=0)[None, :]
    for back in tl.static_range(K - 1, -1, -1):
        tap = tl.load(weight + (K - 1 - back) * C + c, mask=c < C, other=0)[None, :]
        seen = _inputs(x, initial, t - back, c, L, C, K, INITIAL)
        value += tap * tl.where(_looks_back(reach, t, back, L, SEGMENTED)[:, None], seen, 0.0)
    return value


@triton.jit
def _d_linear(
    given,
    dy,
    t,
    c,
    L,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTED: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """Return the cotangent of the activation's input at tokens t; zero outside the row."""
    there = ((t >= 0) & (t < L))[:, None] & (c < C)[None, :]
    g = tl.load(dy + _offsets(t, c, C), mask=there, other=0).to(tl.float32)
    if SILU:
        value = _linear(given, t, c, L, C, K, SEGMENTED, INITIAL)
        gate = 1 / (1 + tl.exp2(-value * _LOG2_E))
        g *= gate * (1 + value * (1 - gate))
    return g


@triton.jit
def _d_inputs(
    given,
    dy,
    t,
    c,
    L,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTED: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """Return the cotangent of the inputs at t: each contributes to the K outputs from its own on."""
    _, weight, _, _, reach = given
    for back in tl.static_range(K - 1, -1, -1):
        later = t + back
        tap = tl.load(weight + (K - 1 - back) * C + c, mask=c < C, other=0)[None, :]
        g = _d_linear(given, dy, later, c, L, C, K, SILU, SEGMENTED, INITIAL)
        part = tap * tl.where(_looks_back(reach, later, back, L, SEGMENTED)[:, None], g, 0.0)
        if back == K - 1:
            total = part
        else:
            total += part
    return total


@triton.jit
def causal_conv1d_forward(
    x,
    weight,
    bias,
    initial,
    reach,
    L,
    y,
    C: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTED: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """Compute y."""
    c, t = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * T + tl.arange(0, T)
    row = tl.program_id(2).to(tl.int64)
    x, y, reach, initial = x + row * L * C, y + row * L * C, reach + row * L, initial + row * (K - 1) * C
    given = (x, weight, bias, initial, reach)
    value = _linear(given, t, c, L, C, K, SEGMENTED, INITIAL)
    if SILU:
        value = value / (1 + tl.exp2(-value * _LOG2_E))
    there = (t < L)[:, None] & (c < C)[None, :]
    tl.store(y + _offsets(t, c, C), value.to(y.dtype.element_ty), mask=there)


@triton.jit
def causal_conv1d_backward(
    x,
    weight,
    bias,
    initial,
    reach,
    dy,
    L,
    dx,
    d_weight,
    d_initial,
    C: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTED: tl.constexpr,
    INITIAL: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Compute dx, d_weight and d_initial.

    d_weight [B blocks K+1 C] float32 is the program's part of the gradients of the taps and, last, the bias; d_initial
    is [B K-1 C] float32. BEFORE is a power of two of at least K-1.
    """
    c, t = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * T + tl.arange(0, T)
    row = tl.program_id(2).to(tl.int64)
    x, dx, dy = x + row * L * C, dx + row * L * C, dy + row * L * C
    reach, initial = reach + row * L, initial + row * (K - 1) * C
    given = (x, weight, bias, initial, reach)
    d_weight += (row * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * C
    d_x = _d_inputs(given, dy, t, c, L, C, K, SILU, SEGMENTED, INITIAL)
    there = (t < L)[:, None] & (c < C)[None, :]
    tl.store(dx + _offsets(t, c, C), d_x.to(dx.dtype.element_ty), mask=there)
    g = _d_linear(given, dy, t, c, L, C, K, SILU, SEGMENTED, INITIAL)
    for back in tl.static_range(K - 1, -1, -1):
        seen = _inputs(x, initial, t - back, c, L, C, K, INITIAL)
        seen = tl.where(_looks_back(reach, t, back, L, SEGMENTED)[:, None], seen, 0.0)
        tl.store(d_weight + (K - 1 - back) * C + c, tl.sum(g * seen, axis=0), mask=c < C)
    tl.store(d_weight + K * C + c, tl.sum(g, axis=0), mask=c < C)
    if INITIAL:  # noqa: SIM102 (a constexpr; the inner condition is not)
        if tl.program_id(0) == 0:
            i = tl.arange(0, BEFORE)
            d_x = _d_inputs(given, dy, i + 1 - K, c, L, C, K, SILU, SEGMENTED, INITIAL)
            place = d_initial + row * (K - 1) * C + _offsets(i, c, C)
            tl.store(place, d_x, mask=(i < K - 1)[:, None] & (c < C)[None, :])
