"""The pretrain command from text to a finished run directory, in this process and at a small size."""

import errno
import itertools
import json
import os
import signal
from pathlib import Path

import lxml.html
import numpy as np
import pytest
import yaml
from synthetic import write_shards

from biomamba_jax.command_line import run_command
from biomamba_jax.config import DataConfig, PretrainConfig
from biomamba_jax.data import ngrams
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.shards import open_split
from biomamba_jax.errors import UserError
from biomamba_jax.folders import locked
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.pretrain import main, write_baselines
from biomamba_jax.train import loop
from biomamba_jax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("shared_programs")
SMALL = (
    "--model.d_model=16 --model.n_layers=2 --model.headdim=8 --model.d_state=4 --data.sequence_length=32 "
    "--data.batch_size=4 --data.num_workers=0 --train.log_every=2 --train.eval_every=4 --optimizer.learning_rate=1e-2 "
    "--checkpoint.every=4 --schedule.kind=constant --schedule.warmup_fraction=0"  # one program for any number of steps
).split()


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_shards(tmp_path / "shards")


def pretrain(*argv: str) -> list[dict]:
    main([*SMALL, "--data.path=shards", "--run_dir=run", *argv])
    return read_metrics("run")


def test_a_run_leaves_everything_that_it_promises(shards, tmp_path, capsys):
    metrics = pretrain("--train.steps=8")
    assert [line["step"] for line in metrics if line["split"] == "train"] == [2, 4, 6, 8]
    held_out = [line["perplexity"] for line in metrics if line["split"] == "validation"]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]

    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocab_size"] == 31
    assert (run / "checkpoints" / "8").is_dir() and any((run / "tensorboard").iterdir())
    assert [b["name"].split(",")[0] for b in json.loads((run / "baselines.json").read_text())] == ["unigram", "bigram"]
    assert "unigram" in lxml.html.parse(str(run / "report.html")).getroot().text_content()
    table = capsys.readouterr().out
    for row in ("this model, step 0", "unigram", "bigram", "this model, step 8"):
        assert row in table


