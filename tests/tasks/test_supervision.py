"""Examples for fine-tuning from PubMedQA: which questions are learnt, which choose the weights, which are the test."""

import dataclasses
import json
import random

import pytest

from biomamba_jax.config import BioASQConfig, ExamplesConfig, FinetuneConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.supervision import read_tasks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    draw = random.Random(0)
    entries = {
        str(10_000 + i): {
            "QUESTION": f"Question {i}?",
            "CONTEXTS": [f"Context {i}."],
            "LABELS": ["RESULTS"],
            "final_decision": draw.choices(["yes", "no", "maybe"], [55, 34, 11])[0],
            "LONG_ANSWER": f"Answer {i}.",
        }
        for i in range(1000)
    }
    path = tmp_path_factory.mktemp("pubmedqa") / "ori_pqal.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("fold", [0, 9])
def test_no_question_is_in_two_of_training_development_and_test(path, fold):
    config = FinetuneConfig(init_from="unused", fold=fold, pubmedqa=PubMedQAConfig(path=str(path)))
    (task,) = read_tasks(config)
    parts = [{example.key for example in part} for part in (task.train, task.development, task.test)]
    assert [len(part) for part in parts] == [450, 50, 500]
    assert len(set.union(*parts)) == 1000


def test_the_folds_development_questions_are_the_500_that_are_not_the_test(path):
    chosen, test = set(), set()
    for fold in range(10):
        (task,) = read_tasks(FinetuneConfig(init_from="unused", fold=fold, pubmedqa=PubMedQAConfig(path=str(path))))
        chosen |= {example.key for example in task.development}
        test |= {example.key for example in task.test}
    assert len(chosen) == 500 and not chosen & test


def test_questions_of_bioasq_that_are_not_learnt_are_counted(tmp_path):
    answers = {"yesno": "yes", "factoid": [["a"]], "list": None, "summary": None}
    questions = [{"type": kind, "body": f"{kind}?", "exact_answer": answer} for kind, answer in answers.items()]
    (tmp_path / "b.json").write_text(json.dumps({"questions": questions}))
    asked = BioASQConfig(path=[str(tmp_path / "b.json")])
    first, second = read_tasks(FinetuneConfig(init_from="unused", bioasq=asked))
    assert first.messages == ["bioasq: questions left out: 1 without a golden answer, 1 summary"]
    assert not second.messages
    with pytest.raises(UserError, match=r"b\.json: no question of bioasq.types \(list\) with a golden answer"):
        read_tasks(FinetuneConfig(init_from="unused", bioasq=dataclasses.replace(asked, types=["list"])))


def test_prompts_that_two_splits_share_are_said(tmp_path):
    lines = [{"prompt": f"Is {word}?", "answer": " yes"} for word in "abcd"]
    for name, part in (("train", lines[:3]), ("dev", lines[2:]), ("test", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    files, development, test = ([str(tmp_path / f"{name}.jsonl")] for name in ("train", "dev", "test"))
    data = ExamplesConfig(files=files, development=development, test=test)
    [task] = read_tasks(FinetuneConfig(init_from="unused", data=data))
    assert task.messages == [
        "1 prompts of the development split are also in the training split",
        "1 prompts of the test split are also in the development split",
    ]
