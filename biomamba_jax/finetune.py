"""Fine-tune a model: questions and answers (PubMedQA, BioASQ task B, JSON lines), or text mining with a head.

python -m biomamba_jax.finetune --config configs/finetune_pubmedqa.yaml --init_from DIR [--lora.rank 8 ...]

Trains the whole model or LoRA adapters, with the loss on the answers only, until the development loss stops improving;
resumes from its run directory's newest checkpoint. Ends with the answers of the best weights: predictions/ and
results.json in the run directory, and a table; for questions next to a baseline that always gives the most frequent
answer. Every command takes the run directory as a model, adapters merged.

--head predicts from hidden states instead: classes, labels or a score of a text, entities, or the answer in a text.
With it --init_from hf:DIR is a third-party encoder, such as BERT or RoBERTa, which transformers trains (the [hf]
extra).
"""

from collections.abc import Sequence
from contextlib import nullcontext

from biomamba_jax import folders, processor
from biomamba_jax.command_line import log_to_stderr, parse, run_command
from biomamba_jax.config import FinetuneConfig

_COLUMNS = {
    "questions": "questions",
    "texts": "texts",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "f1_low": "from",
    "f1_high": "to",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "majority_accuracy": "majority: accuracy",
    "majority_macro_f1": "macro F1",
    "auroc": "AUROC",
    "exact_match": "exact match",
    "strict": "strict",
    "lenient": "lenient",
    "mrr": "MRR",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""Headings of the table; a column without any value is left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    log_to_stderr()
    config = parse(FinetuneConfig, argv, __doc__)
    processor.keep_freed_memory()
    import jax

    from biomamba_jax.parallel.distributed import exit_if_stopped, processes

    with processes(config) as first, folders.locked(config.run_dir) if first else nullcontext():
        # late: refused starts end sooner
        from biomamba_jax.finetuning import RESULTS, cross_validate, read_weights, train_and_answer
        from biomamba_jax.tables import summary_table

        weights = read_weights(config)
        results = cross_validate(config, weights) if config.cross_validate else train_and_answer(config, weights)
        if results is not None and jax.process_count() == 1:
            columns = [key for key in _COLUMNS if any(values.get(key) is not None for values in results.values())]
            rows = [(name, *(_cell(values.get(key)) for key in columns)) for name, values in results.items()]
            summary_table("Of the best weights", ("", *(_COLUMNS[key] for key in columns)), rows)
            print(f"predictions and {RESULTS}: {config.run_dir}")
        elif results is not None and first:
            print(f"for predictions, on one host: python -m biomamba_jax.evaluate --models.tuned {config.run_dir} ...")
    exit_if_stopped(complete=results is not None)


def _cell(value: float | int | None) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None if value is None else f"{100 * value:.1f} %"


if __name__ == "__main__":
    run_command(main)
