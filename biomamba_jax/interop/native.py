"""Native models on disk: model.json and params/ of orbax, and the run directories of `pretrain`.

model.json      {"format_version": 1, "model": fields of ModelConfig, "about": see `describe_run`,
                "token_ids": those of the Hugging Face config.json that it was converted from, if any}
params/         the parameters in float32, a nested dict, written by orbax
tokenizer.model or tokenizer.json
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml
from etils import epath
from orbax.checkpoint import type_handlers

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.shards import MANIFEST_NAME, Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_json
from biomamba_jax.interop import tokenizers
from biomamba_jax.interop.adapters import Base
from biomamba_jax.interop.configs import EXECUTION, portable, token_ids
from biomamba_jax.interop.names import Shape, flatten, native_shapes, path_name, unflatten

MODEL_JSON, PARAMS = "model.json", "params"
FORMAT_VERSION = 1
# Orbax copies arrays before it writes them, and buffers compressed chunks until a file is full: by default three times
# the weights in memory, with this size about 400 MB in addition to them. (Buffers above 32 MB are freed at once.)
_CHUNK_BYTES = 36 << 20
_RECIPE = ("optimizer", "schedule", "loss", "train")
_SECTIONS = ("data", "checkpoint", "lora")


def write(
    folder: Path, config: ModelConfig, params: dict[str, Any], about: dict[str, Any], ids: dict[str, Any]
) -> None:
    """Write model.json and params/ into `folder`."""
    fields = {name: value for name, value in dataclasses.asdict(portable(config)).items() if name not in EXECUTION}
    in_place = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but orbax warns without it
    )
    arguments = ocp.args.PyTreeSave(
        params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params),
        ocdbt_target_data_file_size=_CHUNK_BYTES,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=in_place)) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), args=arguments)
    raw = {"format_version": FORMAT_VERSION, "model": fields, "about": about}
    write_json(folder / MODEL_JSON, raw | ({"token_ids": ids} if ids else {}))


def read(folder: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the arguments of `write`: config, parameters, about and token ids.

    Raises:
      UserError: a file is damaged, or the parameters do not fit the config.
    """
    path = folder / MODEL_JSON
    raw = read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {raw.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    try:
        config = portable(ModelConfig(**raw["model"]))
        shapes = native_shapes(config)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: is not the config of a model ({error})") from None
    about = raw.get("about", {})
    if not isinstance(about, dict):
        raise UserError(f"{path}: about = {about!r}: must be a mapping")
    return config, _restore(folder / PARAMS, "", shapes), about, token_ids(path, raw.get("token_ids", {}))


def _restore(checkpoint: Path, prefix: str, expected: dict[str, Shape]) -> dict[str, Any]:
    """Return the arrays below `prefix` of an orbax checkpoint, as float32 numpy arrays.

    Raises:
      UserError: the checkpoint is damaged, or paths or shapes differ from the expected ones; lists all differences.
    """
    with closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            tree = _metadata(handler, checkpoint)
            saved = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items() if path.startswith(prefix)}
            wanted = {prefix + path: shape for path, shape in expected.items()}
            keys = [key for key in sorted(saved | wanted) if saved.get(key) != wanted.get(key)]
            if keys:
                rows = "; ".join(f"{key}: {wanted.get(key, 'none')}, {saved.get(key, 'none')}" for key in keys)
                raise UserError(f"{checkpoint}: does not fit its config (key: expected, found): {rows}")
            restored = {path: _restore_one(handler, checkpoint, tree, prefix + path) for path in expected}
        except (ValueError, OSError, KeyError) as error:
            raise _unreadable(checkpoint, error) from None
    return unflatten(restored)


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{checkpoint}: cannot be read ({reason}); it is damaged, use another copy or checkpoint")


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
    return flatten(handler.restore(epath.Path(checkpoint.absolute()), args=options))[wanted]


def _metadata(handler: ocp.PyTreeCheckpointHandler, checkpoint: Path) -> Any:
    return handler.metadata(epath.Path(checkpoint.absolute())).tree


@dataclasses.dataclass(frozen=True)
class Run:
    """The model in a run directory."""

    config: ModelConfig
    params: dict[str, Any]
    """Parameters of the model, or its adapters if there is a `base`; with `labels`, also "classifier"."""
    tokenizer_file: Path | None
    about: dict[str, Any]
    """See `describe_run`."""
    base: Base | None = None
    """Base weights of the adapters."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a classifier."""


