"""Settings of evaluation: models, text domains, questions and how they are scored."""

import string
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from biomamba_jax.config import checks
from biomamba_jax.config.checks import Fraction, InnerFraction, Limit, NonNegativeInt, PositiveInt, Settings, check
from biomamba_jax.config.heads import Reading
from biomamba_jax.config.model import InferenceDType
from biomamba_jax.config.prepare import TextFields

YES_NO_MAYBE = ("yes", "no", "maybe")

Method = Literal["likelihood", "generation"]
Thresholds = Literal["none", "accuracy", "macro_f1"]
QuestionKind = Literal["yesno", "factoid", "list", "summary"]


def check_template(key: str, template: str, fields: tuple[str, ...]) -> None:
    """Raise UserError if a template names other fields than these, or lacks {question}."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        check(False, key, template, f"is not a template ({error}); write {{{{ and }}}} for braces")
    named = [name for _, name, _, _ in parts]
    known = ", ".join(f"{{{name}}}" for name in fields)
    check(not set(named) - set(fields), key, template, f"may name {known}; write {{{{ and }}}} for other braces")
    plain = not any(specification or conversion for _, _, specification, conversion in parts)
    check(plain, key, template, f"may name {known} without a format after : or !")
    check("question" in named, key, template, "must contain {question}")


@dataclass(frozen=True)
class DomainConfig(TextFields, section="domains.NAME"):
    """A text domain to measure perplexity on."""

    path: Annotated[str | checks.Files, Limit("a folder of shards, or files", bool)] = ""
    """A folder of shards, also gs://bucket/folder, or files: what prepare reads (.jsonl, .txt, .parquet ...) or BioASQ
    questions (.json)."""
    split: str = "test"
    """Split of the shards; files have none."""
    max_documents: PositiveInt | None = None
    """Evaluate a sample of this many documents, the same for every model; default: all."""
    paper_rows: Literal["documents", "chunks"] = "documents"
    """protocol paper: one document per row, or the whole text split into full rows (as published for general text)."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True)
class PubMedQAConfig(Settings, section="pubmedqa"):
    """PubMedQA (Jin et al. 2019): yes, no or maybe from an abstract without its conclusion."""

    path: str | None = None
    """The authors' ori_pqal.json; default: no PubMedQA."""
    test_ids: str | None = None
    """The authors' test_ground_truth.json, to verify the split that their procedure gives; default: not verified."""
    prompt: str = "{context}\n\nQuestion: {question}\nAnswer (yes, no or maybe):"
    """Template of the prompt: {question} and {context} (the abstract, one "LABEL: text" per paragraph)."""
    answers: dict[str, str] = field(default_factory=lambda: {label: f" {label}" for label in YES_NO_MAYBE})
    """Text of each answer as it follows the prompt, with its leading space."""
    method: Method = "likelihood"
    """Choose the likeliest of the answers, or the first one in generated text."""
    normalize: Literal["none", "bytes"] = "none"
    """likelihood: what an answer's log probability is divided by."""
    thresholds: Thresholds = "none"
    """likelihood: fit an offset of each answer's score on the 500 development questions, by accuracy or macro F1."""
    max_questions: PositiveInt | None = None
    """Evaluate a sample of this many test questions, each answer by its share, drawn with the evaluation's seed."""
    max_new_tokens: PositiveInt = 8
    """generation: maximum tokens of an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("pubmedqa.prompt", self.prompt, ("question", "context"))
        given = tuple(self.answers) == YES_NO_MAYBE and all(self.answers.values())
        check(given, "pubmedqa.answers", self.answers, "must have a text for each of yes, no and maybe, in this order")
        fits = self.thresholds == "none" or self.method == "likelihood"
        check(fits, "pubmedqa.thresholds", self.thresholds, "needs pubmedqa.method likelihood")


@dataclass(frozen=True)
class BioASQConfig(Settings, section="bioasq"):
    """BioASQ task B (Tsatsaronis et al. 2015): questions with snippets, answered by yes or no, names, or sentences."""

    path: checks.Files = field(default_factory=list)
    """Golden files, one per batch; default: no BioASQ."""
    development: checks.Files = field(default_factory=list)
    """Golden files of earlier years, to fit thresholds on."""
    types: Annotated[list[QuestionKind], Limit("a list of yesno, factoid, list or summary", bool)] = field(
        default_factory=lambda: ["yesno", "factoid", "list"]
    )
    """Kinds of questions to answer; the others are counted as left out. summary: sentences, scored by ROUGE."""
    yesno_prompt: str = "{context}\n\nQuestion: {question}\nAnswer (yes or no):"
    """Template of the prompt of a yes/no question: {question} and {context} (the snippets, one per line)."""
    factoid_prompt: str = "{context}\n\nQuestion: {question}\nShort answer:"
    """Template of the prompt of a factoid question."""
    list_prompt: str = "{context}\n\nQuestion: {question}\nAnswers, separated by semicolons:"
    """Template of the prompt of a list question."""
    summary_prompt: str = "{context}\n\nQuestion: {question}\nAnswer in sentences:"
    """Template of the prompt of a summary question."""
    answers: dict[str, str] = field(default_factory=lambda: {"yes": " yes", "no": " no"})
    """Texts of yes and no as they follow the prompt."""
    method: Method = "likelihood"
    """Answering of yes/no questions. Other answers are a generated line; names are split at semicolons."""
    thresholds: Thresholds = "none"
    """likelihood: fit an offset of the score of no on the development files, by accuracy or macro F1."""
    max_snippets: NonNegativeInt = 10
    """Maximum snippets of a question in the context, from the first."""
    max_new_tokens: PositiveInt = 48
    """Maximum tokens of a generated answer to a yes/no, factoid or list question."""
    max_summary_tokens: PositiveInt = 256
    """Maximum tokens of a generated answer to a summary question, of which 200 words count, as officially."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in get_args(QuestionKind):
            check_template(f"bioasq.{kind}_prompt", getattr(self, f"{kind}_prompt"), ("question", "context"))
        given = tuple(self.answers) == ("yes", "no") and all(self.answers.values())
        check(given, "bioasq.answers", self.answers, "must have a text for each of yes and no, in this order")
        fits = self.thresholds == "none" or (self.method == "likelihood" and self.development)
        check(bool(fits), "bioasq.thresholds", self.thresholds, "needs method likelihood and bioasq.development files")


