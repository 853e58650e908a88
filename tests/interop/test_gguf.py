"""GGUF files hold the model that was exported, and a tokenizer that gives the same ids."""

import dataclasses
import functools
import itertools
import json
import re

import numpy as np
import pytest
import tokenizers
from random_weights import random_weights
from tiny_models import CONFIGS, WORDS, sentences, train_tokenizer, write_byte_level
from tokenizers import models, pre_tokenizers

import biomamba_jax
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.prepare import TokenizerTraining
from biomamba_jax.data.tokenizer import EOS, load_tokenizer, train_sentencepiece
from biomamba_jax.errors import UserError
from biomamba_jax.interop import write_model
from biomamba_jax.tasks.sampling import Sampling

gguf = pytest.importorskip("gguf", reason="the oracle is the package that llama.cpp's authors publish")

SHAPES = CONFIGS | {  # what llama.cpp takes: a factor of 2 in Mamba-1, no biases of projections
    "mamba2, 4 groups, no conv bias": dataclasses.replace(CONFIGS["mamba2"], n_groups=4, conv_bias=False, expand=4),
    "mamba1, tied, no conv bias": dataclasses.replace(CONFIGS["mamba1"], conv_bias=False, tie_embeddings=True),
}


def export(weights, folder, dtype="float32"):
    """What the package reads of our file: (values by key, tensors by name)."""
    write_model(weights, folder, "gguf", dtype)
    reader = gguf.GGUFReader(folder / f"{folder.name}.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def with_tokenizer(config, tokenizer):
    weights = random_weights(dataclasses.replace(config, vocab_size=tokenizer.vocab_size))
    return dataclasses.replace(weights, tokenizer_file=tokenizer.path)


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_are_those_of_the_hugging_face_file_in_the_layout_of_llama_cpp(shape, tokenizer, tmp_path):
    from safetensors.numpy import load_file

    weights = with_tokenizer(SHAPES[shape], tokenizer)
    config = weights.config
    write_model(weights, tmp_path / "hf", "hf")
    _, found = export(weights, tmp_path / "out")
    source = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {"token_embd.weight": source["backbone.embeddings.weight"]}
    expected["output_norm.weight"] = source["backbone.norm_f.weight"]
    if not config.tie_embeddings:
        expected["output.weight"] = source["lm_head.weight"]
    for i in range(config.n_layers):
        layer = {key.removeprefix(f"backbone.layers.{i}."): value for key, value in source.items()}
        mixer = {key.removeprefix("mixer."): value for key, value in layer.items()}
        block = {"attn_norm.weight": layer["norm.weight"], "ssm_in.weight": mixer["in_proj.weight"]}
        block["ssm_conv1d.weight"] = mixer["conv1d.weight"][:, 0]
        block["ssm_conv1d.bias"] = mixer.get("conv1d.bias", np.zeros(config.conv_channels, np.float32))
        block["ssm_out.weight"] = mixer["out_proj.weight"]
        if config.kind == "mamba1":
            block |= {"ssm_a": -np.exp(mixer["A_log"]), "ssm_d": mixer["D"], "ssm_x.weight": mixer["x_proj.weight"]}
            block |= {"ssm_dt.weight": mixer["dt_proj.weight"], "ssm_dt.bias": mixer["dt_proj.bias"]}
        else:
            block |= {"ssm_a": -np.exp(mixer["A_log"])[:, None], "ssm_d": mixer["D"][:, None]}
            block |= {
                "ssm_dt.bias": mixer["dt_bias"],
                "ssm_norm.weight": mixer["norm.weight"].reshape(config.n_groups, -1),
            }
        expected |= {f"blk.{i}.{key}": value for key, value in block.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape.tolist() == list(value.shape[::-1]), name  # written with the innermost axis first
        np.testing.assert_array_equal(found[name].data.reshape(value.shape), value, err_msg=name)


def test_sizes_are_stated_as_llama_cpp_reads_them(tokenizer, tmp_path):
    fields, _ = export(with_tokenizer(CONFIGS["mamba2"], tokenizer), tmp_path / "out")
    assert fields["general.architecture"] == "mamba2"
    expected = {"embedding_length": 32, "block_count": 2, "feed_forward_length": 0, "attention.head_count": 0}
    expected |= {"ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16, "ssm.group_count": 2}
    expected |= {"ssm.time_step_rank": 4, "attention.layer_norm_rms_epsilon": pytest.approx(1e-5)}
    assert {key: fields[f"mamba2.{key}"] for key in expected} == expected
    fields, _ = export(with_tokenizer(CONFIGS["mamba1"], tokenizer), tmp_path / "one")
    assert (fields["general.architecture"], fields["mamba.ssm.time_step_rank"]) == ("mamba", 2)
    assert "mamba.ssm.group_count" not in fields


@pytest.mark.parametrize(
    ("dtype", "kind", "error"), [("float16", "F16", 1e-3), ("bfloat16", "BF16", 8e-3), ("q8_0", "Q8_0", 8e-3)]
)
def test_matrices_have_the_type_that_was_asked_for_and_the_rest_is_float32(dtype, kind, error, tokenizer, tmp_path):
    weights = with_tokenizer(CONFIGS["mamba1"], tokenizer)
    _, exact = export(weights, tmp_path / "exact")
    _, found = export(weights, tmp_path / "out", dtype)
    for name, tensor in found.items():
        matrix = name.endswith(".weight") and "norm" not in name and "conv1d" not in name
        rows_of_2 = dtype == "q8_0" and name.endswith("ssm_dt.weight")  # no multiple of a block of 32
        assert tensor.tensor_type.name == ("F32" if not matrix else "F16" if rows_of_2 else kind), name
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = exact[name].data
        assert np.abs(value - expected).max() <= error * np.abs(expected).max(), name


# --- Tokenizers: llama.cpp's algorithms, written down once more, on what the file holds ---


def vocabulary(fields):
    """[(token, score, type)] and {token: id} of the user-defined ones."""
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    fixed = {token: i for i, token in enumerate(tokens) if types[i] == gguf.TokenType.USER_DEFINED}
    return list(zip(tokens, scores, types, strict=True)), fixed


def by_words(encode_word, fixed, space):
    """Encode text word by word, since pieces have spaces only in front; user-defined tokens split it first."""

    def encode(text):
        parts = re.split(f"({'|'.join(map(re.escape, fixed))})", text.replace(" ", space))
        pattern = f"{space}[^{space}]*|[^{space}]+"
        words = (each for part in parts for each in ([part] if part in fixed else re.findall(pattern, part)))
        return [i for each in words for i in ([fixed[each]] if each in fixed else encode_word(each))]

    return encode


def plamo2(fields):
    """Unigram with byte fallback, from the back, on scores rounded to 1e-4."""
    rows, fixed = vocabulary(fields)
    byte = {int(token[3:5], 16): i for i, (token, _, kind) in enumerate(rows) if kind == gguf.TokenType.BYTE}
    pieces = {token: (i, round(score * 1e4)) for i, (token, score, kind) in enumerate(rows) if i not in byte.values()}
    longest = max(map(len, pieces))

    @functools.cache
    def word(text):
        costs, path = [0] * (len(text) + 1), [(1, None)] * len(text)
        for i in reversed(range(len(text))):
            costs[i] = costs[i + 1] + 10**7
            for end in range(min(len(text), i + longest), i, -1):
                token, score = pieces.get(text[i:end], (None, -(10**8)))
                if score > -2 * 10**7 and costs[end] - score < costs[i]:
                    costs[i], path[i] = costs[end] - score, (end - i, token)
        ids, i = [], 0
        while i < len(text):
            length, token = path[i]
            ids += [byte[b] for b in text[i].encode()] if token is None else [token]
            i += length
        return ids

    return by_words(word, fixed, " ")


def spm(fields):
    """SentencePiece's BPE: the pair whose piece has the best score is merged first, of equal ones the leftmost."""
    rows, fixed = vocabulary(fields)
    ids = {token: i for i, (token, _, _) in enumerate(rows)}

    @functools.cache
    def word(text):
        parts = list(text)
        while True:
            joined = [a + b for a, b in itertools.pairwise(parts)]
            pairs = [(-rows[ids[both]][1], i) for i, both in enumerate(joined) if both in ids]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [joined[i]]
        return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]

    return by_words(word, fixed, "▁")


def gpt2(fields):
    """Byte-level BPE with GPT-2's splits; user-defined tokens are looked for first."""
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == 4]
    library.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user])
    return lambda text: library.encode(text).ids


