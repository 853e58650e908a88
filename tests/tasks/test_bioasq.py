"""BioASQ's golden files of all years read alike."""

import json

import pytest

from biomamba_jax.config import BioASQConfig, DomainConfig, EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.bioasq import read_questions
from biomamba_jax.tasks.documents import read_domain
from biomamba_jax.tasks.evaluation import read_inputs


def question(kind="factoid", **changes):
    return {
        "id": "5a",
        "type": kind,
        "body": "Which gene?",
        "snippets": [{"text": "BRCA1 is one.", "document": "http://www.ncbi.nlm.nih.gov/pubmed/1"}],
        "ideal_answer": ["It is BRCA1."],
        "exact_answer": [["BRCA1"]],
    } | changes


def write(folder, *questions):
    path = folder / "golden.json"
    path.write_text(json.dumps({"questions": list(questions)}))
    return path


GOLDEN = {
    "yes/no": ("yesno", "yes", (("yes",),)),
    "yes/no with a full stop": ("yesno", "No.", (("no",),)),
    "yes/no in a list": ("yesno", ["Yes"], (("yes",),)),
    "factoid as lists of synonyms": ("factoid", [["a", "b"], ["c"]], (("a", "b"), ("c",))),
    "factoid as one list of synonyms": ("factoid", ["a", "b"], (("a", "b"),)),
    "factoid as a string": ("factoid", "a", (("a",),)),
    "list of lists of synonyms": ("list", [["a", "b"], ["c"]], (("a", "b"), ("c",))),
    "list of strings": ("list", ["a", "c"], (("a",), ("c",))),
    "list of both": ("list", ["a", ["c", "d"]], (("a",), ("c", "d"))),
    "no golden answer": ("list", None, ()),
    "summary": ("summary", None, ()),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_exact_answers_of_every_layout(tmp_path, case):
    kind, written, golden = GOLDEN[case]
    (read,) = read_questions(write(tmp_path, question(kind, exact_answer=written)))
    assert (read.kind, read.golden) == (kind, golden)


def test_ideal_answers_and_snippets_of_old_files_are_strings(tmp_path):
    (read,) = read_questions(write(tmp_path, question(ideal_answer="It is.", snippets=["one", "two"])))
    assert (read.ideal_answers, read.snippets) == (("It is.",), ("one", "two"))
    assert read.prompt(BioASQConfig(max_snippets=1)).startswith("one\n\nQuestion: ")


def test_thresholds_are_not_fitted_on_questions_that_are_asked(tmp_path):
    asked = write(tmp_path, question("yesno", body="Is it?", exact_answer="yes"))
    known = (
        asked.rename(tmp_path / "asked.json"),
        write(tmp_path, *(question("yesno", body=body, exact_answer="no") for body in ("Is it?", "Is it not?"))),
    )
    bioasq = {"path": [str(known[0])], "development": [str(known[1])], "thresholds": "accuracy"}
    inputs = read_inputs(EvaluateConfig(models={"m": "unused"}, bioasq=BioASQConfig(**bioasq)))
    assert "1 development questions, which are asked too, are left out" in inputs.tasks["bioasq"].title
    assert [each.question for each in inputs.answer["bioasq"].keywords["development"]] == ["Is it not?"]


def test_a_file_that_is_named_twice_is_refused():
    with pytest.raises(UserError, match=r"bioasq\.path = .*: must be files, each named once"):
        BioASQConfig(path=["a.json", "a.json"])


def test_its_own_text_is_a_domain_each_question_a_document(tmp_path):
    path = write(tmp_path, question(), question(id="5b", snippets=["x", "x", " y\n"], ideal_answer=None))
    documents, _ = read_domain("bioasq", DomainConfig(path=str(path)))
    assert [(d.key, d.text) for d in documents] == [
        ("5a", "Which gene?\nBRCA1 is one.\nIt is BRCA1."),
        ("5b", "Which gene?\nx\ny"),
    ]


@pytest.mark.parametrize("broken", [{"type": "essay"}, {"body": None}, {"exact_answer": 3}, {"snippets": [3]}])
def test_a_broken_question_is_named(tmp_path, broken):
    with pytest.raises(UserError, match=r"golden\.json: question 2 has no"):
        read_questions(write(tmp_path, question(), question(**broken)))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"questions": []}'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "golden.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"golden\.json: .*give a golden file of BioASQ"):
        read_questions(path)


def write_one(path, **values):
    path.write_text(json.dumps({"questions": [{"id": "1", "type": "list", "body": "b"} | values]}))
    return path


@pytest.mark.parametrize(
    "values",
    [
        {"exact_answer": [[None]]},
        {"exact_answer": [[["a"]]]},
        {"exact_answer": {"a": 1}},
        {"snippets": [{"text": None}]},
        {"snippets": {"text": "x"}},
        {"ideal_answer": [None]},
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_and_does_not_become_one(tmp_path, values):
    with pytest.raises(UserError, match="question 1 has no type"):
        read_questions(write_one(tmp_path / "g.json", **values))


@pytest.mark.parametrize("kind", ["yesno", "factoid", "list"])
def test_an_answer_that_is_an_empty_list_is_none(tmp_path, kind):
    (question,) = read_questions(write_one(tmp_path / "g.json", type=kind, exact_answer=[[]]))
    assert question.golden == ()