@dataclass(frozen=True)
class MultipleChoiceConfig(Settings, section="multiple_choice.NAME"):
    """Questions with options: MedQA, MedMCQA, MMLU's subjects."""

    path: Annotated[checks.Files, Limit("a list of at least one file", bool)] = field(default_factory=list)
    """Files to answer, as published: JSON lines, Parquet, or MMLU's .csv."""
    train: checks.Files = field(default_factory=list)
    """Files of the training split, from which examples are shown and the most frequent letter is known."""
    shots: NonNegativeInt = 0
    """Number of examples before a question: the first ones of its subject in `train`, or of all."""
    answer: Literal["text", "letter"] = "text"
    """Choose by the likelihood of the options' texts, or of their letters after a prompt that lists them."""
    prompt: str | None = None
    """Template of the prompt: {question} and {options} ("A. text" a line). Default: "Question: {question}", with letter
    also {options}, then "Answer:", each on a line."""
    first_option: Annotated[int, Limit("0 or 1", lambda x: x in (0, 1))] | None = None
    """Number of the first option in MedMCQA's cop: 1 in its authors' files, 0 on the hub; default: seen in the file."""
    max_questions: PositiveInt | None = None
    """Answer a sample of this many questions, drawn with the evaluation's seed; default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("multiple_choice.NAME.prompt", self.template, ("question", "options"))
        lists = self.answer == "text" or "{options}" in self.template
        check(lists, "multiple_choice.NAME.prompt", self.prompt, "must contain {options} where the answer is a letter")

    @property
    def template(self) -> str:
        """The prompt or its default."""
        listed = "\n{options}" if self.answer == "letter" else ""
        return self.prompt if self.prompt is not None else f"Question: {{question}}{listed}\nAnswer:"


@dataclass(frozen=True)
class MeasuresConfig(Settings):
    """Measures of a model: text domains, questions, and how they are scored."""

    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """Name and source of each text domain."""
    pubmedqa: PubMedQAConfig = field(default_factory=PubMedQAConfig)
    """PubMedQA."""
    bioasq: BioASQConfig = field(default_factory=BioASQConfig)
    """BioASQ task B."""
    multiple_choice: dict[str, MultipleChoiceConfig] = field(default_factory=dict)
    """Name and files of each set of questions with options."""
    max_unspelled: Fraction = 0.01
    """Share of a domain's bytes that a tokenizer may fail to spell; above it a model is shown but not compared."""
    window: PositiveInt = 1024
    """Tokens of one row. Longer documents carry the state from row to row, so this changes only speed and memory."""
    batch_size: PositiveInt = 8
    """Rows computed at a time; only speed and memory depend on it."""
    dtype: InferenceDType | None = None
    """Compute dtype, or int8 matrices; default: bfloat16 on TPU and GPU, float32 on CPU."""
    seed: checks.Seed = 0
    """Seed of the bootstrap and of samples of documents."""

    @property
    def measures_anything(self) -> bool:
        """True if a text domain or a set of questions is given."""
        return bool(self.domains or self.multiple_choice or self.pubmedqa.path or self.bioasq.path)


