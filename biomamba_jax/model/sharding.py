"""The sharding rules of a language model's parameters, in one table.

Kernels between the residual stream and a mixer's channels or an MLP's width are sharded over tensor along these and
over fsdp along the other axis; parameters with one value per channel or head are sharded like the channels. B and C of
Mamba-2 and Mamba-3 belong to all heads of a group, the angles to all heads: their small projections, norms and
convolution are replicated over tensor.
"""

from jax.sharding import PartitionSpec

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.sharding import Rules

# The first axis of parameters in "layers" is the layer.
_COMMON: Rules = (
    (r"embedding|lm_head", PartitionSpec("tensor", "fsdp")),
    (r"layers/norm2?/weight|norm_f/weight|layers/mixer/out/bias", PartitionSpec()),
    (r"layers/(mixer/in_(x|z|dt|A|trap)|mlp/(up|gate))/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/(mixer/out|mlp/down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (
        r"layers/mixer/(A_log|D|dt_bias|[BC]_bias|mimo_[xzo]|norm/weight|conv(_x)?/(weight|bias)|in_(x|z|dt)/bias)",
        PartitionSpec(None, "tensor"),
    ),
)
_MAMBA1: Rules = (
    *_COMMON,
    (r"layers/mixer/x_proj/kernel", PartitionSpec(None, ("tensor", "fsdp"))),
    (r"layers/mixer/dt_proj/kernel", PartitionSpec(None, None, ("tensor", "fsdp"))),
)
_MAMBA2: Rules = (
    *_COMMON,
    (r"layers/mixer/in_bc/kernel", PartitionSpec(None, "fsdp")),
    (r"layers/mixer/(in_bc/bias|conv_bc/(weight|bias))", PartitionSpec()),
)
_MAMBA3: Rules = (
    *_COMMON,
    (r"layers/mixer/in_(bc|angle)/kernel", PartitionSpec(None, "fsdp")),
    (r"layers/mixer/norm_[BC]/weight", PartitionSpec()),
)


def sharding_rules(config: ModelConfig, tensor: int = 1) -> Rules:
    """Return the rules for a model's parameters; see `parallel.sharding`.

    Args:
      config: the model.
      tensor: devices along tensor.

    Raises:
      UserError: `tensor` neither divides the number of groups of heads nor is a multiple of it.
    """
    if config.kind == "mamba1":
        return _MAMBA1
    if config.n_groups % tensor and tensor % config.n_groups:
        raise UserError(
            f"mesh.tensor = {tensor}: must divide model.n_groups = {config.n_groups} or be a multiple of it"
        )
    return _MAMBA2 if config.kind == "mamba2" else _MAMBA3
