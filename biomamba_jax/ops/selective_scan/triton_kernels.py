"""Triton kernels of the selective scan, launched by `triton.py`. Importing this module requires triton.

A program handles BE channels of one row and steps through time with the state [BN BE] in registers. The inputs of the
next U steps are loaded while those of the current U are used. Steps after the end of a row, channels beyond E and
states beyond N are masked on load so that they have no effect: delta = softplus(-inf) = 0.

E and L are runtime arguments, E divided by VECTOR: that is all that Triton knows about the alignment, so it assigns
VECTOR neighbouring channels to every thread. With one, a thread has all states of its channel, and a sum over d_state
stays within it.

In the loop over chunks, pointers are at the chunk's first step, steps t count from there and L is the number of steps
left: offsets in a long row need 64 bits, those within a chunk 32.

Shapes: x, dt, z, y and their gradients [B L E]; B, C [B L N]; A_log2e [N E], D, dt_bias [E] float32; reset [B L]
float32, -inf where the state is reset and 0 elsewhere; states [... N E] float32, channels last. `sizes` is a
`triton.Sizes`.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(raw):
    """Return log(1 + exp(raw)) to 2e-6 relative: for common steps of 1e-4 and less, log(1 + e) alone has 3 digits."""
    e = tl.exp2(tl.abs(raw) * -_LOG2_E)
    series = e * (1 + e * (-0.5 + e * (1 / 3 - 0.25 * e)))
    return tl.maximum(raw, 0.0) + tl.where(e < 0.05, series, tl.log2(1 + e) * _LN_2)


@triton.jit
def _sigmoid(v):
    return 1 / (1 + tl.exp2(-v * _LOG2_E))


@triton.jit
def _place(E, sizes: tl.constexpr):
    """Return a program's channels, row, states, its offsets in a state [N E], and the mask of the valid ones."""
    e, n = tl.program_id(0) * sizes.BE + tl.arange(0, sizes.BE), tl.arange(0, sizes.BN)
    there = (n < sizes.N)[:, None] & (e < E)[None, :]
    return e, tl.program_id(1).to(tl.int64), n, n[:, None] * E + e[None, :], there


@triton.jit
def _parameters(A_log2e, D, dt_bias, e, tile, there, E):
    """Load A, D and dt_bias of the program's channels."""
    in_row = e < E
    A = tl.load(A_log2e + tile, mask=there, other=0)
    return A, tl.load(D + e, mask=in_row, other=0), tl.load(dt_bias + e, mask=in_row, other=0)


@triton.jit
def _channels(row, t, e, L, E, other: tl.constexpr):
    """Load channels e of time step t."""
    return tl.load(row + t * E + e, mask=e < tl.where(t < L, E, 0), other=other)


@triton.jit
def _tokens(x, dt, z, t, e, L, E, sizes: tl.constexpr):
    """Load x, dt and z of time step t in their storage dtype."""
    x_t = _channels(x, t, e, L, E, 0)
    dt_t = _channels(dt, t, e, L, E, float("-inf"))
    if sizes.GATED:
        return x_t, dt_t, _channels(z, t, e, L, E, 0)
    else:
        return x_t, dt_t, x_t


@triton.jit
def _per_state(row, t, n, L, sizes: tl.constexpr):
    """Load B or C of time step t as a column; after the end, any finite value: it is multiplied by zero."""
    place = row + tl.minimum(t, L - 1) * sizes.N + n
    if sizes.N == sizes.BN:
        return tl.load(place).to(tl.float32)[:, None]
    else:
        return tl.load(place, mask=n < sizes.N, other=0).to(tl.float32)[:, None]


@triton.jit
def _decay(delta, A, reset, t, L, sizes: tl.constexpr):
    """Return exp(delta A), zero at a reset; the mask precedes the exponential."""
    exponent = delta[None, :] * A
    if sizes.SEGMENTED:
        exponent += tl.load(reset + t, mask=t < L, other=0)
    return tl.exp2(exponent)


