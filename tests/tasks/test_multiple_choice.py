"""Multiple choice: files as published, prompts, and an answerer of known skill through the whole evaluation."""

import csv
import json

import pytest

from biomamba_jax.config import EvaluateConfig, MultipleChoiceConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import evaluation, evaluation_report
from biomamba_jax.tasks.multiple_choice import prompt_of, read_task
from biomamba_jax.tasks.scoring import Continuation, ModelFacts

OPTIONS = ["Aspirin", "Insulin", "Ramipril", "Warfarin"]
MEDQA = {
    "question": "Which lowers glucose?",
    "answer": "Insulin",
    "options": dict(zip("ABCD", OPTIONS, strict=True)),
    "meta_info": "step1",
    "answer_idx": "B",
}
MEDMCQA = {"id": "7", "question": "Which lowers glucose?", "cop": 2, "subject_name": "Pharmacology"}
MEDMCQA |= {f"op{letter}": text for letter, text in zip("abcd", OPTIONS, strict=True)}
NESTED = {"data": {"Question": "Which?", "Options": MEDQA["options"], "Correct Option": "B"}}
LISTED = {"question": "Which?", "options": [{"key": k, "value": v} for k, v in MEDQA["options"].items()]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, **settings):
    return read_task("set", MultipleChoiceConfig(path=[path], **settings), 0)


@pytest.mark.parametrize(
    ("rows", "subject"),
    [
        ([MEDQA], ""),
        ([MEDMCQA, MEDMCQA | {"cop": 4}], "Pharmacology"),
        ([MEDMCQA | {"cop": 1}, MEDMCQA | {"cop": 0}], "Pharmacology"),
        ([NESTED], ""),
        ([LISTED | {"answer_idx": "B"}], ""),
        ([LISTED | {"answer": "Insulin"}], ""),
        ([{"question": "Which?", "choices": OPTIONS, "answer": 1, "subject": "anatomy"}], "anatomy"),
        ([{"question": "Which?", "choices": OPTIONS, "answer": 1.0}], ""),  # from Parquet
        ([{"question": "Which?", "options": dict(zip("BCDE", OPTIONS, strict=True)), "answer_idx": "C"}], ""),
        ([{"question": "Which?", "options": dict(zip("1234", OPTIONS, strict=True)), "correct_option": 2}], ""),
        ([{"question": "Which?", "options": [{"key": i, "value": x} for i, x in enumerate(OPTIONS)], "answer": 1}], ""),
    ],
)
def test_published_layouts_are_read(tmp_path, rows, subject):
    question = read(write(tmp_path / "q.jsonl", *rows)).asked[0]
    assert (question.options, question.answer, question.subject) == (tuple(OPTIONS), "B", subject)


def test_mmlu_csv_has_no_header_and_its_subject_in_its_name(tmp_path):
    path = tmp_path / "college_medicine_test.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["Which, if any?", *OPTIONS, "B"], ["Which not?\nSay.", *OPTIONS, "D"]])
    first, second = read(str(path)).asked
    assert (first.question, first.answer, first.subject) == ("Which, if any?", "B", "college_medicine")
    assert (second.question, second.answer) == ("Which not?\nSay.", "D")


def test_a_cop_that_may_count_from_0_or_1_needs_first_option(tmp_path):
    path = write(tmp_path / "q.jsonl", MEDMCQA)
    with pytest.raises(UserError, match="first_option"):
        read(path)
    assert read(path, first_option=0).asked[0].answer == "C"
    assert read(path, first_option=1).asked[0].answer == "B"


def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path):
    twins, blank = MEDMCQA | {"opa": "Insulin"}, MEDMCQA | {"opa": " "}
    rows = [MEDMCQA | {"cop": 4}, MEDMCQA | {"cop": -1}, twins, blank, *[MEDMCQA] * 3]
    found = read(write(tmp_path / "q.jsonl", *rows), max_questions=2)
    assert len(found.asked) == 2
    counts = {"without an answer": 1, "with an empty option": 1, "with equal options": 1, "not in the sample": 2}
    assert found.left_out == counts


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": "x"}, "line 1: has no question"),
        (MEDQA | {"answer_idx": "E"}, "line 1: its answer is none of its 4"),
        (MEDQA | {"options": "Insulin"}, "line 1: has no question with 2 to 10 options"),
        ({"question": "?", "choices": [*"abcdefghijk"], "answer": 10}, "line 1: has no question with 2 to 10 options"),
        ({"question": "?", "choices": OPTIONS, "answer": 0.5}, "line 1: its answer is none of its 4"),
        ({"question": "?", "options": dict(zip("1234", OPTIONS, strict=True)), "answer": 0}, "its answer is none of"),
        ({"question": "?", "choices": OPTIONS, "answer": True}, "line 1: its answer is none of its 4"),
        (MEDQA | {"question": "\ud83d?"}, "line 1: holds half a character"),
    ],
)
def test_a_row_of_another_layout_is_refused_by_its_line(tmp_path, row, named):
    with pytest.raises(UserError, match=named):
        read(write(tmp_path / "q.jsonl", row))


