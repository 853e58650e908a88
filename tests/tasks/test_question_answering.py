"""Tasks as a whole: official measures with intervals, the majority beside them, thresholds only from development."""

import json

import pytest

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.tasks import bioasq
from biomamba_jax.tasks import question_answering as qa
from biomamba_jax.tasks.pubmedqa import Question, Split
from biomamba_jax.tasks.scoring import Continuation
from biomamba_jax.tasks.statistics import Resampling

QUICK = Resampling(resamples=100)


class Reader:
    """A scorer that finds "yes", "no" or "maybe" in the prompt, but prefers yes by 5 nats."""

    def __init__(self):
        self.prompts = []

    def continuations(self, requests):
        self.prompts += [request.context for request in requests]
        return [
            [
                Continuation((3.0 * (text.strip() in request.context.split()) + 5.0 * (text == " yes"),), False)
                for text in request.continuations
            ]
            for request in requests
        ]

    def generate(self, prompts, max_new_tokens, stop):
        return [" BRCA1; p53." for _ in prompts]


def questions(count, *answers):
    return [Question(f"{i}{a}", "?", (("", f"it is {a} ."),), a, "") for i in range(count) for a in answers]


@pytest.fixture
def split():
    folds = [questions(1, "yes", "no", "maybe", "yes") for _ in range(10)]
    return Split(folds, questions(5, "yes", "yes", "no", "maybe"))


def prompt_config(**settings):
    return PubMedQAConfig(path="-", prompt="{context} {question}", **settings)


def test_thresholds_turn_scores_that_order_questions_rightly_into_right_answers(split):
    plain = qa.answer_pubmedqa(Reader(), prompt_config(), split, QUICK)
    fitted = qa.answer_pubmedqa(Reader(), prompt_config(thresholds="accuracy"), split, QUICK)
    assert plain.measures["accuracy"].value == 0.5
    assert fitted.measures["accuracy"].value == 1.0
    assert fitted.details["thresholds"]["cross_validated_accuracy"] == 1.0
    assert (plain.answered, fitted.answered) == (20, 60)


class Scripted:
    """A scorer that prefers yes to no by as many nats as the context says, and maybe to neither."""

    def continuations(self, requests):
        return [
            [Continuation(({"yes": 0.0, "no": -float(r.context.split()[0])}.get(text.strip(), -99.0),), False)
             for text in r.continuations]
            for r in requests
        ]  # fmt: skip


@pytest.mark.parametrize(("objective", "answer", "accuracy"), [("accuracy", "yes", 0.8), ("macro_f1", "no", 0.7)])
def test_thresholds_are_fitted_and_cross_validated_by_the_measure_that_was_asked_for(objective, answer, accuracy):
    fold = [(2, "yes")] * 3 + [(9, "yes")] * 5 + [(3, "no")] * 2
    folds = [[Question(f"{f}{i}", "?", (("", str(d)),), a, "") for i, (d, a) in enumerate(fold)] for f in range(2)]
    split = Split(folds, [Question("t", "?", (("", "3"),), "no", "")])
    found = qa.answer_pubmedqa(Scripted(), prompt_config(thresholds=objective), split, QUICK)
    assert [prediction.prediction for prediction in found.predictions] == [answer]
    assert found.details["thresholds"]["cross_validated_accuracy"] == pytest.approx(accuracy)


def test_long_answers_are_likelier_where_scores_are_divided_by_their_bytes():
    scorer = Scripted()
    scorer.continuations = lambda requests: [[Continuation((-4.0,), False)] * 3 for _ in requests]
    split = Split([], [Question("t", "?", (), "maybe", "")])
    found = {n: qa.answer_pubmedqa(scorer, prompt_config(normalize=n), split, QUICK) for n in ("none", "bytes")}
    assert {n: result.predictions[0].prediction for n, result in found.items()} == {"none": "yes", "bytes": "maybe"}


def test_the_test_set_s_answers_do_not_reach_the_thresholds(split):
    other = split._replace(test=[Question(q.key, q.question, q.contexts, "no", "") for q in split.test])
    found = [qa.answer_pubmedqa(Reader(), prompt_config(thresholds="macro_f1"), s, QUICK) for s in (split, other)]
    assert found[0].details["thresholds"] == found[1].details["thresholds"]
    assert [p.prediction for p in found[0].predictions] == [p.prediction for p in found[1].predictions]


def test_the_conclusion_is_not_in_the_prompt():
    reader = Reader()
    test = [Question("1", "Does it?", (("AIMS", "to see"),), "yes", "It does.")]
    qa.answer_pubmedqa(reader, PubMedQAConfig(path="-"), Split([], test), QUICK)
    assert reader.prompts == ["AIMS: to see\n\nQuestion: Does it?\nAnswer (yes, no or maybe):"]


