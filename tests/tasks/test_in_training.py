"""A model in training is evaluated on tasks, with the figures that `evaluate` gives for the same weights."""

import json
import random

import pytest
from tiny_models import WORDS

from biomamba_jax.errors import UserError
from biomamba_jax.evaluate import main as evaluate
from biomamba_jax.pretrain import main as pretrain
from biomamba_jax.train.metrics import read_metrics

TINY = (
    "--data.path=shards --run_dir=run --model.d_model=16 --model.n_layers=1 --model.headdim=8 --model.d_state=4 "
    "--data.sequence_length=32 --data.batch_size=4 --data.num_workers=0 --train.steps=4 --optimizer.ema=0.5 "
    "--prepare.input=text.jsonl --prepare.train_tokenizer=300 --prepare.validation_fraction=0.2"
).split()
TASKS = "--pubmedqa.path=pqal.json --pubmedqa.max_questions=20 --domains.notes.path=notes.jsonl".split()


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    """Text to train on, a domain, and PubMedQA's labels on made-up questions."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for name, count in (("text", 200), ("notes", 8)):
        lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=30)), "pmid": i}) for i in range(1, count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    entries = {
        str(i): {"QUESTION": "insulin?", "CONTEXTS": [" ".join(draw.choices(WORDS, k=6))], "final_decision": answer}
        for i, answer in enumerate(["yes"] * 55 + ["no"] * 34 + ["maybe"] * 11)
    }
    (tmp_path / "pqal.json").write_text(json.dumps(entries))


@pytest.mark.slow
def test_the_figures_are_those_of_evaluate_and_stand_in_the_metrics_of_the_run(tmp_path):
    pretrain([*TINY, "--evaluate.every=2", *(word.replace("--", "--evaluate.") for word in TASKS)])
    lines = {(line["split"], line["step"]): line for line in read_metrics("run")}
    assert {step for split, step in lines if split == "evaluate/pubmedqa"} == {2, 4}
    evaluate(["--models.run=run", "--output=after", *TASKS])
    report = json.loads((tmp_path / "after" / "report.json").read_text())
    for key, measure in report["tasks"]["pubmedqa"]["models"]["run"]["measures"].items():
        assert lines["evaluate/pubmedqa", 4][key] == measure["value"]
    text, figures = report["domains"]["notes"]["models"]["run"], lines["evaluate/domains.notes", 4]
    for key in ("perplexity", "bits_per_byte"):
        assert figures[key] == pytest.approx(text[key]["value"], rel=1e-6)
    assert figures["tokens"] == text["tokens"]
    predictions = (tmp_path / "run" / "evaluation" / "predictions" / "pubmedqa" / "run.jsonl").read_text()
    assert predictions == (tmp_path / "after" / "predictions" / "pubmedqa" / "run.jsonl").read_text()


def test_a_missing_file_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"no-such\.json"):
        pretrain([*TINY, "--evaluate.pubmedqa.path=no-such.json"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