def read_run(folder: Path) -> Run:
    """Read the best checkpoint of a run directory if the run keeps it, else the newest; EMA weights if there are any.

    Raises:
      UserError: there is no checkpoint, or a file is damaged.
    """
    settings, config = _settings(folder / "config.yaml")
    entries = [entry for entry in (folder / "checkpoints").iterdir() if entry.name.isdigit()]
    # A checkpoint without a state was deleted or copied in part.
    steps = [int(entry.name) for entry in entries if (entry / "state").is_dir()]
    if not steps:
        raise UserError(
            f"{folder / 'checkpoints'}: no checkpoint; run `python -m biomamba_jax.pretrain` until it saves one"
        )
    step, loop = max(steps), _loop(folder / "checkpoints" / str(max(steps)))
    best = (loop.get("best") or {}).get("step")
    if settings["checkpoint"].get("keep_best") and best in steps:
        step = best
    checkpoint = folder / "checkpoints" / str(step) / "state"
    with closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            shapes = {path: tuple(leaf.shape) for path, leaf in flatten(_metadata(handler, checkpoint)).items()}
        except (ValueError, OSError, KeyError) as error:
            raise _unreadable(checkpoint, error) from None
    average = next((path for path in shapes if "/average/" in path), None)
    prefix = average.partition("/average/")[0] + "/average/" if average else "params/"
    config = portable(config)
    labels = tuple(settings.get("labels", ())) if settings.get("head") == "classifier" else ()
    expected = native_shapes(config) | ({"classifier": (len(labels), config.d_model)} if labels else {})
    base, lora = None, settings["lora"]
    if lora.get("rank"):
        try:
            base = Base(settings["init_from"], loop["base_sha256"], lora["alpha"] / lora["rank"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: its config or {step}/loop lacks the adapters' base weights ({error!r})"
            ) from None
        expected = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
    data = Path(settings["data"].get("path") or "")
    tokenizer_file = tokenizers.find(folder) or _tokenizer_of_shards(data)
    about = describe_run(folder, settings, step, data)
    return Run(config, _restore(checkpoint, prefix, expected), tokenizer_file, about, base, labels)


def _settings(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Return the config.yaml of a run, with its sections as mappings, and the model's section as a ModelConfig."""
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
        settings |= {name: dict(settings.get(name) or {}) for name in _SECTIONS}
        rows = settings["data"]
        if not all(type(rows.get(key)) is int for key in ("batch_size", "sequence_length")):
            raise TypeError("data.batch_size or data.sequence_length is not an integer")
        return settings, ModelConfig(**settings["model"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not the config of a run ({error})") from None


def _loop(checkpoint: Path) -> dict[str, Any]:
    """Return the training loop's entry of a checkpoint, {} if it has none."""
    if not (checkpoint / "loop").exists():
        return {}
    with closing(ocp.JsonCheckpointHandler()) as handler:
        try:
            loop = handler.restore(epath.Path((checkpoint / "loop").absolute()))
        except (ValueError, OSError) as error:
            raise _unreadable(checkpoint / "loop", error) from None
    if not isinstance(loop, dict) or not isinstance(loop.get("best") or {}, dict):
        raise UserError(f"{checkpoint / 'loop'}: was not written by the training loop")
    return loop


def _tokenizer_of_shards(data: Path) -> Path | None:
    if not (data / MANIFEST_NAME).exists():
        return None
    file = data / Manifest.load(data).tokenizer.file
    return file if file.exists() else None


def describe_run(folder: Path, settings: dict[str, Any], step: int, data: Path) -> dict[str, Any]:
    """Return the information of a model card about a run.

    Returns:
      {"steps", "tokens" (of those steps, padding included), "recipe": {section: settings}, "evaluation": the last
      held-out line up to `step`, "text": {"sources", "splits", "tokenizer"} of the shards' manifest}; the last two only
      if metrics.jsonl and the shards exist.
    """
    rows = settings["data"]
    sections = (*_RECIPE, "lora") if settings["lora"].get("rank") else _RECIPE
    about: dict[str, Any] = {
        "steps": step,
        "tokens": step * rows["batch_size"] * rows["sequence_length"],
        "recipe": {key: settings[key] for key in sections if key in settings},
    }
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        held_out = [line for line in _metrics(metrics) if line.get("split") == "validation" and line["step"] <= step]
        about |= {"evaluation": held_out[-1]} if held_out else {}
    if (data / MANIFEST_NAME).exists():
        manifest = Manifest.load(data)
        about["text"] = {
            "sources": manifest.sources,
            "splits": {name: dataclasses.asdict(split) for name, split in manifest.splits.items()},
            "tokenizer": manifest.tokenizer.name,
        }
    return about


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl, except for a last one that is still being written."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            if type(values["step"]) is not int:
                raise TypeError("step is not an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error!r}); delete it") from None
        yield values
