"""Evaluate models side by side: perplexity and bits per byte of text domains, PubMedQA, BioASQ and multiple choice.

python -m biomamba_jax.evaluate --config configs/evaluate.yaml [--models.NAME FOLDER ...] [--output FOLDER]

With --suite blurb the models are fine-tuned on BLURB's sets that are on disk, and measured as BLURB does.

Every figure has its confidence interval. Writes report.html and report.json, each model's loss of every document
(documents/DOMAIN/MODEL.jsonl) and every answer (predictions/TASK/MODEL.jsonl) into the output folder.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from biomamba_jax import processor
from biomamba_jax.command_line import parse, run_command, to_yaml
from biomamba_jax.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate models and write the output folder.

    Returns:
      The path of report.html.

    Raises:
      UserError: a file cannot be read or written; names it.
    """
    from biomamba_jax import files, folders

    output = Path(config.output)
    with files.naming_write_errors(output, "give another --output"):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()  # refuse now, not after hours of evaluation
    with folders.locked(output):
        return _evaluate(config, output)


def _evaluate(config: EvaluateConfig, output: Path) -> Path:
    from biomamba_jax import files

    if config.suite:
        from biomamba_jax.blurb import evaluate_blurb

        return evaluate_blurb(config)
    from biomamba_jax.tasks import evaluation, evaluation_report

    results = evaluation.evaluate(config, output, say=lambda line: print(line, flush=True))
    with files.naming_write_errors(output, "give another --output"):
        # The config too: a run that fails leaves an earlier report with its own config.
        files.write_text(output / "config.yaml", to_yaml(config))
        files.write_text(output / "report.json", evaluation.to_json(results))
        return evaluation_report.write(results, output)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    config = parse(EvaluateConfig, argv, __doc__)
    processor.keep_freed_memory()
    print(f"report: {evaluate(config)}")


if __name__ == "__main__":
    run_command(main)
