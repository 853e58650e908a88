"""Triton kernels of SSD, launched by `triton.py`. Importing this module requires triton.

Two kernels scan over the chunks of a head with its state, or the cotangent of it, in registers, and store it at every
chunk; all others process a chunk independently. Pointers are at the chunk's first token and tokens t count from there:
offsets in a long row need 64 bits, those within a chunk 32. Sizes are powers of two: Q tokens of a chunk, P channels of
a head, N states.

Shapes: x, y [B L H P]; B, C [B L G N]; states [B chunks H P N], all of one dtype. d, the step sizes after the softplus,
and s [B H L] float32: s_t is the sum of the exponents (d A, in base 2) of the tokens up to t, of its chunk and segment.
segment [B L] int32 counts the resets from the start of the chunk: at 0 a token still sees the carried-in state.

With E_tj = 2^(s_t - s_j) where j <= t is in the segment of t, i_t = 2^(s_t) where segment_t is 0, and
o_j = 2^(s_last - s_j) where j is in the segment of the chunk's last token:

    y_t = sum_j (C_t . B_j) E_tj d_j x_j + i_t S C_t + D x_t          S' = across S + sum_j o_j d_j x_j B_j^T

Masks precede exp2: no infinity and no NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _of_head(base, token, head, H: tl.constexpr, P: tl.constexpr):
    """Return the pointer to a token's values of a head in [B L H P]; tokens are counted over all rows."""
    return base + (token * H + head) * P


@triton.jit
def _of_group(base, token, head, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr):
    """Return the pointer to a token's values of the head's group in [B L G N]."""
    return base + (token * G + head // (H // G)) * N


@triton.jit
def _scan_place(N: tl.constexpr, PB: tl.constexpr):
    """Return head and row of a program that scans over chunks, and its PB channels' offsets in a state [P N]."""
    p, n = tl.program_id(0) * PB + tl.arange(0, PB), tl.arange(0, N)
    return tl.program_id(1), tl.program_id(2).to(tl.int64), p[:, None] * N + n[None, :]


@triton.jit
def _rows(base, t, width: tl.constexpr, stride):
    """Load [tokens, width]."""
    return tl.load(base + t[:, None] * stride + tl.arange(0, width)[None, :])


@triton.jit
def _inflow(s, segment, t, SEGMENTED: tl.constexpr):
    """Return i [Q]."""
    if SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + t) == 0, s, float("-inf")))
    else:
        return tl.exp2(s)


@triton.jit
def _outflow(s, total, segment, t, last, SEGMENTED: tl.constexpr):
    """Return o [Q]."""
    if SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + t) == tl.load(segment + last), total - s, float("-inf")))
    else:
        return tl.exp2(total - s)


@triton.jit
def _across(total, segment, last, SEGMENTED: tl.constexpr):
    if SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + last) == 0, total, float("-inf")))
    else:
        return tl.exp2(total)


@triton.jit
def _decays(s, segment, t, Q: tl.constexpr, SEGMENTED: tl.constexpr):
    """Return E [Q Q]."""
    q = tl.arange(0, Q)
    reaches = q[:, None] >= q[None, :]
    if SEGMENTED:
        number = tl.load(segment + t)
        reaches = reaches & (number[:, None] == number[None, :])
    return tl.exp2(tl.where(reaches, s[:, None] - s[None, :], float("-inf")))


