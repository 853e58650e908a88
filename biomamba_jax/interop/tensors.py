"""Tensor files: safetensors (one file or sharded) and pytorch_model.bin, read and written one tensor at a time.

Only one tensor is in memory in addition to what the caller holds: each read reopens its file, which releases the pages
of the memory map, and safetensors are written by hand, since the library's writer needs all tensors at once.
"""

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 known to numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.interop.names import Shape

SAFETENSORS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
METADATA = "biomamba_jax"
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorSource:
    """Named tensors of one folder."""

    shapes: dict[str, Shape]
    """Shape of every tensor, by name."""
    metadata: dict[str, str]
    """Metadata of the files' headers."""
    read: Callable[[str], np.ndarray]
    """Returns one tensor as float32."""


def open_safetensors(files: list[Path]) -> TensorSource:
    """Open safetensors files, which together hold each tensor once.

    Raises:
      UserError: a file is damaged, a tensor is in two of them, or one is not of floating-point numbers.
    """
    home: dict[str, Path] = {}
    source = TensorSource({}, {}, lambda key: _read_tensor(home[key], key))
    for path in files:
        with _opened(path) as file:
            source.metadata.update(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(key)
                if key in home:
                    raise UserError(f"{path}: holds {key}, which is also in {home[key].name}; remove one of the files")
                if tensor.get_dtype() not in _FLOATS:
                    raise UserError(f"{path}: {key} has dtype {tensor.get_dtype()}, which is not floating-point")
                source.shapes[key], home[key] = tuple(tensor.get_shape()), path
    return source


def _read_tensor(path: Path, key: str) -> np.ndarray:
    with _opened(path) as file:
        return file.get_tensor(key).astype(np.float32, copy=False)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it; download it too") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); download it again") from None


def _torch_bin(path: Path) -> TensorSource:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise UserError(
            f"{path}: reading this format needs torch: pip install torch==2.13.0, or give {SAFETENSORS} instead"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...: depends on the file's bytes
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(
            f"{path}: refused by torch's weights-only loader ({reason}); a file of plain tensors is needed"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and torch.is_tensor(t) and t.is_floating_point() for key, t in tensors.items()
    ):
        raise UserError(f"{path}: is not a flat mapping from names to floating-point tensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return TensorSource(shapes, {}, lambda key: tensors[key].float().numpy())  # numpy has no bfloat16


def open_tensors(folder: Path) -> TensorSource:
    """Open the weights in `folder`: model.safetensors, its shards with an index, or pytorch_model.bin.

    Raises:
      UserError: there are none, or a file is damaged or would run code.
    """
    if (folder / SAFETENSORS).exists():
        return open_safetensors([folder / SAFETENSORS])
    if (index := folder / INDEX).exists():
        weight_map = read_json(index).get("weight_map")
        names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name not in ("", "..") for name in names):
            raise UserError(f"{index}: weight_map must map tensors to files of this folder; download it again")
        return open_safetensors([folder / name for name in sorted(set(names))])
    if (folder / BIN).exists():
        return _torch_bin(folder / BIN)
    raise UserError(f"{folder}: holds no weights: {SAFETENSORS}, {INDEX} with its files, or {BIN}")


def write_safetensors(
    path: Path,
    shapes: dict[str, Shape],
    tensors: Iterable[np.ndarray],
    dtype: str,
    metadata: dict[str, str],
) -> None:
    """Write tensors, in the order of `shapes`, as `dtype` ("float32", "float16" or "bfloat16").

    The format: the length of the header as 8 little-endian bytes; the JSON header, padded with spaces to 8 bytes; data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, (key, tensor.shape, shape)
            with np.errstate(over="ignore"):  # overflow is reported below
                array = np.ascontiguousarray(tensor, dtype=np.dtype(dtype))
            if dtype == "float16" and not np.isfinite(array).all() and np.isfinite(tensor).all():
                raise UserError(f"{key} holds values beyond float16's range; give --dtype bfloat16 or float32")
            file.write(array.reshape(-1).view(np.uint8).data)


def write_bin(folder: Path) -> None:
    """Write pytorch_model.bin from the model.safetensors in `folder`, if torch is installed."""
    try:
        torch = importlib.import_module("torch")
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError:
        return
    torch.save(load_file(folder / SAFETENSORS), folder / BIN)  # memory-mapped
