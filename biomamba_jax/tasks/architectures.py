"""Questions that a third-party model can answer, by the architecture that its folder states."""

from pathlib import Path

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json

TRANSFORMERS_PREFIX = "hf:"
"""Start of the name of a model that transformers is to run."""
SPANS = "ForQuestionAnswering"
"""End of the architecture's name of a model that marks an answer's span, see `span_reader`."""
_OTHER_USES = {
    SPANS: "marks the answer's span in a passage",
    "ForTokenClassification": "labels tokens, such as those of entities",
    "ForSequenceClassification": "classifies texts",
    "ForMultipleChoice": "chooses one of several endings",
    "ForNextSentencePrediction": "tells if one sentence follows another",
    "ElectraForPreTraining": "is a discriminator, which tells replaced tokens from original ones",
    "FunnelForPreTraining": "is a discriminator, which tells replaced tokens from original ones",
}
"""Purpose of a model by the end of its architecture's name; such a model gives no likelihood of a text."""


def architecture_of(folder: Path) -> str:
    """Return the architecture that a folder's config.json states, "" if it states none.

    Raises:
      UserError: the file cannot be read, or states no list of names.
    """
    stated = read_json(folder / "config.json").get("architectures") or [""]
    if not isinstance(stated, list) or not all(isinstance(each, str) for each in stated):
        raise UserError(f"{folder / 'config.json'}: architectures = {stated!r:.100}: must be a list of names")
    return stated[0]


def check_dtype(key: str, folder: Path, dtype: str | None) -> None:
    """Raise UserError if transformers does not run a model in `dtype`."""
    if dtype == "int8":
        raise UserError(f"{key}: {folder} is run by transformers, not in int8; give float32 or bfloat16")


def check_architecture(name: str, folder: Path, config: EvaluateConfig) -> str:
    """Return the architecture that a folder states, "" if it states none.

    Raises:
      UserError: it cannot give what `config` measures; says what it does.
    """
    check_dtype(f"models.{name}", folder, config.dtype)
    architecture = architecture_of(folder)
    factoids = config.bioasq.path and config.bioasq.types == ["factoid"]
    others = config.domains or config.multiple_choice or config.pubmedqa.path
    if architecture.endswith(SPANS) and factoids and not others:
        return architecture
    for ending, use in _OTHER_USES.items():
        if architecture.endswith(ending):
            offer = "give a model with a trained language-model head, or leave it out"
            if ending == SPANS:
                offer = "it can answer BioASQ's factoids: set bioasq.types [factoid] and leave everything else out"
            raise UserError(
                f"models.{name}: {folder} is a {architecture}: it {use}, and gives no likelihood of a text; {offer}"
            )
    return architecture
