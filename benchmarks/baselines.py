"""Baselines: training, decoding and embedding with transformers' models. Imports torch only when one of them runs."""

import importlib
import importlib.util
from typing import Any

import numpy as np

from biomamba_jax.config import ModelConfig, OptimizerConfig
from biomamba_jax.errors import UserError


def check_installed(model: ModelConfig) -> None:
    """Raise UserError if transformers has no such model, or a package that the baselines need is missing."""
    if model.kind == "mamba3" or model.d_intermediate:
        raise UserError(f"compare: transformers has no {model.kind} with model.d_intermediate = {model.d_intermediate}")
    needed = ["torch", "transformers", *(["mambapy"] if model.kind == "mamba1" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"compare needs {', '.join(missing)}: pip install {' '.join(missing)}")


def transformers_model(model: ModelConfig) -> Any:
    """Return the transformers model of the same sizes, with random weights and its fastest settings on CPU.

    These are mambapy's parallel scan for Mamba-1, since its own loop over time is many times slower, and chunks of 256
    for Mamba-2, which train faster than 64.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()  # it warns that CUDA kernels are missing
    common = {
        "vocab_size": model.padded_vocab,
        "hidden_size": model.d_model,
        "state_size": model.state_size,
        "num_hidden_layers": model.n_layers,
        "expand": model.expand,
        "conv_kernel": model.d_conv,
        "use_bias": model.bias,
        "use_conv_bias": model.conv_bias,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if model.kind == "mamba1":
        config = transformers.MambaConfig(**common, time_step_rank=model.dt_size, use_mambapy=True)
        return transformers.MambaForCausalLM(config)
    config = transformers.Mamba2Config(
        **common, num_heads=model.n_heads, head_dim=model.headdim, n_groups=model.n_groups, chunk_size=256
    )
    return transformers.Mamba2ForCausalLM(config)


class TransformersStep:
    """A float32 training step of transformers' model: loss, gradients, clipping and AdamW in one call."""

    def __init__(
        self,
        model: ModelConfig,
        batch_size: int,
        sequence_length: int,
        optimizer: OptimizerConfig,
        compiled: bool = False,
    ) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._torch.manual_seed(0)
        self._model = transformers_model(model).float().train()
        self._run = self._torch.compile(self._model) if compiled else self._model
        self._parameters = list(self._model.parameters())
        self._clip = optimizer.clip
        self._optimizer = self._torch.optim.AdamW(
            self._parameters,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,  # several times faster on CPU than the default
        )
        self._ids = self._torch.randint(1, model.known_vocab, (batch_size, sequence_length))

    def __call__(self) -> None:
        """Train one step."""
        self._run(input_ids=self._ids, labels=self._ids, use_cache=False).loss.backward()
        if self._clip:
            self._torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class TransformersDecoding:
    """Greedy `generate` of transformers' model in float32."""

    def __init__(self, model: ModelConfig, prompts: np.ndarray, new_tokens: int) -> None:
        torch: Any = importlib.import_module("torch")
        torch.manual_seed(0)
        self._model = transformers_model(model).float().eval()
        self._model.config.use_cache = True
        self._ids = torch.from_numpy(prompts)
        self._settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def __call__(self) -> None:
        """Generate once."""
        self._model.generate(self._ids, **self._settings, use_cache=True)


class TransformersEmbedding:
    """The mean of the last hidden states of transformers' model in float32, of texts of similar length together."""

    def __init__(self, model: ModelConfig, texts: list[list[int]], batch_size: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._torch.manual_seed(0)
        self._model = transformers_model(model).float().eval().backbone
        ordered = sorted(texts, key=len)
        self._batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def __call__(self) -> None:
        """Embed every text once."""
        for rows in self._batches:
            longest = max(map(len, rows))
            ids = self._torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
            mask = self._torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            with self._torch.inference_mode():
                hidden = self._model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
