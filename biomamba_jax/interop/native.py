"""Native models on disk: model.json and params/ of orbax, and the run directories of `pretrain`.

model.json      {"format_version": 1, "model": fields of ModelConfig, "about": what it was trained on,
                "token_ids": those of a Hugging Face config.json that it came from, if any}
params/         the parameters as float32, a nested dict, by orbax
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
from biomamba_jax.interop.names import Shape, flatten, native_shapes, path_name, unflatten

MODEL_JSON, PARAMS = "model.json", "params"
FORMAT_VERSION = 1
# Orbax copies arrays before it writes them, and holds what it has packed until a file is full: by its defaults three
# times the weights in memory, so written about 400 MB beside them. (Buffers above 32 MB go back to the system at once.)
_CHUNK_BYTES = 36 << 20
# How to compute is for whoever computes; the rest of ModelConfig describes the weights.
_NOT_STORED = ("compute_dtype", "kernels", "remat", "unroll")
_RECIPE = ("optimizer", "schedule", "loss", "train")
_SECTIONS = ("data", "checkpoint", "lora")


def portable(config: ModelConfig) -> ModelConfig:
    """`config` with every size written out and everything that is not of the weights at its default."""
    unused = {"mamba1": ("headdim", "n_groups", "chunk_size"), "mamba2": ("dt_rank",)}[config.kind]
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    fields: dict[str, Any] = {"d_state": config.state_size, "dt_rank": config.rank}
    fields |= {name: defaults[name] for name in (*_NOT_STORED, *unused)}
    return dataclasses.replace(config, **fields)


def write(
    folder: Path, config: ModelConfig, params: dict[str, Any], about: dict[str, Any], token_ids: dict[str, Any]
) -> None:
    """Writes model.json and params/ into `folder`."""
    fields = dataclasses.asdict(portable(config))
    fields = {name: value for name, value in fields.items() if name not in _NOT_STORED}
    in_place = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but orbax warns where it is not there
    )
    arguments = ocp.args.PyTreeSave(
        params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params),
        ocdbt_target_data_file_size=_CHUNK_BYTES,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=in_place)) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), args=arguments)
    raw = {"format_version": FORMAT_VERSION, "model": fields, "about": about}
    write_json(folder / MODEL_JSON, raw | ({"token_ids": token_ids} if token_ids else {}))


def read(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and parameters that `write` wrote."""
    path = folder / MODEL_JSON
    raw = read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {raw.get('format_version')!r}, this program reads {FORMAT_VERSION}")
    try:
        config = portable(ModelConfig(**raw["model"]))
        shapes = native_shapes(config)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: is not a model's ({error})") from None
    return config, _restore(folder / PARAMS, "", shapes)


def read_about(folder: Path) -> dict[str, Any]:
    """What model.json tells of the training."""
    about = read_json(folder / MODEL_JSON).get("about", {})
    if not isinstance(about, dict):
        raise UserError(f"{folder / MODEL_JSON}: about = {about!r}: is no mapping")
    return about


def _restore(checkpoint: Path, prefix: str, expected: dict[str, Shape]) -> dict[str, Any]:
    """The arrays below `prefix` of an orbax checkpoint, as float32 numpy arrays, and nothing else of it.

    Raises:
      UserError: unreadable, or other paths or shapes than those expected, all in one table.
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
    return UserError(f"{checkpoint}: cannot be read ({reason}); it is damaged, take another copy or checkpoint")


def _restore_one(handler: ocp.PyTreeCheckpointHandler, checkpoint: Path, tree: Any, wanted: str) -> np.ndarray:
    """One leaf: all at once, they would need as much again for what is being unpacked."""
    item = jax.tree_util.tree_map_with_path(  # the tree as it was saved, lists included; the rest is left on disk
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
    """What a run directory holds of a model."""

    config: ModelConfig
    params: dict[str, Any]
    """The model's, or where there is a `base` its adapters; with `labels`, the classifier's weight among them."""
    tokenizer_file: Path | None
    about: dict[str, Any]
    base: Base | None = None
    labels: tuple[str, ...] = ()


def read_run(folder: Path) -> Run:
    """A checkpoint of a run directory, the best one where the run keeps it and else the newest: its averaged weights
    where the run keeps them."""
    settings, config = _settings(folder / "config.yaml")
    entries = [entry for entry in (folder / "checkpoints").iterdir() if entry.name.isdigit()]
    # One without a state was left half-deleted or half-copied.
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
                f"{folder}: its config or {step}/loop does not tell the adapters' base ({error!r})"
            ) from None
        expected = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
    data = Path(settings["data"].get("path") or "")
    tokenizer_file = tokenizers.find(folder) or _tokenizer_of_shards(data)
    about = describe_run(folder, settings, step, data)
    return Run(config, _restore(checkpoint, prefix, expected), tokenizer_file, about, base, labels)


def _settings(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The config.yaml of a run, its sections as mappings, and the model's as a ModelConfig."""
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
        settings |= {name: dict(settings.get(name) or {}) for name in _SECTIONS}
        rows = settings["data"]
        if not all(type(rows.get(key)) is int for key in ("batch_size", "sequence_length")):
            raise TypeError("data.batch_size or data.sequence_length is no whole number")
        return settings, ModelConfig(**settings["model"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: is not the config of a run ({error})") from None


def _loop(checkpoint: Path) -> dict[str, Any]:
    """What the training loop put beside the state; {} in checkpoints without it."""
    if not (checkpoint / "loop").exists():
        return {}
    with closing(ocp.JsonCheckpointHandler()) as handler:
        try:
            loop = handler.restore(epath.Path((checkpoint / "loop").absolute()))
        except (ValueError, OSError) as error:
            raise _unreadable(checkpoint / "loop", error) from None
    if not isinstance(loop, dict) or not isinstance(loop.get("best") or {}, dict):
        raise UserError(f"{checkpoint / 'loop'}: is not what the training loop wrote")
    return loop


def _tokenizer_of_shards(data: Path) -> Path | None:
    if not (data / MANIFEST_NAME).exists():
        return None
    file = data / Manifest.load(data).tokenizer.file
    return file if file.exists() else None


def describe_run(folder: Path, settings: dict[str, Any], step: int, data: Path) -> dict[str, Any]:
    """What a model card tells of a run.

    Returns:
      {"steps", "tokens" (of those steps, padding included), "recipe": {section: settings}, "evaluation": the last
      held-out line up to `step`, "text": {"sources", "splits", "tokenizer"} of the shards' manifest}, each as far as
      the run directory and the shards still tell it.
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
    """The lines of metrics.jsonl; a last one without its end is still being written."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            if type(values["step"]) is not int:
                raise TypeError("step is no whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error!r}); take it out") from None
        yield values
