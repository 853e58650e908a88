"""Triton kernels of SSD, launched by `triton.py`. Importing this module requires triton.

Two kernels scan over the chunks of a head with its state, or the cotangent of it, in registers, and store it at every
chunk; all others process a chunk independently. Pointers are at the chunk's first token and tokens t count from there:
offsets in a long row need 64 bits, those within a chunk 32. `sizes` is a `triton.Sizes`.

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
def _of_head(base, token, head, sizes: tl.constexpr):
    """Return the pointer to a token's values of a head in [B L H P]; tokens are counted over all rows."""
    return base + (token * sizes.H + head) * sizes.P


@triton.jit
def _of_group(base, token, head, sizes: tl.constexpr):
    """Return the pointer to a token's values of the head's group in [B L G N]."""
    return base + (token * sizes.G + head // (sizes.H // sizes.G)) * sizes.N


@triton.jit
def _state(row, chunk, head, L, sizes: tl.constexpr):
    """Return the offset of a chunk's state of a head in [B chunks H P N]."""
    return ((row * (L // sizes.Q) + chunk) * sizes.H + head) * sizes.P * sizes.N


@triton.jit
def _scan_place(sizes: tl.constexpr):
    """Return head and row of a program that scans over chunks, and its channels' offsets in a state [P N]."""
    p, n = tl.program_id(0) * sizes.BLOCK + tl.arange(0, sizes.BLOCK), tl.arange(0, sizes.N)
    return tl.program_id(1), tl.program_id(2).to(tl.int64), p[:, None] * sizes.N + n[None, :]


@triton.jit
def _rows(base, t, width: tl.constexpr, stride):
    """Load [tokens, width]."""
    return tl.load(base + t[:, None] * stride + tl.arange(0, width)[None, :])


@triton.jit
def _channels(base, t, sizes: tl.constexpr):
    """Load [tokens, P] of a head."""
    return _rows(base, t, sizes.P, sizes.H * sizes.P)


@triton.jit
def _projections(base, t, sizes: tl.constexpr):
    """Load [tokens, N] of a group."""
    return _rows(base, t, sizes.N, sizes.G * sizes.N)


@triton.jit
def _state_rows(base, sizes: tl.constexpr):
    """Load a state [P, N]."""
    return _rows(base, tl.arange(0, sizes.P), sizes.N, sizes.N)


@triton.jit
def _inflow(s, segment, t, sizes: tl.constexpr):
    """Return i [Q]."""
    if sizes.SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + t) == 0, s, float("-inf")))
    else:
        return tl.exp2(s)


@triton.jit
def _outflow(s, total, segment, t, last, sizes: tl.constexpr):
    """Return o [Q]."""
    if sizes.SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + t) == tl.load(segment + last), total - s, float("-inf")))
    else:
        return tl.exp2(total - s)


@triton.jit
def _across(total, segment, last, sizes: tl.constexpr):
    if sizes.SEGMENTED:
        return tl.exp2(tl.where(tl.load(segment + last) == 0, total, float("-inf")))
    else:
        return tl.exp2(total)


@triton.jit
def _decays(s, segment, t, sizes: tl.constexpr):
    """Return E [Q Q]."""
    q = tl.arange(0, sizes.Q)
    reaches = q[:, None] >= q[None, :]
    if sizes.SEGMENTED:
        number = tl.load(segment + t)
        reaches = reaches & (number[:, None] == number[None, :])
    return tl.exp2(tl.where(reaches, s[:, None] - s[None, :], float("-inf")))


