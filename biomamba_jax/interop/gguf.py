"""GGUF, the one file of a model that llama.cpp loads: sizes, tokenizer and weights.

Keys, names and shapes are those that `llama_model_mamba` and `llama_model_mamba2` of llama.cpp read, and its tokenizers
"gpt2" (byte-level BPE), "llama" (SentencePiece's BPE) and "plamo2" (unigram with byte fallback; its "t5" has none).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.interop import names
from biomamba_jax.interop.weights import Weights
from biomamba_jax.parallel.sharding import leaves_by_path

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Name in a Hugging Face file, without its layer -> name in GGUF.
_NAMES = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
# In every type of file in float32, as llama.cpp computes with them.
_FLOAT32 = ("ssm_conv1d.weight", "attn_norm.weight", "output_norm.weight", "ssm_norm.weight", "ssm_a", "ssm_d")
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # a block of Q8_0 is scaled by a float16
_NEVER = -1e4  # score of a piece that llama.cpp's "plamo2" then never makes of text
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def write(weights: Weights, path: Path, dtype: str) -> None:
    """Write one GGUF file.

    Args:
      weights: the model; its head has no place in the file.
      path: the file.
      dtype: "float32", "float16", "bfloat16" or "q8_0", of the matrices; q8_0 becomes float16 where a matrix's rows are
        not a multiple of 32. Vectors, convolutions, A and D are float32.

    Raises:
      UserError: llama.cpp has no place for a setting of the model or its tokenizer, or gguf is not installed.
    """
    gguf = extra("gguf", "gguf", "--to gguf needs the gguf package")
    config = weights.config
    if config.kind == "mamba3" or config.d_intermediate:
        setting = "kind = mamba3" if config.kind == "mamba3" else f"d_intermediate = {config.d_intermediate}"
        raise UserError(f"model.{setting}: llama.cpp has no such model; use --to hf or mamba_ssm")
    if config.bias or (config.kind == "mamba1" and config.expand != 2):
        setting = "model.bias = true" if config.bias else f"model.expand = {config.expand}"
        raise UserError(f"{setting}: llama.cpp does not support it for {config.kind}; use --to hf")
    if weights.tokenizer_file is None:
        raise UserError("a GGUF file holds the tokenizer, and the input has none; give --tokenizer FILE")
    writer = gguf.GGUFWriter(path, config.kind.replace("mamba1", "mamba"))
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_tokenizer(gguf, writer, config, load_tokenizer(weights.tokenizer_file))
    flat = leaves_by_path(weights.params)
    for name, shape, _ in _tensors(config):
        kind = _type(gguf, name, shape, dtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, tensor in _tensors(config):
            value = np.zeros(shape, np.float32) if tensor is None else tensor.build(flat).reshape(shape)
            if name.endswith("ssm_a"):
                value = -np.exp(value)
            kind = _type(gguf, name, shape, dtype)
            if np.isfinite(value).all() and np.abs(value).max(initial=0) > _LARGEST.get(kind.name, np.inf):
                raise UserError(f"{name} holds values beyond float16's range; give --dtype bfloat16 or float32")
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(value), kind))
    finally:
        writer.close()


def _type(gguf: Any, name: str, shape: names.Shape, dtype: str) -> Any:
    """Return the GGML type of a tensor."""
    if len(shape) == 1 or name.endswith(_FLOAT32):
        return gguf.GGMLQuantizationType.F32
    whole = dtype != "q8_0" or shape[-1] % 32 == 0
    return gguf.GGMLQuantizationType[_TYPES[dtype] if whole else "F16"]


def _tensors(config: ModelConfig) -> Iterator[tuple[str, names.Shape, names.Tensor | None]]:
    """Yield name, shape and origin of every tensor; None for the zeros of a missing bias."""
    special = {"ssm_conv1d.weight": (config.conv_channels, config.d_conv)}
    if config.kind == "mamba2":
        heads = (config.n_heads, 1)
        special |= {
            "ssm_a": heads,
            "ssm_d": heads,
            "ssm_norm.weight": (config.n_groups, config.d_inner // config.n_groups),
        }
    for tensor in names.foreign_tensors(config, "hf"):
        layer = tensor.index if isinstance(tensor.index, int) else None
        name = _NAMES[tensor.key if layer is None else tensor.key.removeprefix(f"backbone.layers.{layer}.")]
        prefix = "" if layer is None else f"blk.{layer}."
        yield prefix + name, special.get(name, tensor.shape), tensor
        if name == "ssm_conv1d.weight" and not config.conv_bias:
            yield f"{prefix}ssm_conv1d.bias", (config.conv_channels,), None


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(1 << 20)  # any: the state has no length
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_vocab_size(config.known_vocab)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.dt_size if config.kind == "mamba1" else config.n_heads)
    if config.kind == "mamba2":
        writer.add_ssm_group_count(config.n_groups)


def _add_tokenizer(gguf: Any, writer: Any, config: ModelConfig, tokenizer: Tokenizer) -> None:
    read = _sentencepiece if tokenizer.path.suffix == ".model" else _byte_level
    tokens: list[str]
    tokens, scores, types = read(gguf, writer, tokenizer)
    for i in range(len(tokens), config.known_vocab):  # llama.cpp needs a token for each row
        tokens.append(f"[PAD{i}]")
        scores.append(_NEVER)
        types.append(gguf.TokenType.UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    special = tokenizer.special
    for name, token in (special.named | {"bos": special.start}).items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(special.adds_start)  # llama.cpp ignores it for "plamo2"
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _byte_level(gguf: Any, writer: Any, tokenizer: Tokenizer) -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and types of a byte-level BPE; adds its merges."""
    raw = json.loads(tokenizer.path.read_bytes())
    model, splits = raw["model"], raw.get("pre_tokenizer") or {}
    stages = splits.get("pretokenizers", [splits])
    plain = [{key: stage.get(key, True) for key in _GPT2_SPLIT} for stage in stages] == [_GPT2_SPLIT]
    normalizer = (raw.get("normalizer") or {"type": "NFC"})["type"]
    if model.get("type") != "BPE" or not plain or normalizer != "NFC" or model.get("ignore_merges"):
        raise UserError(
            f"{tokenizer.path}: --to gguf takes byte-level BPE that splits text as GPT-2 and GPT-NeoX do, and "
            "SentencePiece models; use --to hf"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    writer.add_token_merges(list(pairs))
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    control = {tokenizer.start_id, *tokenizer.special.named.values()} | {
        i for i, token in added.items() if token["special"]
    }
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        tokens.append(tokenizer.token(i) or f"[PAD{i}]")
        kinds = gguf.TokenType
        other = kinds.USER_DEFINED if i in added else kinds.NORMAL if tokenizer.token(i) else kinds.UNUSED
        types.append(kinds.CONTROL if i in control else other)
    return tokens, [0.0] * len(tokens), types


def _sentencepiece(gguf: Any, writer: Any, tokenizer: Tokenizer) -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and types of a SentencePiece model."""
    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(tokenizer.path.read_bytes())
    pieces, settings = model.pieces, model.trainer_spec
    plain = not model.normalizer_spec.add_dummy_prefix and model.normalizer_spec.name == "identity"
    if not settings.byte_fallback or not plain or settings.model_type not in (settings.BPE, settings.UNIGRAM):
        raise UserError(
            f"{tokenizer.path}: --to gguf takes SentencePiece models with byte fallback, as `prepare "
            "--train_tokenizer` makes them; use --to hf"
        )
    types = [int(piece.type) for piece in pieces]  # the same numbers
    if settings.model_type == settings.BPE:
        writer.add_tokenizer_model("llama")
        return [piece.piece for piece in pieces], [piece.score for piece in pieces], types
    writer.add_tokenizer_model("plamo2")
    # llama.cpp rounds these scores to 1e-4 and has -1000 for a character without a piece: scale them to just above.
    normal = [piece.score for piece in pieces if piece.type == piece.NORMAL]
    scale = 900 / max(1.0, -min(normal))
    scores = [piece.score * scale if piece.type == piece.NORMAL else _NEVER for piece in pieces]
    tokens = [piece.piece.replace("▁", " ") if piece.type == piece.NORMAL else piece.piece for piece in pieces]
    return tokens, scores, types