ENCODERS = {"plamo2": plamo2, "llama": spm, "gpt2": gpt2}
TEXTS = [
    "Serum TNF-α rose 2.5-fold (p < 0.001).\nMETHODS: 1,024 patients",
    "  two  spaces, a tab\t and <0x0A>, <unk>, <|endoftext|>, Ångström, naïve, ﬁ, ½, µg",
    "日本語 🧬\r\n\n end ",
    " ".join(WORDS * 3),
    "",
]


def made(kind, folder):
    if kind == "byte-level":
        return load_tokenizer(write_byte_level(folder / "t", [EOS], ["  ", "word"], [("i", "n"), ("in", "s")]))
    return train_tokenizer(folder, kind)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte-level"])
def test_the_tokenizer_in_the_file_gives_the_same_ids(kind, tmp_path):
    tokenizer = made(kind, tmp_path)
    fields, _ = export(with_tokenizer(CONFIGS["mamba2"], tokenizer), tmp_path / "out")
    encode = ENCODERS[fields["tokenizer.ggml.model"]](fields)
    for text in [*TEXTS, *sentences()[:50]]:
        assert encode(text) == tokenizer.encode_batch([text])[0], text
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == tokenizer.eos_id
    assert len(set(fields["tokenizer.ggml.tokens"])) == tokenizer.vocab_size


