"""The reproduction: its proportions and controls, its commands, and figures with both uncertainties."""

import json
import math
from itertools import product

import numpy as np
import pytest
import yaml

from benchmarks import reproduction
from benchmarks.reproduction import CONFIGS, PARTS, ReproductionBenchmark, commands, results
from biomamba_jax.command_line import parse
from biomamba_jax.config import PretrainConfig


@pytest.fixture(scope="module")
def parts():
    return {name: parse(PretrainConfig, ["--config", str(CONFIGS / f"{name}.yaml")], "") for name in PARTS}


def tokens(config):
    return config.train.steps * config.data.batch_size * config.data.sequence_length


def test_adaptation_takes_at_most_a_tenth_of_the_general_model_s_tokens_and_its_controls_as_many(parts):
    base, adapted = tokens(parts["general"]), tokens(parts["adapted"])
    assert adapted <= base / 10
    assert tokens(parts["continued"]) == tokens(parts["not_decontaminated"]) == adapted
    assert tokens(parts["scratch"]) == base + adapted


def test_controls_differ_in_one_thing_alone(parts):
    """The text, for the one; what is left out of it, for the other."""
    settings = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in PARTS}
    for control in ("continued", "not_decontaminated"):
        kept = [{k: v for k, v in settings[name].items() if k not in ("run_dir", "prepare", "data")}
                for name in (control, "adapted")]  # fmt: skip
        assert kept[0] == kept[1]
    prepared = settings["adapted"]["prepare"]
    assert prepared.pop("decontaminate") == ["data/reproduce/evaluation.jsonl"]
    assert prepared == settings["not_decontaminated"]["prepare"]


def test_every_model_of_a_seed_starts_from_the_general_one_of_that_seed(parts):
    *runs, evaluate = commands(ReproductionBenchmark(seeds=2, pubmedqa="q.json"))
    assert len(runs) == 2 * len(PARTS)
    for (seed, part), command in zip(product("01", PARTS), runs, strict=True):
        config = parse(PretrainConfig, command[1:], "")
        assert config.train.seed == int(seed) and config.run_dir == f"runs/reproduce/{part}-{seed}"
        assert config.init_from == (f"runs/reproduce/general-{seed}" if parts[part].init_from else None)
        assert ("q.json" in config.prepare.decontaminate) == (part in ("adapted", "scratch"))
        assert config.run_dir in evaluate
    assert evaluate[-2:] == ["--pubmedqa.path", "q.json"]


def test_the_first_seed_prepares_the_text_then_the_others_run_side_by_side_and_all_are_measured(monkeypatch):
    ran = []
    monkeypatch.setattr(reproduction, "write_evaluation_text", lambda path: None)
    monkeypatch.setattr(reproduction, "run", lambda command: ran.append(command))
    monkeypatch.setattr(reproduction, "run_on_cores", lambda chains: ran.extend(chains))
    monkeypatch.setattr(reproduction, "results", lambda *_: "table")
    monkeypatch.setattr(reproduction.files, "write_text", lambda *_: None)
    reproduction.reproduce_claim(ReproductionBenchmark())
    *runs, evaluate = commands(ReproductionBenchmark())
    n = len(PARTS)
    assert ran == [*runs[:n], runs[n : 2 * n], runs[2 * n :], evaluate]


def write(folder, nats, tokens):
    """An evaluation of two seeds: `nats` by part, and what each seed adds to them, per token."""
    documents = folder / "documents" / "PubMed"
    documents.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"domains": {"PubMed": {}}}))
    for part, (base, spread) in nats.items():
        for seed in (0, 1):
            values = (base + spread * (2 * seed - 1)) * np.asarray(tokens)
            lines = [{"nats": float(n), "tokens": int(t)} for n, t in zip(values, tokens, strict=True)]
            (documents / f"{part}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_perplexity_is_that_of_the_mean_cross_entropy_with_the_range_over_seeds(tmp_path):
    nats = dict.fromkeys(PARTS, (4.0, 0.0)) | {"adapted": (3.0, 0.1), "scratch": (3.0, 0.2)}
    write(tmp_path, nats, [10, 20, 30])
    found = results(tmp_path, ReproductionBenchmark(seeds=2))
    row = next(line for line in found.splitlines() if "PubMed, 3 documents" in line).split(" | ")
    low, mean, high = (f"{math.exp(x):.1f}" for x in (2.9, 3.0, 3.1))
    assert row[3] == f"{mean} ({mean}-{mean}) [{low}-{high}]"


@pytest.mark.parametrize(("spread", "verdict"), [(0.1, "larger"), (0.3, "NOT larger")])
def test_an_effect_that_the_seeds_spread_hides_is_called_so(tmp_path, spread, verdict):
    """An effect of 0.5 nats a token, where the seeds differ by 0.2 or by 0.6."""
    write(tmp_path, dict.fromkeys(PARTS, (4.0, 0.0)) | {"adapted": (3.5, spread)}, [10, 20, 30])
    lines = results(tmp_path, ReproductionBenchmark(seeds=2)).splitlines()
    (line,) = (line for line in lines if line.startswith("Adaptation, PubMed"))
    assert f"the effect is {verdict} than the spread over seeds" in line
    assert f"divided by {math.exp(0.5):.2f} (" in line
