"""Sizes of a model, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least, check_types
from biomamba_jax.errors import UserError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    """A Mamba language model."""

    kind: Literal["mamba1", "mamba2"] = "mamba2"
    """Mixer of every layer: Mamba-1 (selective scan) or Mamba-2 (state-space duality)."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 24
    """Number of layers."""
    vocab_size: int | None = None
    """Number of token ids in use; taken from the shards' tokenizer when left out."""
    pad_vocab_multiple: int = 16
    """The embedding's rows are padded to a multiple of this; padded ids are never predicted."""
    d_state: int | None = None
    """State size per channel; left out: 16 for mamba1, 128 for mamba2, as published."""
    d_conv: int = 4
    """Width of the causal convolution."""
    expand: int = 2
    """d_inner = expand * d_model."""
    dt_rank: int | None = None
    """mamba1: rank of the projection to dt; left out: ceil(d_model / 16)."""
    headdim: int = 64
    """mamba2: channels of one head."""
    n_groups: int = 1
    """mamba2: groups of heads that share B and C."""
    chunk_size: int | None = None
    """mamba2: length of the SSD algorithm's chunks; left out: the platform's best. Results do not depend on it."""
    bias: bool = False
    """Biases on the input and output projections."""
    conv_bias: bool = True
    """Bias on the convolution."""
    tie_embeddings: bool = True
    """The output head is the transposed embedding."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    compute_dtype: DType | Literal["auto"] = "auto"
    """Type of activations and matrix products; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters: float32."""
    kernels: bool = True
    """Use the kernels written for this TPU or GPU; false: XLA's own operations everywhere."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes of each layer: nothing, all but matrix products, or everything."""
    unroll: int = 1
    """Layers per step of the scan over layers; n_layers unrolls it fully: slower to compile, faster on CPU."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        sizes = ("d_model", "n_layers", "vocab_size", "pad_vocab_multiple", "d_state", "expand", "dt_rank", "headdim")
        check_at_least(1, "model", self, *sizes, "n_groups", "chunk_size", "unroll")
        check_at_least(2, "model", self, "d_conv")
        check_at_least(0, "model", self, "norm_eps")
        if self.kind == "mamba2":
            check(
                self.d_inner % self.headdim == 0,
                "model.headdim",
                self.headdim,
                f"must divide d_inner = {self.d_inner}",
            )
            check(
                self.n_heads % self.n_groups == 0,
                "model.n_groups",
                self.n_groups,
                f"must divide {self.n_heads} heads",
            )

    @property
    def implementation(self) -> Literal["xla"] | None:
        """Of the heavy operations; None: the best for the platform."""
        return None if self.kernels else "xla"

    @property
    def d_inner(self) -> int:
        """E, the width inside the mixer."""
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
        """`vocab_size`, which must have been given or resolved by now."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or give shards whose tokenizer tells it")
        return self.vocab_size

    @property
    def padded_vocab(self) -> int:
        """V, rows of the embedding."""
        return -(-self.known_vocab // self.pad_vocab_multiple) * self.pad_vocab_multiple
