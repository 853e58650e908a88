"""Pretraining on a mixture: what the config names is what is trained on, counted per source, and resumed exactly."""

import dataclasses
import json

import pytest
from synthetic import write_shards
from tiny_models import train_tokenizer

from biomamba_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from biomamba_jax.config.data import MixtureConfig, SourceConfig
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.train.loop import train
from biomamba_jax.train.metrics import read_metrics
from biomamba_jax.train.setup import total_steps

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sources = {
        "pubmed": SourceConfig(str(write_shards(folder / "pubmed")), weight=80),
        "wikipedia": SourceConfig(str(write_shards(folder / "wikipedia", documents=60, seed=1)), weight=20),
    }
    data = DataConfig(
        path=sources["pubmed"].path, sequence_length=32, batch_size=4, num_workers=0, mixture=MixtureConfig(sources)
    )
    return PretrainConfig(
        run_dir=str(folder / "whole"),
        model=ModelConfig(d_model=16, n_layers=2, d_state=4, headdim=8),  # the program of test_pretrain.py
        data=data,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(kind="constant", warmup_fraction=0),  # one program for any number of steps
        train=TrainConfig(steps=STEPS, log_every=2, eval_every=0, eval_batches=1),
        checkpoint=CheckpointConfig(every=2),
        tensorboard=False,
    )


@pytest.fixture(scope="module")
def lines(config):
    train(config)
    return [line for line in read_metrics(config.run_dir) if line["split"] == "train"]


def test_every_metrics_line_counts_the_tokens_of_each_source(lines):
    assert len(lines) == STEPS // 2
    for line in lines:
        assert line["tokens/pubmed"] + line["tokens/wikipedia"] == line["tokens"]
    last = lines[-1]
    assert last["tokens/pubmed"] / last["tokens"] == pytest.approx(0.8, abs=0.05)


def test_a_run_in_two_parts_writes_the_same_lines(config, lines):
    parts = dataclasses.replace(config, run_dir=config.run_dir + "-parts")
    for steps in (4, STEPS):
        train(dataclasses.replace(parts, train=dataclasses.replace(config.train, steps=steps)))
    found = [line for line in read_metrics(parts.run_dir) if line["split"] == "train"]
    counts = ("step", "tokens", "tokens/pubmed", "tokens/wikipedia")
    assert [[line[name] for name in counts] for line in found] == [[line[name] for name in counts] for line in lines]


def test_epochs_are_those_of_the_main_source(config):
    of_epochs = dataclasses.replace(config, train=TrainConfig(epochs=2.0))
    manifest = Manifest.load(config.data.path)
    assert total_steps(of_epochs, manifest) == -(-2 * round(manifest.splits["train"].tokens / 0.8) // (32 * 4))


def test_a_manifest_of_another_vocabulary_than_its_tokenizer_is_refused(config, tmp_path):
    shards = write_shards(tmp_path / "shards", documents=10)
    tokenizer = train_tokenizer(shards)
    path = shards / "manifest.json"
    raw = json.loads(path.read_text())
    raw["tokenizer"] |= {"file": tokenizer.path.name, "sha256": tokenizer.sha256}
    path.write_text(json.dumps(raw))
    settings = dataclasses.replace(config.data, path=str(shards), mixture=MixtureConfig())
    with pytest.raises(UserError, match=r"states 31 ids, start None and end 0, tokenizer\.model has 310"):
        train(dataclasses.replace(config, data=settings, run_dir=str(tmp_path / "run")))
