"""What is evaluated, on what, and how it is scored."""

import string
from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least

YES_NO_MAYBE = ("yes", "no", "maybe")

Method = Literal["likelihood", "generation"]
Thresholds = Literal["none", "accuracy", "macro_f1"]


def check_template(key: str, template: str, fields: tuple[str, ...]) -> None:
    """Refuses a template that names other fields than these, or that leaves out {question}."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        check(False, key, template, f"is no template ({error}); write {{{{ and }}}} for braces")
    named = [name for _, name, _, _ in parts]
    known = ", ".join(f"{{{name}}}" for name in fields)
    check(not set(named) - set(fields), key, template, f"may name {known}; write {{{{ and }}}} for other braces")
    plain = not any(specification or conversion for _, _, specification, conversion in parts)
    check(plain, key, template, f"may name {known} as they are, with no format behind : or !")
    check("question" in named, key, template, "must contain {question}")


@dataclass(frozen=True)
class DomainConfig:
    """One text domain that perplexity is measured on."""

    path: str | list[str] = ""
    """A folder of shards, or files: what prepare reads (.jsonl, .txt, .parquet ...) or BioASQ questions (.json)."""
    split: str = "test"
    """Split of the shards; files have none."""
    max_documents: int | None = None
    """Evaluate a sample of this many documents, the same one for every model; left out: all."""
    paper_rows: Literal["documents", "chunks"] = "documents"
    """protocol paper: one document a row, or the whole text cut into full rows (as published for general text)."""

    def __post_init__(self) -> None:
        check(bool(self.path), "domains.*.path", self.path, "name a folder of shards or files")
        check_at_least(1, "domains.*", self, "max_documents")

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True)
class PubMedQAConfig:
    """PubMedQA (Jin et al. 2019): yes, no or maybe from an abstract without its conclusion."""

    path: str | None = None
    """ori_pqal.json of the authors; left out, PubMedQA is not evaluated."""
    test_ids: str | None = None
    """test_ground_truth.json of the authors, to check the split against; left out: the authors' procedure alone."""
    prompt: str = "{context}\n\nQuestion: {question}\nAnswer (yes, no or maybe):"
    """What stands before the answer; {question} and {context} (the abstract, "LABEL: text" a paragraph)."""
    answers: dict[str, str] = field(default_factory=lambda: {label: f" {label}" for label in YES_NO_MAYBE})
    """The text of each answer as the model would write it behind the prompt, its leading space included."""
    method: Method = "likelihood"
    """The likeliest of the answers, or the first of them in generated text."""
    normalize: Literal["none", "bytes"] = "none"
    """likelihood: divide an answer's log probability by its bytes, or not."""
    thresholds: Thresholds = "none"
    """likelihood: add to each answer's score what is best on the 500 development questions, by accuracy or macro F1."""
    max_questions: int | None = None
    """Only the first questions of the test set, for a quick look; the result then says so."""
    max_new_tokens: int = 8
    """generation: tokens."""

    def __post_init__(self) -> None:
        check_template("pubmedqa.prompt", self.prompt, ("question", "context"))
        labels = tuple(self.answers)
        check(labels == YES_NO_MAYBE and all(self.answers.values()), "pubmedqa.answers", self.answers, _ANSWERS)
        check_at_least(1, "pubmedqa", self, "max_new_tokens", "max_questions")
        fits = self.thresholds == "none" or self.method == "likelihood"
        check(fits, "pubmedqa.thresholds", self.thresholds, "needs pubmedqa.method likelihood")


_ANSWERS = f"must give a text for each of {', '.join(YES_NO_MAYBE)}, in this order"


