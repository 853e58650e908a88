"""python -m biomamba_jax.evaluate --config configs/evaluate.yaml [--models.NAME FOLDER ...] [--output FOLDER]

Measures models side by side: perplexity and bits per byte of text domains, PubMedQA and BioASQ, each figure with its
interval. Writes into the output folder report.html and report.json, what each model made of every document
(documents/DOMAIN/MODEL.jsonl) and every answer (predictions/TASK/MODEL.jsonl).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    from biomamba_jax import files
    from biomamba_jax.tasks import evaluation, evaluation_report

    output = Path(config.output)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()  # better refused now than when everything is measured
    results = evaluation.evaluate(config, output, say=lambda line: print(line, flush=True))
    with _writing(output):  # the config as well, and only now: a run that fails leaves an earlier report with its own
        files.write_text(output / "config.yaml", to_yaml(config))
        files.write_text(output / "report.json", evaluation.to_json(results))
        return evaluation_report.write(results, output)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None


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
