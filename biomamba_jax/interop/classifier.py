"""Classification head of a language model: one linear layer on the hidden state after a text's last token.

classifier.safetensors: "weight" [classes D] in float32; its metadata has the class names as JSON under "labels". A file
of its own: readers of language models refuse unknown tensors. In PyTorch modeling_biomamba.py reads it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from biomamba_jax.errors import UserError

FILE = "classifier.safetensors"
CODE = {
    "mamba": ("modeling_biomamba.py",),
    "mamba2": ("modeling_biomamba.py",),
    "mamba3": ("modeling_mamba3.py", "modeling_biomamba.py"),
}
"""PyTorch modules of the classifier by model_type; the first one has the class."""


@dataclass(frozen=True)
class Classifier:
    """A linear classifier; its logits are weight @ hidden state."""

    weight: np.ndarray
    """Float32 [classes D]."""
    labels: tuple[str, ...]
    """Names of the classes, in the order of the rows of `weight`."""


def write(classifier: Classifier, folder: Path) -> None:
    """Write classifier.safetensors into `folder`."""
    metadata = {"format": "pt", "labels": json.dumps(classifier.labels)}
    save_file({"weight": np.ascontiguousarray(classifier.weight, np.float32)}, folder / FILE, metadata)


def write_for_transformers(classifier: Classifier, folder: Path, config: dict[str, Any]) -> None:
    """Let `AutoModelForSequenceClassification` find the classifier: its code into `folder`, its keys into `config`."""
    module = write_code(folder, config["model_type"])
    name = f"{module}.{config['model_type'].capitalize()}ForSequenceClassification"
    config["auto_map"] = config.get("auto_map", {}) | {"AutoModelForSequenceClassification": name}
    config["id2label"] = {str(i): label for i, label in enumerate(classifier.labels)}
    config["label2id"] = {label: i for i, label in enumerate(classifier.labels)}


def write_code(folder: Path, model_type: str) -> str:
    """Write the PyTorch modules of a model type into `folder`; return the name of the one with its classes."""
    for name in CODE[model_type]:
        shutil.copyfile(Path(__file__).parents[1] / "templates" / name, folder / name)
    return CODE[model_type][0].removesuffix(".py")


def find(folder: Path, width: int) -> Classifier | None:
    """Return the classifier in `folder`, None if there is none.

    Args:
      folder: folder of the model.
      width: d_model of the model.

    Raises:
      UserError: the file is damaged or belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            weight = np.asarray(file.get_tensor("weight"), np.float32)
            labels = tuple(json.loads(file.metadata()["labels"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not a classifier ({error}); export it again, or remove the file") from None
    if weight.shape != (len(labels), width):
        raise UserError(
            f"{path}: has shape {list(weight.shape)}, its labels and this model need {[len(labels), width]}"
        )
    return Classifier(weight, labels)