def test_the_majority_of_the_real_questions_scores_55_2_and_23_7_percent(shared_data):
    folder = shared_data / "pubmedqa"
    config = PubMedQAConfig(path=str(folder / "ori_pqal.json"), test_ids=str(folder / "test_ground_truth.json"))
    found = qa.pubmedqa_majority(qa.read_pubmedqa(config, 0)[0], QUICK)
    assert found.questions == 500
    assert found.measures["accuracy"].value == pytest.approx(0.552)
    assert found.measures["macro_f1"].value == pytest.approx(0.237, abs=5e-4)
    assert found.measures["accuracy"].low == pytest.approx(0.508, abs=1e-3)


def test_the_majority_is_that_of_the_development_questions():
    result = qa.pubmedqa_majority(Split([questions(2, "yes")], questions(2, "no")), QUICK)
    assert [prediction.prediction for prediction in result.predictions] == ["yes", "yes"]


def bioasq_question(kind, golden, key="1", batch="a"):
    return bioasq.Question(key, kind, "?", ("it is no .",), (), golden, batch)


def test_bioasq_pools_questions_and_not_the_figures_of_files():
    yes, no = bioasq_question("yesno", (("yes",),)), bioasq_question("yesno", (("no",),), batch="b")
    found = qa.bioasq_majority([yes, yes, yes, no], QUICK)
    assert found.measures["yesno_accuracy"].value == 0.75
    assert [m["yesno_accuracy"].value for m in found.details["batches"].values()] == [1.0, 0.0]
    assert found.measures["yesno_macro_f1"].value == pytest.approx((6 / 7 + 0) / 2)


def test_bioasq_s_names_are_read_from_text_and_yes_no_from_likelihood():
    questions = [
        bioasq_question("yesno", (("yes",),)),
        bioasq_question("factoid", (("TP53", "P53"),)),
        bioasq_question("list", (("brca1",), ("EGFR",))),
    ]
    found = qa.answer_bioasq(Reader(), BioASQConfig(path=["a"]), questions, [], QUICK)
    assert found.measures["yesno_accuracy"].value == 1
    assert found.measures["factoid_mrr"].value == 0.5 and found.measures["factoid_strict_accuracy"].value == 0
    assert found.measures["list_precision"].value == 0.5 and found.measures["list_recall"].value == 0.5
    assert [p.prediction for p in found.predictions] == ["yes", ["BRCA1", "p53"], ["BRCA1", "p53"]]
    assert [p.correct for p in found.predictions] == [True, False, None]


def test_a_summary_question_is_answered_in_sentences_and_scored_by_rouge():
    ideal = "BRCA1; p53 and EGFR"
    question = bioasq.Question("1", "summary", "?", ("it is no .",), (ideal,), (), "a")
    found = qa.answer_bioasq(Reader(), BioASQConfig(path=["a"], types=["summary"]), [question], [], QUICK)
    assert found.measures["summary_rouge_2_recall"].value == pytest.approx(1 / 3)
    assert found.measures["summary_rouge_2_f1"].value == pytest.approx(1 / 2)
    assert found.predictions[0].prediction == [" BRCA1; p53."] and found.predictions[0].correct is None


def test_words_of_an_ideal_answer_beyond_the_200th_do_not_count():
    long = bioasq.Question("1", "summary", "?", (), (" ".join(f"w{i}" for i in range(200)),), (), "a")
    pair = long, [" ".join(f"w{i}" for i in range(300))]
    assert qa.bioasq_measures([pair], QUICK)["summary_rouge_su4_f1"].value == 1


def test_questions_that_are_not_asked_are_counted(tmp_path):
    asked = [("yesno", "yes"), ("yesno", None), ("summary", None), ("summary", None), ("list", ["x"]), ("factoid", [])]
    entries = [{"type": kind, "body": "?", "exact_answer": exact, "ideal_answer": "x"} for kind, exact in asked]
    (tmp_path / "b.json").write_text(json.dumps({"questions": entries}))
    read = {}
    for types in (["yesno", "factoid", "list"], ["yesno", "summary"]):
        questions, left_out = qa.read_bioasq(BioASQConfig(types=types), [str(tmp_path / "b.json")])
        read[len(types)] = [question.kind for question in questions], left_out
    assert read[3] == (["yesno", "list"], {"without a golden answer": 2, "summary": 2})
    assert read[2] == (["yesno", "summary", "summary"], {"without a golden answer": 1, "list": 1, "factoid": 1})


def test_bioasq_s_thresholds_come_from_development_files():
    no = bioasq_question("yesno", (("no",),))
    config = BioASQConfig(path=["a"], development=["d"], thresholds="accuracy")
    found = qa.answer_bioasq(Reader(), config, [no], [no, no], QUICK)
    assert found.measures["yesno_accuracy"].value == 1
    assert found.details["thresholds"]["development_questions"] == 2


def test_only_answers_that_are_right_or_wrong_are_compared_between_models():
    questions = [bioasq_question("yesno", (("yes",),)), bioasq_question("list", (("x",),))]
    one, two = qa.bioasq_majority(questions, QUICK), qa.bioasq_majority(questions, QUICK)
    assert qa.shared_correctness(one, two) == ([True], [True])
    wrong = qa.bioasq_majority([bioasq_question("yesno", (("no",),)), questions[1]], QUICK)
    assert qa.shared_correctness(one, wrong) == ([True], [False])
