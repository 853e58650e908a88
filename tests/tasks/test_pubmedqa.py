"""PubMedQA's questions, its official test set and its folds."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from biomamba_jax.config import EvaluateConfig, PubMedQAConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.evaluation import read_inputs
from biomamba_jax.tasks.pubmedqa import Question, official_split, random_test, read_questions, stratified_sample


def entry(answer="yes", **changes):
    return {"QUESTION": "Is it?", "CONTEXTS": ["a", "b"], "LABELS": ["AIMS"], "final_decision": answer} | changes


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def questions(tmp_path):
    """As many of each answer as the authors have."""
    answers = ["yes"] * 552 + ["no"] * 338 + ["maybe"] * 110
    return read_questions(write(tmp_path / "q.json", {str(i): entry(a) for i, a in enumerate(answers)}))


def test_sections_stand_behind_their_labels_one_a_paragraph(tmp_path):
    (question,) = read_questions(write(tmp_path / "q.json", {"7": entry()}))
    assert (question.key, question.context) == ("7", "AIMS: a\nb")


def test_every_question_is_in_the_test_set_or_in_one_fold(questions):
    split = official_split(questions)
    assert sorted(map(id, split.test + split.development)) == sorted(map(id, questions))
    assert [len(fold) for fold in split.folds] == [50] * 10


@pytest.mark.parametrize(
    ("repeats", "title"),
    [(1, "PubMedQA, official test set"), (2, "PubMedQA's split of another file, 1,000 test questions and not 500")],
)
def test_only_the_authors_file_gives_the_official_test_set(tmp_path, repeats, title):
    answers = (["yes"] * 552 + ["no"] * 338 + ["maybe"] * 110) * repeats
    path = write(tmp_path / "q.json", {str(i): entry(a) for i, a in enumerate(answers)})
    config = EvaluateConfig(models={"m": "unused"}, pubmedqa=PubMedQAConfig(path=str(path)), resamples=2)
    assert read_inputs(config).tasks["pubmedqa"].title == title


def test_labels_are_spread_evenly_over_the_test_set_and_the_folds(questions):
    split = official_split(questions)
    assert Counter(question.answer for question in split.test) == {"yes": 276, "no": 169, "maybe": 55}
    assert all(26 <= Counter(question.answer for question in fold)["yes"] <= 28 for fold in split.folds[:-1])


def test_the_draws_are_those_of_python_from_seed_0(questions):
    shuffled = [question.key for question in questions if question.answer == "yes"]
    random.Random(0).shuffle(shuffled)
    split = official_split(questions)
    assert [question.key for question in split.test if question.answer == "yes"] == shuffled[276:]


def test_the_official_files_give_the_official_500_and_folds_of_50(shared_data):
    folder = shared_data / "pubmedqa"
    split = official_split(read_questions(folder / "ori_pqal.json"), folder / "test_ground_truth.json")
    assert Counter(question.answer for question in split.test) == {"yes": 276, "no": 169, "maybe": 55}
    assert [len(fold) for fold in split.folds] == [50] * 10


def test_a_test_set_of_another_release_is_refused(questions, tmp_path):
    with pytest.raises(UserError, match="is not the test set"):
        official_split(questions, write(tmp_path / "truth.json", {"0": "yes"}))


def test_the_published_subset_is_a_fifth_drawn_by_numpy(questions):
    subset = random_test(questions)
    assert len(subset) == len({question.key for question in subset}) == 200
    assert subset != official_split(questions).test
    assert [int(question.key) for question in subset] == np.random.default_rng(42).permutation(1000)[:200].tolist()


@pytest.mark.parametrize(
    ("size", "counts"),
    [(500, (276, 169, 55)), (30, (17, 10, 3)), (3, (1, 1, 1)), (7, (4, 2, 1)), (1, (1, 0, 0)), (900, (276, 169, 55))],
)
def test_a_sample_has_each_answer_by_its_share(questions, size, counts):
    test = official_split(questions).test
    sample = stratified_sample(test, size, 0)
    found = Counter(question.answer for question in sample)
    assert tuple(found[label] for label in ("yes", "no", "maybe")) == counts
    assert sample == [question for question in test if question in sample]


def test_another_seed_draws_another_sample(questions):
    draws = [[question.key for question in stratified_sample(questions, 50, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "broken", [{"7": entry("perhaps")}, {"7": {}}, {"7": entry(CONTEXTS=3)}, {"7": entry(QUESTION="")}, [], {"7": 1}]
)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, broken):
    with pytest.raises(UserError, match=r"q\.json: .*(7|not a mapping)"):
        read_questions(write(tmp_path / "q.json", broken))


def test_too_few_questions_are_said_to_be_too_few():
    for count in range(2, 60):
        draw = random.Random(count)
        labels = draw.choices(("yes", "no", "maybe"), (55, 34, 11), k=count)
        try:
            asked = [Question(str(i), "?", (), label, "") for i, label in enumerate(labels)]
            split = official_split(asked, source="q.json")
            assert sum(map(len, split.folds)) + len(split.test) == count
        except UserError as error:
            assert str(error).startswith("q.json: ") and "too few" in str(error)


@pytest.mark.parametrize("contexts", ["abc", [None], None, {"a": "b"}])
def test_contexts_that_are_no_list_of_texts_are_refused(tmp_path, contexts):
    entry = {"QUESTION": "q", "CONTEXTS": contexts, "final_decision": "yes"}
    (tmp_path / "q.json").write_text(json.dumps({"17": entry}))
    with pytest.raises(UserError, match="17 has no QUESTION, CONTEXTS"):
        read_questions(tmp_path / "q.json")
