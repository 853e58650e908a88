"""python -m biomamba_jax.evaluate --config configs/evaluate.yaml [--models.NAME FOLDER ...] [--output FOLDER]

Measures models side by side: perplexity and bits per byte of text domains, PubMedQA and BioASQ, each figure with its
interval. Writes into the output folder report.html and report.json, what each model made of every document
(documents/DOMAIN/MODEL.jsonl) and every answer (predictions/TASK/MODEL.jsonl).
"""

from collections.abc import Sequence
from pathlib import Path

from biomamba_jax.command_line import parse, run_command, to_yaml
from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluates and writes the output folder.

    Returns:
      The path of report.html.

    Raises:
      UserError: something cannot be read or written; names it.
    """
    from biomamba_jax import page
    from biomamba_jax.tasks import evaluation, evaluation_report

    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        page.replace(output / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    results = evaluation.evaluate(config, output, say=lambda line: print(line, flush=True))
    page.replace(output / "report.json", evaluation.to_json(results))
    return evaluation_report.write(results, output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    config = parse(
        EvaluateConfig,
        argv,
        prog="python -m biomamba_jax.evaluate",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    print(f"report: {evaluate(config)}")


if __name__ == "__main__":
    run_command(main)
