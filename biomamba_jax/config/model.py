"""Sizes of a model, and how it is computed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from biomamba_jax.config.checks import Limit, NonNegativeFloat, PositiveInt, Settings, check, check_type, field_types
from biomamba_jax.errors import UserError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig(Settings, section="model"):
    """A Mamba language model."""

    kind: Literal["mamba1", "mamba2"] = "mamba2"
    """Mixer of every layer: Mamba-1 (selective scan) or Mamba-2 (state-space duality)."""
    d_model: PositiveInt = 768
    """Width of the residual stream."""
    n_layers: PositiveInt = 24
    """Number of layers."""
    vocab_size: PositiveInt | None = None
    """Number of token ids in use; default: that of the shards' tokenizer."""
    pad_vocab_multiple: PositiveInt = 16
    """The embedding's rows are padded to a multiple of this; padded ids are never predicted."""
    d_state: PositiveInt | None = None
    """State size per channel; default: 16 for mamba1, 128 for mamba2, as published."""
    d_conv: Annotated[int, Limit("at least 2", lambda x: x >= 2)] = 4
    """Width of the causal convolution."""
    expand: PositiveInt = 2
    """d_inner = expand * d_model."""
    dt_rank: PositiveInt | None = None
    """mamba1: rank of the projection to dt; default: ceil(d_model / 16)."""
    headdim: PositiveInt = 64
    """mamba2: channels of one head."""
    n_groups: PositiveInt = 1
    """mamba2: groups of heads that share B and C."""
    chunk_size: PositiveInt | None = None
    """mamba2: chunk length of the SSD algorithm; default: the fastest for the platform. Results do not depend on it."""
    bias: bool = False
    """Biases on the input and output projections."""
    conv_bias: bool = True
    """Bias on the convolution."""
    tie_embeddings: bool = True
    """Use the transposed embedding as the output head."""
    norm_eps: NonNegativeFloat = 1e-5
    """Epsilon added to the mean square in every RMSNorm."""
    compute_dtype: DType | Literal["auto"] = "auto"
    """Dtype of activations and matrix products; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters: float32."""
    kernels: bool = True
    """Use the Pallas and Triton kernels on TPU and GPU; false: XLA operations only."""
    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialisation of each layer in the backward pass: nothing, all but matrix products, or everything."""
    unroll: PositiveInt = 1
    """Layers per iteration of the scan over layers; n_layers unrolls it fully: slower to compile, faster on CPU."""

    def __post_init__(self) -> None:
        for name in field_types(ModelConfig):  # also from JSON files, whose types nothing else checks
            check_type(ModelConfig, name, self.key(name), getattr(self, name))
        super().__post_init__()
        if self.kind == "mamba2":
            whole = self.d_inner % self.headdim == 0
            check(whole, "model.headdim", self.headdim, f"must divide d_inner = {self.d_inner}")
            whole = self.n_heads % self.n_groups == 0
            check(whole, "model.n_groups", self.n_groups, f"must divide {self.n_heads} heads")

    @property
    def implementation(self) -> Literal["xla"] | None:
        """Implementation of the ops; None: the fastest for the platform."""
        return None if self.kernels else "xla"

    @property
    def d_inner(self) -> int:
        """E, the inner width of the mixer."""
        return self.expand * self.d_model

    @property
    def state_size(self) -> int:
        """N, d_state or its published default."""
        return self.d_state or {"mamba1": 16, "mamba2": 128}[self.kind]

    @property
    def rank(self) -> int:
        """R, dt_rank or its published default."""
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def n_heads(self) -> int:
        """H, heads of Mamba-2."""
        return self.d_inner // self.headdim

    @property
    def conv_channels(self) -> int:
        """C, channels of the convolution: x alone in Mamba-1, x, B and C in Mamba-2."""
        return self.d_inner + (2 * self.n_groups * self.state_size if self.kind == "mamba2" else 0)

    @property
    def known_vocab(self) -> int:
        """`vocab_size`; raises UserError if it is neither given nor resolved."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set; give it, or shards, whose tokenizer determines it")
        return self.vocab_size

    @property
    def padded_vocab(self) -> int:
        """V, number of rows of the embedding."""
        return -(-self.known_vocab // self.pad_vocab_multiple) * self.pad_vocab_multiple