def abstracts(shared_data):
    questions = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text())
    return ["\n".join(question["CONTEXTS"]) for question in questions.values()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt-neox", "unigram", "bpe"])
def test_a_thousand_abstracts_have_the_same_ids(kind, shared_data, tmp_path):
    texts = abstracts(shared_data)
    if kind == "gpt-neox":
        tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json")
    else:
        training = TokenizerTraining(train_tokenizer=4000, tokenizer_kind=kind)
        tokenizer = train_sentencepiece(texts[:300], training, tmp_path / "tokenizer.model")
    config = ModelConfig(kind="mamba2", d_model=32, n_layers=1, d_state=16, headdim=16)
    fields, _ = export(with_tokenizer(config, tokenizer), tmp_path / "out")
    encode = ENCODERS[fields["tokenizer.ggml.model"]](fields)
    pairs = [(ids, encode(text)) for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)]
    other = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(texts) == 1000
    # Unigram models have ties: "FFF" is "F FF" here and "FF F" in llama.cpp, with the same score.
    assert len(other) <= (3 if kind == "unigram" else 0), len(other)
    assert all(sorted(left) == sorted(right) for left, right in other)


# --- What llama.cpp cannot hold ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, r"model\.bias = true: llama\.cpp does not support it"),
        ({"kind": "mamba1", "expand": 3}, r"model\.expand = 3: llama\.cpp does not support it for mamba1"),
    ],
)
def test_a_setting_that_llama_cpp_lacks_is_refused(change, message, tokenizer, tmp_path):
    weights = with_tokenizer(dataclasses.replace(CONFIGS["mamba2"], **change), tokenizer)
    with pytest.raises(UserError, match=message):
        write_model(weights, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tokenizer, tmp_path):
    path = write_byte_level(tmp_path / "t", [EOS])
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"normalizer": {"type": "Lowercase"}}))
    weights = dataclasses.replace(with_tokenizer(CONFIGS["mamba2"], tokenizer), tokenizer_file=path)
    with pytest.raises(UserError, match=r"tokenizer\.json: --to gguf takes byte-level BPE"):
        write_model(weights, tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="give --tokenizer FILE"):
        write_model(dataclasses.replace(weights, tokenizer_file=None), tmp_path / "out", "gguf")


@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("q8_0", 1e7)])
def test_a_value_that_the_type_cannot_hold_is_refused(dtype, value, tokenizer, tmp_path):
    weights = with_tokenizer(CONFIGS["mamba1"], tokenizer)
    weights.params["embedding"][3, 4] = value
    with pytest.raises(UserError, match=r"token_embd\.weight holds values beyond float16's range; give --dtype"):
        write_model(weights, tmp_path / "out", "gguf", dtype)


def test_8_bit_weights_are_only_for_gguf(tokenizer, tmp_path):
    with pytest.raises(UserError, match="only --to gguf has it, not hf"):
        write_model(with_tokenizer(CONFIGS["mamba2"], tokenizer), tmp_path / "out", "hf", "q8_0")


# --- llama.cpp itself ---


@pytest.mark.long
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_gives_the_same_ids_and_the_same_64_greedy_tokens(kind, tmp_path, shared_data):
    """Needs llama.cpp's Python binding: `pip install llama-cpp-python` compiles it in some ten minutes."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's Python binding is not installed")
    for tokenizer_kind in ("unigram", "bpe", "gpt-neox"):
        (tmp_path / tokenizer_kind).mkdir()
        neox = shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json"
        given = tokenizer_kind == "gpt-neox"
        tokenizer = load_tokenizer(neox) if given else train_tokenizer(tmp_path / tokenizer_kind, tokenizer_kind)
        weights = with_tokenizer(CONFIGS[kind], tokenizer)
        weights.params["norm_f"]["weight"] *= 8  # logits far apart
        write_model(weights, tmp_path / f"{tokenizer_kind}-hf", "hf")
        write_model(weights, tmp_path / tokenizer_kind / "out", "gguf")
        file = str(tmp_path / tokenizer_kind / "out" / "out.gguf")
        theirs = llama_cpp.Llama(file, n_ctx=256, verbose=False, n_threads=1)
        for text in [*TEXTS[:4], *abstracts(shared_data)[:100]]:
            found = theirs.tokenize(text.encode(), add_bos=False, special=False)
            assert found == tokenizer.encode_batch([text])[0], text
        prompt = [tokenizer.eos_id, *tokenizer.encode_batch([WORDS[0]])[0]]
        sampling = Sampling(max_new_tokens=64, temperature=0.0)
        [ours] = biomamba_jax.load(tmp_path / f"{tokenizer_kind}-hf").generator.decode([prompt], sampling)
        generated = theirs.generate(prompt, temp=0.0)
        assert [token for token, _ in zip(generated, range(64), strict=False)] == ours
