"""What other programs need of an export: keys, a digest of the weights, classifiers in PyTorch, a card for the hub."""

import dataclasses
import json
import random

import numpy as np
import pytest
import yaml
from random_weights import flipped_bit, random_weights, same_weights
from tiny_models import CONFIGS, sentences, train_tokenizer, write_byte_level

import biomamba_jax
from biomamba_jax import convert
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.heads import Head
from biomamba_jax.interop.runs import effective

# Fields without a default of mlx-lm's `ModelArgs`, mlx_lm/models/{mamba,mamba2}.py of version 0.32.
MLX_KEYS = (
    "model_type vocab_size hidden_size intermediate_size state_size num_hidden_layers conv_kernel use_bias".split()
)
MLX_KEYS += ["use_conv_bias", "time_step_rank"]
MLX_2_KEYS = "num_heads head_dim layer_norm_epsilon n_groups tie_word_embeddings time_step_limit".split()
LABELS = ("yes", "no", "maybe")


@pytest.fixture(scope="module", params=CONFIGS)
def weights(request, tmp_path_factory):
    """A model with a tokenizer and a classifier."""
    weights = random_weights(dataclasses.replace(CONFIGS[request.param], vocab_size=310))
    random = np.random.default_rng(0)
    weight, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 32), 3))
    head = Head(HeadConfig("classifier", LABELS), weight, bias)
    tokenizer = train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return dataclasses.replace(weights, head=head, tokenizer_file=tokenizer.path)


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_model(weights, folder, "hf")
    return folder


def test_the_config_has_every_key_that_mlx_lm_needs_as_plain_finite_values(weights, folder):
    raw = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    keys = MLX_KEYS + (MLX_2_KEYS if weights.config.kind == "mamba2" else [])
    assert not [key for key in keys if raw.get(key) is None]
    assert all(np.isfinite(raw.get("time_step_limit", [0.0])))


@pytest.fixture(scope="module", params=["hf", "mamba_ssm", "native"])
def export(request, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / request.param
    write_model(weights, folder, request.param)
    return folder


@pytest.mark.parametrize("flips", [30, pytest.param(120, marks=pytest.mark.long)])
def test_no_flipped_bit_in_an_export_goes_unnoticed(export, flips):
    draw, whole = random.Random(flips), read_model(export)
    unlisted = ("README.md", "SHA256SUMS")
    files = [path for path in sorted(export.rglob("*")) if path.is_file()]
    assert {"tokenizer.json", "tokenizer.model"} & {path.name for path in files}
    for path in draw.choices(files, k=flips):
        with flipped_bit(path, draw):
            try:
                found = read_model(export)
            except UserError as error:
                assert path.name in str(error) or path.name == "SHA256SUMS"
            else:
                assert path.name in unlisted
                assert same_weights(found, whole)


def test_a_card_may_be_edited_and_files_of_a_hub_may_be_added_or_left_out(export):
    (export / "README.md").write_text("Edited.")
    (export / ".gitattributes").write_text("*.safetensors filter=lfs")
    (export / "pytorch_model.bin").unlink(missing_ok=True)
    assert read_model(export).config


SIZES = ("hidden_size", "state_size", "num_hidden_layers", "conv_kernel", "expand", "vocab_size", "pad_vocab_multiple")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [10**9, 2**63])
def test_a_size_that_no_tensor_can_have_is_refused_before_anything_is_built(folder, tmp_path, key, value):
    (tmp_path / "copy").mkdir()
    for path in folder.iterdir():
        if path.name != "SHA256SUMS":  # as another program's folder
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "config.json").read_text()) | {key: value}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"config\.json: (.* = {value}: more|.*num_heads \* head_dim)"):
        read_model(tmp_path / "copy")


# --- The classifier in PyTorch ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_pytorch_gives_the_classes_that_we_give(weights, folder, side):
    transformers = pytest.importorskip("transformers", reason="the classifier's code is for transformers")
    torch = pytest.importorskip("torch", reason="transformers runs on torch")
    texts = ["serum", *sentences()[:3]]
    ours = [list(found.probabilities.values()) for found in biomamba_jax.load(folder).classify(texts)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    for special in (True, False):  # the start of a text is added where the tokenizer does not
        rows = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=special)
        with torch.no_grad():
            theirs = torch.softmax(model(**rows).logits.double(), -1).numpy()
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert tuple(model.config.id2label.values()) == LABELS


def test_a_classifier_that_pytorch_trained_on_is_saved_and_loaded_by_pytorch(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the classifier's code is for transformers")
    torch = pytest.importorskip("torch", reason="transformers runs on torch")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    ids, labels = torch.as_tensor([[0, 5, 9], [0, 7, 3]]), torch.as_tensor([0, 2])
    model(ids, labels=labels).loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0 and model.backbone.embeddings.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.classifier.weight.mul_(2)
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "saved", trust_remote_code=True
        )
        torch.testing.assert_close(again(ids).logits, expected)


# --- The model card ---


def header(folder):
    start, raw, text = (folder / "README.md").read_text().split("---\n", 2)
    assert start == "" and text.strip().startswith("# ")
    return yaml.safe_load(raw)


