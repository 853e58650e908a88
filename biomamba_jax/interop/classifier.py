"""A classifier beside a language model: one linear layer on the state after a text's last token.

classifier.safetensors: "weight" [classes D] as float32, and under "labels" of its metadata the names of the classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from biomamba_jax.errors import UserError

FILE = "classifier.safetensors"


@dataclass(frozen=True)
class Classifier:
    """Scores of the classes are weight @ hidden state."""

    weight: np.ndarray
    """Float32 [classes D]."""
    labels: tuple[str, ...]
    """Names of the classes, in the order of the rows."""


def write(classifier: Classifier, folder: Path) -> None:
    """Writes classifier.safetensors into `folder`."""
    metadata = {"format": "pt", "labels": json.dumps(classifier.labels)}
    save_file({"weight": np.ascontiguousarray(classifier.weight, np.float32)}, folder / FILE, metadata)


def find(folder: Path, width: int) -> Classifier | None:
    """The classifier in `folder`, if there is one.

    Args:
      width: D of the model beside it.

    Raises:
      UserError: a damaged file, or one that belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            weight = np.asarray(file.get_tensor("weight"), np.float32)
            labels = tuple(json.loads(file.metadata()["labels"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no classifier ({error}); export it again, or remove the file") from None
    if weight.shape != (len(labels), width):
        raise UserError(f"{path}: is {list(weight.shape)}, its labels and this model need {[len(labels), width]}")
    return Classifier(weight, labels)