@triton.jit
def ssd_states(
    x,
    d,
    s,
    B,
    segment,
    initial,
    L,
    before,
    final,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    PB: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Compute the state before each chunk and the final one [B H P N] float32, for PB channels of a head."""
    head, row, tile = _scan_place(N, PB)
    x = _of_head(x, row * L, head, H, P) + tl.program_id(0) * PB
    B = _of_group(B, row * L, head, H, G, N)
    d, s, segment = d + (row * H + head) * L, s + (row * H + head) * L, segment + row * L
    t, last = tl.arange(0, Q), Q - 1
    state = tl.load(initial + (row * H + head) * P * N + tile)
    before += (row * (L // Q) * H + head) * P * N
    for _ in range(0, L // Q):
        tl.store(before + tile, state.to(before.dtype.element_ty))
        total = tl.load(s + last)
        weight = _outflow(tl.load(s + t), total, segment, t, last, SEGMENTED) * tl.load(d + t)
        x_c = _rows(x, t, PB, H * P)
        weighted = (x_c.to(tl.float32) * weight[:, None]).to(x_c.dtype)
        increment = tl.dot(tl.trans(weighted), _rows(B, t, N, G * N))
        state = state * _across(total, segment, last, SEGMENTED) + increment
        x, B, before = x + Q * H * P, B + Q * G * N, before + H * P * N
        d, s, segment = d + Q, s + Q, segment + Q
    tl.store(final + (row * H + head) * P * N + tile, state)


@triton.jit
def ssd_outputs(
    x,
    d,
    s,
    B,
    C,
    D,
    segment,
    before,
    L,
    y,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Compute y of a chunk and head from the state before the chunk."""
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, first = tl.arange(0, Q), row * L + chunk * Q
    x, y = _of_head(x, first, head, H, P), _of_head(y, first, head, H, P)
    B, C = _of_group(B, first, head, H, G, N), _of_group(C, first, head, H, G, N)
    segment += first
    before += ((row * (L // Q) + chunk) * H + head) * P * N
    of_head = (row * H + head) * L + chunk * Q
    s_t, d_t = tl.load(s + of_head + t), tl.load(d + of_head + t)
    C_c = _rows(C, t, N, G * N)
    scores = tl.dot(C_c, tl.trans(_rows(B, t, N, G * N)))
    mixing = scores * _decays(s_t, segment, t, Q, SEGMENTED) * d_t[None, :]
    state = _rows(before, tl.arange(0, P), N, N)
    x_c = _rows(x, t, P, H * P)
    y_c = tl.dot(C_c, tl.trans(state)) * _inflow(s_t, segment, t, SEGMENTED)[:, None]
    y_c += tl.dot(mixing.to(x_c.dtype), x_c)
    y_c += tl.load(D + head) * x_c.to(tl.float32)
    tl.store(y + t[:, None] * (H * P) + tl.arange(0, P)[None, :], y_c.to(y.dtype.element_ty))


@triton.jit
def ssd_state_gradients(
    dy,
    s,
    C,
    segment,
    d_final,
    L,
    after,
    d_initial,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    PB: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Compute the cotangents of the state after each chunk, in reverse, and of the initial one [B H P N] float32."""
    head, row, tile = _scan_place(N, PB)
    first = row * L + L - Q
    dy = _of_head(dy, first, head, H, P) + tl.program_id(0) * PB
    C = _of_group(C, first, head, H, G, N)
    s, segment = s + (row * H + head) * L + L - Q, segment + first
    t, last = tl.arange(0, Q), Q - 1
    d_state = tl.load(d_final + (row * H + head) * P * N + tile)
    after += ((row * (L // Q) + L // Q - 1) * H + head) * P * N
    for _ in range(0, L // Q):
        tl.store(after + tile, d_state.to(after.dtype.element_ty))
        dy_c = _rows(dy, t, PB, H * P)
        decayed = (dy_c.to(tl.float32) * _inflow(tl.load(s + t), segment, t, SEGMENTED)[:, None]).to(dy_c.dtype)
        increment = tl.dot(tl.trans(decayed), _rows(C, t, N, G * N))
        d_state = d_state * _across(tl.load(s + last), segment, last, SEGMENTED) + increment
        dy, C, after = dy - Q * H * P, C - Q * G * N, after - H * P * N
        s, segment = s - Q, segment - Q
    tl.store(d_initial + (row * H + head) * P * N + tile, d_state)


@triton.jit
def ssd_token_gradients(
    x,
    dy,
    d,
    s,
    B,
    C,
    D,
    segment,
    before,
    after,
    L,
    dx,
    dd,
    ds,
    dD,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Compute dx, the gradients of d (excluding those through s) and of s, and the part of dD of a chunk and head.

    `before` contains the states before the chunks, `after` the cotangents of those after them; dD is [B H chunks].

    A path from token j to a later token t depends on s_t - s_j: it adds to the gradient of s at its end and subtracts
    at its start. The diagonal is not a path.
    """
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, last, first = tl.arange(0, Q), Q - 1, row * L + chunk * Q
    x, dy, dx = _of_head(x, first, head, H, P), _of_head(dy, first, head, H, P), _of_head(dx, first, head, H, P)
    B, C = _of_group(B, first, head, H, G, N), _of_group(C, first, head, H, G, N)
    segment += first
    of_head = (row * H + head) * L + chunk * Q
    state = ((row * (L // Q) + chunk) * H + head) * P * N
    s_t, d_t, total = tl.load(s + of_head + t), tl.load(d + of_head + t), tl.load(s + of_head + last)

    x_c, dy_c = _rows(x, t, P, H * P), _rows(dy, t, P, H * P)
    B_c, C_c = _rows(B, t, N, G * N), _rows(C, t, N, G * N)
    mixing = tl.dot(C_c, tl.trans(B_c)) * _decays(s_t, segment, t, Q, SEGMENTED)
    paths = tl.dot(dy_c, tl.trans(x_c)) * mixing
    mixing *= d_t[None, :]
    dx_c = tl.dot(tl.trans(mixing.to(x_c.dtype)), dy_c)
    dd_t = tl.sum(paths, axis=0)
    paths = tl.where(t[:, None] > t[None, :], paths * d_t[None, :], 0.0)
    ds_t = tl.sum(paths, axis=1) - tl.sum(paths, axis=0)

    after_c = _rows(after + state, tl.arange(0, P), N, N)
    outflow = _outflow(s_t, total, segment, t, last, SEGMENTED)
    d_weighted = tl.dot(B_c, tl.trans(after_c)) * outflow[:, None]
    dx_c += d_weighted * d_t[:, None]
    through = tl.sum(d_weighted * x_c.to(tl.float32), axis=1)
    dd_t += through
    leaving = tl.where(t < last, through * d_t, 0.0)

    before_c = _rows(before + state, tl.arange(0, P), N, N)
    from_state = tl.dot(C_c, tl.trans(before_c)) * _inflow(s_t, segment, t, SEGMENTED)[:, None]
    ds_t += tl.sum(from_state * dy_c.to(tl.float32), axis=1) - leaving
    crossing = tl.sum(tl.sum(before_c.to(tl.float32) * after_c.to(tl.float32), axis=1), axis=0)
    crossing = crossing * _across(total, segment, last, SEGMENTED) + tl.sum(leaving, axis=0)
    ds_t += tl.where(t == last, crossing, 0.0)

    dx_c += tl.load(D + head) * dy_c.to(tl.float32)
    skipped = tl.sum(tl.sum(dy_c.to(tl.float32) * x_c.to(tl.float32), axis=1), axis=0)
    tl.store(dx + t[:, None] * (H * P) + tl.arange(0, P)[None, :], dx_c.to(dx.dtype.element_ty))
    tl.store(dd + of_head + t, dd_t)
    tl.store(ds + of_head + t, ds_t)
    tl.store(dD + (row * H + head) * (L // Q) + chunk, skipped)


@triton.jit
def ssd_shared_gradients(
    x,
    dy,
    d,
    s,
    B,
    C,
    segment,
    before,
    after,
    L,
    dB,
    dC,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HB: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Compute dB and dC of a chunk for HB heads that share B and C: [B H/HB L N] float32, to be summed over a group."""
    block, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, last, first = tl.arange(0, Q), Q - 1, row * L + chunk * Q
    lowest = block * HB
    x, dy = _of_head(x, first, lowest, H, P), _of_head(dy, first, lowest, H, P)
    B, C = _of_group(B, first, lowest, H, G, N), _of_group(C, first, lowest, H, G, N)
    of_heads = (row * H + lowest) * L + chunk * Q
    d, s, segment = d + of_heads, s + of_heads, segment + first
    state = ((row * (L // Q) + chunk) * H + lowest) * P * N
    before, after = before + state, after + state
    d_scores = tl.zeros((Q, Q), tl.float32)
    dB_c = tl.zeros((Q, N), tl.float32)
    dC_c = tl.zeros((Q, N), tl.float32)
    for head in range(0, HB):
        s_t, d_t, total = tl.load(s + t), tl.load(d + t), tl.load(s + last)
        x_c, dy_c = _rows(x + head * P, t, P, H * P), _rows(dy + head * P, t, P, H * P)
        decays = _decays(s_t, segment, t, Q, SEGMENTED) * d_t[None, :]
        d_scores += tl.dot(dy_c, tl.trans(x_c)) * decays
        inflow = _inflow(s_t, segment, t, SEGMENTED)
        decayed = (dy_c.to(tl.float32) * inflow[:, None]).to(dy_c.dtype)
        dC_c += tl.dot(decayed, _rows(before + head * P * N, tl.arange(0, P), N, N))
        outflow = _outflow(s_t, total, segment, t, last, SEGMENTED) * d_t
        weighted = (x_c.to(tl.float32) * outflow[:, None]).to(x_c.dtype)
        dB_c += tl.dot(weighted, _rows(after + head * P * N, tl.arange(0, P), N, N))
        d, s = d + L, s + L
    B_c, C_c = _rows(B, t, N, G * N), _rows(C, t, N, G * N)
    dC_c += tl.dot(d_scores.to(B_c.dtype), B_c)
    dB_c += tl.dot(tl.trans(d_scores.to(B_c.dtype)), C_c)
    tile = ((row * (H // HB) + block) * L + chunk * Q) * N + t[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(dB + tile, dB_c)
    tl.store(dC + tile, dC_c)