@triton.jit
def selective_scan_forward(
    x, dt, z, B, C, A_log2e, D, dt_bias, reset, initial, L, E_per_vector, y, final, boundary, sizes: tl.constexpr
):
    """Compute y, the final state [B N E] and, if SAVE, the state before every CHUNK steps [B chunks N E]."""
    N: tl.constexpr = sizes.N
    U: tl.constexpr = sizes.U
    CHUNK: tl.constexpr = sizes.CHUNK
    E = E_per_vector * sizes.VECTOR
    e, row, n, tile, there = _place(E, sizes)
    x, dt, z, y = x + row * L * E, dt + row * L * E, z + row * L * E, y + row * L * E
    B, C, reset = B + row * L * N, C + row * L * N, reset + row * L
    A, skip, bias = _parameters(A_log2e, D, dt_bias, e, tile, there, E)
    h = tl.load(initial + row * N * E + tile, mask=there, other=0)
    chunks = tl.cdiv(L, CHUNK)
    boundary += row * chunks * N * E

    ahead = ()
    for i in tl.static_range(U):
        ahead = ahead + (_tokens(x, dt, z, i, e, L, E, sizes),)
    B_t, C_t = _per_state(B, 0, n, L, sizes), _per_state(C, 0, n, L, sizes)
    for _ in range(0, chunks):
        if sizes.SAVE:
            tl.store(boundary + tile, h, mask=there)
            boundary += N * E
        for block in range(0, tl.minimum(CHUNK, L), U):
            loaded = ()
            for i in tl.static_range(U):
                t = block + i
                x_t = ahead[i][0].to(tl.float32)
                delta = _softplus(ahead[i][1].to(tl.float32) + bias)
                loaded = loaded + (_tokens(x, dt, z, t + U, e, L, E, sizes),)
                next_B, next_C = _per_state(B, t + 1, n, L, sizes), _per_state(C, t + 1, n, L, sizes)
                # h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t  (Mamba, arXiv 2312.00752, eq. 2)
                h = _decay(delta, A, reset, t, L, sizes) * h + (delta * x_t)[None, :] * B_t
                y_t = tl.sum(h * C_t, axis=0) + skip * x_t
                if sizes.GATED:
                    z_t = ahead[i][2].to(tl.float32)
                    y_t *= z_t * _sigmoid(z_t)
                tl.store(y + t * E + e, y_t.to(y.dtype.element_ty), mask=e < tl.where(t < L, E, 0))
                B_t, C_t = next_B, next_C
            ahead = loaded
        L -= CHUNK
        x, dt, z, y = x + CHUNK * E, dt + CHUNK * E, z + CHUNK * E, y + CHUNK * E
        B, C, reset = B + CHUNK * N, C + CHUNK * N, reset + CHUNK
    tl.store(final + row * N * E + tile, h, mask=there)


