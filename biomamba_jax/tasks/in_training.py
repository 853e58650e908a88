"""Evaluates a model on tasks while it is trained, by its weights in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from biomamba_jax.config import EvaluateConfig, ModelConfig, PretrainConfig
from biomamba_jax.config.checks import field_types
from biomamba_jax.config.evaluate import MeasuresConfig
from biomamba_jax.data.shards import tokenizer_file
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.tasks.evaluation import evaluate, read_inputs
from biomamba_jax.tasks.generation import Generator
from biomamba_jax.tasks.native_scorer import NativeScorer

_NAME = "run"


class TrainingEvaluation:
    """Measures weights on the tasks of a run's `evaluate` section; texts and questions are read once, at the start.

    Args:
      config: the run; its shards' tokenizer encodes all texts.

    Raises:
      UserError: a text or question file cannot be read, or the run has several processes.
    """

    def __init__(self, config: PretrainConfig) -> None:
        if jax.process_count() > 1:
            raise UserError("evaluate: tasks are evaluated in one process only; leave the section out of this config")
        asked = config.evaluate
        measures = {name: getattr(asked, name) for name in field_types(MeasuresConfig)}
        self._config = EvaluateConfig(models={_NAME: config.run_dir}, resamples=2, **measures)  # no interval is shown
        self._output = Path(config.run_dir) / "evaluation"
        self._inputs = read_inputs(self._config)
        self._tokenizer = load_tokenizer(tokenizer_file(config.data.path))

    def __call__(self, model: ModelConfig, params: Any) -> Mapping[str, Mapping[str, float]]:
        """Return the measures of each domain and task; documents and predictions are written into the run directory.

        Args:
          model: the model, with its vocabulary.
          params: its parameters, a nested dict; may be sharded over the devices of this process.
        """
        config, dtype = self._config, self._config.dtype
        generator = Generator(InferenceModel.from_params(model, jax.device_get(params), dtype), self._tokenizer, _NAME)
        scorer = NativeScorer(_NAME, generator, config.models[_NAME], config.window, config.batch_size)
        found = evaluate(config, self._output, scorers={_NAME: scorer}, inputs=self._inputs)
        measures: dict[str, dict[str, float]] = {}
        for key, domain in found.domains.items():
            of_text = domain.models[_NAME]
            figures = {"perplexity": of_text.perplexity.value, "bits_per_byte": of_text.bits_per_byte.value}
            measures[f"evaluate/domains.{key}"] = figures | {"tokens": of_text.tokens}
        for key, task in found.tasks.items():
            estimates = task.models[_NAME].measures
            measures[f"evaluate/{key}"] = {name: estimate.value for name, estimate in estimates.items()}
        return measures
