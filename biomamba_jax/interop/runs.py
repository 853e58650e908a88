"""Run directories of `pretrain` and `finetune`, read-only: their best or newest checkpoint and what trained it."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.shards import MANIFEST_NAME, Manifest
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_step_lines
from biomamba_jax.interop import heads, names, native, run_dir, tokenizers, vocabulary
from biomamba_jax.interop.adapters import Base
from biomamba_jax.interop.configs import portable
from biomamba_jax.interop.hub import HUB_NAME
from biomamba_jax.interop.weights import Weights

_RECIPE = ("data", "optimizer", "schedule", "loss", "train", "lora")
_SECTIONS = ("data", "checkpoint", "lora")
_IN_RECIPE = ("batch_size", "sequence_length")  # of "data"
# Settings that change speed or output, but no weight; and the value at which a setting has no effect.
_NO_EFFECT = (
    *("chunk_size", "log_every", "eval_every", "eval_batches", "max_skipped_steps"),
    *("compiler_options", "offload_collectives"),
)
_OFF: dict[str, Any] = {"weight_decay": 0, "clip": 0, "layer_decay": 1, "ema": 0, "label_smoothing": 0, "z_loss": 0}
_OFF |= {"warmup_fraction": 0, "accumulation": 1, "dropout": 0, "patience": None}


def read(folder: Path) -> tuple[Weights, Base | None, HeadConfig | None]:
    """Read the best checkpoint of a run directory if the run keeps it, else the newest; EMA weights if there are any.

    Returns:
      The model; the adapters' base weights if there are adapters instead of the parameters; and the head, whose
      parameters are with those of the model, if the run trained one.

    Raises:
      UserError: there is no checkpoint, or a file is damaged.
    """
    steps = run_dir.complete_steps(folder)
    if not steps:
        raise UserError(
            f"{folder / run_dir.CHECKPOINTS}: no checkpoint; run `python -m biomamba_jax.pretrain` until it saves one"
        )
    settings, config, expected = read_settings(folder)
    step, loop = _chosen_step(folder, steps, settings["checkpoint"])
    checkpoint = run_dir.checkpoint_folder(folder, step) / "state"
    with run_dir.reading(folder, step):
        shapes = native.saved_shapes(checkpoint)
    average = next((path for path in shapes if "/average/" in path), None)
    prefix = average.partition("/average/")[0] + "/average/" if average else "params/"
    head = _head(folder, settings)
    if head is not None:
        earlier = f"{prefix}classifier" in shapes  # a run of an earlier version
        expected |= {"classifier": (len(head.labels), config.d_model)} if earlier else heads.shapes(head, config)
    base = _base(folder, settings, step, loop)
    if base is not None:
        expected = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
    data = Path(settings["data"].get("path") or "")
    manifest = Manifest.load(data) if (data / MANIFEST_NAME).exists() else None
    tokenizer_file = _tokenizer_file(folder, data, manifest)
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    vocabulary.check_recorded(folder, tokenizer, loop.get("tokenizer"))
    about = describe(folder, settings, step, manifest)
    with run_dir.reading(folder, step):
        params = native.restore(checkpoint, prefix, expected)
    if "classifier" in params:
        weight = params.pop("classifier")
        params["head"] = {"weight": weight, "bias": np.zeros(len(weight), np.float32)}
    return Weights(config, params, tokenizer_file, about), base, head


def _chosen_step(folder: Path, steps: list[int], settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Verify the best step where the run keeps it, else the newest; return it, and the newest step's loop entry.

    Args:
      folder: the run directory.
      steps: those that have a checkpoint, at least one.
      settings: the run's checkpoint section.
    """
    verify = run_dir.verify if settings.get("verify", True) else lambda *_: None
    newest = max(steps)
    verify(folder, newest)
    loop = run_dir.read_loop(folder, newest)
    best = (loop.get("best") or {}).get("step")
    if not settings.get("keep_best") or best not in steps or best == newest:
        return newest, loop
    verify(folder, best)
    return best, loop


