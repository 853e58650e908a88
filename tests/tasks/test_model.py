"""`biomamba_jax.load`: any format in, and a model that is used in three lines."""

import subprocess
import sys

import numpy as np
import pytest
from tiny_models import CONFIGS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model

TEXTS = ["insulin", "the patients were given insulin, and serum glucose fell", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=list(CONFIGS))
def folders(request, tokenizer, tmp_path_factory):
    """The same model in every format."""
    folder = tmp_path_factory.mktemp(request.param)
    native = write_tiny_model(folder / "native", request.param, tokenizer)
    weights = read_model(native)
    for dialect in ("hf", "mamba_ssm"):
        write_model(weights, folder / dialect, dialect)
    return folder


@pytest.fixture(scope="module")
def model(folders):
    return biomamba_jax.load(folders / "native")


def test_every_format_gives_the_same_logits_and_text(folders, model):
    ids = np.arange(30).reshape(2, 15)
    logits = model.logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 15, model.config.padded_vocab)
    text = model.generate(["insulin"], max_new_tokens=24)[0].text
    for dialect in ("hf", "mamba_ssm"):
        other = biomamba_jax.load(folders / dialect)
        vocabulary = model.config.vocab_size
        np.testing.assert_array_equal(other.logits(ids)[..., :vocabulary], logits[..., :vocabulary])
        assert other.generate("insulin", max_new_tokens=24)[0].text == text


def test_logprobs_are_those_of_the_logits(model):
    vocabulary = model.tokenizer.vocab_size
    for text, score in zip(TEXTS, model.logprobs(TEXTS), strict=True):
        ids = model.tokenizer.encode_batch([text])[0]
        assert score.tokens == ids
        if ids:
            logits = model.logits([[model.tokenizer.eos_id, *ids[:-1]]])[0, :, :vocabulary].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(score.logprobs, logp[np.arange(len(ids)), ids], atol=1e-4)
        assert score.total == pytest.approx(sum(score.logprobs))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_fewer_bits_are_close_to_float32(folders, model, dtype):
    ids = np.arange(30).reshape(2, 15)
    full, rounded = model.logits(ids), biomamba_jax.load(folders / "native", dtype=dtype).logits(ids)
    assert 0 < np.abs(full - rounded).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("ids", [[1, 2], [[1], [2, 3]], [[0.5]], [[-1]], [[10**6]], [[]]])
def test_what_is_no_batch_of_ids_is_refused(model, ids):
    with pytest.raises(UserError, match="logits"):
        model.logits(ids)


def test_a_model_without_tokenizer_still_gives_logits_and_says_what_is_missing(folders, tmp_path):
    weights = read_model(folders / "native")
    weights.tokenizer_file = None
    write_model(weights, tmp_path / "bare", "native")
    bare = biomamba_jax.load(tmp_path / "bare")
    assert bare.logits([[1, 2]]).shape[:2] == (1, 2)
    for use in (bare.generate, bare.logprobs):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            use(["text"])


def test_a_model_of_nan_gives_no_log_probabilities(tokenizer, tmp_path):
    write_tiny_model(tmp_path / "m", "mamba1", tokenizer, spread=float("nan"))
    with pytest.raises(UserError, match="gives NaN or infinite log probabilities"):
        biomamba_jax.load(tmp_path / "m").logprobs("insulin")


def test_an_unknown_type_is_refused(folders):
    with pytest.raises(UserError, match="float32, bfloat16, int8"):
        biomamba_jax.load(folders / "native", dtype="int4")


def test_importing_the_package_imports_no_jax():
    check = "import sys, biomamba_jax; assert 'jax' not in sys.modules; assert not hasattr(biomamba_jax, 'no_such')"
    subprocess.run([sys.executable, "-c", check], check=True)


def greedy_text_of_transformers(folder, prompts, length):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for prompt in prompts:  # one at a time: left padding leaks into its states
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = peer.generate(ids, max_new_tokens=length, do_sample=False)
        rows.append(out[0, ids.shape[1] :].tolist())
    return rows


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_ragged_batch(folders, model):
    prompts = ["insulin", "the patients with type 2 diabetes", "mice", "serum glucose fell in", "and (p<0.05), " * 6]
    theirs = greedy_text_of_transformers(folders / "hf", prompts, 64)
    eos = model.tokenizer.eos_id
    theirs = [row[: row.index(eos)] if eos in row else row for row in theirs]
    assert len({token for row in theirs for token in row}) > 20
    ours = biomamba_jax.load(folders / "hf")
    assert [result.tokens for result in ours.generate(prompts, max_new_tokens=64)] == theirs
    assert ours.generate(prompts[1], max_new_tokens=64)[0].tokens == theirs[1]
