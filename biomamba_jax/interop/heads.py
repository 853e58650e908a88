"""Head of a model, in a file of its own: readers of language models refuse unknown tensors.

head.safetensors    "weight" [K D] and "bias" [K] in float32, and for a bidirectional head the backbone that reads
                    backwards, under "reversed_" and its names in transformers; metadata: "head", fields of HeadConfig
                    as JSON
classifier.safetensors of earlier versions: "weight", and "labels" in the metadata

In PyTorch modeling_biomamba.py reads it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.heads import HeadConfig, HeadKind
from biomamba_jax.errors import UserError
from biomamba_jax.interop import names, tensors
from biomamba_jax.model.heads import REVERSED
from biomamba_jax.parallel.sharding import leaves_by_path

FILE, EARLIER = "head.safetensors", "classifier.safetensors"
CODE = {
    "mamba": ("modeling_biomamba.py",),
    "mamba2": ("modeling_biomamba.py",),
    "mamba3": ("modeling_mamba3.py", "modeling_biomamba.py"),
}
"""PyTorch modules of heads by model_type; the first one has the class."""
PROBLEM_TYPES: dict[HeadKind, str] = {
    "classifier": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""Names of transformers for what a head of texts predicts."""
_PREFIX = "reversed_"
_AUTO = {"token_classifier": "TokenClassification", "span": "QuestionAnswering"}


@dataclass(frozen=True)
class Head:
    """A head and its weights; its logits are weight @ hidden state + bias."""

    config: HeadConfig
    """Kind, labels and reading."""
    weight: np.ndarray
    """Float32 [K D]; [K 2D] if bidirectional, the columns of the left-to-right backbone first."""
    bias: np.ndarray
    """Float32 [K]."""
    reversed: dict[str, Any] | None = None
    """Layers and final norm of the backbone that reads backwards."""


def shapes(head: HeadConfig, model: ModelConfig) -> dict[str, names.Shape]:
    """Return the shapes of the parameters that a head adds to a model's, by path."""
    count, added = len(head.labels), {}
    if head.reading == "bidirectional":
        native = names.native_shapes(model)
        added = {f"reversed/{path}": shape for path, shape in native.items() if path.split("/")[0] in REVERSED}
    return {"head/weight": (count, head.width(model.d_model)), "head/bias": (count,)} | added


def split(params: dict[str, Any], config: HeadConfig) -> tuple[dict[str, Any], Head]:
    """Return a language model's parameters and the head that was trained with them."""
    rest = {name: value for name, value in params.items() if name not in ("head", "reversed")}
    return rest, Head(config, params["head"]["weight"], params["head"]["bias"], params.get("reversed"))


def write(head: Head, folder: Path, model: ModelConfig) -> None:
    """Write head.safetensors into `folder`."""
    arrays = {"weight": np.ascontiguousarray(head.weight, np.float32), "bias": head.bias.astype(np.float32)}
    if head.reversed is not None:
        flat = leaves_by_path(head.reversed)
        arrays |= {tensor.key: np.ascontiguousarray(tensor.build(flat)) for tensor in _reversed_tensors(model)}
    save_file(arrays, folder / FILE, {"format": "pt", "head": json.dumps(dataclasses.asdict(head.config))})


def _reversed_tensors(model: ModelConfig) -> Iterator[names.Tensor]:
    for tensor in names.foreign_tensors(model, "hf"):
        if tensor.parts[0].split("/")[0] in REVERSED:
            yield dataclasses.replace(tensor, key=_PREFIX + tensor.key)


def write_for_transformers(head: Head, folder: Path, config: dict[str, Any]) -> None:
    """Let transformers' AutoModelFor... find the head: its code into `folder`, its keys into `config`."""
    module, task = write_code(folder, config["model_type"]), auto_class(head.config.kind)
    name = f"{module}.{config['model_type'].capitalize()}For{task}"
    config["auto_map"] = config.get("auto_map", {}) | {f"AutoModelFor{task}": name}
    config |= transformers_settings(head.config) | {"reading": head.config.reading}


def auto_class(kind: HeadKind) -> str:
    """Return what follows AutoModelFor in the name of transformers' class of a head."""
    return _AUTO.get(kind, "SequenceClassification")


def transformers_settings(head: HeadConfig) -> dict[str, Any]:
    """Return the keys of transformers' config.json that describe a head."""
    return {
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: index for index, label in enumerate(head.labels)},
        "problem_type": PROBLEM_TYPES.get(head.kind),
    }


def write_code(folder: Path, model_type: str) -> str:
    """Write the PyTorch modules of a model type into `folder`; return the name of the one with its classes."""
    for name in CODE[model_type]:
        shutil.copyfile(Path(__file__).parents[1] / "templates" / name, folder / name)
    return CODE[model_type][0].removesuffix(".py")


def find(folder: Path, model: ModelConfig) -> Head | None:
    """Return the head in `folder`, None if there is none.

    Args:
      folder: folder of the model.
      model: the model.

    Raises:
      UserError: the file is damaged or belongs to another model.
    """
    path = next((folder / name for name in (FILE, EARLIER) if (folder / name).exists()), None)
    if path is None:
        return None
    source = tensors.open_safetensors([path])
    try:
        stated = source.metadata
        raw = json.loads(stated["head"]) if "head" in stated else {"labels": json.loads(stated["labels"])}
        config = HeadConfig(**raw | {"labels": tuple(raw["labels"])})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a head ({error}); export it again, or remove the file") from None
    found = {key: source.read(key) for key in source.shapes}
    if path.name == EARLIER:  # which has no bias
        found["bias"] = np.zeros(len(config.labels), np.float32)
    backwards = list(_reversed_tensors(model)) if config.reading == "bidirectional" else []
    expected = shapes(config, model)
    wanted = {"weight": expected.pop("head/weight"), "bias": expected.pop("head/bias")}
    wanted |= {tensor.key: tensor.shape for tensor in backwards}
    for key, shape in wanted.items():
        value = found.get(key)
        if value is None or value.shape != shape:
            has = "lacks" if value is None else f"has shape {list(value.shape)} for"
            raise UserError(f"{path}: {has} {key}, its labels and this model need {list(shape)}; export it again")
    reversed_params = {path.removeprefix("reversed/"): np.zeros(shape, np.float32) for path, shape in expected.items()}
    for tensor in backwards:
        tensor.read_into(reversed_params, found[tensor.key])
    return Head(config, found["weight"], found["bias"], unflatten_dict(reversed_params, sep="/") if backwards else None)
