"""A model whose documents begin with another token than the end of a text: every command agrees on it."""

import json

import numpy as np
import pytest
import tokenizers
from test_lm_eval_adapter import requests
from test_pretrain import SMALL
from test_scoring import config
from tiny_models import sentences, write_byte_level
from tokenizers import processors

import biomamba_jax
from biomamba_jax import convert, prepare, pretrain
from biomamba_jax.data.pipeline import evaluation_batches
from biomamba_jax.data.shards import open_split
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.tasks.lm_eval_adapter import HarnessMethods
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.train.metrics import read_metrics

START, END = 257, 258
SPELLED = ["the patients <|begin|> were <|end|> given insulin", "<|begin|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer like Llama's, shards and a run of it, and the run's export."""
    folder = tmp_path_factory.mktemp("start")
    special = ["<|other|>", "<|begin|>", "<|end|>"]
    file = write_byte_level(folder / "t", special, eos_token="<|end|>", bos_token="<|begin|>")
    library = tokenizers.Tokenizer.from_file(str(file))
    template = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", START)])
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    library.save(str(file))
    texts = [f"{text} {number}" for number, text in enumerate(sentences()[:60])]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = f"--input {folder}/a.jsonl --output {folder}/shards --tokenizer {file} --workers 1 --seed 1"
    prepare.main([*shards.split(), "--validation_fraction=0.2", "--test_fraction=0"])
    sizes = "--model.tie_embeddings false --data.sequence_length 128 --train.steps 2 --tensorboard=false"
    pretrain.main([*SMALL, f"--data.path={folder}/shards", f"--run_dir={folder}/run", *sizes.split()])
    convert.main(["--input", f"{folder}/run", "--output", f"{folder}/hf"])
    return folder


def texts_of(folder, split="validation"):
    tokenizer = load_tokenizer(folder / "shards" / "tokenizer.json")
    return [tokenizer.decode(document.ids[:-1]) for document in open_split(folder / "shards", split)[1]]


def test_training_rows_begin_with_it_and_end_with_the_other(folder):
    manifest, documents = open_split(folder / "shards", "validation")
    assert (manifest.format_version, manifest.tokenizer.start_id, manifest.tokenizer.eos_id) == (2, START, END)
    [batch] = evaluation_batches(documents, sequence_length=1024, batch_size=4)
    begins = np.diff(batch["segment_ids"], prepend=0, axis=1) > 0
    assert begins.sum() == len(documents) and (batch["inputs"][begins] == START).all()
    assert (batch["inputs"] == START).sum() == (batch["targets"] == END).sum() == len(documents)
    assert START not in batch["targets"] and END not in batch["inputs"]


@pytest.mark.parametrize("name", ["run", "hf", "hf:hf"])
def test_evaluation_predicts_the_first_token_from_it_whoever_runs_the_model(folder, name):
    if name.startswith("hf:"):
        pytest.importorskip("transformers", reason="runs the export")
    prefix, _, name = name.rpartition(":")
    scorer = load_scorer("m", f"{prefix and 'hf:'}{folder}/{name}", config())
    held_out = [line for line in read_metrics(folder / "run") if line["split"] == "validation"][-1]
    nats = np.concatenate([nats for _, nats in scorer.documents(texts_of(folder))])
    assert len(nats) == held_out["tokens"]
    assert nats.mean() == pytest.approx(held_out["loss"], abs=2e-5)


def by_hand(model, rows):
    """Log probability of each token but the first of each row, by the model's logits."""
    for row in rows:
        logits = model.logits([row])[0, :-1, : model.tokenizer.vocab_size].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        yield (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(row) - 1), row[1:]]


@pytest.mark.parametrize("path", ["run", "hf"])
def test_texts_and_prompts_follow_it_and_text_never_makes_it(folder, path):
    model = biomamba_jax.load(folder / path)
    assert (model.tokenizer.start_id, model.tokenizer.eos_id) == (START, END)
    for text, score in zip(SPELLED, model.logprobs(SPELLED), strict=True):
        assert not {START, END} & set(score.tokens) and model.tokenizer.decode(score.tokens) == text
        [expected] = by_hand(model, [[START, *score.tokens]])
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        [prompt] = model.tokenizer.encode_prompts([text])
        assert prompt == [START, *score.tokens]


def test_lm_eval_and_evaluate_and_generate_give_what_transformers_gives(folder):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    ours = biomamba_jax.load(folder / "run")
    for text in [*SPELLED, "insulin"]:
        assert theirs(text)["input_ids"] == ours.tokenizer.encode_prompts([text])[0]
    assert json.loads((folder / "hf" / "config.json").read_text())["start_token_id"] == START

    harness = HarnessMethods()
    harness.scorer, other = (load_scorer("m", f"{name}{folder}/hf", config()) for name in ("", "hf:"))
    asked = requests(("the patients", " insulin"), ("", "glucose"))
    rows = [[START, *ours.tokenizer.encode_batch(["".join(each.args)])[0]] for each in asked]
    expected = [found[len(each.args[0]) :].sum() for each, found in zip(asked, by_hand(ours, rows), strict=True)]
    assert [total for total, _ in harness.loglikelihood(asked)] == pytest.approx(expected, abs=1e-4)
    rolled = harness.loglikelihood_rolling(requests(("insulin",)))
    assert rolled == pytest.approx([ours.logprobs("insulin")[0].total], abs=1e-4)
    prompts = ["the patients", SPELLED[0]]
    assert harness.scorer.generate(prompts, 8, []) == other.generate(prompts, 8, [])
