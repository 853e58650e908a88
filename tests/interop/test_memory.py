"""Conversions pass tensors through one by one: what they need beside the weights themselves does not grow with them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from random_weights import random_weights

from biomamba_jax.config import ModelConfig
from biomamba_jax.interop import write_model

# Anonymous memory: pages of mapped files are the system's to take back.
MEASURE = """
import sys, threading, time
import torch, orbax.checkpoint, safetensors.torch
from biomamba_jax.config import ModelConfig
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.names import native_shapes
from biomamba_jax.parallel.sharding import leaves_by_path

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous() - before)
        time.sleep(0.003)

native_shapes(ModelConfig(vocab_size=16))  # starts jax
before, peak, done = anonymous(), [0], False
watcher = threading.Thread(target=watch)
watcher.start()
weights = read_model(sys.argv[1])
write_model(weights, sys.argv[2], sys.argv[3])
done = True
watcher.join()
print(peak[0] / sum(x.nbytes for x in leaves_by_path(weights.params).values()))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_conversions_stay_below_one_and_a_half_times_the_float32_weights(tmp_path):
    pytest.importorskip("torch", reason="mamba_ssm's pytorch_model.bin is part of what is measured")
    config = ModelConfig(kind="mamba2", d_model=1024, n_layers=44, vocab_size=8192)  # 1.2 GB
    write_model(random_weights(config), tmp_path / "hf", "hf")
    for source, target in (("hf", "native"), ("native", "mamba_ssm"), ("mamba_ssm", "hf_again")):
        command = [sys.executable, "-c", MEASURE, tmp_path / source, tmp_path / target, target.removesuffix("_again")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / source)
        assert 1.0 <= float(done.stdout.splitlines()[-1]) < 1.5, (source, target, done.stdout)
