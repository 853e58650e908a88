"""Native models on disk, and the orbax checkpoints in which they and runs hold their parameters.

model.json      {"format_version": 2, "model": fields of ModelConfig, "about": see `runs.describe`,
                "token_ids": those of the Hugging Face config.json that it was converted from, if any,
                "tokenizer": `vocabulary.identity` of the tokenizer, if there is one}
params/         the parameters in float32, a nested dict, written by orbax
tokenizer.model or tokenizer.json
"""

import dataclasses
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import type_handlers

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.special_tokens import token_ids
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_json
from biomamba_jax.interop import heads, tokenizers, vocabulary
from biomamba_jax.interop.configs import EXECUTION, portable
from biomamba_jax.interop.names import Shape, native_shapes
from biomamba_jax.interop.weights import Weights
from biomamba_jax.parallel.sharding import leaves_by_path, path_name

MODEL_JSON, PARAMS = "model.json", "params"
FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # 1 does not name the tokenizer
# Orbax copies arrays before it writes them, and buffers compressed chunks until a file is full: by default three times
# the weights in memory, with this size about 400 MB in addition to them. (Buffers above 32 MB are freed at once.)
_CHUNK_BYTES = 36 << 20
_OVERHEAD = 1 << 19  # bytes for orbax's own files, the tokenizer and the card


def write(weights: Weights, folder: Path) -> None:
    """Write model.json and params/ into `folder`."""
    size = sum(array.nbytes for array in jax.tree.leaves(weights.params)) + _OVERHEAD
    if shutil.disk_usage(folder).free < size:  # in the middle of orbax's writes it would be a traceback for each array
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    config = dataclasses.asdict(portable(weights.config))
    in_place = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but orbax warns without it
    )
    arguments = ocp.args.PyTreeSave(
        weights.params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), weights.params),
        ocdbt_target_data_file_size=_CHUNK_BYTES,
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=in_place)
    with ocp.Checkpointer(handler) as checkpointer, _interrupted_later():
        checkpointer.save((folder / PARAMS).absolute(), args=arguments)
    raw = {"format_version": FORMAT_VERSION, "model": {key: config[key] for key in config if key not in EXECUTION}}
    raw |= {"about": weights.about}
    raw |= {"token_ids": weights.token_ids} if weights.token_ids else {}
    file = weights.tokenizer_file
    raw |= {"tokenizer": vocabulary.identity(load_tokenizer(file))} if file else {}
    write_json(folder / MODEL_JSON, raw)


def read(folder: Path) -> Weights:
    """Read a native model.

    Raises:
      UserError: a file is damaged, or the parameters do not fit the config.
    """
    path = folder / MODEL_JSON
    raw = read_json(path)
    if raw.get("format_version") not in _READ_VERSIONS:
        known = " and ".join(map(str, _READ_VERSIONS))
        raise UserError(f"{path}: format_version is {raw.get('format_version')!r}, this version reads {known}")
    try:
        config = portable(ModelConfig(**raw["model"]))
        shapes = native_shapes(config)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is not the config of a model ({error})") from None
    about = raw.get("about", {})
    if not isinstance(about, dict):
        raise UserError(f"{path}: about = {about!r}: must be a mapping")
    params = restore(folder / PARAMS, "", shapes)
    ids = token_ids(path, raw.get("token_ids", {}), config.known_vocab)
    file = tokenizers.find(folder)
    vocabulary.check_recorded(folder, load_tokenizer(file) if file else None, raw.get("tokenizer"))
    return Weights(config, params, file, about, heads.find(folder, config), ids)


class Damaged(UserError):
    """A checkpoint or a part of it that cannot be read."""


@contextmanager
def naming_errors(checkpoint: Path) -> Iterator[None]:
    """Convert orbax's errors into one that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of orbax and tensorstore, of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(f"{checkpoint}: cannot be read ({reason[:200]}); it is damaged, use another copy") from None


def saved_shapes(checkpoint: Path) -> dict[str, Shape]:
    """Return the shape of every array of an orbax checkpoint, by path."""
    with naming_errors(checkpoint), closing(ocp.PyTreeCheckpointHandler()) as handler:
        return {path: tuple(leaf.shape) for path, leaf in leaves_by_path(_metadata(handler, checkpoint)).items()}


def restore(checkpoint: Path, prefix: str, expected: dict[str, Shape]) -> dict[str, Any]:
    """Return the arrays below `prefix` of an orbax checkpoint, as float32 numpy arrays.

    Raises:
      UserError: the checkpoint is damaged, or paths or shapes differ from the expected ones; lists all differences.
    """
    saved = {path: shape for path, shape in saved_shapes(checkpoint).items() if path.startswith(prefix)}
    wanted = {prefix + path: shape for path, shape in expected.items()}
    keys = [key for key in sorted(saved | wanted) if saved.get(key) != wanted.get(key)]
    if keys:
        rows = "; ".join(f"{key}: {wanted.get(key, 'none')}, {saved.get(key, 'none')}" for key in keys)
        raise UserError(f"{checkpoint}: does not fit its config (key: expected, found): {rows}")
    with naming_errors(checkpoint), closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = _metadata(handler, checkpoint)
        restored = {path: _restore_one(handler, checkpoint, tree, prefix + path) for path in expected}
    return unflatten_dict(restored, sep="/")


def _restore_one(handler: ocp.PyTreeCheckpointHandler, checkpoint: Path, tree: Any, wanted: str) -> np.ndarray:
    """Return one leaf; restoring all leaves at once would double the memory."""
    item = jax.tree_util.tree_map_with_path(  # the saved tree, lists included; other leaves stay on disk
        lambda path, leaf: (
            jax.ShapeDtypeStruct(leaf.shape, np.float32) if path_name(path) == wanted else ocp.PLACEHOLDER
        ),
        tree,
    )
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32), item)
    options = ocp.args.PyTreeRestore(item=item, restore_args=arguments)
    with _interrupted_later():
        return leaves_by_path(handler.restore(epath.Path(checkpoint.absolute()), args=options))[wanted]


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let Ctrl-C count after the block: orbax's threads, which go on without the main one, end in tracebacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: requests.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if requests:
        raise KeyboardInterrupt


def _metadata(handler: ocp.PyTreeCheckpointHandler, checkpoint: Path) -> Any:
    return handler.metadata(epath.Path(checkpoint.absolute())).tree
