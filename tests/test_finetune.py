"""The finetune command from questions to a model that answers them, at a small size, on questions written for it."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tiny_models import train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.classify import main as classify
from biomamba_jax.convert import main as convert
from biomamba_jax.errors import UserError
from biomamba_jax.finetune import main
from biomamba_jax.train.metrics import read_metrics

NOUNS = "insulin glucose patients diabetes mice serum cell type the fell given in were and with".split()
SETTINGS = (
    "--init_from=base --run_dir=run --data.sequence_length=64 --data.batch_size=4 --tensorboard=false "
    "--optimizer.learning_rate=2e-2 --optimizer.weight_decay=0 --train.log_every=5 --train.eval_every=10"
).split()
LORA = "--lora.rank=8 --lora.targets=[_proj,lm_head]".split()


def answer_of(word: str) -> str:
    return "yes" if word in ("insulin", "serum", "mice") else "no"


def questions():
    """Whether the first word is one of three: 45 of 225 are answered with yes."""
    return [(f"{first} {second}?", answer_of(first)) for first, second in itertools.product(NOUNS, NOUNS)]


def write_jsonl(path: Path, records) -> None:
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in records))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models of random weights, by kind."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(folder)
    return {kind: write_tiny_model(folder / kind, kind, tokenizer) for kind in ("mamba1", "mamba2")}


def furnish(folder: Path, base) -> Path:
    """A model to start from and questions, in a folder that a command is run in."""
    os.symlink(base["mamba2"], folder / "base")
    records = questions()
    write_jsonl(folder / "train.jsonl", records[::2])
    write_jsonl(folder / "test.jsonl", records[1::2])
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path, base)


class Learnt(NamedTuple):
    """A run of adapters in a folder of its own."""

    folder: Path
    results: dict
    out: str
    err: str


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, base):
    folder = furnish(tmp_path_factory.mktemp("learnt"), base)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        results = finetune("--train.steps=120", *LORA)
    return Learnt(folder, results, out.getvalue(), err.getvalue())


def predictions(run: str = "run", name: str = "examples-test"):
    return [json.loads(line) for line in Path(run, "predictions", f"{name}.jsonl").read_text().splitlines()]


def finetune(*settings: str):
    main([*SETTINGS, "--data.files=[train.jsonl]", "--data.test=[test.jsonl]", "--data.answer= {answer}", *settings])
    return json.loads(Path("run/results.json").read_text())


@pytest.mark.slow
def test_adapters_learn_the_questions_and_the_result_leaves_as_any_model_does(learnt, monkeypatch):
    monkeypatch.chdir(learnt.folder)
    assert learnt.results["examples test"]["accuracy"] > 0.95
    assert "examples development" in learnt.out and "examples test" in learnt.out
    convert(["--input=run", "--output=hf", "--to=hf"])
    ids = np.arange(40).reshape(2, 20)
    run, exported = biomamba_jax.load("run"), biomamba_jax.load("hf")
    known = run.config.known_vocab  # an export has no rows of padding
    np.testing.assert_allclose(run.logits(ids)[..., :known], exported.logits(ids)[..., :known], atol=1e-5)
    asked = predictions()[:6]
    prompts = [json.loads(line)["prompt"] for line in Path("test.jsonl").read_text().splitlines()[:6]]
    answers = exported.generate(prompts, max_new_tokens=8)
    assert [answer.text.strip() for answer in answers] == [each["prediction"] for each in asked]
    assert {answer.finish_reason for answer in answers} == {"eos"}


@pytest.mark.slow
def test_a_classifier_is_learnt_and_leaves_beside_the_weights(here, capsys):
    results = finetune("--train.steps=120", "--head=classifier", *LORA[:1], "--lora.targets=[_proj]")
    measured = results["examples test"]
    assert measured["accuracy"] > 0.95 and measured["macro_f1"] > 0.9 and measured["majority"] == "no"
    assert measured["majority_accuracy"] == pytest.approx(0.8, abs=0.02)
    convert(["--input=run", "--output=exported", "--to=mamba_ssm"])
    assert (here / "exported" / "head.safetensors").exists()
    prompts = [json.loads(line)["prompt"] for line in Path("test.jsonl").read_text().splitlines()]
    classes = biomamba_jax.load("exported").classify(prompts)
    assert [each.label for each in classes] == [each["prediction"] for each in predictions()]
    assert classes[0].probabilities == pytest.approx(predictions()[0]["scores"], abs=1e-5)
    classify(["--model=run", "--file=test.jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["predicted_label"] for line in lines] == [each.label for each in classes]
    assert lines[0]["answer"] == predictions()[0]["truth"] and set(lines[0]["probabilities"]) == {"yes", "no"}


def test_a_model_without_a_classifier_says_how_to_get_one(here):
    with pytest.raises(UserError, match=r"base: has no head.safetensors; fine-tune with --head classifier"):
        classify(["--model=base", "--file=test.jsonl"])


def test_a_run_tells_what_it_learns_and_what_it_reads(learnt):
    assert "adapters: 0.0" in learnt.err and "to train on" in learnt.err and "held-out loss" in learnt.err
    lines = [line for line in read_metrics(learnt.folder / "run") if line["split"] == "validation"]
    assert [line["step"] for line in lines] == list(range(0, 121, 10))
    assert all({"loss", "accuracy", "targets"} <= line.keys() for line in lines)
    assert (learnt.folder / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.files=[]"], "give data.files, pubmedqa.path or bioasq.path"),
        (["--data.files=[absent.jsonl]"], "absent.jsonl: cannot be read"),
        (["--lora.rank=2", "--lora.targets=[q_proj]"], "lora.targets: 'q_proj' matches no matrix"),
        (["--cross_validate=true"], "cross_validate = True: needs pubmedqa.path"),
        (["--init_from=absent"], "absent: no such folder"),
        (["--head=classifier", "--labels=[A,B]"], "is of class 'yes', none of A, B"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(here, settings, message):
    with pytest.raises(UserError, match=message):
        finetune("--train.steps=2", *settings)


def test_a_base_that_has_changed_since_is_refused(learnt, here):
    shutil.copytree(learnt.folder / "run", "run")
    os.remove("base")
    other = write_tiny_model(here / "other", "mamba2", train_tokenizer(here))
    weights = biomamba_jax.interop.read_model(other)
    weights.params["norm_f"]["weight"] *= 1.5
    biomamba_jax.interop.write_model(weights, "base", "native")
    with pytest.raises(UserError, match="holds other weights"):
        biomamba_jax.load("run")


# --- PubMedQA and BioASQ ---------------------------------------------------------------------------------------------


def write_pubmedqa(path: Path) -> None:
    """40 questions of each answer: 20 for the test, two for each fold."""
    label = {"insulin": "yes", "glucose": "no", "diabetes": "maybe"}
    entries = {}
    for pmid, (first, number) in enumerate(itertools.product(label, range(40)), 1):
        entries[str(pmid)] = {
            "QUESTION": f"{first} {NOUNS[number % 14]} {NOUNS[number // 14]}?",
            "CONTEXTS": ["the patients were given insulin"],
            "LABELS": ["METHODS"],
            "final_decision": label[first],
        }
    path.write_text(json.dumps(entries))


@pytest.mark.long
def test_ten_folds_are_trained_each_by_itself_and_pooled(here):
    write_pubmedqa(here / "ori_pqal.json")
    main([*SETTINGS, "--pubmedqa.path=ori_pqal.json", "--cross_validate=true", "--train.steps=3", *LORA])
    results = json.loads(Path("run/results.json").read_text())
    assert list(results) == [*(f"fold {i}" for i in range(10)), "all folds", "test, mean of folds"]
    assert results["all folds"]["questions"] == 60 and results["test, mean of folds"]["questions"] == 60
    pooled = [line for i in range(10) for line in predictions(f"run/fold-{i}", "pubmedqa-development")]
    right = sum(line["truth"] == line["prediction"] for line in pooled)
    assert results["all folds"]["accuracy"] == pytest.approx(right / 60)
    assert len({line["key"] for line in pooled}) == 60
    assert not {line["key"] for line in pooled} & {line["key"] for line in predictions("run/fold-0", "pubmedqa-test")}


@pytest.mark.slow
def test_bioasq_is_learnt_from_golden_files(here):
    snippets = [{"text": "the patients were given insulin"}]
    items = [
        {"id": f"y{i}", "type": "yesno", "body": f"{word} fell?", "exact_answer": answer_of(word), "snippets": snippets}
        for i, word in enumerate(NOUNS)
    ]
    items += [
        {"id": f"l{i}", "type": "list", "body": f"{word} and?", "exact_answer": [["mice", "cell"], ["serum"]]}
        for i, word in enumerate(NOUNS)
    ]
    Path("golden.json").write_text(json.dumps({"questions": items}))
    main([*SETTINGS, "--bioasq.path=[golden.json]", "--data.development_fraction=0.4", "--train.steps=3"])
    results = json.loads(Path("run/results.json").read_text())
    assert set(results) == {"bioasq-yesno development", "bioasq-names development"}
    assert {line["truth"] for line in predictions(name="bioasq-names-development")} == {"mice; serum"}
    assert all(set(line["scores"]) == {"yes", "no"} for line in predictions(name="bioasq-yesno-development"))


@pytest.mark.slow
def test_pubmedqa_itself_gives_the_published_baseline_on_its_test_set(here, base, shared_data):
    folder = shared_data / "pubmedqa"
    os.remove("base")
    os.symlink(base["mamba1"], "base")  # the faster one, for half a million tokens
    main(
        [*SETTINGS, f"--pubmedqa.path={folder / 'ori_pqal.json'}", "--train.steps=3", "--data.batch_size=16", *LORA]
        + [f"--pubmedqa.test_ids={folder / 'test_ground_truth.json'}", "--head=classifier", "--lora.targets=[_proj]"]
    )
    results = json.loads(Path("run/results.json").read_text())
    test = results["pubmedqa test"]
    assert test["questions"] == 500 and results["pubmedqa development"]["questions"] == 50
    assert test["majority"] == "yes"
    assert (round(test["majority_accuracy"], 3), round(test["majority_macro_f1"], 3)) == (0.552, 0.237)
    assert len(predictions(name="pubmedqa-test")) == 500


# --- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(here):
    settings = [
        *SETTINGS,
        "--data.files=[train.jsonl]",
        "--train.steps=60",
        "--checkpoint.every=7",
        "--lora.dropout=0.1",
    ]
    command = [sys.executable, "-m", "biomamba_jax.finetune", *settings, "--lora.dropout=0.1", *LORA]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def start(run: str) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--run_dir={run}"], env=environment, stderr=subprocess.PIPE)

    whole = start("whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors.decode()
    killed = start("killed")
    deadline = time.monotonic() + 300
    while not (here / "killed" / "checkpoints" / "14").exists() and time.monotonic() < deadline:
        assert killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = start("killed")
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors.decode()
    assert "resumed at step" in errors.decode()
    for file in ("metrics.jsonl", "results.json", "predictions/examples-development.jsonl"):
        assert (here / "whole" / file).read_bytes() == (here / "killed" / file).read_bytes()
    ids = np.arange(40).reshape(2, 20)
    np.testing.assert_array_equal(*(biomamba_jax.load(run).logits(ids) for run in ("whole", "killed")))