def test_baselines_are_counted_once_for_the_same_shards_and_again_for_others(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    counted = []
    count = ngrams.ngram_baselines
    monkeypatch.setattr(ngrams, "ngram_baselines", lambda *a, **options: counted.append(1) or count(*a, **options))
    for run in ("one", "two"):
        write_baselines(PretrainConfig(data=DataConfig(path="shards"), run_dir=run))
    assert len(counted) == 1 and Path("one/baselines.json").read_text() == Path("two/baselines.json").read_text()
    os.utime("shards/manifest.json", (0, 0))
    (tmp_path / "cache" / "baselines").chmod(0)
    write_baselines(PretrainConfig(data=DataConfig(path="shards"), run_dir="three"))
    assert len(counted) == 2


def test_shards_are_made_first_where_the_config_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "the heart kidney patients were treated with a randomised trial of aspirin in acute infarction".split()
    with open("text.jsonl", "w") as file:
        for pmid in range(1, 400):
            text = " ".join(words[(pmid * k * k) % len(words)] for k in range(3, 30))
            file.write(json.dumps({"text": f"{text} {pmid}", "pmid": pmid}) + "\n")
    main(
        [*SMALL, "--data.path=made", "--run_dir=run", "--train.steps=2", "--prepare.input=[text.jsonl]"]
        + "--prepare.train_tokenizer=300 --prepare.validation_fraction=0.1".split()
    )
    assert (tmp_path / "made" / "manifest.json").exists()
    assert (tmp_path / "run" / "tokenizer.model").exists()
    assert read_metrics("run")[-1]["step"] == 2


def test_a_longer_run_goes_on_from_a_shorter_one_and_says_what_changed(shards, capsys):
    pretrain("--train.steps=4")
    metrics = pretrain("--train.steps=8")
    assert [line["step"] for line in metrics if line["split"] == "train"] == [2, 4, 6, 8]
    assert "changed since this run began: train.steps was 4, is 8" in capsys.readouterr().err


def test_folders_may_have_any_name_be_links_and_be_moved(shards, tmp_path):
    odd = tmp_path / "my données: α 🧬 #1 100% {0} 'x'"
    odd.mkdir()
    shards.rename(odd / "the shards")
    Path("link").symlink_to(odd)
    arguments = [*SMALL, "--data.path=link/the shards", "--train.steps=2"]
    main([*arguments, f"--run_dir={odd}/run ü"])
    (odd / "run ü").rename(tmp_path / "moved run")
    Path("run").symlink_to("moved run")
    main([*arguments, "--run_dir=run", "--train.steps=4"])
    assert [line["step"] for line in read_metrics("run") if line["split"] == "train"] == [2, 4]
    write_model(read_model("link/../run"), odd / "export ö\n", "hf")
    assert read_model(Path("link") / "export ö\n").config == read_model("moved run").config


def test_a_report_that_a_full_disk_left_out_is_written_by_the_next_start(shards, monkeypatch, capsys):
    def full(run_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{run_dir}/report.html.tmp")

    with monkeypatch.context() as patch:
        patch.setattr("biomamba_jax.train.report.write_report", full)
        with pytest.raises(SystemExit) as end:
            run_command(main, [*SMALL, "--data.path=shards", "--run_dir=run", "--train.steps=2"])
    assert end.value.code == 1
    line = (
        "error: run/report.html.tmp: cannot be written (No space left on device); free space, then run the same command"
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
    assert not Path("run/report.html").exists()
    pretrain("--train.steps=2")
    assert Path("run/report.html").exists()


def test_a_finished_run_is_left_as_it_is(shards):
    first = pretrain("--train.steps=4")
    assert pretrain("--train.steps=4") == first


def test_a_start_that_trains_nothing_changes_nothing(shards):
    def contents():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("run").rglob("*") if path.is_file()}

    pretrain("--train.steps=2")
    before = contents()
    pretrain("--train.steps=2", "--optimizer.learning_rate=0.5")
    after = contents()
    del before[Path("run/lock")], after[Path("run/lock")]
    assert before == after


def test_the_settings_of_each_range_of_steps_are_kept(shards):
    pretrain("--train.steps=4")
    pretrain("--train.steps=8", "--optimizer.learning_rate=0.5")
    lines = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["config"]["optimizer"]["learning_rate"]) for line in lines] == [(0, 0.01), (4, 0.5)]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["optimizer"]["learning_rate"] == 0.5
    assert read_model("run").about["recipe"]["until step 4"]["optimizer.learning_rate"] == 0.01


def test_settings_that_never_reached_a_checkpoint_are_not_recorded(shards, monkeypatch):
    pretrain("--train.steps=4")
    before = Path("run/config.yaml").read_bytes(), Path("run/history.jsonl").read_bytes()
    with pytest.raises(UserError, match="losses or gradients were not finite"):
        pretrain("--train.steps=7", "--optimizer.learning_rate=1e30", "--train.max_skipped_steps=1")
    assert (Path("run/config.yaml").read_bytes(), Path("run/history.jsonl").read_bytes()) == before


def test_a_second_start_in_a_run_directory_is_refused_before_it_writes_anything(shards):
    with locked("run"), pytest.raises(UserError, match=r"run: another run uses it \(process \d+ of host \S+\)"):
        pretrain("--train.steps=2")
    assert [path.name for path in Path("run").iterdir()] == ["lock"]


def test_a_run_goes_back_to_the_newest_whole_checkpoint_if_told_to_and_ends_as_if_nothing_had_been(shards):
    pretrain("--train.steps=8")
    metrics = Path("run/metrics.jsonl").read_bytes()
    newest = Path("run/checkpoints/8/SHA256SUMS")
    newest.write_bytes(newest.read_bytes()[70:])
    with pytest.raises(UserError, match="newest whole checkpoint is of step 4: resume with --resume_from 4"):
        pretrain("--train.steps=8")
    with pytest.raises(UserError, match="newest whole checkpoint is of step 4"):
        read_model("run")
    for _ in range(2):
        pretrain("--train.steps=8", "--resume_from=4")
        assert Path("run/metrics.jsonl").read_bytes() == metrics
    assert "resume_from: null" in Path("run/config.yaml").read_text()
    assert read_model("run").about["steps"] == 8


