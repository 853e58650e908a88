"""Conversion between `ModelConfig` and the config.json of Hugging Face and mamba_ssm, by tables of keys.

Sources: `transformers.models.{mamba,mamba2}.configuration_*`, `mamba_ssm.models.config_mamba` and the arguments of
`mamba_ssm.modules.{mamba_simple.Mamba, mamba2.Mamba2, mamba3.Mamba3}`, which are the keys of `ssm_cfg`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.checks import check_type
from biomamba_jax.data.special_tokens import TOKEN_IDS
from biomamba_jax.errors import UserError

EXECUTION = ("compute_dtype", "kernels", "remat", "unroll")
"""Fields of ModelConfig that do not describe the weights."""
_DEFAULT_CHUNK = 256  # of both libraries; read as None, since results do not depend on it
HF_TYPES = {"mamba": "mamba1", "mamba2": "mamba2", "mamba3": "mamba3"}
"""model_type of a Hugging Face config.json -> `ModelConfig.kind`."""
_SSM_LAYERS = {"Mamba1": "mamba1", "Mamba2": "mamba2", "Mamba3": "mamba3"}

# Foreign key -> field of ModelConfig.
_HF_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "state_size": "d_state",
    "expand": "expand",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_HF_CONV_FIELDS = {"conv_kernel": "d_conv", "use_bias": "bias", "use_conv_bias": "conv_bias"}
_HF_HEAD_FIELDS = {"head_dim": "headdim", "n_groups": "n_groups", "chunk_size": "chunk_size"}
_MAMBA3_FIELDS = ("mimo_rank", "rope_fraction", "a_floor", "outproj_norm")
_HF_KIND_FIELDS = {
    "mamba1": _HF_CONV_FIELDS | {"time_step_rank": "dt_rank"},
    "mamba2": _HF_CONV_FIELDS | _HF_HEAD_FIELDS,
    "mamba3": _HF_HEAD_FIELDS | {name: name for name in (*_MAMBA3_FIELDS, "d_intermediate")},  # our own class's names
}
# In this order: what the rows of our embedding are padded to wins over padding in the file.
_HF_VOCABULARY = {
    "vocab_size": "vocab_size",
    "unpadded_vocab_size": "vocab_size",  # of exports before 0.2, whose rows were padded
    "pad_vocab_size_multiple": "pad_vocab_multiple",
    "pad_vocab_multiple": "pad_vocab_multiple",
}
# Upper bound of dt that stands for none: JSON has no infinity, readers in Rust and Go take no 1e999, and float16, in
# which PyTorch may compute dt, no larger number.
_NO_BOUND = 65504.0
_SSM_OUTER_FIELDS = {
    "d_model": "d_model",
    "d_intermediate": "d_intermediate",
    "n_layer": "n_layers",
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_multiple",
    "tie_embeddings": "tie_embeddings",
}
_SSM_FIELDS = {"d_state": "d_state", "expand": "expand"}
_SSM_CONV_FIELDS = {"d_conv": "d_conv", "bias": "bias", "conv_bias": "conv_bias"}
_SSM_HEAD_FIELDS = {"headdim": "headdim", "ngroups": "n_groups", "chunk_size": "chunk_size"}
_SSM_MAMBA3_FIELDS = {"mimo_rank": "mimo_rank", "rope_fraction": "rope_fraction", "A_floor": "a_floor"}
_SSM_KIND_FIELDS = {
    "mamba1": _SSM_CONV_FIELDS | {"dt_rank": "dt_rank"},
    "mamba2": _SSM_CONV_FIELDS | _SSM_HEAD_FIELDS,
    "mamba3": _SSM_HEAD_FIELDS | _SSM_MAMBA3_FIELDS | {"is_outproj_norm": "outproj_norm"},
}
_SSM_RANK = 4  # default of mimo_rank, which counts only with is_mimo
# Arguments of mamba_ssm's mixers that affect initial values or speed, not the function.
_SSM_IRRELEVANT = {
    *("layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range"),
    *("use_fast_path", "use_mem_eff_path", "process_group", "sequence_parallel", "device", "dtype"),
    *("is_mimo", "fuse_pregate_headwise_norm", "dropout"),  # is_mimo is read with mimo_rank
}
# Settings that are fixed in our models, and the libraries' defaults.
_SSM_FIXED = {"d_ssm": (None,), "D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,)}


def portable(config: ModelConfig) -> ModelConfig:
    """Return `config` with every size filled in and all settings that do not describe the weights at their defaults."""
    unused = {
        "mamba1": ("headdim", "n_groups", "chunk_size", *_MAMBA3_FIELDS),
        "mamba2": ("dt_rank", *_MAMBA3_FIELDS),
        "mamba3": ("dt_rank", "d_conv", "conv_bias"),
    }[config.kind]
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    fields: dict[str, Any] = {"d_state": config.state_size, "dt_rank": config.dt_size}
    fields |= {name: defaults[name] for name in (*EXECUTION, *unused)}
    return dataclasses.replace(config, **fields)


def _refuse(path: Path, unsupported: dict[str, Any]) -> None:
    if unsupported:
        rows = ", ".join(f"{key} = {value!r:.100}" for key, value in unsupported.items())
        raise UserError(f"{path}: settings that these models do not support: {rows}")


def _no_clamp(limit: Any) -> bool:
    """Return True if a dt limit is (0, inf), spelt 65504, Infinity, "Infinity" or {"__float__": "Infinity"}."""
    try:
        plain = [next(iter(bound.values())) if isinstance(bound, dict) else bound for bound in limit]
        low, high = (float(bound) for bound in plain)
        return low == 0.0 and high >= _NO_BOUND
    except (TypeError, ValueError, OverflowError, StopIteration):
        return False


def _stated(path: Path, raw: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return fields of ModelConfig from a file's keys; null counts as absent."""
    fields = {}
    for key, field in names.items():
        value = raw.get(key)
        if value is None or (field, value) == ("dt_rank", "auto"):
            continue
        check_type(ModelConfig, field, f"{path}: {key}", value)
        fields[field] = value
    if fields.get("chunk_size") == _DEFAULT_CHUNK:
        del fields["chunk_size"]
    return fields


