"""Mamba-3 in float64 from tensors in the authors' layout, token after token and in chunks: the oracles of its tests.

Sources: `Mamba3` of state-spaces/mamba at e9594ce, and the step and chunk references of its tests for SISO and MIMO.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax.config import ModelConfig

Tensors = Mapping[str, np.ndarray]


class State(NamedTuple):
    """State of one mixer and one sequence, in the authors' order of the dimensions of N."""

    angle: np.ndarray  # [H S]
    ssm: np.ndarray  # [H P N]
    last_k: np.ndarray  # [R H N]
    last_v: np.ndarray  # [R H P]


class Tokens(NamedTuple):
    """Inputs of the recurrence for one sequence."""

    log_decay: np.ndarray  # [L H]
    dt: np.ndarray  # [L H]
    trap: np.ndarray  # [L H]
    q: np.ndarray  # [L R H N], rotated
    k: np.ndarray  # [L R H N], rotated
    v: np.ndarray  # [L R H P]


def token_by_token(tokens: Tokens, state: State) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [L R H P] without the skip, and the last state [H P N], by the recurrence."""
    ssm, last = state.ssm, np.einsum("rhp,rhn->hpn", state.last_v, state.last_k)
    outputs = []
    for log_decay, dt, trap, q, k, v in zip(*tokens, strict=True):
        alpha, beta, gamma = (x[:, None, None] for x in (np.exp(log_decay), (1 - trap) * dt, trap * dt))
        new = np.einsum("rhp,rhn->hpn", v, k)
        ssm = alpha * (ssm + beta * last) + gamma * new
        outputs.append(np.einsum("hpn,rhn->rhp", ssm, q))
        last = new
    return np.stack(outputs), ssm


def in_chunks(tokens: Tokens, state: State, chunk: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The same by products: each token enters once, with its weight in the next step, which its own output lacks."""
    ranks = tokens.v.shape[1]
    from_last = (1 - tokens.trap) * tokens.dt
    ahead = np.concatenate([from_last[1:], np.zeros_like(from_last[:1])])
    ssm = state.ssm + from_last[0][:, None, None] * np.einsum("rhp,rhn->hpn", state.last_v, state.last_k)
    outputs = []
    for start in range(0, len(ahead), chunk):
        log_decay, dt, trap, *vectors = (x[start : start + chunk] for x in tokens)
        here, after = trap * dt, ahead[start : start + chunk]
        length = len(dt)
        q, k, v = (x.reshape(length * ranks, *x.shape[2:]).swapaxes(0, 1) for x in vectors)  # [H LR N], [H LR P]
        total = np.cumsum(log_decay, axis=0).T
        between = np.tril(np.ones((length, length))) * np.exp(np.minimum(total[:, :, None] - total[:, None], 0))
        weight = between * (here + after).T[:, None] - np.eye(length) * after.T[:, None]
        scores = (q @ k.swapaxes(1, 2)) * np.repeat(np.repeat(weight, ranks, axis=1), ranks, axis=2)
        from_start, to_end = np.exp(total), np.exp(total[:, -1:] - total) * (here + after).T
        y = scores @ v + np.repeat(from_start, ranks, axis=1)[..., None] * (q @ ssm.swapaxes(1, 2))
        outputs.append(y.swapaxes(0, 1).reshape(length, ranks, *v.shape[::2]))
        added = (np.repeat(to_end, ranks, axis=1)[..., None] * v).swapaxes(1, 2) @ k
        ssm = from_start[:, -1, None, None] * ssm + added
    return np.concatenate(outputs), ssm


