"""Sizes of a model, and how it is computed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from biomamba_jax.config.checks import (
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Settings,
    check,
    check_type,
    field_types,
)
from biomamba_jax.errors import UserError

DType = Literal["float32", "bfloat16"]
InferenceDType = Literal["float32", "bfloat16", "int8"]
"""Type of matrices and activations; int8: of the matrices, and activations of the default type."""
Kind = Literal["mamba1", "mamba2", "mamba3"]


@dataclass(frozen=True)
class InferenceConfig(Settings):
    """The model that a command runs, and its compute dtype."""

    model: str
    """Folder of the model, also gs://bucket/folder, or its name on the Hugging Face hub, owner/name or
    owner/name@revision."""
    dtype: InferenceDType | None = None
    """Compute dtype, or int8 matrices; default: bfloat16 on TPU and GPU, float32 on CPU."""


@dataclass(frozen=True)
class ModelConfig(Settings, section="model"):
    """A Mamba language model."""

    kind: Kind = "mamba2"
    """Mixer of every layer: Mamba-1 (selective scan), Mamba-2 (state-space duality) or Mamba-3 (trapezoidal rule and
    rotations)."""
    d_model: PositiveInt = 768
    """Width of the residual stream."""
    n_layers: PositiveInt = 24
    """Number of layers."""
    vocab_size: PositiveInt | None = None
    """Number of token ids in use; default: that of the shards' tokenizer."""
    pad_vocab_multiple: PositiveInt = 16
    """The embedding's rows are padded to a multiple of this; padded ids are never predicted."""
    d_state: PositiveInt | None = None
    """State size per channel; default: 16 for mamba1, 128 for mamba2 and mamba3, as published."""
    d_conv: Annotated[int, Limit("at least 2", lambda x: x >= 2)] = 4
    """mamba1, mamba2: width of the causal convolution."""
    expand: PositiveInt = 2
    """d_inner = expand * d_model."""
    dt_rank: PositiveInt | None = None
    """mamba1: rank of the projection to dt; default: ceil(d_model / 16)."""
    headdim: PositiveInt = 64
    """mamba2, mamba3: channels of one head."""
    n_groups: PositiveInt = 1
    """mamba2, mamba3: groups of heads that share B and C."""
    chunk_size: PositiveInt | None = None
    """mamba2, mamba3: chunk length of the SSD algorithm; default: the platform's fastest. It changes no result."""
    mimo_rank: PositiveInt | None = None
    """mamba3: inputs and outputs of each state (MIMO); default: one of each, without their projections (SISO)."""
    rope_fraction: Annotated[float, Limit("0.5 or 1.0", lambda x: x in (0.5, 1.0))] = 0.5
    """mamba3: share of each state's dimensions that rotates."""
    outproj_norm: bool = False
    """mamba3: normalise each head before the gate."""
    a_floor: NonNegativeFloat = 1e-4
    """mamba3: lower bound of the decay rates."""
    d_intermediate: NonNegativeInt = 0
    """Width of a gated MLP after each mixer, rounded up to a multiple of 128; 0: none."""
    bias: bool = False
    """mamba1, mamba2: biases on the input and output projections."""
    conv_bias: bool = True
    """mamba1, mamba2: bias on the convolution."""
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
        if self.kind != "mamba1":
            whole = self.d_inner % self.headdim == 0
            check(whole, "model.headdim", self.headdim, f"must divide d_inner = {self.d_inner}")
            whole = self.n_heads % self.n_groups == 0
            check(whole, "model.n_groups", self.n_groups, f"must divide {self.n_heads} heads")
        if self.kind == "mamba3":
            whole = self.state_size % 2 == 0 and self.n_angles > 0
            check(whole, "model.d_state", self.state_size, "must be even, for pairs that rotate, and at least 4")
            check(not self.bias, "model.bias", self.bias, "mamba3 has no such biases; leave it out")

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
        return self.d_state or (16 if self.kind == "mamba1" else 128)

    @property
    def dt_size(self) -> int:
        """Width of Mamba-1's projection to dt, dt_rank or its published default."""
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def n_heads(self) -> int:
        """H, heads of Mamba-2 and Mamba-3."""
        return self.d_inner // self.headdim

    @property
    def conv_channels(self) -> int:
        """C, channels of the convolution: x alone in Mamba-1, x, B and C in Mamba-2, none in Mamba-3."""
        both = self.d_inner + 2 * self.n_groups * self.state_size
        return {"mamba1": self.d_inner, "mamba2": both, "mamba3": 0}[self.kind]

    @property
    def n_ranks(self) -> int:
        """R, inputs and outputs of a state of Mamba-3: `mimo_rank`, or 1."""
        return self.mimo_rank or 1

    @property
    def n_angles(self) -> int:
        """S, pairs of a state's dimensions that rotate in Mamba-3."""
        return int(self.state_size * self.rope_fraction) // 2

    @property
    def mlp_width(self) -> int:
        """Width of the gated MLP, `d_intermediate` rounded up as in the released models; 0: none."""
        return -(-self.d_intermediate // 128) * 128

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
