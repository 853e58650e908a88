"""Prompts of questions, for training, evaluation and the published protocol alike; the templates are in `config`."""

from biomamba_jax.config import BioASQConfig, PubMedQAConfig
from biomamba_jax.tasks import bioasq, pubmedqa


def pubmedqa_prompt(config: PubMedQAConfig, question: pubmedqa.Question, context: str | None = None) -> str:
    """Return the prompt of a question.

    Args:
      config: the template.
      question: the question.
      context: text instead of the question's own context.
    """
    return config.prompt.format(question=question.question, context=question.context if context is None else context)


def bioasq_prompt(config: BioASQConfig, question: bioasq.Question, context: str | None = None) -> str:
    """Return the prompt of a question.

    Args:
      config: the templates, one for each kind of question, and the number of snippets.
      question: a yes/no, factoid or list question.
      context: text instead of the question's snippets.
    """
    templates = {"yesno": config.yesno_prompt, "factoid": config.factoid_prompt, "list": config.list_prompt}
    context = question.context(config.max_snippets) if context is None else context
    return templates[question.kind].format(question=question.question, context=context)