def test_examples_come_from_the_subject_and_are_never_the_questions_that_are_asked(tmp_path):
    shown = [
        {"question": f"{s} {i}?", "choices": OPTIONS, "answer": i, "subject": s} for s in ("eye", "ear") for i in (0, 1)
    ]
    asked = {"question": "ear 2?", "choices": OPTIONS, "answer": 2, "subject": "ear"}
    train = write(tmp_path / "train.jsonl", asked | {"question": "EAR  2?"}, *shown)
    config = MultipleChoiceConfig(path=[write(tmp_path / "q.jsonl", asked)], train=[train], shots=2)
    questions = read_task("set", config, 0)
    text = "Question: ear 0?\nAnswer: Aspirin\n\nQuestion: ear 1?\nAnswer: Insulin\n\nQuestion: ear 2?\nAnswer:"
    assert prompt_of(questions.asked[0], config, questions.train) == text
    letters = MultipleChoiceConfig(path=config.path, train=[train], shots=1, answer="letter")
    listed = "\nA. Aspirin\nB. Insulin\nC. Ramipril\nD. Warfarin\nAnswer:"
    expected = f"Question: ear 0?{listed} A\n\nQuestion: ear 2?{listed}"
    assert prompt_of(questions.asked[0], letters, questions.train) == expected
    with pytest.raises(UserError, match="shots = 5"):
        read_task("set", MultipleChoiceConfig(path=config.path, train=[train], shots=5), 0)


class Knowing:
    """A scorer that knows the answers of the first questions, and prefers another option for the others."""

    facts = ModelFacts("knowing", "-", "causal", "test", 0, "-", "-", "float32")

    def __init__(self, known, per_byte=False):
        self.known, self.per_byte = known, per_byte

    def continuations(self, requests):
        def likelihood(request, index, text):
            number = int(request.context.rpartition("Question: ")[2].split()[0])
            right = index == (number % 4 if number < self.known else (number + 1) % 4)
            return (-1.0 if right else -2.0) * (len(text.encode()) if self.per_byte else 1)

        return [
            [
                Continuation((likelihood(request, index, text),), False)
                for index, text in enumerate(request.continuations)
            ]
            for request in requests
        ]


@pytest.mark.parametrize("answer", ["text", "letter"])
def test_an_answerer_of_known_skill_has_that_accuracy_in_the_report(tmp_path, answer):
    options = ["x" * size for size in (3, 40, 9, 20)]
    rows = [
        {"question": f"{i} ?", "choices": options, "answer": i % 4, "subject": f"part {i // 20}"} for i in range(40)
    ]
    path = write(tmp_path / "q.jsonl", *rows, rows[0] | {"answer": None})
    train = write(
        tmp_path / "train.jsonl", *(row | {"question": "t" + row["question"], "answer": 3} for row in rows[:3])
    )
    choice = MultipleChoiceConfig(path=[path], train=[train], answer=answer, shots=2)
    scorers = {"knowing": Knowing(30), "per byte": Knowing(40, per_byte=True)}
    config = EvaluateConfig(models=dict.fromkeys(scorers, "-"), multiple_choice={"set": choice}, resamples=10)
    said = []
    results = evaluation.evaluate(config, tmp_path, said.append, scorers=scorers)
    task = json.loads(evaluation.to_json(results))["tasks"]["set"]
    accuracy = {name: found["measures"]["accuracy"]["value"] for name, found in task["models"].items()}
    assert accuracy["knowing"] == 30 / 40
    assert (task["majority"]["measures"]["accuracy"]["value"], task["left_out"]) == (0.25, {"without an answer": 1})
    parts = task["models"]["knowing"]["details"]["batches"]
    assert [parts[part]["accuracy"]["value"] for part in ("part 0", "part 1")] == [1.0, 0.5]
    if answer == "text":  # the longest right option loses as a whole, and wins per byte
        assert accuracy["per byte"] < 1 == task["models"]["per byte"]["measures"]["accuracy_per_byte"]["value"]
    lines = [json.loads(line) for line in (tmp_path / "predictions/set/knowing.jsonl").read_text().splitlines()]
    assert sum(line["correct"] for line in lines) == 30
    assert lines[0]["scores"] == {"A": -1.0, "B": -2.0, "C": -2.0, "D": -2.0}
    assert "set: questions left out: 1 without an answer" in said
    page = evaluation_report.write(results, tmp_path).read_text()
    assert f"set: multiple choice by {answer}, 2 shots, chance 25.0 %" in page
    assert "75.0 %" in page


def test_names_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(UserError, match="pubmedqa"):
        EvaluateConfig(models={"m": "-"}, multiple_choice={"pubmedqa": MultipleChoiceConfig(path=["q.jsonl"])})
