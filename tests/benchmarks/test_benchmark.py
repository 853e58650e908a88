"""`python -m benchmarks` at a tiny size."""

import re
from dataclasses import replace

import pytest
from synthetic import write_shards

from benchmarks import __main__ as benchmark
from benchmarks.contenders import Machine
from benchmarks.decode import DecodeBenchmark, bytes_read
from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model.flops import matrix_parameters, training_flops_per_token

TINY = ["--model.d_model", "32", "--model.n_layers", "2", "--model.vocab_size", "100", "--model.headdim", "16"]
TINY += ["--data.sequence_length", "16", "--steps", "1"]
TINY_DECODING = [*TINY[:-4], "--prompt_length", "8", "--new_tokens", "4", "--rounds", "1"]


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_step_and_decode_print_speed_memory_and_share_of_peak(kind, capsys):
    benchmark.main(["step", "--model.kind", kind, *TINY])
    benchmark.main(["decode", "--model.kind", kind, "--batch_size", "3", *TINY_DECODING])
    printed = capsys.readouterr().out
    assert f"{kind}, 2 x 32, batch 1 x 16, float32" in printed
    assert f"{kind}, 2 x 32, float32, 3 prompts of 8 + 4 tokens" in printed
    for column in ("tokens/s", "peak memory", "share of peak"):
        assert column in printed


@pytest.mark.long
def test_compare_prints_both_contenders_and_their_ratio(capsys):
    pytest.importorskip("transformers")
    settings = ["--compare", "--allocators", "[default]", "--torch_compile", "false"]
    benchmark.main(["step", "--model.kind", "mamba2", *TINY, *settings])
    printed = capsys.readouterr().out
    assert "biomamba_jax" in printed
    assert "transformers" in printed
    assert "ratio within pairs" in printed
    assert re.search(r"cores; float32 products [\d,]+ GFLOP/s, reads [\d.,]+ GB/s, measured in this run", printed)
    assert "share of floor" in printed


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_decode_compares_with_generate_of_transformers(kind, capsys):
    pytest.importorskip("mambapy")
    benchmark.main(["decode", "--model.kind", kind, "--compare", *TINY_DECODING])
    assert "ratio within pairs" in capsys.readouterr().out


def test_the_floor_of_decoding_is_the_prompts_products_and_the_slower_of_reading_and_computing():
    model = ModelConfig(vocab_size=1000)
    config = DecodeBenchmark(model, batch_size=8, prompt_length=100, new_tokens=10)
    flops, weights = training_flops_per_token(model) / 3, bytes_read(config)
    assert config.floor(Machine("", flops, weights)) == pytest.approx(8 * 100 + 10 * 8)
    assert config.floor(Machine("", flops, weights / 20)) == pytest.approx(8 * 100 + 10 * 20)


def test_a_token_reads_the_matrices_in_their_dtype_but_no_untied_embedding():
    model = ModelConfig(vocab_size=1000)
    whole, half, quarter = (bytes_read(DecodeBenchmark(model, dtype)) for dtype in ("float32", "bfloat16", "int8"))
    assert whole - half == 2 * matrix_parameters(model)
    assert 0 < quarter - (whole - 3 * matrix_parameters(model)) < 0.02 * quarter  # scales
    assert bytes_read(DecodeBenchmark(replace(model, tie_embeddings=False))) == whole


def test_input_prints_what_one_host_delivers_and_all_of_them_would(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards")
    words = f"input --path {folder} --hosts 4 --batch_size 2 --sequence_length 8 --window 10 --seconds 0.1"
    benchmark.main(words.split())
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    one, all_hosts, _ = (float(line[2].replace(",", "")) for line in lines)
    assert all_hosts == pytest.approx(4 * one, abs=0.1)


def test_what_to_measure_must_be_said():
    with pytest.raises(UserError, match="step"):
        benchmark.main(["steps"])
