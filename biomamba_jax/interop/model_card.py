"""The model card, README.md of an exported model: its sizes, usage, training and evaluation."""

from typing import Any

from biomamba_jax.config import ModelConfig

_MOST_SOURCES = 20
_NAMES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}
_LOAD = {
    "native": """import biomamba_jax

model = biomamba_jax.load("{name}")
print(model.generate(["Aspirin reduces the risk of"]))""",
    "hf": """from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("Aspirin reduces the risk of", max_new_tokens=40))""",
    "mamba_ssm": """from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("{name}", device="cuda")""",
}


def model_card(
    name: str, dialect: str, config: ModelConfig, dtype: str, about: dict[str, Any], has_tokenizer: bool
) -> str:
    """Return the text of README.md.

    Args:
      name: name of the folder, for the example.
      dialect: format of the weights.
      config: the model.
      dtype: dtype of the weights.
      about: result of `native.describe_run`; sections without information are omitted.
      has_tokenizer: True if a tokenizer is exported with the weights.
    """
    sections = [
        f"# {name}",
        f"A {_NAMES[config.kind]} language model: {config.n_layers} layers of width {config.d_model}, state size "
        f"{config.state_size}, vocabulary {config.known_vocab:,} (embedding rows: {config.padded_vocab:,}); {dtype} "
        "weights, written by biomamba_jax.",
        f"## Use\n\n```python\n{_LOAD[dialect].format(name=name)}\n```",
    ]
    if not has_tokenizer:
        sections.append("There is no tokenizer here: add the tokenizer.json that the model was trained with.")
    sections += [*_training(about), *_evaluation(about), _LICENCE]
    return "\n\n".join(sections) + "\n"


_LICENCE = """## Licence

The software that wrote this is under the Apache License 2.0. The weights may be subject to the terms of the weights and
text that they were trained from; abstracts can be under their publishers' copyright. State the licence before you share
them. Not a medical device: generated text can be wrong."""


def _training(about: dict[str, Any]) -> list[str]:
    if "steps" not in about:
        return ["## Training\n\nUnknown: these weights were converted from another format; see their source."]
    lines = [f"* {about['steps']:,} steps, {about['tokens']:,} tokens (padding included)"]
    for section, settings in about.get("recipe", {}).items():
        lines.append(f"* {section}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    parts = ["## Training\n\n" + "\n".join(lines)]
    if text := about.get("text"):
        rows = [
            f"| {split} | {size['documents']:,} | {size['tokens']:,} | {size['bytes']:,} |"
            for split, size in text["splits"].items()
        ]
        named = [f"* {source.get('name')} (sha256 {source.get('sha256')})" for source in text["sources"]]
        rest = [f"* and {len(named) - _MOST_SOURCES:,} more"] if len(named) > _MOST_SOURCES else []
        sources = named[:_MOST_SOURCES] + rest
        head = (
            f"Text, with tokenizer {text['tokenizer']}:\n\n| split | documents | tokens | bytes |\n|---|---|---|---|\n"
        )
        parts += [head + "\n".join(rows), "Sources:\n\n" + "\n".join(sources)]
    return parts


def _evaluation(about: dict[str, Any]) -> list[str]:
    line = about.get("evaluation")
    if not line:
        return []
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
    rows = "\n".join(
        f"| {key} | {f'{value:,}' if isinstance(value, int) else f'{value:.4f}'} |" for key, value in numbers.items()
    )
    return [
        f"## Evaluation\n\nHeld-out text of the same sources, at step {line['step']:,}:\n\n| | |\n|---|---|\n{rows}"
    ]