@triton.jit
def selective_scan_backward(
    x,
    dt,
    z,
    B,
    C,
    A_log2e,
    D,
    dt_bias,
    reset,
    boundary,
    dy,
    d_final,
    L,
    E_per_vector,
    dx,
    d_dt,
    dz,
    dB,
    dC,
    dA,
    dD,
    d_bias,
    d_initial,
    scratch,
    sizes: tl.constexpr,
):
    """Compute all gradients, last chunk first.

    In a chunk: recompute forward, saving the state before every U steps to `scratch` [B CHUNK/U N E]; then, U steps at
    a time, forward with all states in registers, and backward. dB and dC [B blocks L N] are partial sums over the
    program's channels; dA [B N E], dD and d_bias [B E] are per row.
    """
    N: tl.constexpr = sizes.N
    U: tl.constexpr = sizes.U
    CHUNK: tl.constexpr = sizes.CHUNK
    E = E_per_vector * sizes.VECTOR
    e, row, n, tile, there = _place(E, sizes)
    chunks = tl.cdiv(L, CHUNK)
    first = (chunks - 1) * CHUNK
    token = row * L + first
    x, dt, z, dy = x + token * E, dt + token * E, z + token * E, dy + token * E
    dx, d_dt, dz = dx + token * E, d_dt + token * E, dz + token * E
    B, C, reset = B + token * N, C + token * N, reset + token
    partial = ((row * tl.num_programs(0) + tl.program_id(0)) * L + first) * N
    dB, dC = dB + partial, dC + partial
    L -= first
    boundary += (row * chunks + chunks - 1) * N * E
    scratch += row * (CHUNK // U) * N * E
    A, skip, bias = _parameters(A_log2e, D, dt_bias, e, tile, there, E)

    # The cotangent of the state before the current step from all later ones.
    later = tl.load(d_final + row * N * E + tile, mask=there, other=0)
    sum_A = tl.zeros((sizes.BN, sizes.BE), tl.float32)
    sum_D, sum_bias = tl.zeros((sizes.BE,), tl.float32), tl.zeros((sizes.BE,), tl.float32)
    for _ in range(0, chunks):
        h = tl.load(boundary + tile, mask=there, other=0)
        boundary -= N * E
        for part in range(0, CHUNK // U - 1):
            tl.store(scratch + part * N * E + tile, h, mask=there)
            for i in tl.static_range(U):
                t = part * U + i
                delta = _softplus(_channels(dt, t, e, L, E, float("-inf")).to(tl.float32) + bias)
                u = delta * _channels(x, t, e, L, E, 0).to(tl.float32)
                h = _decay(delta, A, reset, t, L, sizes) * h + u[None, :] * _per_state(B, t, n, L, sizes)
        tl.store(scratch + (CHUNK // U - 1) * N * E + tile, h, mask=there)
        tl.debug_barrier()
        for part in range(CHUNK // U - 1, -1, -1):
            start = part * U
            before = (tl.load(scratch + part * N * E + tile, mask=there, other=0),)
            inputs = ()
            for i in tl.static_range(U):
                t = start + i
                tokens = _tokens(x, dt, z, t, e, L, E, sizes)
                delta = _softplus(tokens[1].to(tl.float32) + bias)
                inputs = inputs + ((tokens[0], tokens[1], tokens[2], _channels(dy, t, e, L, E, 0), delta),)
            for i in tl.static_range(U):
                t = start + i
                delta = inputs[i][4]
                u = delta * inputs[i][0].to(tl.float32)
                decayed = _decay(delta, A, reset, t, L, sizes) * before[i]
                before = before + (decayed + u[None, :] * _per_state(B, t, n, L, sizes),)
            for i in tl.static_range(U - 1, -1, -1):
                t = start + i
                x_t, g, delta = inputs[i][0].to(tl.float32), inputs[i][3].to(tl.float32), inputs[i][4]
                B_t, C_t = _per_state(B, t, n, L, sizes), _per_state(C, t, n, L, sizes)
                in_row = e < tl.where(t < L, E, 0)
                if sizes.GATED:
                    ungated = tl.sum(before[i + 1] * C_t, axis=0) + skip * x_t
                    z_t = inputs[i][2].to(tl.float32)
                    gate = _sigmoid(z_t)
                    dz_t = g * ungated * gate * (1 + z_t * (1 - gate))
                    tl.store(dz + t * E + e, dz_t.to(dz.dtype.element_ty), mask=in_row)
                    g *= z_t * gate
                u = delta * x_t
                # dh_t = C_t g_t + exp(delta_{t+1} A) dh_{t+1}
                dh = later + C_t * g[None, :]
                of_token = n < tl.where(t < L, N, 0)
                tl.store(dC + t * N + n, tl.sum(before[i + 1] * g[None, :], axis=1), mask=of_token)
                tl.store(dB + t * N + n, tl.sum(dh * u[None, :], axis=1), mask=of_token)
                du = tl.sum(dh * B_t, axis=0)
                later = _decay(delta, A, reset, t, L, sizes) * dh
                d_exponent = later * before[i]
                sum_A += d_exponent * delta[None, :]
                d_raw = (tl.sum(d_exponent * A, axis=0) * _LN_2 + du * x_t) * _sigmoid(
                    inputs[i][1].to(tl.float32) + bias
                )
                tl.store(d_dt + t * E + e, d_raw.to(d_dt.dtype.element_ty), mask=in_row)
                tl.store(dx + t * E + e, (du * delta + skip * g).to(dx.dtype.element_ty), mask=in_row)
                sum_D += g * x_t
                sum_bias += d_raw
        tl.debug_barrier()
        L += CHUNK
        x, dt, z, dy = x - CHUNK * E, dt - CHUNK * E, z - CHUNK * E, dy - CHUNK * E
        dx, d_dt, dz = dx - CHUNK * E, d_dt - CHUNK * E, dz - CHUNK * E
        B, C, reset = B - CHUNK * N, C - CHUNK * N, reset - CHUNK
        dB, dC = dB - CHUNK * N, dC - CHUNK * N
    tl.store(d_initial + row * N * E + tile, later, mask=there)
    tl.store(dA + row * N * E + tile, sum_A, mask=there)
    tl.store(dD + row * E + e, sum_D, mask=e < E)
    tl.store(d_bias + row * E + e, sum_bias, mask=e < E)
