"""Files from outside with anything in them: they are read, or refused in one line, and soon."""

import itertools
import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import hammer, mutated_file, read_or_refused, some_or_many
from random_weights import random_weights
from safetensors.numpy import load_file
from synthetic import write_shards
from tiny_models import train_tokenizer, write_byte_level, write_tiny_model

from biomamba_jax.command_line import parse
from biomamba_jax.config import EvaluateConfig, ExamplesConfig, ModelConfig, MultipleChoiceConfig, PretrainConfig
from biomamba_jax.data.annotation_files import read_annotated
from biomamba_jax.data.examples import read_examples
from biomamba_jax.data.shards import open_split
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.folders import DIGESTS
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.model_card import read_results
from biomamba_jax.tasks import bioasq, pubmedqa
from biomamba_jax.tasks.multiple_choice import read_task
from biomamba_jax.tasks.vectors import EmbeddingFolder
from biomamba_jax.train.metrics import read_metrics
from biomamba_jax.train.report import key_figures

MEMORY = 1 << 30
"""Bytes by which the process may grow meanwhile."""
PUBMEDQA = """{
  "1": {"QUESTION": "Is it?", "CONTEXTS": ["a", "b"], "LABELS": ["AIM", "END"], "final_decision": "yes"},
  "2": {"QUESTION": "Is it not?", "CONTEXTS": ["a"], "LABELS": [], "final_decision": "no", "LONG_ANSWER": "No."}
}"""
BIOASQ = """{"questions": [
  {"id": "1", "type": "yesno", "body": "Is it?", "snippets": [{"text": "So.", "document": "http://x/1"}],
   "exact_answer": "yes", "ideal_answer": ["It is."]},
  {"id": "2", "type": "factoid", "body": "Which?", "snippets": ["So."], "exact_answer": [["a", "b"]]},
  {"id": "3", "type": "list", "body": "Which?", "snippets": [], "exact_answer": [["a"], ["b", "c"]]}
]}"""
CHOICES = """\
{"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "x"}
{"question": "Which one?", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 0, "subject_name": "A", "id": "7"}
{"question": "Where?", "choices": ["x", "y"], "answer": 1}
"""
SPANS = """\
{"text": "TP53 is a gene.", "spans": [{"start": 0, "end": 4, "type": "Gene", "ids": ["7157"], "text": "TP53"}]}
{"text": "It is.", "labels": ["a", "b"], "score": 0.5, "relations": [["CID", "D1", "D2"]], "question": "Is it?"}
"""
SQUAD = """{"data": [{"paragraphs": [{"context": "TP53 is a gene.", "qas": [
  {"id": "1", "question": "Which?", "answers": [{"text": "TP53", "answer_start": 0}]}
]}]}]}"""
PUBTATOR = "1|t|TP53 is a gene.\n1|a|Yes.\n1\t0\t4\tTP53\tGene\t7157\n1\tCID\tD1\tD2\n"
BIOC = """<collection><document><id>1</id><passage><offset>0</offset><text>TP53 is a gene.</text>
<annotation id="T1"><infon key="type">Gene</infon><location offset="0" length="4"/><text>TP53</text></annotation>
</passage></document></collection>"""
METRICS = """{"step": 0, "split": "validation", "loss": 2.5, "perplexity": 12.2}
{"step": 10, "split": "train", "loss": "NaN", "learning_rate": 0.001, "tokens": 81920}
"""
EMBED = """{
  "model": "m", "settings": {"format": "npy", "pooling": "mean"}, "probe": [0.5, 0.25], "texts": 3, "parts": [3]
}"""
REPORT = """{
  "models": {"m": {"path": "run"}},
  "domains": {"a": {"models": {"m": {
    "perplexity": {"value": 1.5}, "bits_per_byte": {"value": 1.5}, "accuracy": {"value": 0.5}, "loss": {"value": 2}}}}},
  "tasks": {"t": {"title": "T", "models": {"m": {"measures": {"accuracy": {"value": 0.5}}}}}}
}"""
YAML = """\
run_dir: runs/a
model: {kind: mamba2, d_model: 32, n_layers: 2}
train: {steps: 10, profile_steps: [1, 2], compiler_options: {xla_dump_to: a}}
data:
  path: shards
  mixture: {sources: {a: {path: b, weight: 2.0}}}
optimizer: {learning_rate: 1e-3}
"""
YAML_BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder of folders, each with what a reader needs and no digests."""
    folder = tmp_path_factory.mktemp("originals")
    tokenizer = train_tokenizer(folder)
    for dialect in ("hf", "mamba_ssm", "native"):
        write_tiny_model(folder / dialect, "mamba2", tokenizer, dialect)
    mamba3 = ModelConfig(kind="mamba3", d_model=32, n_layers=1, d_state=16, headdim=16, vocab_size=40)
    write_model(random_weights(mamba3), folder / "mamba3", "hf")
    tensors = load_file(shutil.copytree(folder / "hf", folder / "indexed") / "model.safetensors")
    (folder / "indexed" / "model.safetensors").rename(folder / "indexed" / "model-1.safetensors")
    index = {"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps(index))
    for sums in folder.rglob(DIGESTS):
        sums.unlink()
    write_byte_level(folder / "bytes", ["<|endoftext|>"], ["plain"], [("t", "h")], eos_token="<|endoftext|>")
    write_shards(folder / "shards", documents=12)
    (folder / "files").mkdir()
    for name, content in FILES.items():
        (folder / "files" / name).write_text(content)
    return folder


FILES = {
    "pubmedqa.json": PUBMEDQA,
    "bioasq.json": BIOASQ,
    "choices.jsonl": CHOICES,
    "spans.jsonl": SPANS,
    "marked.jsonl": '{"text": "<< a >> binds [[ b ]]", "label": "binds"}\n',
    "squad.json": SQUAD,
    "examples.jsonl": '{"prompt": "Is it?", "answer": " yes"}\n{"prompt": "Is it not?", "answer": " no"}\n',
    "report.json": REPORT,
    "pubtator.txt": PUBTATOR,
    "bioc.xml": BIOC,
    "metrics.jsonl": METRICS,
    "embed.json": EMBED,
    "settings.yaml": YAML,
}


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.decode_batch(tokenizer.encode_batch(["the patients were", "plain <|endoftext|>"]))
    assert tokenizer.vocabulary_sha256


def annotated(kind: str) -> Callable[[Path], Any]:
    return lambda path: read_annotated(str(path), ExamplesConfig(format=kind))  # type: ignore[arg-type]


READERS: dict[str, Callable[[Path], Any]] = {
    "hf/config.json": lambda path: read_model(path.parent),
    "hf/model.safetensors": lambda path: read_model(path.parent),
    "hf/generation_config.json": lambda path: read_model(path.parent),
    "hf/tokenizer_config.json": lambda path: read_model(path.parent),
    "mamba_ssm/config.json": lambda path: read_model(path.parent),
    "mamba3/config.json": lambda path: read_model(path.parent),
    "indexed/model.safetensors.index.json": lambda path: read_model(path.parent),
    "native/model.json": lambda path: read_model(path.parent),
    "bytes/tokenizer.json": use_tokenizer,
    "shards/manifest.json": lambda path: open_split(path.parent, "train"),
    "files/pubmedqa.json": pubmedqa.read_questions,
    "files/bioasq.json": bioasq.read_questions,
    "files/choices.jsonl": lambda path: read_task("m", MultipleChoiceConfig(path=[str(path)]), 0),
    "files/spans.jsonl": annotated("spans"),
    "files/marked.jsonl": annotated("marked"),
    "files/squad.json": annotated("squad"),
    "files/examples.jsonl": lambda path: list(read_examples(str(path), "{prompt}", "{answer}")),
    "files/report.json": lambda path: read_results(path, "run"),
    "files/pubtator.txt": annotated("pubtator"),
    "files/bioc.xml": annotated("bioc"),
    "files/metrics.jsonl": lambda path: key_figures(read_metrics(path.parent), []),
    "files/embed.json": lambda path: EmbeddingFolder.open(path.parent),
    "files/settings.yaml": lambda path: parse(PretrainConfig, ["--config", str(path)]),
}


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@some_or_many(shares=24)
@pytest.mark.parametrize("file", READERS)
def test_a_file_with_anything_in_it_is_read_or_refused_in_one_line(originals, tmp_path, file, examples, seconds):
    folder = tmp_path / file.partition("/")[0]
    shutil.copytree(originals / folder.name, folder)
    path, before, outcomes = tmp_path / file, peak_memory(), Counter[str]()
    whole = path.read_bytes()
    READERS[file](path)
    named = None if file.endswith(".yaml") else tmp_path  # a setting is named by its key

    def check(seed: int) -> None:
        path.write_bytes(mutated_file(whole, random.Random(seed)))
        outcomes[read_or_refused(lambda: READERS[file](path), named)] += 1

    hammer(check, examples, seconds)
    assert outcomes["refused"]
    assert peak_memory() - before < MEMORY


@pytest.mark.parametrize(
    "text", [YAML_BOMB + "train: {profile_steps: *j}\n", "train: &a {profile_steps: [*a]}\n", "model: &a\n  kind: *a\n"]
)
def test_settings_that_repeat_themselves_without_end_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    for schema in (PretrainConfig, EvaluateConfig):
        assert read_or_refused(lambda: parse(schema, ["--config", str(tmp_path / "c.yaml")])) == "refused"  # noqa: B023
