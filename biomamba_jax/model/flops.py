"""FLOPs of a model: the numerator of model FLOPs utilisation."""

from biomamba_jax.config import ModelConfig


def matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in matrices, nearly all of a model's, with tied embeddings."""
    d, e, n, h = config.d_model, config.d_inner, config.state_size, config.n_heads
    if config.kind == "mamba1":
        projections = 2 * d * e + e * (config.dt_size + 2 * n) + config.dt_size * e + e * d
    elif config.kind == "mamba2":
        projections = d * (2 * e + 2 * config.n_groups * n + h) + e * d
    else:
        projections = d * (2 * e + 2 * config.n_ranks * config.n_groups * n + 3 * h + config.n_angles) + e * d
    return config.n_layers * (projections + 3 * d * config.mlp_width) + d * config.padded_vocab


def training_flops_per_token(config: ModelConfig) -> float:
    """Return the FLOPs of training on one token, forward and backward, with a multiply-add counted as two.

    Model FLOPs, whatever the implementation: matrix products of the parameters, the convolution, and the recurrence in
    its step-by-step form (decay, input, sum and output: 6 per channel and state, 4 more for each further rank).
    Recomputation, norms, rotations and activations do not count. The backward pass costs twice the forward pass.
    """
    recurrence = (2 + 4 * config.n_ranks) * config.d_inner * config.state_size
    elementwise = 2 * config.d_conv * config.conv_channels + recurrence
    return 3.0 * (2 * matrix_parameters(config) + config.n_layers * elementwise)