def _norm(x: np.ndarray, weight: Any, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _rotated(v: np.ndarray, angle: np.ndarray, *, neighbours: bool) -> np.ndarray:
    """[L R H N] with pair i turned by angle[l, h, i]: dimensions 2i, 2i + 1 (SISO) or i, i + N / 2 (MIMO)."""
    n, v = v.shape[-1], v.copy()
    for pair in range(angle.shape[-1]):
        i, j = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + n // 2)
        cos, sin = np.cos(angle[:, None, :, pair]), np.sin(angle[:, None, :, pair])
        v[..., i], v[..., j] = v[..., i] * cos - v[..., j] * sin, v[..., i] * sin + v[..., j] * cos
    return v


def empty_state(config: ModelConfig) -> State:
    """The state before the first token."""
    heads, channels, n, ranks = config.n_heads, config.headdim, config.state_size, config.n_ranks
    sizes = (heads, config.n_angles), (heads, channels, n), (ranks, heads, n), (ranks, heads, channels)
    return State(*map(np.zeros, sizes))


def mixer(
    config: ModelConfig, w: Tensors, inputs: np.ndarray, state: State, recurrence: Callable = token_by_token
) -> tuple[np.ndarray, State]:
    """The mixer's output [L D] for one sequence [L D], and the state; `w` holds the tensors below `mixer.`."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in w.items()}
    width, heads, ranks, n, groups = config.d_inner, config.n_heads, config.n_ranks, config.state_size, config.n_groups
    sizes = [width, width, ranks * groups * n, ranks * groups * n, heads, heads, heads]
    z, x, b, c, dt, a, trap, turn = np.split(inputs @ w["in_proj.weight"].T, np.cumsum(sizes), axis=1)
    dt = np.log1p(np.exp(dt + w["dt_bias"]))
    rate = np.maximum(np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0))), config.a_floor)
    angle = state.angle + np.cumsum(np.tanh(turn)[:, None] * np.pi * dt[:, :, None], axis=0)

    def of_heads(v: np.ndarray, name: str) -> np.ndarray:
        v = _norm(v.reshape(-1, ranks, groups, n), w[f"{name}_norm.weight"], config.norm_eps)
        v = np.repeat(v, heads // groups, axis=2) + w[f"{name}_bias"].swapaxes(0, 1)
        return _rotated(v, angle, neighbours=config.mimo_rank is None)

    ones = np.ones((heads, ranks, width // heads))
    mimo_x, mimo_z, mimo_o = (w.get(name, ones).swapaxes(0, 1) for name in ("mimo_x", "mimo_z", "mimo_o"))
    x, z = (v.reshape(-1, 1, *ones.shape[::2]) for v in (x, z))
    tokens = Tokens(-rate * dt, dt, _sigmoid(trap), of_heads(c, "C"), of_heads(b, "B"), mimo_x * x)
    y, ssm = recurrence(tokens, state)
    y = y + w["D"][:, None] * tokens.v
    if config.outproj_norm:
        y = _norm(y, w["norm.weight"].reshape(heads, -1), config.norm_eps)
    z = mimo_z * z
    y = np.sum(y * z * _sigmoid(z) * mimo_o, axis=1).reshape(-1, width)
    return y @ w["out_proj.weight"].T, State(angle[-1], ssm, tokens.k[-1], tokens.v[-1])


def language_model(config: ModelConfig, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Logits [L V] of one text in float64 from the tensors of `MambaLMHeadModel`."""
    w = {name.removeprefix("backbone."): np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    h = w["embedding.weight"][tokens]
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        block = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        own = {name.removeprefix("mixer."): v for name, v in block.items() if name.startswith("mixer.")}
        h = h + mixer(config, own, _norm(h, block["norm.weight"], config.norm_eps), empty_state(config))[0]
        if config.d_intermediate:
            both = _norm(h, block["norm2.weight"], config.norm_eps) @ block["mlp.fc1.weight"].T
            up, gate = np.split(both, 2, axis=-1)
            h = h + (up * gate * _sigmoid(gate)) @ block["mlp.fc2.weight"].T
    return _norm(h, w["norm_f.weight"], config.norm_eps) @ w["lm_head.weight"].T
