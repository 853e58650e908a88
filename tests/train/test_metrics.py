"""The files of metrics: deterministic, whole after a kill, and the same after a resume."""

import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.config import RunConfig
from biomamba_jax.errors import UserError
from biomamba_jax.train.metrics import MetricsWriter, read_metrics, read_timing


def writer_of(run_dir, last_step=None, **more):
    return MetricsWriter(RunConfig(run_dir=str(run_dir), **{"tensorboard": False, **more}), last_step)


def log(run_dir, steps, *, last_step=None):
    with writer_of(run_dir, last_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": np.float32(1 / (step + 3)), "tokens": 128 * step})
            writer.write(step, "validation", {"loss": jnp.float32(0.1)})
            writer.write_timing(step, {"tokens_per_second": 1.5, "share_of_peak": None})


def test_a_line_keeps_the_order_of_keys_and_the_exact_float32(tmp_path):
    log(tmp_path, [1])
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert first == '{"step": 1, "split": "train", "loss": 0.25, "tokens": 128}'
    assert second == '{"step": 1, "split": "validation", "loss": 0.10000000149011612}'
    assert np.float32(json.loads(second)["loss"]) == np.float32(0.1)


def test_what_differs_from_run_to_run_has_a_file_of_its_own(tmp_path):
    log(tmp_path, [1])
    (record,) = read_timing(tmp_path)
    assert list(record) == ["step", "time", "tokens_per_second"]


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "spl', b'{"step": 5, "split": "train", "loss": 1.0}'])
def test_a_killed_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path, torn):
    log(tmp_path / "whole", range(8))
    log(tmp_path / "killed", range(5))
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    log(tmp_path / "killed", range(4, 8), last_step=3)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [record["step"] for record in read_timing(tmp_path / "killed")] == list(range(8))


def test_a_run_from_the_start_drops_the_lines_of_one_that_never_reached_a_checkpoint(tmp_path):
    log(tmp_path, [0, 1, 2])
    log(tmp_path, [0])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 0]


def test_a_killed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    log(tmp_path, [0, 1, 2])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer_of(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_json_lacks_are_written_as_strings_and_read_as_numbers(tmp_path):
    with writer_of(tmp_path) as writer:
        writer.write(1, "train", {"loss": math.nan, "gradient_norm": np.float32(math.inf), "z": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "split": "train", "loss": "NaN", "gradient_norm": "Infinity", "z": "-Infinity"}\n'
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["gradient_norm"] == math.inf and record["z"] == -math.inf


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with writer_of(tmp_path) as writer:
        writer.write(1, "train", {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "split": "train", "loss": 2.0}]


def test_a_broken_line_is_named(tmp_path):
    log(tmp_path, [0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
        read_metrics(tmp_path)
    for line in ('{"step": 1}', '{"step": 1, "split": "train", "loss": null}', '{"step": 1, "split": 5}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
            read_metrics(tmp_path)


def test_tensorboard_has_a_curve_for_each_value_of_a_split(tmp_path):
    with writer_of(tmp_path, tensorboard=True) as writer:
        writer.write(1, "train", {"loss": 2.0})
        writer.write(1, "validation", {"loss": math.nan})
        writer.write_timing(1, {"tokens_per_second": 3.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(tag in content for tag in (b"train/loss", b"validation/loss", b"timing/tokens_per_second"))


def test_tensorboard_is_written_without_importing_pytorch(tmp_path):
    code = f"""
import sys
from biomamba_jax.config import RunConfig
from biomamba_jax.train.metrics import MetricsWriter
with MetricsWriter(RunConfig(run_dir={str(tmp_path)!r}), None) as writer:
    writer.write(1, "train", {{"loss": 2.0}})
print("tensorboardX" in sys.modules, "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True False\n" and list((tmp_path / "tensorboard").iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log(tmp_path, [0])
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_without_the_extra_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'biomamba-jax\[wandb\]'"):
        writer_of(tmp_path, wandb_project="mamba")


def test_weights_and_biases_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.logged = settings, []
            runs.append(self)

        def define_metric(self, *_, **__): ...

        def log(self, values):
            self.logged.append(values)

        def finish(self): ...

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    for last_step in (None, 1, None):
        with writer_of(tmp_path, last_step, wandb_project="mamba") as writer:
            writer.write(2, "validation", {"loss": 2.0})
    first, resumed, fresh = (run.settings["id"] for run in runs)
    assert first == resumed != fresh
    assert runs[0].logged == [{"validation/loss": 2.0, "step": 2}]