@pytest.mark.parametrize("content", ["{", '[{"name": 1}]', '{"starts": 3}'])
def test_damaged_records_never_end_a_run(shards, content, capsys):
    pretrain("--train.steps=2")
    for name in ("baselines.json", "environment.json"):
        Path("run", name).write_text(content)
    assert pretrain("--train.steps=4")[-1]["step"] == 4
    assert "bigram" in capsys.readouterr().out
    assert json.loads(Path("run/environment.json").read_text())["starts"][-1]["step"] == 2


def test_weights_that_are_not_finite_are_refused_before_the_first_step(shards):
    pretrain("--train.steps=2")
    weights = read_model("run")
    weights.params["embedding"] = weights.params["embedding"] * np.float32(np.nan)
    write_model(weights, "broken", "native")
    with pytest.raises(UserError, match="step 0: the held-out loss is nan; check the weights of init_from"):
        main([*SMALL, "--data.path=shards", "--run_dir=second", "--init_from=broken", "--train.steps=4"])


@pytest.mark.parametrize("states_largest", [True, False], ids=["stated", "found in a document"])
def test_ids_beyond_the_vocabulary_are_refused_before_the_first_step(shards, states_largest):
    manifest = json.loads(Path("shards/manifest.json").read_text())
    assert manifest["splits"]["train"]["largest_id"] == 30
    manifest["tokenizer"]["vocab_size"] = 30
    if not states_largest:  # shards of version 0.1
        for split in manifest["splits"].values():
            del split["largest_id"]
    Path("shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"id 30, .*vocabulary of .*30"):
        pretrain("--train.steps=4")
    assert not Path("run/checkpoints").exists()


def test_a_skipped_step_names_its_rows_and_documents(shards, capsys):
    with pytest.raises(UserError, match="not finite"):
        pretrain(
            "--train.steps=30", "--optimizer.learning_rate=1e30", "--optimizer.clip=0", "--train.max_skipped_steps=2"
        )
    lines = [json.loads(line) for line in Path("run/skipped.jsonl").read_text().splitlines()]
    first = lines[0]["step"]
    assert [line["step"] for line in lines] == [first, first + 1, first + 2]  # a step's report is read one step later
    _, documents = open_split("shards", "train")
    plan = RowPlan(documents.lengths, 32, seed=0)
    for line in lines:
        rows = range(4 * (line["step"] - 1), 4 * line["step"])
        assert [row["row"] for row in line["rows"]] == list(rows)
        for row in line["rows"]:
            pieces = [(each["document"], each["pmid"] - 1, *each["tokens"]) for each in row["documents"]]
            assert pieces == [(piece.document, *piece) for piece in plan[row["row"]]]
    assert f"step {first}: update skipped, loss " in capsys.readouterr().err


def test_a_run_that_is_beyond_the_steps_asked_for_says_so(shards, capsys):
    pretrain("--train.steps=4")
    pretrain("--train.steps=2")
    assert "nothing to do: the run is at step 4 of the 2 steps of this config" in capsys.readouterr().err


def test_a_finished_run_whose_metrics_were_taken_away_still_ends_well(shards, capsys):
    pretrain("--train.steps=2")
    Path("run/metrics.jsonl").unlink()
    pretrain("--train.steps=2")
    assert capsys.readouterr().out.endswith(f"report: {Path('run/report.html')}\n")


def test_shards_without_held_out_text_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", documents=9)  # of which a tenth is held out
    with pytest.raises(UserError, match=r"the validation split is empty; prepare with a larger validation_fraction"):
        pretrain("--train.steps=2")


def test_a_run_directory_of_another_model_is_refused(shards):
    pretrain("--train.steps=2")
    with pytest.raises(UserError, match=r"does not fit this config .*: model\.d_model was 16, is 24; restore"):
        pretrain("--train.steps=4", "--model.d_model=24")


def test_a_run_whose_gradients_stay_non_finite_stops_with_the_remedy(shards):
    with pytest.raises(
        UserError, match=r"consecutive losses or gradients were not finite; lower optimizer\.learning_rate"
    ):
        pretrain(
            "--train.steps=30", "--optimizer.learning_rate=1e30", "--optimizer.clip=0", "--train.max_skipped_steps=3"
        )


def test_the_learning_rate_of_a_metrics_line_is_that_of_its_update_though_others_were_skipped(shards):
    settings = ["--optimizer.learning_rate=1e30", "--optimizer.clip=0", "--train.log_every=1"]
    with pytest.raises(UserError, match="consecutive losses or gradients were not finite"):
        pretrain(*settings, "--schedule.kind=linear", "--train.steps=30", "--train.max_skipped_steps=3")
    lines = [line for line in read_metrics("run") if line["split"] == "train"]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 3]
    assert [line["learning_rate"] for line in lines] == [pytest.approx(1e30)] * 4  # the only one that was applied