@dataclass(frozen=True)
class BioASQConfig:
    """BioASQ task B (Tsatsaronis et al. 2015): yes/no, factoid and list questions with snippets."""

    path: list[str] = field(default_factory=list)
    """Golden files, one a batch; none: BioASQ is not evaluated."""
    development: list[str] = field(default_factory=list)
    """Golden files of earlier years that thresholds are fitted on."""
    types: list[Literal["yesno", "factoid", "list"]] = field(default_factory=lambda: ["yesno", "factoid", "list"])
    """Kinds of questions to answer."""
    yesno_prompt: str = "{context}\n\nQuestion: {question}\nAnswer (yes or no):"
    """What stands before the answer to a yes/no question; {question} and {context} (the snippets, one a line)."""
    factoid_prompt: str = "{context}\n\nQuestion: {question}\nShort answer:"
    """What stands before the answer to a factoid question."""
    list_prompt: str = "{context}\n\nQuestion: {question}\nAnswers, separated by semicolons:"
    """What stands before the answer to a list question."""
    answers: dict[str, str] = field(default_factory=lambda: {"yes": " yes", "no": " no"})
    """The texts of yes and no behind the prompt."""
    method: Method = "likelihood"
    """How yes/no is answered. Factoid and list questions: in a generated line, split at semicolons."""
    thresholds: Thresholds = "none"
    """likelihood: add to the score of no what is best on the development files, by accuracy or macro F1."""
    max_snippets: int = 10
    """Snippets of a question that the context holds, from the first."""
    max_new_tokens: int = 48
    """Tokens of a generated answer."""

    def __post_init__(self) -> None:
        for key in ("yesno_prompt", "factoid_prompt", "list_prompt"):
            check_template(f"bioasq.{key}", getattr(self, key), ("question", "context"))
        given = tuple(self.answers) == ("yes", "no") and all(self.answers.values())
        check(given, "bioasq.answers", self.answers, "must give a text for yes and one for no, in this order")
        check(bool(self.types), "bioasq.types", self.types, "name yesno, factoid or list")
        check_at_least(0, "bioasq", self, "max_snippets")
        check_at_least(1, "bioasq", self, "max_new_tokens")
        fits = self.thresholds == "none" or (self.method == "likelihood" and self.development)
        check(bool(fits), "bioasq.thresholds", self.thresholds, "needs method likelihood and bioasq.development files")


@dataclass(frozen=True)
class EvaluateConfig:
    """Models side by side on text domains and on questions."""

    output: str = "evaluation"
    """Folder of report.html, report.json, config.yaml, predictions/ and documents/."""
    models: dict[str, str] = field(default_factory=dict)
    """Name and folder of each model. This program runs native, Hugging Face Mamba and mamba_ssm folders and run
    directories; transformers (the [hf] extra) runs any other causal or masked language model, and hf:FOLDER."""
    reference: str | None = None
    """Name of the model that the others are compared with; left out: the first."""
    protocol: Literal["standard", "paper"] = "standard"
    """standard: measured as this project does; paper: as the published BioMamba code computes, weaknesses included."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """Name and source of each text domain."""
    pubmedqa: PubMedQAConfig = field(default_factory=PubMedQAConfig)
    """PubMedQA."""
    bioasq: BioASQConfig = field(default_factory=BioASQConfig)
    """BioASQ task B."""
    window: int = 1024
    """Tokens of one row. Longer documents go on with the recurrent state, so this changes speed and memory only."""
    batch_size: int = 8
    """Rows computed at one time; changes speed and memory only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrices and activations; left out: bfloat16 on TPU and GPU, float32 on CPU."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    confidence: float = 0.95
    """Level of the intervals."""
    seed: int = 0
    """Seed of the resamples and of samples of documents."""

    def __post_init__(self) -> None:
        check(bool(self.models), "models", self.models, "name a model: --models.NAME FOLDER")
        check_at_least(1, "", self, "window", "batch_size", "resamples")
        check(0 < self.confidence < 1, "confidence", self.confidence, "must be in (0, 1)")
        for name in [*self.models, *self.domains]:
            check(name not in ("", ".", "..") and "/" not in name, "models and domains", name, "is no file name")
        known = ", ".join(self.models)
        check(self.reference in (None, *self.models), "reference", self.reference, f"must be one of {known}")
        asked = bool(self.domains or self.pubmedqa.path or self.bioasq.path)
        check(asked, "domains", self.domains, "give domains, pubmedqa.path or bioasq.path: there is nothing to measure")
