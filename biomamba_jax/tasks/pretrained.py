"""Other projects' models, run by transformers on PyTorch, and the embeddings of encoders.

PyTorch and transformers (the [hf] extra) are imported when such a model is loaded.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.files import read_json
from biomamba_jax.tasks.architectures import architecture_of, check_dtype
from biomamba_jax.tasks.embedding import finite
from biomamba_jax.tasks.padding import by_length

_MOST_LAYERS = 2000
_DIGITS = re.compile(r"\d+")
UNUSED = "pooler"
"""Weights that an encoder's hidden states do not depend on, and that its folder may lack."""


def load_pretrained(
    key: str,
    folder: Path,
    kind: Callable[[], str],
    dtype: str | None,
    *,
    holds: str = "trained weights",
    needs: Callable[[Any, str], bool] = lambda model, weight: True,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Load a Hugging Face folder with its tokenizer.

    Args:
      key: the setting that names the model, for messages.
      folder: the model's folder.
      kind: returns the class of transformers that loads it; called once transformers is imported.
      dtype: compute dtype; None: bfloat16 on a GPU, float32 on CPU.
      holds: what the folder must hold, for messages.
      needs: returns True if the folder must hold a weight of the model; transformers draws the others at random.
      **settings: of its `from_pretrained`, such as other values of the folder's config.

    Returns:
      The module torch, the model and its tokenizer.

    Raises:
      UserError: the extra is not installed, transformers cannot load the folder, it has more layers than its config, or
        it lacks a weight or has one of another shape.
    """
    check_dtype(key, folder, dtype)
    for name, value in read_json(folder / "config.json").items():
        if "layer" in name and type(value) is int and value > _MOST_LAYERS:  # transformers would build all of them
            raise UserError(f"{key}: {folder / 'config.json'}: {name} = {value!r:.100}: no model has so many layers")
    purpose = f"{key}: {folder} is run by transformers, and {{}} is not installed".format
    torch, transformers = (extra("hf", package, purpose(package)) for package in ("torch", "transformers"))
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_weights = getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    # Uses this folder, whatever repository its config names, and runs no code of it, nor asks whether to.
    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here, split_special_tokens=True)
        model, found = getattr(transformers, kind()).from_pretrained(
            folder, **here, dtype=of_weights, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # of transformers, its checks of types, safetensors and unpickling
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: transformers cannot load {folder} ({reason})") from None
    patterns = {_DIGITS.sub("*", name) for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    for name in sorted(found["unexpected_keys"]):  # such as a pooler's, but not those of a further layer
        if {_DIGITS.sub("*", each) for each in (name, prefix + name, name.removeprefix(prefix))} & patterns:
            raise UserError(f"{key}: {folder} holds {name}, for which its config.json has no place; correct the sizes")
    reshaped = {f"{name} of shape {list(wanted)}" for name, _, wanted in found["mismatched_keys"]}
    if missing := sorted(name for name in {*found["missing_keys"], *reshaped} if needs(model, name)):
        rest = f" and {len(missing) - 1} more weights" if missing[1:] else ""
        raise UserError(
            f"{key}: {folder} ({architecture_of(folder) or 'of no stated architecture'}) lacks {missing[0]}{rest} of a "
            f"{type(model).__name__}, which would be drawn at random; give a folder with {holds}"
        )
    return torch, model.to(device).eval(), tokenizer


def padded_inputs(torch: Any, rows: Sequence[Sequence[int]], padding_id: int) -> dict[str, Any]:
    """Return a model's inputs "input_ids" and "attention_mask" [B L] for rows of ids, padded on the right."""
    pad, ids = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True), [torch.tensor(row).long() for row in rows]
    read = [torch.ones_like(row) for row in ids]
    return {"input_ids": pad(ids, padding_value=padding_id), "attention_mask": pad(read)}


def reserved_positions(model: Any) -> int:
    """Return the rows of the position embedding that no text uses: RoBERTa's positions start after the padding's."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = (getattr(table, "padding_idx", None) for table in tables)
    return max((index + 1 for index in padding if index is not None), default=0)


class Encoder:
    """Turns texts into the mean of an encoder's last hidden states, special tokens included.

    Args:
      name: the model's name in the config.
      folder: the model's folder.
      config: rows of a batch and dtype; pooling must be mean.

    Raises:
      UserError: transformers cannot load the folder, it lacks a weight, or another pooling is asked for.
    """

    def __init__(self, name: str, folder: Path, config: EmbeddingConfig):
        if config.pooling != "mean":
            raise UserError(f"models.{name}: an encoder's embedding is the mean; leave out pooling {config.pooling}")
        self._key = f"models.{name}"
        self._torch, self._model, self._tokenizer = load_pretrained(
            self._key, folder, lambda: "AutoModel", config.dtype, needs=lambda model, weight: UNUSED not in weight
        )
        self._batch_size = config.batch_size
        positions = self._model.config.max_position_embeddings - reserved_positions(self._model)
        self.limit = int(min(self._tokenizer.model_max_length, positions))
        """Tokens beyond which a text is cut."""
        self.cut = 0
        """Number of texts that were longer."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embedding of each text, float32 [texts D]."""
        return finite(np.array(by_length(texts, self._batch_size, self._of_batch)), self._key)

    def _of_batch(self, texts: Sequence[str]) -> np.ndarray:
        self.cut += sum(len(row) > self.limit for row in self._tokenizer(texts, verbose=False)["input_ids"])
        options = {"padding": True, "truncation": True, "max_length": self.limit, "return_tensors": "pt"}
        inputs = self._tokenizer(texts, **options).to(self._model.device)
        with self._torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].float()
        return ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()
