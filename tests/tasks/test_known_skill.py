"""The positive control of every task: an answerer of known skill gets it, through files, prompts and measures."""

import json
import random
import re

import numpy as np
import pytest

from biomamba_jax.config import BioASQConfig, DomainConfig, EvaluateConfig, PubMedQAConfig
from biomamba_jax.config.evaluate import MultipleChoiceConfig
from biomamba_jax.tasks.evaluation import evaluate
from biomamba_jax.tasks.scoring import Continuation, ModelFacts

QUESTIONS = 500
KINDS = ("yesno", "factoid", "list", "summary")
SKILLED = [
    "yesno_accuracy",
    *("factoid_strict_accuracy", "factoid_lenient_accuracy", "factoid_mrr"),
    *("list_precision", "list_recall", "list_f1"),
    *(f"summary_{name}_{part}" for name in ("rouge_2", "rouge_su4") for part in ("recall", "f1")),
]


class Answerer:
    """A scorer that knows the answer to a question by the number in it, and gives it with probability `skill`."""

    ends_documents, padding_id, documents_by_word = True, 0, None

    def __init__(self, skill, truth):
        draw = random.Random(7)
        self._given = {
            key: answer if draw.random() < skill else draw.choice(wrong) for key, (answer, wrong) in truth.items()
        }
        self._nats = np.random.default_rng(7)
        self.facts = ModelFacts("known", "-", "causal", "this test", 0, "words", "-", "-")
        self._skill = skill

    def _answer(self, prompt):
        return self._given[re.search(r"about (\w+\d+)\?", prompt)[1]]

    def continuations(self, requests):
        return [
            [Continuation((-float(text != self._answer(request.context)),), False) for text in request.continuations]
            for request in requests
        ]

    def generate(self, prompts, max_new_tokens, stop):
        return [self._answer(prompt) for prompt in prompts]

    def encode(self, texts):
        return [list(range(len(text.split()))) for text in texts]

    def spell(self, texts):
        return list(texts)

    def documents(self, texts):
        """A text's every word costs as many nats as the skill, on average."""
        for index, text in enumerate(texts):
            yield index, self._nats.exponential(self._skill, len(text.split()))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Files of PubMedQA, BioASQ and text; each question's answer, and wrong ones, by the key in the question."""
    folder, draw, truth = tmp_path_factory.mktemp("asked"), random.Random(3), {}
    pubmedqa = {}
    for number in range(2 * QUESTIONS):
        answer = ("yes", "no", "maybe")[number % 9 // 4]
        truth[f"p{number}"] = f" {answer}", [f" {other}" for other in ("yes", "no", "maybe") if other != answer]
        article = {"CONTEXTS": ["It was given."], "LABELS": ["METHODS"], "LONG_ANSWER": "It may."}
        pubmedqa[str(number)] = {"QUESTION": f"What about p{number}?", "final_decision": answer} | article
    (folder / "pqal.json").write_text(json.dumps(pubmedqa))
    questions = []
    for number in range(QUESTIONS):
        for kind in KINDS:
            key, names = f"{kind}{number}", [f"name{draw.randrange(10**6)}" for _ in range(3)]
            answer = {"yesno": draw.choice(["yes", "no"]), "factoid": names[0], "list": "; ".join(names),
                      "summary": f"{names[0]} is what {names[1]} needs in {names[2]}."}[kind]  # fmt: skip
            wrong = {"yesno": [" no" if answer == "yes" else " yes"], "summary": [" Other words entirely here."]}
            truth[key] = f" {answer}", wrong.get(kind, [" nothing of it; none"])
            exact = {"yesno": answer, "factoid": [[answer]], "list": [[name] for name in names]}
            golden = {"exact_answer": exact[kind]} if kind in exact else {}
            ideal = {"ideal_answer": [answer], "snippets": [{"text": "It was given."}]}
            questions.append({"id": key, "type": kind, "body": f"What about {key}?"} | golden | ideal)
    (folder / "golden.json").write_text(json.dumps({"questions": questions}))
    choices = []
    for number in range(QUESTIONS):
        options = {letter: f"option {letter} of {number}" for letter in "ABCD"}
        answer = draw.choice("ABCD")
        wrong_options = [f" {text}" for letter, text in options.items() if letter != answer]
        truth[f"choice{number}"] = f" {options[answer]}", wrong_options
        choices.append({"question": f"What about choice{number}?", "options": options, "answer_idx": answer})
    (folder / "choices.jsonl").write_text("".join(json.dumps(choice) + "\n" for choice in choices))
    texts = ({"text": "word " * draw.randint(20, 200)} for _ in range(QUESTIONS))
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder, truth


@pytest.mark.parametrize("method", ["likelihood", "generation"])
@pytest.mark.parametrize("skill", [0.3, 0.85])
def test_an_answerer_gets_its_skill_within_the_interval_in_every_task(asked, tmp_path, skill, method):
    folder, truth = asked
    config = EvaluateConfig(
        models={"known": "-"},
        domains={"text": DomainConfig(path=str(folder / "text.jsonl"))},
        pubmedqa=PubMedQAConfig(str(folder / "pqal.json"), method=method),
        multiple_choice={"medqa": MultipleChoiceConfig([str(folder / "choices.jsonl")])},
        bioasq=BioASQConfig([str(folder / "golden.json")], types=list(KINDS), method=method),
        resamples=300,
    )
    found = evaluate(config, tmp_path, scorers={"known": Answerer(skill, truth)})
    measured = {"accuracy": found.tasks["pubmedqa"].models["known"].measures["accuracy"]}
    measured |= {name: found.tasks["bioasq"].models["known"].measures[name] for name in SKILLED}
    measured["choice"] = found.tasks["medqa"].models["known"].measures["accuracy"]
    measured["cross_entropy"] = found.domains["text"].models["known"].cross_entropy
    for name, estimate in measured.items():
        assert estimate.low <= skill <= estimate.high, name
        assert estimate.high - estimate.low < 0.1, name  # so that another skill would not be in it
