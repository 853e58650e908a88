"""`python -m benchmarks` at a tiny size."""

import pytest

from benchmarks import __main__ as benchmark
from biomamba_jax.errors import UserError

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


@pytest.mark.slow
def test_compare_prints_both_contenders_and_their_ratio(capsys):
    pytest.importorskip("transformers")
    settings = ["--compare", "--allocators", "[default]", "--torch_compile", "false"]
    benchmark.main(["step", "--model.kind", "mamba2", *TINY, *settings])
    printed = capsys.readouterr().out
    assert "biomamba_jax" in printed
    assert "transformers" in printed
    assert "ratio within pairs" in printed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_decode_compares_with_generate_of_transformers(kind, capsys):
    pytest.importorskip("mambapy")
    benchmark.main(["decode", "--model.kind", kind, "--compare", *TINY_DECODING])
    assert "ratio within pairs" in capsys.readouterr().out


def test_what_to_measure_must_be_said():
    with pytest.raises(UserError, match="step"):
        benchmark.main(["steps"])
