"""The model card, README.md of an exported model: what it is, its training and results, and what it is not for."""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.html import TEMPLATES
from biomamba_jax.interop.weights import Weights

_LIBRARIES = {"native": "biomamba-jax", "hf": "transformers", "mamba_ssm": "mamba-ssm", "gguf": "gguf"}
_FIGURES = ("perplexity", "bits_per_byte")
_TASKS = dict.fromkeys(("classifier", "multi_label", "regression"), "text-classification")
_TASKS |= {"token_classifier": "token-classification", "span": "question-answering"}


def model_card(name: str, dialect: str, weights: Weights, dtype: str) -> str:
    """Return the text of README.md, with the hub's metadata as YAML at its top.

    Args:
      name: name of the folder, for the example.
      dialect: format of the weights.
      weights: the model; sections that its `about` has no information for are omitted.
      dtype: dtype of the weights.

    Raises:
      UserError: `about`, which comes from the model's files, is not what `runs.describe` returns.
    """
    head = weights.head and weights.head.config
    task = _TASKS[head.kind] if head else "text-generation"
    try:
        card = TEMPLATES.get_template("model_card.md.jinja").render(
            name=name,
            dialect=dialect,
            dtype=dtype,
            header=yaml.safe_dump(_metadata(name, dialect, weights, task), sort_keys=False, allow_unicode=True),
            task=task,
            config=weights.config,
            head=head,
            about=weights.about,
            has_tokenizer=weights.tokenizer_file is not None,
        )
        return card + "\n"
    except (jinja2.UndefinedError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the model's information about its training (key about) is damaged ({error!r})") from None


def _metadata(name: str, dialect: str, weights: Weights, task: str) -> dict[str, Any]:
    """Return the hub's metadata: https://huggingface.co/docs/hub/model-cards."""
    about = weights.about
    sources = (str(source.get("name")) for source in about.get("text", {}).get("sources", ()))
    datasets = sorted({source.removeprefix("hf:") for source in sources if source.startswith("hf:")})
    metadata = {
        "license": about.get("license", "unknown"),
        "library_name": _LIBRARIES[dialect],
        "pipeline_tag": task,
        "language": about.get("language", "en"),
        "tags": [weights.config.kind.replace("mamba1", "mamba"), "biology", "medical", "biomamba-jax"],
    }
    metadata |= {key: about[key] for key in ("base_model",) if about.get(key)}
    metadata |= {"datasets": datasets} if datasets else {}
    results = [
        {
            "task": {"type": "question-answering" if row["kind"] == "task" else "text-generation"},
            "dataset": {"name": row["name"], "type": row["key"]},
            "metrics": [{"type": key, "value": value} for key, value in row["figures"].items()],
        }
        for row in about.get("results", ())
    ]
    return metadata | ({"model-index": [{"name": name, "results": results}]} if results else {})


def read_results(report: Path, model: str) -> list[dict[str, Any]]:
    """Return what a report of `evaluate` measured of a model, for its card.

    Args:
      report: report.json, or its folder.
      model: the model's folder as the report names it; not needed if the report has only one model.

    Raises:
      UserError: the report cannot be read, or has no such model.
    """
    path = report / "report.json" if report.is_dir() else report
    raw = read_json(path)
    try:
        paths = {name: Path(facts["path"]).resolve() for name, facts in raw["models"].items()}
        names = [name for name, folder in paths.items() if len(paths) == 1 or folder == Path(model).resolve()]
        if not names:
            raise UserError(f"{path}: has no model {model}, only {', '.join(map(str, paths.values()))}")
        rows = []
        for key, domain in raw["domains"].items():
            compared = names[0] not in domain.get("not_compared", ())  # else its tokenizer does not spell the text
            if (found := domain["models"].get(names[0])) and compared:
                figures = {each: found[each]["value"] for each in _FIGURES}
                rows.append({"kind": "domain", "key": key, "name": key, "figures": figures})
        for key, task in raw["tasks"].items():
            if found := task["models"].get(names[0]):
                figures = {each: measure["value"] for each, measure in found["measures"].items()}
                rows.append({"kind": "task", "key": key, "name": task["title"], "figures": figures})
        return rows
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a report of `evaluate` ({error!r})") from None