def test_the_card_begins_with_what_the_hub_reads(weights, folder):
    expected = {"license": "unknown", "library_name": "transformers", "pipeline_tag": "text-classification"}
    found = header(folder)
    assert expected.items() <= found.items() and found["language"] == "en"
    assert not {"base_model", "datasets", "model-index"} & found.keys()
    card = (folder / "README.md").read_text()
    assert "## Intended use" in card and "## Limits" in card and "Not a medical device" in card


def test_the_card_states_origin_licence_and_what_a_report_measured(weights, tmp_path):
    sources = [{"name": "hf:owner/set", "sha256": "1"}, {"name": "a.xml.gz", "sha256": "2"}]
    about = {"steps": 3, "tokens": 9, "base_model": "owner/base"}
    about["text"] = {"sources": sources, "splits": {}, "tokenizer": "t"}
    write_model(dataclasses.replace(weights, about=about, head=None), tmp_path / "m", "native")
    measured = {"models": {"us": {"perplexity": {"value": 9.5}, "bits_per_byte": {"value": 1.25}}}}
    task = {"title": "PubMedQA", "models": {"us": {"measures": {"accuracy": {"value": 0.75}}}}}
    report = {"models": {"us": {"path": str(tmp_path / "m")}, "other": {"path": "elsewhere"}}}
    lossy = {"models": {"us": {"perplexity": {"value": 1.5}, "bits_per_byte": {"value": 0.1}}}, "not_compared": ["us"]}
    report |= {"domains": {"pubmed": measured, "lossy": lossy}, "tasks": {"pubmedqa": task}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    words = ["--input", f"{tmp_path}/m", "--output", f"{tmp_path}/out", "--report", f"{tmp_path}/report.json"]
    convert.main([*words, "--license", "apache-2.0", "--language", "de"])
    found = header(tmp_path / "out")
    assert (found["license"], found["language"]) == ("apache-2.0", "de")
    assert (found["base_model"], found["datasets"]) == ("owner/base", ["owner/set"])
    metrics = [each for result in found["model-index"][0]["results"] for each in result["metrics"]]
    expected = {"perplexity": 9.5, "bits_per_byte": 1.25, "accuracy": 0.75}
    assert {each["type"]: each["value"] for each in metrics} == expected
    (tmp_path / "report.json").write_text(json.dumps(report | {"models": {"other": {"path": "x"}, "b": {"path": "y"}}}))
    with pytest.raises(UserError, match=r"report\.json: has no model .*m, only .*x, .*y"):
        convert.main(["--input", f"{tmp_path}/m", "--output", f"{tmp_path}/o", "--report", f"{tmp_path}/report.json"])


def test_settings_without_an_effect_are_left_out_of_the_card():
    optimizer = {"learning_rate": 1e-3, "ema": 0.0, "layer_decay": 1.0, "embedding_rate": "full", "clip": 0}
    assert effective("optimizer", optimizer) == {"learning_rate": 1e-3}
    assert effective("optimizer", optimizer | {"layer_decay": 0.9})["embedding_rate"] == "full"
    schedule = {"kind": "cosine", "warmup_fraction": 0.1, "stable_fraction": 0.65, "final_fraction": 0.1}
    assert effective("schedule", schedule) == {"kind": "cosine", "warmup_fraction": 0.1, "final_fraction": 0.1}
    assert "stable_fraction" in effective("schedule", schedule | {"kind": "wsd"})
    assert effective("schedule", schedule | {"kind": "constant"}) == {"kind": "constant", "warmup_fraction": 0.1}
    assert effective("train", {"steps": 5, "epochs": 1.0, "log_every": 10, "seed": 0}) == {"steps": 5, "seed": 0}
    assert effective("train", {"steps": None, "epochs": 1.0}) == {"epochs": 1.0}
    assert effective("lora", {"rank": 0, "alpha": 16.0}) == {}


@pytest.mark.parametrize(
    "about", [{"steps": "x"}, {"steps": 1}, {"text": []}, {"evaluation": 5}, {"results": [1]}], ids=str
)
def test_a_damaged_story_ends_in_one_line(weights, tmp_path, about):
    with pytest.raises(UserError, match="information about its training"):
        write_model(dataclasses.replace(weights, about=about), tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_tokenizer_adds_no_start_is_classified_alike_in_pytorch(weights, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the classifier's code is for transformers")
    torch = pytest.importorskip("torch", reason="transformers runs on torch")
    path = write_byte_level(tmp_path / "t", ["<|endoftext|>"])
    write_model(dataclasses.replace(weights, tokenizer_file=path), tmp_path / "hf", "hf")
    [ours] = biomamba_jax.load(tmp_path / "hf").classify("serum of mice")
    pipe = transformers.pipeline("text-classification", str(tmp_path / "hf"), trust_remote_code=True, top_k=None)
    with torch.no_grad():
        theirs = {each["label"]: each["score"] for each in pipe(["serum of mice"])[0]}
    assert theirs == pytest.approx(ours.probabilities, abs=1e-5)