def read_hf(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig that a Hugging Face config.json states.

    Raises:
      UserError: an unknown model type, or settings that these models do not support.
    """
    kind = HF_TYPES.get(raw["model_type"]) if isinstance(raw["model_type"], str) else None
    if kind is None:
        raise UserError(
            f"{path}: model_type {raw['model_type']!r}; only {', '.join(HF_TYPES)} are supported; `evaluate`, "
            "`finetune --head` and `embed retrieval` take other models as hf:FOLDER"
        )
    unsupported = {key: raw[key] for key in ("hidden_act",) if raw.get(key, "silu") not in ("silu", "swish")}
    if kind == "mamba2" and not _no_clamp(raw.get("time_step_limit", (0.0, math.inf))):
        unsupported["time_step_limit"] = raw["time_step_limit"]
    _refuse(path, unsupported)
    fields = _stated(path, raw, _HF_FIELDS | _HF_KIND_FIELDS[kind] | _HF_VOCABULARY)
    heads = _stated(path, raw, {"num_heads": "n_groups"}).get("n_groups", 0)  # checked as n_groups is: an integer
    inner = heads * fields.get("headdim", 0), fields.get("expand", 0) * fields.get("d_model", 0)
    if kind == "mamba2" and all(inner) and inner[0] != inner[1]:
        _refuse(path, {"num_heads * head_dim": inner[0]})
    return {"kind": kind} | fields


def read_mamba_ssm(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig that a mamba_ssm config.json states.

    Raises:
      UserError: settings that these models do not support.
    """
    ssm = raw.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise UserError(f"{path}: ssm_cfg = {ssm!r}: must be a mapping")
    layer = ssm.get("layer", "Mamba1")  # absent in old files of Mamba-1
    kind = _SSM_LAYERS.get(layer) if isinstance(layer, str) else None
    unsupported = {} if kind else {"ssm_cfg.layer": layer}
    kind = kind or "mamba1"
    unsupported |= {key: raw[key] for key in ("attn_layer_idx", "attn_cfg") if raw.get(key)}
    unsupported |= {"rms_norm": False} if raw.get("rms_norm") is False else {}
    names = _SSM_FIELDS | _SSM_KIND_FIELDS[kind]
    for key, value in ssm.items():
        if key == "dt_limit":
            good = _no_clamp(value)
        else:
            good = key in names or key in _SSM_IRRELEVANT or value in _SSM_FIXED.get(key, ())
        if not good:
            unsupported[f"ssm_cfg.{key}"] = value
    _refuse(path, unsupported)
    fields = _stated(path, ssm, names)
    if kind == "mamba3":
        rank = fields.pop("mimo_rank", _SSM_RANK)
        fields["mimo_rank"] = rank if ssm.get("is_mimo") else None
    return {"kind": kind} | _stated(path, raw, _SSM_OUTER_FIELDS) | fields


def write_hf(config: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """Return the Hugging Face config.json, with every field: the library's defaults are those of other models.

    So are its token ids: unknown ones are null. The embedding has a row for each token and no padding; what our own is
    padded to is `pad_vocab_multiple`, which is ours. mlx-lm needs every key of its `ModelArgs`. Mamba-3 is run by the
    classes of `templates/modeling_mamba3.py`.

    Raises:
      UserError: transformers has no class for the model.
    """
    own: dict[str, Any]
    if config.d_intermediate and config.kind != "mamba3":
        setting = f"model.d_intermediate = {config.d_intermediate}"
        raise UserError(f"{setting}: transformers' {config.kind} has no MLP; use --to mamba_ssm")
    if config.kind == "mamba1":
        own = {"time_step_scale": 1.0, "time_step_init_scheme": "random", "use_mambapy": False}
    elif config.kind == "mamba3":
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        own = {"auto_map": {auto: f"modeling_mamba3.Mamba3{name}" for auto, name in classes.items()}}
    else:
        own = {
            "num_heads": config.n_heads,
            "time_step_rank": config.dt_size,
            "rms_norm": True,
            "norm_before_gate": False,
        }
        own |= {"time_step_limit": [0.0, _NO_BOUND]}
    model_type = {kind: name for name, kind in HF_TYPES.items()}[config.kind]
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.known_vocab,
        "pad_vocab_size_multiple": 1,  # llama.cpp's converter pads to 8 or 16 without it
        "pad_vocab_multiple": config.pad_vocab_multiple,
        **_written(config, _HF_FIELDS | _HF_KIND_FIELDS[config.kind], _DEFAULT_CHUNK),
        **own,
        "intermediate_size": config.d_inner,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "rescale_prenorm_residual": False,  # true makes transformers 5 divide out_proj again after loading it
        "initializer_range": 0.02,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        **{key: token_ids.get(key) for key in TOKEN_IDS},
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_mamba_ssm(config: ModelConfig) -> dict[str, Any]:
    """Return the mamba_ssm config.json, in the form of its authors.

    Raises:
      UserError: the file has no key for a setting of the model.
    """
    if config.norm_eps != 1e-5:
        raise UserError(f"model.norm_eps = {config.norm_eps}: mamba_ssm has no key for it and uses 1e-5; use --to hf")
    layer = {kind: layer for layer, kind in _SSM_LAYERS.items()}[config.kind]
    mixer = {"layer": layer} | _written(config, _SSM_FIELDS | _SSM_KIND_FIELDS[config.kind])
    if config.kind == "mamba3":
        mixer["is_mimo"] = config.mimo_rank is not None
    return {
        **_written(config, _SSM_OUTER_FIELDS),
        "ssm_cfg": mixer,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


def _written(config: ModelConfig, names: dict[str, str], chunk_size: int | None = None) -> dict[str, Any]:
    """Return a file's keys from fields of ModelConfig, without those that are None."""
    fields = dataclasses.asdict(portable(config)) | {"dt_rank": config.dt_size}
    fields["chunk_size"] = config.chunk_size or chunk_size
    return {key: fields[field] for key, field in names.items() if fields[field] is not None}
