"""Reading and writing of models in every format.

Dialects: "native" (model.json, params/ of orbax), "run" (a run directory of `pretrain`, read-only), "hf" (Hugging Face
transformers), "mamba_ssm" (the authors' library) and, only to write, "gguf" (llama.cpp). Each is recognised by its
files.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_write_errors, read_json, write_text
from biomamba_jax.folders import DIGESTS, check_digests, locked, write_digests
from biomamba_jax.interop import adapters, foreign, gguf, heads, native, runs
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.interop.model_card import model_card
from biomamba_jax.interop.weights import Weights

_FULL = 1 << 14  # bytes: less than this is free on a full disk
Dialect = Literal["native", "run", "hf", "mamba_ssm"]


def dialect_of(path: str | os.PathLike[str]) -> Dialect:
    """Return the dialect of a folder or of a model on the hub.

    Raises:
      UserError: the folder doesn't exist or has none of the dialects.
    """
    folder = local_folder(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of a model")
    if (folder / native.MODEL_JSON).exists():
        return "native"
    if (folder / "checkpoints").is_dir():
        return "run"
    if (folder / "config.json").exists():
        raw = read_json(folder / "config.json")
        if "model_type" in raw:
            return "hf"
        if "d_model" in raw and "n_layer" in raw:
            return "mamba_ssm"
        raise UserError(
            f"{folder / 'config.json'}: has neither Hugging Face's model_type nor mamba_ssm's d_model and n_layer"
        )
    raise UserError(
        f"{folder}: holds no model: no {native.MODEL_JSON} (native), checkpoints/ (a run directory) or config.json "
        "(Hugging Face and mamba_ssm)"
    )


def read_model(path: str | os.PathLike[str]) -> Weights:
    """Read a model of any dialect, from a folder or by its name on the hub.

    Of a run directory see `runs.read`; adapters are merged into their base.
    float16 and bfloat16 are converted to float32. Memory: the float32 weights and one tensor.

    Raises:
      UserError: a file is damaged or unknown, or tensors do not fit the config; lists all of these.
    """
    folder = local_folder(path)
    dialect = dialect_of(folder)
    try:
        check_digests(folder, complete=False)  # a copy may lack files, or have more, such as a hub's
    except UserError as error:
        raise UserError(f"{error}; copy it again, or delete {DIGESTS} if the change is meant") from None
    if dialect == "native":
        return native.read(folder)
    if dialect != "run":
        return foreign.read(folder, dialect)
    weights, base, head = runs.read(folder)
    if base is not None:
        on = read_model(base.path)
        weights.params = adapters.merged(on.params, weights.params, base, on.head.reversed if on.head else None)
    if head is not None:
        weights.params, weights.head = heads.split(weights.params, head)
    return weights


def write_model(
    weights: Weights,
    folder: str | os.PathLike[str],
    dialect: Literal["native", "hf", "mamba_ssm", "gguf"],
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32",
    name: str | None = None,
) -> list[Path]:
    """Write a model as a new folder, atomically.

    native: model.json, params/ and the tokenizer. hf: files for `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline`.
    mamba_ssm: files for `MambaLMHeadModel.from_pretrained`; pytorch_model.bin only if torch is installed. gguf: one
    file of that name. Each with a model card, README.md, and all but gguf with head.safetensors if there is a head.

    Args:
      weights: the model.
      folder: folder to create.
      dialect: format to write.
      dtype: dtype of the tensors; native is always float32, and q8_0 only for gguf.
      name: the model's name in its card; default: the folder's.

    Returns:
      The paths written, in `folder`.

    Raises:
      UserError: the folder exists, or the dialect or dtype cannot represent the model.
    """
    if dialect == "native" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: native weights are float32; give --to hf or mamba_ssm for other types")
    if dtype == "q8_0" and dialect != "gguf":
        raise UserError(f"--dtype q8_0: only --to gguf has it, not {dialect}; give float16 or bfloat16")
    name = name or Path(folder).name
    # Strict JSON has no NaN: these become strings.
    weights = dataclasses.replace(weights, about=json.loads(json.dumps(weights.about), parse_constant=str))
    with _whole_folder(Path(folder)) as new:
        if dialect == "gguf":
            gguf.write(weights, new / f"{name.rpartition('/')[2]}.gguf", dtype)
        else:
            _write_folder(weights, new, dialect, dtype)
        write_digests(new)  # of all but the card, which people edit
        card = model_card(name, dialect, weights, dtype)
        write_text(new / "README.md", card)
    return sorted(Path(folder).iterdir())


def _write_folder(weights: Weights, folder: Path, dialect: str, dtype: str) -> None:
    if weights.tokenizer_file:
        load_tokenizer(weights.tokenizer_file).save_to(folder)
    if dialect == "native":
        native.write(weights, folder)
    else:
        foreign.write(weights, folder, dialect, dtype)
    if weights.head is not None:
        heads.write(weights.head, folder, weights.config)


def refuse_existing(folder: Path) -> None:
    """Raise a UserError if `folder` exists or cannot exist."""
    try:
        exists = folder.exists()
    except OSError as error:  # the name is too long, or a parent folder not accessible
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give --output another folder") from None
    if exists:
        raise UserError(f"{folder}: exists already; give --output a new folder")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, renamed to it when the block ends and removed when it raises.

    The next process that writes `folder` removes what a killed one left.
    """
    refuse_existing(folder)
    with naming_write_errors(folder, "give another --output"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(folder.name.encode()).hexdigest()[:12]  # a name may have 255 bytes already
    root = folder.parent / f".new-{digest}"
    new = root / "output"
    with locked(root, name=folder):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            os.rename(new, folder)
        except UserError:
            raise
        except Exception as error:
            # orbax, safetensors, tokenizers and torch each have errors of their own for a full disk.
            if shutil.disk_usage(root).free < _FULL or "No space left" in str(error):
                raise UserError(
                    f"{folder}: cannot be written (No space left on device); free space or give another --output"
                ) from None
            if isinstance(error, OSError):
                raise UserError(f"{folder}: cannot be written ({error})") from None
            raise
        finally:
            shutil.rmtree(root, ignore_errors=True)
