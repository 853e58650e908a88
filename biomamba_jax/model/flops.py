"""How much arithmetic a model needs: the numerator of every share of peak."""

from biomamba_jax.config import ModelConfig


def training_flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token, forward and backward, counting a multiply-add as two.

    Independent of how it is computed: matrix products of the parameters, the convolution, and the recurrence in its
    step-by-step form (decay, input, sum and output: 6 operations per channel and state). Recomputation does not count,
    nor do norms and activations. Backward costs twice the forward pass.
    """
    d, e, n = config.d_model, config.d_inner, config.state_size
    if config.kind == "mamba1":
        projections = 2 * d * e + e * (config.rank + 2 * n) + config.rank * e + e * d
    else:
        projections = d * (2 * e + 2 * config.n_groups * n + config.n_heads) + e * d
    layer = 2 * projections + 2 * config.d_conv * config.conv_channels + 6 * e * n
    return 3.0 * (config.n_layers * layer + 2 * d * config.padded_vocab)
