"""lm-eval's three kinds of requests answered by a scorer; its base class is the real one where it is installed."""

import abc
import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny_models import train_tokenizer, write_tiny_model

from biomamba_jax.errors import UserError
from biomamba_jax.tasks import lm_eval_adapter
from biomamba_jax.tasks.lm_eval_adapter import HarnessMethods, harness_class, harness_model
from biomamba_jax.tasks.scoring import Continuation, Request


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


class Recording:
    """A scorer that remembers what it was asked: a letter has a log probability of -1."""

    ends_documents = True

    def __init__(self):
        self.asked = []

    def continuations(self, requests):
        self.asked += requests
        return [[Continuation((-1.0,) * len(t), t == "a") for t in request.continuations] for request in requests]

    def documents(self, texts):
        yield from ((place, np.ones(len(text) + 1)) for place, text in reversed(list(enumerate(texts))))

    def generate(self, prompts, max_new_tokens, stop):
        return [f"{prompt}|{max_new_tokens}|{','.join(stop)}" for prompt in prompts]


@pytest.fixture
def model():
    methods = HarnessMethods()
    methods.scorer = Recording()
    return methods


def test_choices_behind_one_context_are_scored_together_and_come_back_in_their_order(model):
    found = model.loglikelihood(requests(("c", "a"), ("d", "bb"), ("c", "ccc")))
    assert found == [(-1.0, True), (-2.0, False), (-3.0, False)]
    assert model.scorer.asked == [Request("c", ("a", "ccc")), Request("d", ("bb",))]


def test_rolling_likelihood_does_not_count_the_end_of_the_text(model):
    assert model.loglikelihood_rolling(requests(("abc",), ("a",))) == [-3.0, -1.0]


def test_text_is_generated_with_each_request_s_own_settings(model):
    asked = requests(("p", {"until": "x"}), ("q", {"until": ["x", ""], "max_gen_toks": 3}), ("r", {"until": ["x"]}))
    assert model.generate_until(asked) == ["p|256|x", "q|3|x", "r|256|x"]


def test_draws_are_refused_and_a_temperature_of_0_is_none(model):
    with pytest.raises(UserError, match="generates greedily"):
        model.generate_until(requests(("p", {"do_sample": True, "temperature": 0.7})))
    assert model.generate_until(requests(("p", {"do_sample": True, "temperature": 0.0})))


@pytest.fixture
def registry(monkeypatch):
    """lm-eval, or a stand-in with its abstract methods."""
    harness_class.cache_clear()
    if importlib.util.find_spec("lm_eval") is not None:
        return importlib.import_module("lm_eval.api.registry").get_model
    models = {}
    api = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")}
    names = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    abstract = {name: abc.abstractmethod(lambda self, requests: None) for name in names}
    api["lm_eval.api.model"].LM = abc.ABCMeta("LM", (), abstract)
    api["lm_eval.api.registry"].register_model = lambda name: lambda cls: models.setdefault(name, cls)
    for name, module in api.items():
        monkeypatch.setitem(sys.modules, name, module)
    return models.__getitem__


def test_the_model_type_is_registered_and_made_of_a_folder(registry, tmp_path):
    folder = write_tiny_model(tmp_path / "model", "mamba2", train_tokenizer(tmp_path))
    model = harness_model(str(folder), batch_size=2)
    assert isinstance(model, registry(lm_eval_adapter.NAME))
    ((total, greedy),) = model.loglikelihood(requests(("the patients", " insulin")))
    assert total < 0 and isinstance(greedy, bool)
    harness_class.cache_clear()


def test_a_missing_lm_eval_is_named_with_its_extra(monkeypatch):
    harness_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"biomamba-jax\[eval\]"):
        harness_class()


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling"])
def test_a_model_of_nan_is_refused(model, method):
    model.scorer.facts = SimpleNamespace(name="m", path="some/folder", dtype="float32")
    model.scorer.continuations = lambda requests: [[Continuation((np.nan,), False)]]
    model.scorer.documents = lambda texts: [(0, np.array([1.0, np.nan]))]
    with pytest.raises(UserError, match="some/folder gives NaN"):
        getattr(model, method)(requests(("a", "b")))


def test_the_command_ends_in_one_line_without_lm_eval():
    code = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module(sys.argv[1], run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", code, "biomamba_jax.tasks.lm_eval_adapter"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and "pip install 'biomamba-jax[eval]'" in ended.stderr
    assert ended.stderr.count("\n") == 1
