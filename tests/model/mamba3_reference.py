"""Mamba-3 as a plain loop over time in float64, from tensors in the authors' layout: the oracle of its tests.

Source: `Mamba3.step` and the step references of the tests in state-spaces/mamba at e9594ce.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from biomamba_jax.config import ModelConfig

Tensors = Mapping[str, np.ndarray]


def _norm(x: np.ndarray, weight: Any, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _rotated(v: np.ndarray, angle: np.ndarray, *, neighbours: bool) -> np.ndarray:
    """[R H N] with pair i turned by angle[h, i]: dimensions 2i, 2i + 1 (SISO) or i, i + N / 2 (MIMO)."""
    n, v = v.shape[-1], v.copy()
    for pair in range(angle.shape[-1]):
        i, j = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + n // 2)
        cos, sin = np.cos(angle[:, pair]), np.sin(angle[:, pair])
        v[..., i], v[..., j] = v[..., i] * cos - v[..., j] * sin, v[..., i] * sin + v[..., j] * cos
    return v


def mixer(config: ModelConfig, w: Tensors, inputs: np.ndarray) -> np.ndarray:
    """The mixer's output [L D] for one sequence [L D]; `w` holds the tensors below `mixer.`."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in w.items()}
    width, heads, ranks, n, groups = config.d_inner, config.n_heads, config.n_ranks, config.state_size, config.n_groups
    channels = width // heads
    ones = np.ones((heads, ranks, channels))
    sizes = [width, width, ranks * groups * n, ranks * groups * n, heads, heads, heads]
    angle, state = np.zeros((heads, config.n_angles)), np.zeros((heads, channels, n))
    last_k, last_v = np.zeros((ranks, heads, n)), np.zeros((ranks, heads, channels))
    mimo_x, mimo_z, mimo_o = (w.get(name, ones).swapaxes(0, 1) for name in ("mimo_x", "mimo_z", "mimo_o"))
    outputs = []
    for u in inputs:
        z, x, b, c, dt, a, trap, turn = np.split(w["in_proj.weight"] @ u, np.cumsum(sizes))
        dt = np.log1p(np.exp(dt + w["dt_bias"]))
        rate = np.maximum(np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0))), config.a_floor)
        trap = _sigmoid(trap)
        angle = angle + np.tanh(turn) * np.pi * dt[:, None]

        def heads_of(v: np.ndarray, name: str, angle: np.ndarray = angle) -> np.ndarray:
            v = _norm(v.reshape(ranks, groups, n), w[f"{name}_norm.weight"], config.norm_eps)
            v = np.repeat(v, heads // groups, axis=1) + w[f"{name}_bias"].swapaxes(0, 1)
            return _rotated(v, angle, neighbours=config.mimo_rank is None)

        k, q = heads_of(b, "B"), heads_of(c, "C")
        v = mimo_x * x.reshape(heads, channels)
        decay = np.exp(-rate * dt)[:, None, None]
        state = decay * (state + ((1 - trap) * dt)[:, None, None] * np.einsum("rhp,rhn->hpn", last_v, last_k))
        state = state + (trap * dt)[:, None, None] * np.einsum("rhp,rhn->hpn", v, k)
        y = np.einsum("hpn,rhn->rhp", state, q) + w["D"][:, None] * v
        z = mimo_z * z.reshape(heads, channels)
        if config.outproj_norm:
            y = _norm(y, w["norm.weight"].reshape(heads, channels), config.norm_eps)
        y = np.sum(y * z * _sigmoid(z) * mimo_o, axis=0)
        outputs.append(w["out_proj.weight"] @ y.reshape(-1))
        last_k, last_v = k, v
    return np.stack(outputs)


def language_model(config: ModelConfig, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Logits [L V] of one text in float64 from the tensors of `MambaLMHeadModel`."""
    w = {name.removeprefix("backbone."): np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    h = w["embedding.weight"][tokens]
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        block = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        own = {name.removeprefix("mixer."): v for name, v in block.items() if name.startswith("mixer.")}
        h = h + mixer(config, own, _norm(h, block["norm.weight"], config.norm_eps))
        if config.d_intermediate:
            both = _norm(h, block["norm2.weight"], config.norm_eps) @ block["mlp.fc1.weight"].T
            up, gate = np.split(both, 2, axis=-1)
            h = h + (up * gate * _sigmoid(gate)) @ block["mlp.fc2.weight"].T
    return _norm(h, w["norm_f.weight"], config.norm_eps) @ w["lm_head.weight"].T