@dataclass(frozen=True)
class TrainingEvaluationConfig(MeasuresConfig, section="evaluate"):
    """Evaluation of the model in training on text domains and questions, as `evaluate` does it."""

    every: NonNegativeInt = 0
    """Steps between these evaluations, whose figures go to metrics.jsonl; 0: only after the last step."""


@dataclass(frozen=True)
class BlurbConfig(Settings, section="blurb"):
    """BLURB (Gu et al. 2021): every model is fine-tuned on each of its sets that is there."""

    data: str = "data/text_mining"
    """Folder with a folder for each set, whose files have train, dev and test in their names; docs/text_mining.md."""
    seeds: PositiveInt | None = None
    """Runs of each model on each set; default: as published, ten of BIOSSES, PubMedQA and BioASQ, five of others."""
    learning_rate: checks.PositiveFloat = 1e-4
    """Peak learning rate, which then decays to 0."""
    epochs: checks.PositiveFloat = 10.0
    """Passes over the training split at most; a run ends early as in `finetune`."""
    steps: PositiveInt | None = None
    """Steps of every run instead."""
    batch_size: PositiveInt = 8
    """Rows of 1,024 tokens of a step; texts of an encoder."""
    reading: Reading = "once"
    """Reading of our models' heads, see `finetune`."""


@dataclass(frozen=True)
class EvaluateConfig(MeasuresConfig):
    """An evaluation of several models on text domains and questions, or on a published suite of fine-tuning tasks."""

    basic: ClassVar[str] = (
        "output models.NAME reference domains.NAME.path domains.NAME.split domains.NAME.max_documents "
        "pubmedqa.path bioasq.path multiple_choice.NAME.path suite blurb.data batch_size"
    )

    output: checks.LocalFolder = "evaluation"
    """Folder to write: report.html, report.json, config.yaml, predictions/ and documents/."""
    models: dict[str, str] = field(default_factory=dict)
    """Name of each model, and its folder (native, Hugging Face Mamba, mamba_ssm or a run directory), also
    gs://bucket/folder, or its name on the Hugging Face hub, owner/name. Any other causal or masked language model, and
    hf:FOLDER, is run by transformers (the [hf] extra)."""
    suite: Literal["blurb"] | None = None
    """Fine-tune and measure the models on this suite instead; hf:FOLDER is then an encoder."""
    blurb: BlurbConfig = field(default_factory=BlurbConfig)
    """BLURB."""
    reference: str | None = None
    """Name of the model that the others are compared with; default: the first."""
    protocol: Literal["standard", "paper", "paper_v1"] = "standard"
    """standard: this project's definitions; paper: those of the published BioMamba code, including its weaknesses;
    paper_v1: standard, and perplexity as that code's first version computes it, with padding in the loss."""
    resamples: Annotated[int, Limit("at least 2, below 2^31", lambda x: 2 <= x < 2**31)] = 2000
    """Bootstrap resamples for each interval."""
    confidence: InnerFraction = 0.95
    """Confidence level of the intervals."""

    def __post_init__(self) -> None:
        check(bool(self.models), "models", self.models, "name a model: --models.NAME FOLDER")
        super().__post_init__()
        for name in [*self.models, *self.domains, *self.multiple_choice]:
            check(name not in ("", ".", "..") and "/" not in name, "models and domains", name, "must be a file name")
        taken = {"pubmedqa", "bioasq"} & set(self.multiple_choice)
        check(not taken, "multiple_choice", taken, "names of tasks; give the sets others")
        known = ", ".join(self.models)
        check(self.reference in (None, *self.models), "reference", self.reference, f"must be one of {known}")
        published = self.protocol != "standard" and bool(self.multiple_choice)
        check(not published, "protocol", self.protocol, "has no multiple choice; leave multiple_choice out")
        alone = self.protocol != "paper_v1" or not (self.pubmedqa.path or self.bioasq.path)
        check(alone, "protocol", self.protocol, "is of text domains alone; leave out pubmedqa.path and bioasq.path")
        if self.suite:
            check(not self.measures_anything, "suite", self.suite, "is by itself; leave domains and questions out")
            return
        remedy = "give domains, pubmedqa.path, bioasq.path, multiple_choice or suite; there is nothing to measure"
        check(self.measures_anything, "domains", self.domains, remedy)