@triton.jit
def ssd_states(x, d, s, B, segment, initial, L, before, final, sizes: tl.constexpr):
    """Compute the state before each chunk and the final one [B H P N] float32, for a program's channels of a head."""
    head, row, tile = _scan_place(sizes)
    x = _of_head(x, row * L, head, sizes) + tl.program_id(0) * sizes.BLOCK
    B = _of_group(B, row * L, head, sizes)
    of_head = row * sizes.H + head
    d, s, segment = d + of_head * L, s + of_head * L, segment + row * L
    t, last = tl.arange(0, sizes.Q), sizes.Q - 1
    state = tl.load(initial + of_head * sizes.P * sizes.N + tile)
    before += _state(row, 0, head, L, sizes)
    for _ in range(0, L // sizes.Q):
        tl.store(before + tile, state.to(before.dtype.element_ty))
        total = tl.load(s + last)
        weight = _outflow(tl.load(s + t), total, segment, t, last, sizes) * tl.load(d + t)
        x_c = _rows(x, t, sizes.BLOCK, sizes.H * sizes.P)
        weighted = (x_c.to(tl.float32) * weight[:, None]).to(x_c.dtype)
        increment = tl.dot(tl.trans(weighted), _projections(B, t, sizes))
        state = state * _across(total, segment, last, sizes) + increment
        x, B = x + sizes.Q * sizes.H * sizes.P, B + sizes.Q * sizes.G * sizes.N
        before += sizes.H * sizes.P * sizes.N
        d, s, segment = d + sizes.Q, s + sizes.Q, segment + sizes.Q
    tl.store(final + of_head * sizes.P * sizes.N + tile, state)


@triton.jit
def ssd_outputs(x, d, s, B, C, D, segment, before, L, y, sizes: tl.constexpr):
    """Compute y of a chunk and head from the state before the chunk."""
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, first = tl.arange(0, sizes.Q), row * L + chunk * sizes.Q
    x, y = _of_head(x, first, head, sizes), _of_head(y, first, head, sizes)
    B, C = _of_group(B, first, head, sizes), _of_group(C, first, head, sizes)
    segment += first
    of_head = (row * sizes.H + head) * L + chunk * sizes.Q
    s_t, d_t = tl.load(s + of_head + t), tl.load(d + of_head + t)
    C_c = _projections(C, t, sizes)
    scores = tl.dot(C_c, tl.trans(_projections(B, t, sizes)))
    mixing = scores * _decays(s_t, segment, t, sizes) * d_t[None, :]
    state = _state_rows(before + _state(row, chunk, head, L, sizes), sizes)
    x_c = _channels(x, t, sizes)
    y_c = tl.dot(C_c, tl.trans(state)) * _inflow(s_t, segment, t, sizes)[:, None]
    y_c += tl.dot(mixing.to(x_c.dtype), x_c)
    y_c += tl.load(D + head) * x_c.to(tl.float32)
    tl.store(y + t[:, None] * (sizes.H * sizes.P) + tl.arange(0, sizes.P)[None, :], y_c.to(y.dtype.element_ty))


@triton.jit
def ssd_state_gradients(dy, s, C, segment, d_final, L, after, d_initial, sizes: tl.constexpr):
    """Compute the cotangents of the state after each chunk, in reverse, and of the initial one [B H P N] float32."""
    head, row, tile = _scan_place(sizes)
    first = row * L + L - sizes.Q
    dy = _of_head(dy, first, head, sizes) + tl.program_id(0) * sizes.BLOCK
    C = _of_group(C, first, head, sizes)
    of_head = row * sizes.H + head
    s, segment = s + of_head * L + L - sizes.Q, segment + first
    t, last = tl.arange(0, sizes.Q), sizes.Q - 1
    d_state = tl.load(d_final + of_head * sizes.P * sizes.N + tile)
    after += _state(row, L // sizes.Q - 1, head, L, sizes)
    for _ in range(0, L // sizes.Q):
        tl.store(after + tile, d_state.to(after.dtype.element_ty))
        dy_c = _rows(dy, t, sizes.BLOCK, sizes.H * sizes.P)
        decayed = (dy_c.to(tl.float32) * _inflow(tl.load(s + t), segment, t, sizes)[:, None]).to(dy_c.dtype)
        increment = tl.dot(tl.trans(decayed), _projections(C, t, sizes))
        d_state = d_state * _across(tl.load(s + last), segment, last, sizes) + increment
        dy, C = dy - sizes.Q * sizes.H * sizes.P, C - sizes.Q * sizes.G * sizes.N
        after -= sizes.H * sizes.P * sizes.N
        s, segment = s - sizes.Q, segment - sizes.Q
    tl.store(d_initial + of_head * sizes.P * sizes.N + tile, d_state)


@triton.jit
def ssd_token_gradients(x, dy, d, s, B, C, D, segment, before, after, L, dx, dd, ds, dD, sizes: tl.constexpr):
    """Compute dx, the gradients of d (excluding those through s) and of s, and the part of dD of a chunk and head.

    `before` contains the states before the chunks, `after` the cotangents of those after them; dD is [B H chunks].

    A path from token j to a later token t depends on s_t - s_j: it adds to the gradient of s at its end and subtracts
    at its start. The diagonal is not a path.
    """
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, last, first = tl.arange(0, sizes.Q), sizes.Q - 1, row * L + chunk * sizes.Q
    x, dy, dx = _of_head(x, first, head, sizes), _of_head(dy, first, head, sizes), _of_head(dx, first, head, sizes)
    B, C = _of_group(B, first, head, sizes), _of_group(C, first, head, sizes)
    segment += first
    of_head = (row * sizes.H + head) * L + chunk * sizes.Q
    state = _state(row, chunk, head, L, sizes)
    s_t, d_t, total = tl.load(s + of_head + t), tl.load(d + of_head + t), tl.load(s + of_head + last)

    x_c, dy_c = _channels(x, t, sizes), _channels(dy, t, sizes)
    B_c, C_c = _projections(B, t, sizes), _projections(C, t, sizes)
    mixing = tl.dot(C_c, tl.trans(B_c)) * _decays(s_t, segment, t, sizes)
    paths = tl.dot(dy_c, tl.trans(x_c)) * mixing
    mixing *= d_t[None, :]
    dx_c = tl.dot(tl.trans(mixing.to(x_c.dtype)), dy_c)
    dd_t = tl.sum(paths, axis=0)
    paths = tl.where(t[:, None] > t[None, :], paths * d_t[None, :], 0.0)
    ds_t = tl.sum(paths, axis=1) - tl.sum(paths, axis=0)

    after_c = _state_rows(after + state, sizes)
    outflow = _outflow(s_t, total, segment, t, last, sizes)
    d_weighted = tl.dot(B_c, tl.trans(after_c)) * outflow[:, None]
    dx_c += d_weighted * d_t[:, None]
    through = tl.sum(d_weighted * x_c.to(tl.float32), axis=1)
    dd_t += through
    leaving = tl.where(t < last, through * d_t, 0.0)

    before_c = _state_rows(before + state, sizes)
    from_state = tl.dot(C_c, tl.trans(before_c)) * _inflow(s_t, segment, t, sizes)[:, None]
    ds_t += tl.sum(from_state * dy_c.to(tl.float32), axis=1) - leaving
    crossing = tl.sum(tl.sum(before_c.to(tl.float32) * after_c.to(tl.float32), axis=1), axis=0)
    crossing = crossing * _across(total, segment, last, sizes) + tl.sum(leaving, axis=0)
    ds_t += tl.where(t == last, crossing, 0.0)

    dx_c += tl.load(D + head) * dy_c.to(tl.float32)
    skipped = tl.sum(tl.sum(dy_c.to(tl.float32) * x_c.to(tl.float32), axis=1), axis=0)
    tl.store(dx + t[:, None] * (sizes.H * sizes.P) + tl.arange(0, sizes.P)[None, :], dx_c.to(dx.dtype.element_ty))
    tl.store(dd + of_head + t, dd_t)
    tl.store(ds + of_head + t, ds_t)
    tl.store(dD + (row * sizes.H + head) * (L // sizes.Q) + chunk, skipped)


@triton.jit
def ssd_shared_gradients(x, dy, d, s, B, C, segment, before, after, L, dB, dC, sizes: tl.constexpr):
    """Compute dB and dC of a chunk for BLOCK heads that share B and C.

    They are [B H/BLOCK L N] float32, to be summed over a group.
    """
    block, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, last, first = tl.arange(0, sizes.Q), sizes.Q - 1, row * L + chunk * sizes.Q
    lowest = block * sizes.BLOCK
    x, dy = _of_head(x, first, lowest, sizes), _of_head(dy, first, lowest, sizes)
    B, C = _of_group(B, first, lowest, sizes), _of_group(C, first, lowest, sizes)
    of_heads = (row * sizes.H + lowest) * L + chunk * sizes.Q
    d, s, segment = d + of_heads, s + of_heads, segment + first
    state = _state(row, chunk, lowest, L, sizes)
    before, after = before + state, after + state
    d_scores = tl.zeros((sizes.Q, sizes.Q), tl.float32)
    dB_c = tl.zeros((sizes.Q, sizes.N), tl.float32)
    dC_c = tl.zeros((sizes.Q, sizes.N), tl.float32)
    for head in range(0, sizes.BLOCK):
        s_t, d_t, total = tl.load(s + t), tl.load(d + t), tl.load(s + last)
        x_c, dy_c = _channels(x + head * sizes.P, t, sizes), _channels(dy + head * sizes.P, t, sizes)
        decays = _decays(s_t, segment, t, sizes) * d_t[None, :]
        d_scores += tl.dot(dy_c, tl.trans(x_c)) * decays
        inflow = _inflow(s_t, segment, t, sizes)
        decayed = (dy_c.to(tl.float32) * inflow[:, None]).to(dy_c.dtype)
        dC_c += tl.dot(decayed, _state_rows(before + head * sizes.P * sizes.N, sizes))
        outflow = _outflow(s_t, total, segment, t, last, sizes) * d_t
        weighted = (x_c.to(tl.float32) * outflow[:, None]).to(x_c.dtype)
        dB_c += tl.dot(weighted, _state_rows(after + head * sizes.P * sizes.N, sizes))
        d, s = d + L, s + L
    B_c, C_c = _projections(B, t, sizes), _projections(C, t, sizes)
    dC_c += tl.dot(d_scores.to(B_c.dtype), B_c)
    dB_c += tl.dot(tl.trans(d_scores.to(B_c.dtype)), C_c)
    first = (row * (sizes.H // sizes.BLOCK) + block) * L + chunk * sizes.Q
    tile = first * sizes.N + t[:, None] * sizes.N + tl.arange(0, sizes.N)[None, :]
    tl.store(dB + tile, dB_c)
    tl.store(dC + tile, dC_c)