def _base(folder: Path, settings: dict[str, Any], step: int, loop: dict[str, Any]) -> Base | None:
    """Return the base weights of a run's adapters, None if it trains the whole model."""
    lora = settings["lora"]
    if not lora.get("rank"):
        return None
    try:
        return Base(settings["init_from"], loop["base_sha256"], lora["alpha"] / lora["rank"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its config or {step}/loop lacks the adapters' base weights ({error!r})") from None


def _tokenizer_file(folder: Path, data: Path, manifest: Manifest | None) -> Path | None:
    """Return the run's tokenizer, or that of its shards where it has none; None if neither is there."""
    file = tokenizers.find(folder)
    if file is None and manifest and (data / manifest.tokenizer.file).exists():
        file = data / manifest.tokenizer.file
        manifest.check_tokenizer(load_tokenizer(file).sha256)
    return file


def _head(folder: Path, settings: dict[str, Any]) -> HeadConfig | None:
    """Return the head that a run trains, None for the language model's."""
    kind, labels = settings.get("head", "language_model"), settings.get("labels")
    if kind == "language_model":
        return None
    try:
        return HeadConfig(kind, tuple(labels or ()), settings.get("reading", "once"))
    except TypeError as error:
        raise UserError(f"{folder / run_dir.CONFIG}: is not the config of a run ({error})") from None


def read_settings(folder: Path) -> tuple[dict[str, Any], ModelConfig, dict[str, names.Shape]]:
    """Return the config.yaml of a run, with its sections as mappings, its model, and the shapes of the parameters.

    Raises:
      UserError: the file is damaged.
    """
    settings = run_dir.read_settings(folder)
    try:
        settings |= {name: dict(settings.get(name) or {}) for name in _SECTIONS}
        rows = settings["data"]
        if not all(type(rows.get(key)) is int for key in ("batch_size", "sequence_length")):
            raise TypeError("data.batch_size or data.sequence_length is not an integer")
        if not all(isinstance(path, str | None) for path in (rows.get("path"), settings.get("init_from"))):
            raise TypeError("data.path or init_from is not text")
        config = portable(ModelConfig(**settings["model"]))
        return settings, config, names.native_shapes(config)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / run_dir.CONFIG}: is not the config of a run ({error})") from None


def describe(folder: Path, settings: dict[str, Any], step: int, manifest: Manifest | None) -> dict[str, Any]:
    """Return the information of a model card about a run.

    Returns:
      {"steps", "tokens" (of those steps, padding included), "recipe": {section: settings that had an effect} of the
      last of them, with {"until step N": {key: value}} for the settings that were changed then, "init_from" or, if it
      is not a folder, "base_model" (a hub name), "evaluation": the last held-out line up to `step`, "text": {"sources",
      "splits", "tokenizer"} of the shards' manifest}; the last two only if metrics.jsonl and the shards exist.
    """
    changes = run_dir.settings_by_step(folder, step)
    ends = [*(begin for begin, _ in changes[1:]), step]
    try:
        rows = [(end - begin, change["data"]) for (begin, change), end in zip(changes, ends, strict=True)]
        tokens = sum(steps * data["batch_size"] * data["sequence_length"] for steps, data in rows)
        about: dict[str, Any] = {"steps": step, "tokens": tokens}
        about["recipe"] = {key: effective(key, changes[-1][1].get(key) or {}) for key in _RECIPE}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / run_dir.HISTORY}: holds no settings of a run ({error!r}); delete it") from None
    for (_, before), (begin, after) in itertools.pairwise(changes):
        replaced = {key: old for key, (old, _) in run_dir.changed(before, after).items()}
        about["recipe"][f"until step {begin:,}"] = replaced
    if base := settings.get("init_from"):
        hub = not Path(base).exists() and HUB_NAME.fullmatch(base)
        about |= {"base_model": hub[1]} if hub else {"init_from": Path(base).name}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = (line for _, line in read_step_lines(metrics) if line["step"] <= step)
        held_out = [line for line in lines if line.get("split") == "validation"]
        about |= {"evaluation": held_out[-1]} if held_out else {}
    if manifest is not None:
        splits = {name: dataclasses.asdict(split) for name, split in manifest.splits.items()}
        about["text"] = {"sources": manifest.sources, "splits": splits, "tokenizer": manifest.tokenizer.name}
    return about


def effective(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a section that had an effect on the weights."""
    if section == "data":
        return {key: settings[key] for key in _IN_RECIPE}
    if section == "lora" and not settings.get("rank"):
        return {}
    kept = {
        key: value for key, value in settings.items() if key not in _NO_EFFECT and value != _OFF.get(key, _NO_EFFECT)
    }
    unused = {
        "embedding_rate": "layer_decay" not in kept,
        "stable_fraction": kept.get("kind") != "wsd",
        "final_fraction": kept.get("kind") == "constant",
        "steps": kept.get("steps") is None,
        "epochs": kept.get("steps") is not None,
    }
    return {key: value for key, value in kept.items() if not unused.get(key)}
