"""The comparison of text mining: its runs and what distinguishes them, its figures, and that nothing runs twice."""

import json
from collections import Counter

import numpy as np
import pytest
import yaml
from tiny_models import train_tokenizer, write_tiny_model

from benchmarks import seeds, text_mining
from benchmarks.text_mining import TASKS, TextMiningBenchmark, commands, compare_text_mining, results
from biomamba_jax.command_line import parse
from biomamba_jax.config import FinetuneConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model


def test_runs_differ_in_weights_reading_and_seed_alone():
    for task, conditions in TASKS.items():
        runs = [parse(FinetuneConfig, words[1:], "") for words in commands(TextMiningBenchmark()) if task in words[2]]
        assert len(runs) == 3 * len(conditions)
        differ = [name for name in vars(runs[0]) if len({str(getattr(run, name)) for run in runs}) > 1]
        assert set(differ) - {"reading"} == {"run_dir", "init_from", "train"}
        assert len({str({**vars(run.train), "seed": 0}) for run in runs}) == 1
        assert Counter(run.init_from for run in runs) == {
            "runs/quickstart": 3 * (len(conditions) - 1), **{f"runs/text_mining/random-{n}": 1 for n in range(3)}
        }  # fmt: skip
        assert all(run.data.test and not run.data.development for run in runs)


CORPUS = ["Insulin fell .", "Mice had diabetes .", "Both rose ."]
TRUE = [[[0, 7, "X", []]], [[9, 17, "X", []]], []]
RELATIONS = [("<< A >> binds [[ B ]] and C .", "1"), ("<< A >> binds B and [[ C ]] .", "2"), ("<< D >> [[ E ]]", "1")]


@pytest.fixture
def config(tmp_path):
    """Finished runs: random weights find nothing; pretrained ones all, but for one more wrong span of seed 1."""
    config = TextMiningBenchmark(data=str(tmp_path / "data"), output=str(tmp_path / "out"), seeds=2)
    (tmp_path / "data" / "chemprot").mkdir(parents=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in RELATIONS]
    (tmp_path / "data" / "chemprot" / "test.txt").write_text("\n".join(lines))
    for seed, task, condition in text_mining.keys(config):
        folder = tmp_path / "out" / f"{task}-{condition}-{seed}"
        (folder / "predictions").mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        found = [[], [], []] if condition == "random" else [*TRUE[:2], [[0, 4, "X", []]] * seed]
        entities = [{"spans": f, "gold": {"spans": t}} for f, t in zip(found, TRUE, strict=True)]
        classes = [{"correct": condition != "random"}, {"correct": False}, {"correct": condition != "random"}]
        kind, rows = ("conll", entities) if task == "ncbi_disease" else ("marked", classes)
        text = "\n".join(map(json.dumps, rows))
        (folder / "predictions" / f"{kind}-test.jsonl").write_text(text)
    return config


def test_figures_are_micro_f1_over_all_seeds_with_the_range_over_seeds(config):
    table, figures = results(config)
    entities = figures["ncbi_disease"]
    assert entities["random"]["value"] == 0 and entities["random"]["seeds"] == [0, 0]
    assert entities["echo"]["seeds"] == pytest.approx([100, 80])  # 4 of 4 and 4 of 5 true and predicted spans
    assert entities["echo"]["value"] == pytest.approx(100 * 8 / 9)
    assert figures["chemprot"]["once"]["value"] == pytest.approx(100 * 2 / 3)
    assert "ncbi_disease, 3 sentences" in table and "chemprot, 2 sentences" in table  # one has two pairs
    [better] = [line for line in table.splitlines() if line.startswith("ncbi_disease, once minus random: 88.9")]
    assert "[80.0 to 100.0]; the effect is larger than the spread" in better
    [same] = [line for line in table.splitlines() if line.startswith("ncbi_disease, echo minus once: 0.0")]
    assert "NOT larger" in same


def test_finished_runs_are_not_run_again_and_other_settings_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(seeds.__file__.rpartition("/benchmarks")[0])
    write_tiny_model(tmp_path / "model", "mamba2", train_tokenizer(tmp_path))
    given = {"data": config.data, "output": config.output, "seeds": 2, "model": str(tmp_path / "model")}
    (tmp_path / "out" / "chemprot-once-1" / "results.json").unlink()
    ran = []
    monkeypatch.setattr(text_mining, "run_on_cores", ran.extend)
    table = compare_text_mining(TextMiningBenchmark(**given))
    assert [f"--run_dir={tmp_path}/out/chemprot-once-1"] == [w for [words] in ran for w in words if "run_dir" in w]
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert json.loads((tmp_path / "out" / "table.json").read_text())["settings"]["seeds"] == 2
    first, second = (read_model(tmp_path / "out" / f"random-{seed}") for seed in range(2))
    assert first.config == second.config == read_model(given["model"]).config and first.tokenizer_file.exists()
    assert not np.array_equal(first.params["embedding"], second.params["embedding"])
    with pytest.raises(UserError, match="other settings"):
        compare_text_mining(TextMiningBenchmark(**given, epochs=7.0))


def test_a_failed_command_ends_its_chain_and_the_benchmark(monkeypatch):
    with pytest.raises(UserError, match=r"biomamba_jax\.nothing has failed"):
        seeds.run_on_cores([[["biomamba_jax.nothing"]]])
    ran = []
    monkeypatch.setattr(seeds, "run", lambda command: ran.append(command) or 1 / len(command[0]))
    with pytest.raises(ZeroDivisionError):
        seeds.run_on_cores([[["a"], [""], ["never"]]])
    assert ran == [["a"], [""]]


def test_the_configs_name_the_files_of_the_corpora():
    for task in TASKS:
        raw = yaml.safe_load((text_mining.CONFIGS / f"{task}.yaml").read_text())
        assert all(path.startswith(f"data/text_mining/{task}/") for path in raw["data"]["files"] + raw["data"]["test"])
