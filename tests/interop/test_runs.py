"""A run directory of `pretrain` is taken as it is: the newest checkpoint, its average, its tokenizer and its story."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
import yaml
from random_weights import flipped_bit, random_weights
from synthetic import write_shards

from biomamba_jax.command_line import to_yaml
from biomamba_jax.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, PretrainConfig, TrainConfig
from biomamba_jax.data.tokenizer import train_sentencepiece
from biomamba_jax.errors import UserError
from biomamba_jax.interop import dialect_of, read_model, write_model
from biomamba_jax.interop.adapters import fingerprint
from biomamba_jax.parallel.sharding import leaves_by_path
from biomamba_jax.train.checkpoints import Checkpoints
from biomamba_jax.train.optimizer import evaluation_weights, make_optimizer
from biomamba_jax.train.step import TrainState


def write_run(folder, ema: float, best: int | None = None):
    """Two checkpoints, as `train` writes them; returns the weights that are to be evaluated at the second."""
    config = PretrainConfig(
        run_dir=str(folder),
        model=ModelConfig(kind="mamba2", d_model=32, n_layers=2, vocab_size=31, d_state=8, headdim=16, unroll=2),
        data=DataConfig(path=str(write_shards(folder.parent / "shards")), sequence_length=64, batch_size=4),
        optimizer=OptimizerConfig(ema=ema),
        train=TrainConfig(steps=20),
    )
    optimizer = make_optimizer(config.optimizer, config.model, lambda step: 1e-3)
    params = random_weights(config.model).params
    zero = np.zeros((), np.int32)
    first = TrainState(zero, params, optimizer.init(params), np.zeros(2, np.uint32), zero, zero)
    numbers = iter(range(10_000))
    second = jax.tree.map(lambda x: np.full_like(x, next(numbers)), first)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        for step, state in ((9, first), (10, second)):
            checkpoints.save(step, state, {} if best is None else {"best": {"step": best}})
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": step, "split": "validation", "perplexity": 100.0 - step} for step in (0, 10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return evaluation_weights(second.params, second.optimizer)


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["weights", "average"])
def test_the_newest_checkpoint_gives_the_weights_that_were_evaluated(tmp_path, ema):
    expected = leaves_by_path(write_run(tmp_path / "run", ema))
    assert dialect_of(tmp_path / "run") == "run"
    weights = read_model(tmp_path / "run")
    found = leaves_by_path(weights.params)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])
    assert weights.config.d_state == 8 and weights.config.unroll == 1


def test_the_best_checkpoint_is_read_where_the_run_keeps_it(tmp_path):
    write_run(tmp_path / "run", 0.0, best=9)
    assert read_model(tmp_path / "run").about["steps"] == 10
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["checkpoint"]["keep_best"] = True
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    assert read_model(tmp_path / "run").about["steps"] == 9


def test_adapters_are_merged_with_alpha_over_rank_into_their_base(tmp_path):
    base = random_weights(ModelConfig(kind="mamba2", d_model=32, n_layers=2, vocab_size=31, d_state=8, headdim=16))
    write_model(base, tmp_path / "base", "native")
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(shape, np.float32) for shape in ((2, 64, 4), (2, 4, 32)))
    zero = np.zeros((), np.int32)
    adapters = {"layers": {"mixer": {"out": {"kernel": {"a": a, "b": b}}}}}
    with Checkpoints(tmp_path / "run", CheckpointConfig()) as checkpoints:
        state = TrainState(zero, adapters, {}, np.zeros(2, np.uint32), zero, zero)
        checkpoints.save(3, state, {"base_sha256": fingerprint(base.params)})
    settings = {
        "model": dataclasses.asdict(base.config),
        "data": {"batch_size": 1, "sequence_length": 8},
        "lora": {"rank": 4, "alpha": 6.0},
        "init_from": str(tmp_path / "base"),
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    found, expected = leaves_by_path(read_model(tmp_path / "run").params), leaves_by_path(base.params)
    expected["layers/mixer/out/kernel"] = expected["layers/mixer/out/kernel"] + 1.5 * (a @ b)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_model_card_tells_how_the_weights_came_about(tmp_path):
    write_run(tmp_path / "run", 0.0)
    weights = read_model(tmp_path / "run")
    write_model(weights, tmp_path / "hf", "hf")
    write_model(read_model(tmp_path / "hf"), tmp_path / "ssm", "mamba_ssm")
    for folder in ("hf", "ssm"):  # the story goes along with safetensors
        card = (tmp_path / folder / "README.md").read_text()
        assert "10 steps, 2,560 tokens" in card
        assert "learning_rate 0.001" in card
        assert "made-up (sha256 000" in card
        assert "| perplexity | 90.0000 |" in card


def test_the_tokenizer_is_the_one_in_the_run_or_else_that_of_the_shards(tmp_path):
    write_run(tmp_path / "run", 0.0)
    assert read_model(tmp_path / "run").tokenizer_file is None
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    made = train_sentencepiece(["a few words for a tokenizer"] * 50, 275, tmp_path / "shards" / "made-up.model")
    manifest["tokenizer"] |= {"file": "made-up.model", "sha256": made.sha256}
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    assert read_model(tmp_path / "run").tokenizer_file == tmp_path / "shards" / "made-up.model"
    (tmp_path / "run" / "tokenizer.model").write_bytes((tmp_path / "shards" / "made-up.model").read_bytes())
    assert read_model(tmp_path / "run").tokenizer_file == tmp_path / "run" / "tokenizer.model"


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(PretrainConfig()))
    with pytest.raises(UserError, match="no checkpoint"):
        read_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", b"# \xff", "config.yaml: is not the config of a run"),
        ("config.yaml", b"- a", "config.yaml: is not the config of a run"),
        ("config.yaml", b"model: {d_model: 32}", r"config.yaml: .*data\.batch_size"),
        ("config.yaml", b"model: {d_model: '32'}\ndata: {batch_size: 1, sequence_length: 1}", "config.yaml: .*d_model"),
        ("metrics.jsonl", b'{"step": 0}\n{"a":\n', "metrics.jsonl, line 2: not a record with a step"),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl, line 1: not a record with a step"),
        ("checkpoints/10/state/_METADATA", b"{", "checkpoint 10: .*state/_METADATA: is damaged .* whole .* step 9"),
        ("checkpoints/10/loop/metadata", b"[]", "checkpoint 10: .*loop/metadata: is damaged .* whole .* of step 9"),
        (
            "config.yaml",
            b"model: {d_model: 9223372036854775808, vocab_size: 9}\ndata: {batch_size: 1, sequence_length: 1}",
            "config.yaml: is not the config of a run",
        ),
        (
            "config.yaml",
            b"model: {d_model: 32}\ndata: {path: [a], batch_size: 1, sequence_length: 1}",
            "config.yaml: .*text",
        ),
        ("history.jsonl", b'{"step": 0}\n', "history.jsonl, line 1: does not hold a step and a config"),
        ("history.jsonl", b'{"step": 0, "config": {"data": 5}}\n', "history.jsonl: holds no settings of a run"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, file, content, message):
    write_run(tmp_path / "run", 0.0)
    assert file == "history.jsonl" or (tmp_path / "run" / file).is_file()
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "run")


@pytest.mark.parametrize("flips", [20, pytest.param(400, marks=pytest.mark.long)])
def test_no_flipped_bit_in_a_checkpoint_goes_unnoticed_by_resume_or_export(tmp_path, flips):
    write_run(tmp_path / "run", 0.9)
    draw = random.Random(flips)
    files = [path for path in sorted((tmp_path / "run" / "checkpoints" / "10").rglob("*")) if path.stat().st_size]
    for path in draw.choices([path for path in files if path.is_file()], k=flips):
        named = pytest.raises(UserError, match=r"checkpoint 10: .*; the newest whole checkpoint is of step 9")
        with flipped_bit(path, draw):
            with named:
                read_model(tmp_path / "run")
            with named:
                Checkpoints(tmp_path / "run", CheckpointConfig())
    assert read_model(tmp_path / "run").about["steps"] == 10


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state/_METADATA", b"{", "checkpoint 10: .*/10/state: cannot be read .* whole .* of step 9"),
        ("loop/metadata", b"{", "checkpoint 10: .*/10/loop: cannot be read .* whole .* of step 9"),
        ("loop/metadata", b"[]", "checkpoint 10: .*/10/loop: was not written by"),
    ],
)
def test_damage_in_a_checkpoint_without_digests_is_named(tmp_path, file, content, message):
    write_run(tmp_path / "run", 0.0)
    (tmp_path / "run" / "checkpoints" / "10" / "SHA256SUMS").unlink()
    (tmp_path / "run" / "checkpoints" / "10" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "run")


def test_the_model_card_tells_the_settings_of_each_range_of_steps_up_to_its_checkpoint(tmp_path):
    write_run(tmp_path / "run", 0.0)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    lines = []
    for step, rate, batch_size in ((0, 3e-3, 2), (4, 1e-3, 4), (10, 5e-4, 64)):
        settings = config | {"optimizer": config["optimizer"] | {"learning_rate": rate}}
        lines.append({"step": step, "config": settings | {"data": config["data"] | {"batch_size": batch_size}}})
    (tmp_path / "run" / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = read_model(tmp_path / "run").about
    assert about["recipe"]["optimizer"]["learning_rate"] == 1e-3  # of steps 5 to 10
    assert about["recipe"]["until step 4"] == {"optimizer.learning_rate": 3e-3, "data.batch_size": 2}
    assert about["tokens"] == (4 * 2 + 6 * 4) * 64


def test_a_line_of_metrics_that_is_still_being_written_is_left_out(tmp_path):
    write_run(tmp_path / "run", 0.0)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "spl')
    assert read_model(tmp_path / "run").about["evaluation"]["perplexity"] == 90.0


def test_an_empty_newer_checkpoint_does_not_hide_the_last_complete_one(tmp_path):
    write_run(tmp_path / "run", 0.0)
    (tmp_path / "run" / "checkpoints" / "99999").mkdir()
    assert read_model(tmp_path / "run").about["steps"] == 10


def test_a_base_model_of_the_hub_keeps_its_name_whatever_its_revision_is_called(tmp_path):
    write_run(tmp_path / "run", 0.0)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("init_from: null", "init_from: owner/name@refs/pr/3"))
    assert read_model(tmp_path / "run").about["base_model"] == "owner/name"
