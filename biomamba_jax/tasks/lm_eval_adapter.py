"""Run EleutherAI's lm-eval on this package's models.

python -m biomamba_jax.tasks.lm_eval_adapter --model biomamba_jax --model_args path=DIR --tasks TASK ...

This is lm-eval's own command line with the additional model type biomamba_jax. From Python:

    lm_eval.simple_evaluate(model=harness_model("DIR"), tasks=["pubmedqa"])

Needs the [eval] extra.
"""

import functools
import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from biomamba_jax.command_line import run_command
from biomamba_jax.config import DomainConfig, EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.load_scorer import load_scorer
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite

NAME = "biomamba_jax"
_MAX_GEN_TOKS = 256


class HarnessMethods:
    """The three request types of lm-eval's `LM`, answered by a scorer; see its docs/model_guide.md."""

    scorer: Scorer
    """The model."""

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score the continuation of each (context, continuation) request.

        Returns:
          The log-likelihood in nats, and True if greedy decoding would produce the continuation, for each request.
        """
        groups = _grouped(request.args[0] for request in requests)
        asked = [Request(context, tuple(requests[i].args[1] for i in group)) for context, group in groups.items()]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for group, scored in zip(groups.values(), self.scorer.continuations(asked), strict=True):
            for index, found in zip(group, scored, strict=True):
                check_finite(self.scorer, found.total)
                results[index] = found.total, found.greedy
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-likelihood of each whole text after the start token, in nats; its end is not predicted."""
        results = [0.0] * len(requests)
        for index, nats in self.scorer.documents([request.args[0] for request in requests]):
            check_finite(self.scorer, nats)
            results[index] = -float((nats[:-1] if self.scorer.ends_documents else nats).sum())
        return results

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return greedy text up to the first of the strings `until`, for each request.

        Raises:
          UserError: a request wants sampling.
        """
        groups, results = _grouped(_length_and_stop(request.args[1]) for request in requests), [""] * len(requests)
        for (tokens, stop), group in groups.items():
            texts = self.scorer.generate([requests[index].args[0] for index in group], tokens, stop)
            for index, text in zip(group, texts, strict=True):
                results[index] = text
        return results


def _grouped(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Return the indices at which each key occurs."""
    groups = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return groups


def _length_and_stop(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise UserError("lm-eval: a task sets do_sample, but biomamba_jax generates greedily here; set it to false")
    until = settings.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    return int(settings.get("max_gen_toks", _MAX_GEN_TOKS)), stop


@functools.cache
def harness_class() -> type:
    """Return the model class for lm-eval, registered there as biomamba_jax.

    Raises:
      UserError: lm-eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
        registry = importlib.import_module("lm_eval.api.registry")
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}): pip install 'biomamba-jax[eval]'") from None

    class BioMambaLM(HarnessMethods, base):  # type: ignore[misc, valid-type]
        """A folder that `biomamba_jax.load` reads."""

        def __init__(self, path: str = "", batch_size: int | str = 8, dtype: Any = None, **_: Any):
            super().__init__()
            rows = int(batch_size) if str(batch_size).isdecimal() else 8
            # The domain is a placeholder: a config without anything to measure is refused.
            config = EvaluateConfig(
                models={NAME: path}, domains={"requests": DomainConfig(path="-")}, batch_size=rows, dtype=dtype or None
            )
            self.scorer = load_scorer(NAME, path, config)

        @property
        def tokenizer_name(self) -> str:
            """Key of lm-eval's cache of requests."""
            return self.scorer.facts.tokenizer

    registry.register_model(NAME)(BioMambaLM)
    return BioMambaLM


def harness_model(path: str, batch_size: int = 8, dtype: str | None = None) -> Any:
    """Return the model of a folder for `lm_eval.simple_evaluate(model=...)`.

    Args:
      path: the model's folder.
      batch_size: rows in a batch.
      dtype: type of matrices and activations, or int8 for int8 matrices; None: bfloat16 on TPU and GPU, float32 on CPU.
    """
    return harness_class()(path=path, batch_size=batch_size, dtype=dtype)


def main(_: Sequence[str] | None = None) -> None:
    """Run lm-eval's own command, which reads this process's arguments, with our model type."""
    harness_class()
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    run_command(main)