@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_returns(shards, monkeypatch, capsys, request_to_stop):
    batches, shard_batch = itertools.count(1), loop.shard_batch

    def note(batch, mesh):
        if next(batches) == 3:
            signal.raise_signal(request_to_stop)
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", note)
    pretrain("--train.steps=5000", "--train.eval_every=0", "--checkpoint.every=5000")
    (step,) = [int(path.name) for path in Path("run/checkpoints").iterdir()]
    assert 3 <= step < 5000
    assert f"{request_to_stop.name}: saving step {step:,}; run the same command to resume" in capsys.readouterr().err


def test_a_data_worker_that_dies_leaves_the_newest_state_saved(shards, monkeypatch):
    take, alive = loop.TrainIterator.__next__, iter([True] * 3)

    def dying(batches):
        if not next(alive, False):
            raise UserError("a data worker was killed")
        return take(batches)

    monkeypatch.setattr(loop.TrainIterator, "__next__", dying)
    with pytest.raises(UserError, match="a data worker was killed; step 3 is saved: run the same command to resume"):
        pretrain("--train.steps=8", "--checkpoint.every=8")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["3"]


def test_the_averaged_weights_are_the_evaluated_ones(shards):
    metrics = pretrain("--train.steps=4", "--optimizer.ema=0.999999")  # an average that stays at the start
    first, last = (line["loss"] for line in metrics if line["split"] == "validation")
    assert last == pytest.approx(first, abs=1e-4)
    trained = [line["loss"] for line in metrics if line["split"] == "train"]
    assert trained[-1] < first - 0.01


def test_compiler_options_reach_the_program_of_the_step(shards, tmp_path):
    pretrain("--train.steps=2", "--train.compiler_options={xla_dump_to: dump}")
    assert list((tmp_path / "dump").glob("*jit_train_step*"))


@pytest.mark.parametrize("option", ["xla_no_such_option: 1", "xla_cpu_enable_fast_math: maybe"])
def test_options_that_the_compiler_does_not_know_are_refused_before_the_run_begins(option, shards, tmp_path):
    with pytest.raises(UserError, match=rf"train\.compiler_options: .*{option.partition(':')[0]}"):
        pretrain("--train.steps=2", f"--train.compiler_options={{{option}}}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_collectives_are_offloaded_only_to_devices_with_sparse_cores(shards, tmp_path):
    with pytest.raises(UserError, match=r"train\.offload_collectives: cpu has no SparseCores"):
        pretrain("--train.steps=2", "--train.offload_collectives")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_shards_that_do_not_exist_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"biomamba_jax\.prepare"):
        main([*SMALL, "--data.path=missing"])


def test_a_run_starts_from_the_weights_of_another(shards):
    before = pretrain("--train.steps=4")[-1]
    main([*SMALL, "--data.path=shards", "--run_dir=second", "--init_from=run", "--train.steps=2", "--model.d_model=24"])
    first = read_metrics("second")[0]
    assert first["step"] == 0 and first["loss"] == before["loss"]
    main([*SMALL, "--data.path=shards", "--run_dir=second", "--init_from=run", "--train.steps=4"])  # and resumes
    assert read_metrics("second")[-1]["step"] == 4


def test_a_run_killed_while_it_wrote_its_first_checkpoint_begins_with_the_given_weights_again(shards):
    before = pretrain("--train.steps=4")[-1]
    again = [*SMALL, "--data.path=shards", "--run_dir=second", "--init_from=run", "--train.steps=2"]
    Path("second/checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    Path("second/config.yaml").write_bytes(Path("run/config.yaml").read_bytes())
    main(again)
    assert read_metrics("second")[0]["loss"] == before["loss"]
